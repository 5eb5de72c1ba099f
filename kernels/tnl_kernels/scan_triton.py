"""The scan: one head of decayed linear attention walked chunk by chunk with its state on chip.

With lambda = exp(-slope) and D[r, s] = lambda^(r - s) for s <= r, a chunk of n rows that meets the state S gives

    o = ((q k^T) * D) v + (into * q) S        into_r   = lambda^(r + 1)
    S = lambda^n S + k^T (out_of * v)         out_of_s = lambda^(n - 1 - s)

and in reversed time, with D transposed and ``into`` and ``out_of`` exchanged, the same two lines on other arguments are
the backward pass (see `attention_kernels`). No exponent of lambda is negative: nothing overflows for any slope.

On chip everything stands transposed: the state as [BV, BK] and the outputs as [BV, BT]. The state is then the left
operand of its dot and goes there from its registers; as right operand it would pass through shared memory, and tensor
cores would ask for chunks of 64 rows. With chunks of 32 two programs fit on a multiprocessor without spilling.
"""

import torch
import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
# 2^-150 is zero in fp32, also as a denormal.
ZERO_EXPONENT = tl.constexpr(150.0)
ASSEMBLY = tl.constexpr(torch.version.cuda is not None and not triton.knobs.runtime.interpret)


@triton.jit
def load_tile(p_x, o_row, o_col, stride, num_rows, num_cols, MASK_ROWS: tl.constexpr, MASK_COLS: tl.constexpr):
    """Rows ``o_row`` and columns ``o_col`` of a matrix; zero outside of it."""
    p_tile = p_x + o_row[:, None] * stride + o_col[None, :]
    if MASK_ROWS and MASK_COLS:
        return tl.load(p_tile, mask=(o_row < num_rows)[:, None] & (o_col < num_cols)[None, :], other=0.0)
    if MASK_ROWS:
        return tl.load(p_tile, mask=(o_row < num_rows)[:, None], other=0.0)
    if MASK_COLS:
        return tl.load(p_tile, mask=(o_col < num_cols)[None, :], other=0.0)
    return tl.load(p_tile)


@triton.jit
def store_tile(p_x, b_x, o_row, o_col, stride, num_rows, num_cols, MASK_ROWS: tl.constexpr, MASK_COLS: tl.constexpr):
    """Round ``b_x`` to the dtype of the matrix and write it to the rows and columns that exist."""
    p_tile = p_x + o_row[:, None] * stride + o_col[None, :]
    b_x = b_x.to(p_x.dtype.element_ty)
    if MASK_ROWS and MASK_COLS:
        tl.store(p_tile, b_x, mask=(o_row < num_rows)[:, None] & (o_col < num_cols)[None, :])
    elif MASK_ROWS:
        tl.store(p_tile, b_x, mask=(o_row < num_rows)[:, None])
    elif MASK_COLS:
        tl.store(p_tile, b_x, mask=(o_col < num_cols)[None, :])
    else:
        tl.store(p_tile, b_x)


@triton.jit
def sigmoid(b_x):
    """In fp32. On NVIDIA GPUs two approximate instructions, 2e-7 relative.

    Assembly, and declared impure, because the compiler would otherwise repeat the work in the layout of every dot that
    takes the result: the loop would have three times as many instructions.
    """
    if ASSEMBLY:
        return tl.inline_asm_elementwise(
            """{
            .reg .f32 e;
            mul.f32 e, $1, 0fBFB8AA3B;
            ex2.approx.ftz.f32 e, e;
            add.f32 e, e, 0f3F800000;
            rcp.approx.ftz.f32 $0, e;
            }""",
            "=f,f",
            [b_x],
            dtype=tl.float32,
            is_pure=False,
            pack=1,
        )
    return 1.0 / (1.0 + tl.exp2(b_x * -LOG2_E))


@triton.jit
def activated(b_x, SILU: tl.constexpr):
    """SiLU in fp32, rounded back, or the tile as it is."""
    if SILU:
        b_wide = b_x.to(tl.float32)
        return (b_wide * sigmoid(b_wide)).to(b_x.dtype)
    return b_x


@triton.jit
def through_activation(b_dx, b_x, SILU: tl.constexpr):
    """Gradient before the activation from the gradient after it; ``b_x`` is the tile before the activation."""
    if SILU:
        b_wide = b_x.to(tl.float32)
        b_sigmoid = sigmoid(b_wide)
        return b_dx * (b_sigmoid * (1.0 + b_wide * (1.0 - b_sigmoid)))
    return b_dx


@triton.jit
def powers(rate, exponent):
    """2^(-rate exponent) for integer exponents >= 0, in fp32."""
    return tl.exp2(-rate * exponent)


@triton.jit
def chunk(
    b_s,
    p_q,
    p_k,
    p_v,
    p_x,
    p_o,
    stride_q,
    stride_k,
    stride_v,
    stride_x,
    stride_o,
    n,
    rate,
    i_v,
    K: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    REVERSE: tl.constexpr,
    TAIL: tl.constexpr,
    SILU_Q: tl.constexpr,
    SILU_K: tl.constexpr,
    SILU_V: tl.constexpr,
    SILU_O: tl.constexpr,
    STORE_O: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One chunk of ``n`` rows: writes o [n, BV] unless only the state is wanted; returns the state [BV, BK] past it."""
    o_t = tl.arange(0, BT)
    o_k = tl.arange(0, BK)
    o_v = i_v * BV + tl.arange(0, BV)
    MASK_K: tl.constexpr = BK != K
    MASK_V: tl.constexpr = V % BV != 0
    b_k = activated(load_tile(p_k, o_t, o_k, stride_k, n, K, TAIL, MASK_K), SILU_K)
    b_v = activated(load_tile(p_v, o_t, o_v, stride_v, n, V, TAIL, MASK_V), SILU_V)
    # fp16 has too little range for scores and states: those dots take fp32 operands.
    DOT: tl.constexpr = tl.bfloat16 if b_v.dtype == tl.bfloat16 else tl.float32
    to_end = tl.maximum(n - 1 - o_t, 0)
    if REVERSE:
        b_into = powers(rate, to_end)
        b_out_of = powers(rate, o_t + 1)
    else:
        b_into = powers(rate, o_t + 1)
        b_out_of = powers(rate, to_end)
    if STORE_O:
        b_q = activated(load_tile(p_q, o_t, o_k, stride_q, n, K, TAIL, MASK_K), SILU_Q)
        distance = o_t[:, None] - o_t[None, :] if REVERSE else o_t[None, :] - o_t[:, None]  # [s, r]
        b_a = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)
        b_a = tl.where(distance >= 0, b_a * powers(rate, tl.maximum(distance, 0)), 0.0)
        b_o = tl.dot(b_s.to(DOT), tl.trans(b_q).to(DOT), input_precision=PRECISION) * b_into[None, :]  # [BV, BT]
        b_o = tl.trans(tl.dot(tl.trans(b_v).to(DOT), b_a.to(DOT), acc=b_o, input_precision=PRECISION))
        if SILU_O:
            b_x = load_tile(p_x, o_t, o_v, stride_x, n, V, TAIL, MASK_V)
            b_o = through_activation(b_o, b_x, SILU_O)
        store_tile(p_o, b_o, o_t, o_v, stride_o, n, V, TAIL, MASK_V)
    b_v = (b_v * b_out_of[:, None]).to(DOT)
    return tl.dot(tl.trans(b_v), b_k.to(DOT), acc=b_s * powers(rate, n), input_precision=PRECISION)


@triton.jit
def scan(
    b_s,
    p_q,
    p_k,
    p_v,
    p_x,
    p_o,
    stride_q,
    stride_k,
    stride_v,
    stride_x,
    stride_o,
    length,
    slope,
    i_v,
    K: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    REVERSE: tl.constexpr,
    SILU_Q: tl.constexpr,
    SILU_K: tl.constexpr,
    SILU_V: tl.constexpr,
    SILU_O: tl.constexpr,
    STORE_O: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """All ``length`` rows from the state ``b_s`` [BV, BK] on, in time order or reversed; returns the last state.

    Pointers are at the first row of the head; strides are between rows. The rows past the last whole chunk go by
    themselves, so that the loop needs no masks in time.
    """
    rate = slope * LOG2_E
    num_chunks = length // BT
    tail = length - num_chunks * BT
    first = 0
    if not STORE_O:
        # A state alone is made from zero; what decays to zero before it reaches that state need not be read.
        reach = tl.minimum(1.0 / tl.maximum(rate, 1e-7) * ZERO_EXPONENT, 2e9).to(tl.int32)
        if REVERSE:
            kept = tl.minimum(num_chunks, tl.cdiv(reach, BT))
            tail = tl.where(kept < num_chunks, 0, tail)
            num_chunks = kept
        else:
            first = tl.maximum(length - reach, 0) // BT
            first = tl.minimum(first, num_chunks)
    o_tail = (num_chunks * BT).to(tl.int64)
    if REVERSE:  # noqa: SIM102 - one is known to the compiler, the other not
        if tail > 0:
            b_s = chunk(
                b_s, p_q + o_tail * stride_q, p_k + o_tail * stride_k, p_v + o_tail * stride_v,
                p_x + o_tail * stride_x, p_o + o_tail * stride_o, stride_q, stride_k, stride_v, stride_x, stride_o,
                tail, rate, i_v, K, V, BT, BK, BV, REVERSE, True, SILU_Q, SILU_K, SILU_V, SILU_O, STORE_O, PRECISION,
            )  # fmt: skip
    for i in tl.range(first, num_chunks, num_stages=STAGES, disable_licm=True):
        i_c = num_chunks - 1 - i if REVERSE else i
        o_c = (i_c * BT).to(tl.int64)
        b_s = chunk(
            b_s, p_q + o_c * stride_q, p_k + o_c * stride_k, p_v + o_c * stride_v,
            p_x + o_c * stride_x, p_o + o_c * stride_o, stride_q, stride_k, stride_v, stride_x, stride_o,
            BT, rate, i_v, K, V, BT, BK, BV, REVERSE, False, SILU_Q, SILU_K, SILU_V, SILU_O, STORE_O, PRECISION,
        )  # fmt: skip
    if not REVERSE:  # noqa: SIM102 - one is known to the compiler, the other not
        if tail > 0:
            b_s = chunk(
                b_s, p_q + o_tail * stride_q, p_k + o_tail * stride_k, p_v + o_tail * stride_v,
                p_x + o_tail * stride_x, p_o + o_tail * stride_o, stride_q, stride_k, stride_v, stride_x, stride_o,
                tail, rate, i_v, K, V, BT, BK, BV, REVERSE, True, SILU_Q, SILU_K, SILU_V, SILU_O, STORE_O, PRECISION,
            )  # fmt: skip
    return b_s

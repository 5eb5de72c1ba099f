"""The Triton form of one token of decoding: the state is read once and written once, which is all that it costs.

One program holds a K x BV tile of one head's state. K is never split, so the sum over it stays inside the program:
no atomics, and runs are bitwise equal.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tnl_kernels.operators import in_place_operator

# Elements of the state in a program of 4 warps: 8 loads of 16 bytes in flight per thread, and registers for several
# programs on a multiprocessor, together more than the bytes that its share of the memory bandwidth needs in flight.
TILE_ELEMENTS = 4096
ELEMENTS_PER_WARP = 1024


@triton.jit(do_not_specialize=["num_slots"])
def lightning_attention_step_kernel(
    p_q,
    p_k,
    p_v,
    p_slopes,
    p_state,
    p_slots,
    p_o,
    H,
    num_slots,
    stride_q_b,
    stride_q_h,
    stride_q_k,
    stride_k_b,
    stride_k_h,
    stride_k_k,
    stride_v_b,
    stride_v_h,
    stride_v_v,
    stride_slopes,
    stride_s_slot,
    stride_s_h,
    stride_s_k,
    stride_s_v,
    stride_slots,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    USE_SLOTS: tl.constexpr,
    SILU: tl.constexpr,
):
    """S = exp(-slope) S + k^T v and o = q S for one row, one head and BV columns of the state."""
    i_v = tl.program_id(0) % tl.cdiv(V, BV)
    i_bh = tl.program_id(0) // tl.cdiv(V, BV)
    i_b = (i_bh // H).to(tl.int64)
    i_h = (i_bh % H).to(tl.int64)
    slot = tl.load(p_slots + i_b * stride_slots).to(tl.int64) if USE_SLOTS else i_b

    o_k, o_v = tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    m_k, m_v = o_k < K, o_v < V
    p_s = p_state + slot * stride_s_slot + i_h * stride_s_h
    o_k, o_v = o_k.to(tl.int64), o_v.to(tl.int64)
    p_s = p_s + (o_k * stride_s_k)[:, None] + (o_v * stride_s_v)[None, :]
    m_s = (m_k[:, None] & m_v[None, :]) & ((slot >= 0) & (slot < num_slots))
    b_s = tl.load(p_s, mask=m_s, other=0.0)  # [BK, BV]

    b_q = tl.load(p_q + i_b * stride_q_b + i_h * stride_q_h + o_k * stride_q_k, mask=m_k, other=0.0).to(tl.float32)
    b_k = tl.load(p_k + i_b * stride_k_b + i_h * stride_k_h + o_k * stride_k_k, mask=m_k, other=0.0).to(tl.float32)
    b_v = tl.load(p_v + i_b * stride_v_b + i_h * stride_v_h + o_v * stride_v_v, mask=m_v, other=0.0).to(tl.float32)
    if SILU:
        b_q, b_k = b_q * tl.sigmoid(b_q), b_k * tl.sigmoid(b_k)
    decay = tl.exp(-tl.load(p_slopes + i_h * stride_slopes).to(tl.float32))

    b_s = decay * b_s + b_k[:, None] * b_v[None, :]
    tl.store(p_s, b_s, mask=m_s)
    b_o = tl.sum(b_q[:, None] * b_s, 0)  # [BV]
    # The slots are not checked on the host: one beyond the table writes no state, and its NaN is seen.
    b_o = tl.where(slot < 0, 0.0, tl.where(slot < num_slots, b_o, float("nan")))
    tl.store(p_o + i_bh.to(tl.int64) * V + o_v, b_o.to(p_o.dtype.element_ty), mask=m_v)


def step_tile(K: int, V: int) -> tuple[int, int]:
    """BV, the columns of the state in one program, and its number of warps."""
    BK = triton.next_power_of_2(K)
    # At least 32 bytes of a row, the least that memory moves.
    BV = min(triton.next_power_of_2(V), max(8, TILE_ELEMENTS // BK))
    # Never more warps than a small tile fills: a second warp with the same elements would read them while the first
    # already writes.
    return BV, max(1, min(8, BK * BV // ELEMENTS_PER_WARP))


def launch_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    state: Tensor,
    slots: Tensor | None,
    activation: str | None,
    BV: int,
    num_warps: int,
) -> Tensor:
    """Launch the kernel with the given tiles: o [B, H, V]; arguments as `triton_lightning_attention_step`."""
    B, H, K = k.shape
    V = v.shape[-1]
    o = v.new_empty(B, H, V)
    if o.numel() == 0:
        return o
    with torch.cuda.device_of(v):
        lightning_attention_step_kernel[(B * H * triton.cdiv(V, BV),)](
            q,
            k,
            v,
            slopes,
            state,
            slots,
            o,
            H,
            len(state),
            *q.stride(),
            *k.stride(),
            *v.stride(),
            slopes.stride(0),
            *state.stride(),
            0 if slots is None else slots.stride(0),
            K=K,
            V=V,
            BK=triton.next_power_of_2(K),
            BV=BV,
            USE_SLOTS=slots is not None,
            SILU=activation == "silu",
            num_warps=num_warps,
        )
    return o


@in_place_operator("tnl_kernels::lightning_attention_step", mutates_args={"state"})
def lightning_attention_step_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    state: Tensor,
    slots: Tensor | None,
    activation: str | None,
) -> Tensor:
    """The kernel as an operator of torch."""
    return launch_step(q, k, v, slopes, state, slots, activation, *step_tile(k.shape[-1], v.shape[-1]))


@lightning_attention_step_op.register_fake
def _(q, k, v, slopes, state, slots, activation):
    return v.new_empty(v.shape)


@torch.no_grad()
def triton_lightning_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    state: Tensor,
    *,
    slots: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """The Triton form of `tnl_kernels.lightning_attention_step`: fp32, bf16 or fp16, for any B."""
    return lightning_attention_step_op(q, k, v, slopes, state, slots, activation)

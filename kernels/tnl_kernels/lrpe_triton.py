"""The Triton form of LRPE: one pass forward and one backward, the phases formed on chip.

A phase is a number of turns, and whole turns do not count. So theta / 2 pi is held as a 64-bit fixed-point fraction of
a turn, and its integer product with the position, which wraps at 2^64, is the phase already reduced to one turn: exact
at any position, without fp64 arithmetic per element (slow on consumer cards). Its upper bit names the half turn, the
rest is an angle of at most pi / 2, where short polynomials give sine and cosine to fp32 precision.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from tnl_kernels.operators import operator
from tnl_kernels.rows import column_tile

TURNS_PER_RADIAN = tl.constexpr(1 / (2 * math.pi))
RADIANS_PER_STEP = tl.constexpr(2 * math.pi / 2**64)
HALF_TURN = tl.constexpr(2**63)
QUARTER_TURN = tl.constexpr(2**62)

# 4 warps, and 8 columns a thread in every tile: the layout of 16-byte loads of x is then also the one in which the
# fractions are computed, and nothing is exchanged between threads. The fractions serve all rows of a program.
WIDEST_TILE = 1024
NUM_WARPS = 4
FWD_TILE = 4096
BWD_TILE = 2048
# Tiles that one program of the backward pass walks: their part of theta's gradient is summed on chip.
BWD_STEPS = 16


@triton.jit
def turn_fraction(p_theta, o_d, mask):
    """theta / 2 pi modulo one turn in steps of 2^-64 turns (int64), and radians per step, of each column."""
    b_theta = tl.load(p_theta + o_d, mask=mask, other=0.0).to(tl.float32)
    b_turns = b_theta.to(tl.float64) * tl.full((), TURNS_PER_RADIAN, tl.float64)
    b_turns -= tl.floor(b_turns + 0.5)
    # In [-1/2, 1/2]: scaled to 2^63 it cannot overflow, and doubling the integer wraps.
    b_fraction = (b_turns * 9223372036854775808.0).to(tl.int64) * 2
    # 0 * theta: an infinite theta or one that is not a number has no integer, but must still be seen in the output.
    return b_fraction, RADIANS_PER_STEP + b_theta * 0.0


@triton.jit
def load_positions(p_positions, first, T, BT: tl.constexpr):
    """BT positions from the one at ``first`` on, [BT, 1]: read as a line, of which each thread reads its part."""
    o_t = first + tl.arange(0, BT)
    return tl.load(p_positions + o_t, mask=o_t < T, other=0)[:, None]


@triton.jit
def rotation(b_fraction, b_radians, b_position):
    """cos and sin of theta * position: of the angle to the nearest half turn, negative where that half is odd."""
    b_turn = b_fraction * b_position + QUARTER_TURN
    b_angle = ((b_turn & (HALF_TURN - 1)) - QUARTER_TURN).to(tl.float32) * b_radians
    b_square = b_angle * b_angle
    # Minimax polynomials within pi / 2: sin to 6e-9 of itself, cos to 3e-10, before the rounding of fp32.
    b_sin = (2.6057801422e-6 * b_square - 1.9809602698e-4) * b_square + 8.3330662436e-3
    b_sin = (b_sin * b_square - 1.6666659550e-1) * (b_square * b_angle) + b_angle
    b_cos = (-2.6077101238e-7 * b_square + 2.4761886037e-5) * b_square - 1.3888403505e-3
    b_cos = ((b_cos * b_square + 4.1666640728e-2) * b_square - 4.9999999550e-1) * b_square + 1.0
    is_odd = b_turn < 0
    return tl.where(is_odd, -b_cos, b_cos), tl.where(is_odd, -b_sin, b_sin)


@triton.jit(do_not_specialize=["T", "stride_p_b"])
def lrpe_fwd_kernel(
    p_x,
    p_theta,
    p_positions,
    p_out,
    T,
    stride_x_b,
    stride_x_t,
    stride_p_b,
    D: tl.constexpr,
    K: tl.constexpr,
    BD: tl.constexpr,
    BT: tl.constexpr,
):
    """BT tokens and BD of the D = H * K columns of one sequence."""
    i_d = tl.program_id(0) % tl.cdiv(D, BD)
    i_bt = tl.program_id(0) // tl.cdiv(D, BD)
    # int64: offsets can pass 2^31 elements.
    i_b = (i_bt // tl.cdiv(T, BT)).to(tl.int64)
    first = (i_bt % tl.cdiv(T, BT)).to(tl.int64) * BT
    o_t = first + tl.arange(0, BT)[:, None]
    o_d = i_d * BD + tl.arange(0, BD)[None, :]
    mask = (o_t < T) & (o_d < D)
    b_x = tl.load(p_x + i_b * stride_x_b + o_t * stride_x_t + o_d, mask=mask, other=0.0).to(tl.float32)
    b_position = load_positions(p_positions + i_b * stride_p_b, first, T, BT)
    b_fraction, b_radians = turn_fraction(p_theta, o_d, o_d < D)
    b_cos, b_sin = rotation(b_fraction, b_radians, b_position)
    # [H, 2K]: each head's K cosines stand before its K sines.
    p_cos = p_out + (i_b * T + o_t) * (2 * D) + o_d // K * K + o_d
    tl.store(p_cos, (b_x * b_cos).to(p_out.dtype.element_ty), mask=mask)
    tl.store(p_cos + K, (b_x * b_sin).to(p_out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["T", "stride_p_b"])
def lrpe_bwd_kernel(
    p_dout,
    p_x,
    p_theta,
    p_positions,
    p_dx,
    p_dtheta,
    T,
    stride_do_b,
    stride_do_t,
    stride_x_b,
    stride_x_t,
    stride_p_b,
    D: tl.constexpr,
    K: tl.constexpr,
    BD: tl.constexpr,
    BT: tl.constexpr,
    STEPS: tl.constexpr,
    STORE_DTHETA: tl.constexpr,
):
    """dx of STEPS * BT tokens and BD columns, and those tokens' part of dtheta, [programs over B and T, D]."""
    i_d = tl.program_id(0) % tl.cdiv(D, BD)
    i_bt = tl.program_id(0) // tl.cdiv(D, BD)
    i_b = (i_bt // tl.cdiv(T, STEPS * BT)).to(tl.int64)
    first = (i_bt % tl.cdiv(T, STEPS * BT)).to(tl.int64) * (STEPS * BT)
    o_d = i_d * BD + tl.arange(0, BD)[None, :]
    b_fraction, b_radians = turn_fraction(p_theta, o_d, o_d < D)
    b_dtheta = tl.zeros([BT, BD], dtype=tl.float32)
    for i in range(STEPS):
        o_t = first + i * BT + tl.arange(0, BT)[:, None]
        mask = (o_t < T) & (o_d < D)
        p_dcos = p_dout + i_b * stride_do_b + o_t * stride_do_t + o_d // K * K + o_d
        b_dcos = tl.load(p_dcos, mask=mask, other=0.0).to(tl.float32)
        b_dsin = tl.load(p_dcos + K, mask=mask, other=0.0).to(tl.float32)
        b_position = load_positions(p_positions + i_b * stride_p_b, first + i * BT, T, BT)
        b_cos, b_sin = rotation(b_fraction, b_radians, b_position)
        b_dx = b_dcos * b_cos + b_dsin * b_sin
        tl.store(p_dx + (i_b * T + o_t) * D + o_d, b_dx.to(p_dx.dtype.element_ty), mask=mask)
        if STORE_DTHETA:
            b_x = tl.load(p_x + i_b * stride_x_b + o_t * stride_x_t + o_d, mask=mask, other=0.0).to(tl.float32)
            b_dtheta += (b_dsin * b_cos - b_dcos * b_sin) * b_x * b_position.to(tl.float32)
    if STORE_DTHETA:
        b_sum = tl.sum(b_dtheta, axis=0, keep_dims=True)
        tl.store(p_dtheta + i_bt.to(tl.int64) * D + o_d, b_sum, mask=o_d < D)


def heads_flat(x: Tensor) -> Tensor:
    """x [B, T, H, K] as [B, T, H * K] with elements side by side: a view where strides allow, else a copy."""
    x = x.flatten(2)
    return x if x.stride(-1) == 1 else x.contiguous()


def position_rows(positions: Tensor, B: int, T: int) -> Tensor:
    """positions as [B, T] with elements side by side; rows that are equal stay one row in memory."""
    return positions.contiguous().expand(B, T)


@operator("tnl_kernels::lrpe_fwd")
def lrpe_fwd(x: Tensor, theta: Tensor, positions: Tensor) -> Tensor:
    """[B, T, H, 2K] in the dtype of x."""
    B, T, H, K = x.shape
    D = H * K
    out = x.new_empty(B, T, H, 2 * K)
    if out.numel() == 0:
        return out
    x, positions = heads_flat(x), position_rows(positions, B, T)
    BD = column_tile(D, WIDEST_TILE)
    BT = FWD_TILE // BD
    # Triton launches on the current device, which need not be that of the tensors.
    with torch.cuda.device_of(x):
        lrpe_fwd_kernel[(triton.cdiv(D, BD) * triton.cdiv(T, BT) * B,)](
            x,
            theta.contiguous(),
            positions,
            out,
            T,
            *x.stride()[:2],
            positions.stride(0),
            D=D,
            K=K,
            BD=BD,
            BT=BT,
            num_warps=NUM_WARPS,
        )
    return out


@lrpe_fwd.register_fake
def _(x, theta, positions):
    return x.new_empty(*x.shape[:-1], 2 * x.shape[-1])


@operator("tnl_kernels::lrpe_bwd")
def lrpe_bwd(dout: Tensor, x: Tensor, theta: Tensor, positions: Tensor, needs_dtheta: bool) -> tuple[Tensor, Tensor]:
    """dx [B, T, H, K] and dtheta [H, 1, K], which is [0] where it is not needed."""
    B, T, H, K = x.shape
    D = H * K
    dx = x.new_empty(x.shape)
    if dx.numel() == 0:
        return dx, theta.new_zeros(theta.shape if needs_dtheta else 0)
    x, dout, positions = heads_flat(x), heads_flat(dout), position_rows(positions, B, T)
    BD = column_tile(D, WIDEST_TILE)
    BT = BWD_TILE // BD
    num_parts = triton.cdiv(T, BWD_STEPS * BT) * B
    parts = x.new_empty(num_parts if needs_dtheta else 0, D, dtype=torch.float32)
    with torch.cuda.device_of(x):
        lrpe_bwd_kernel[(triton.cdiv(D, BD) * num_parts,)](
            dout,
            x,
            theta.contiguous(),
            positions,
            dx,
            parts,
            T,
            *dout.stride()[:2],
            *x.stride()[:2],
            positions.stride(0),
            D=D,
            K=K,
            BD=BD,
            BT=BT,
            STEPS=BWD_STEPS,
            STORE_DTHETA=needs_dtheta,
            num_warps=NUM_WARPS,
        )
    # A second pass over one row for each program, instead of atomics: runs are bitwise equal.
    return dx, parts.sum(0).to(theta.dtype).view(H, 1, K) if needs_dtheta else theta.new_empty(0)


@lrpe_bwd.register_fake
def _(dout, x, theta, positions, needs_dtheta):
    return x.new_empty(x.shape), theta.new_empty(theta.shape if needs_dtheta else 0)


def _keep_inputs(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _lrpe_backward(ctx, dout):
    needs_dtheta = ctx.needs_input_grad[1]
    dx, dtheta = torch.ops.tnl_kernels.lrpe_bwd(dout, *ctx.saved_tensors, needs_dtheta)
    return dx, dtheta if needs_dtheta else None, None


lrpe_fwd.register_autograd(_lrpe_backward, setup_context=_keep_inputs)


def triton_lrpe(x: Tensor, theta: Tensor, positions: Tensor) -> Tensor:
    """The Triton form of `tnl_kernels.lrpe`."""
    return torch.ops.tnl_kernels.lrpe_fwd(x, theta, positions)

"""The Triton form of the gate: one pass forward, one pass for both gradients."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tnl_kernels.operators import operator
from tnl_kernels.rows import as_rows, column_tile

# 4 warps: 16 elements a thread, two loads of 16 bytes of each 2-byte input.
TILE_ELEMENTS = 2048
NUM_WARPS = 4


@triton.jit
def tile_of(num_rows, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr):
    """Rows [ROWS, 1], columns [1, BLOCK_D] and the mask [ROWS, BLOCK_D] of this program."""
    i_row = tl.program_id(0) // tl.cdiv(D, BLOCK_D)
    i_d = tl.program_id(0) % tl.cdiv(D, BLOCK_D)
    # int64: rows times their distance can pass 2^31 elements.
    o_row = i_row.to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    o_d = i_d * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    return o_row, o_d, (o_row < num_rows) & (o_d < D)


@triton.jit(do_not_specialize=["num_rows"])
def sglu_fwd_kernel(
    p_a, p_b, p_y, num_rows, stride_a, stride_b, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr
):
    """a * b of ROWS rows and BLOCK_D columns."""
    o_row, o_d, mask = tile_of(num_rows, D, BLOCK_D, ROWS)
    b_a = tl.load(p_a + o_row * stride_a + o_d, mask=mask).to(tl.float32)
    b_b = tl.load(p_b + o_row * stride_b + o_d, mask=mask).to(tl.float32)
    tl.store(p_y + o_row * D + o_d, (b_a * b_b).to(p_y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def sglu_bwd_kernel(
    p_dy,
    p_a,
    p_b,
    p_da,
    p_db,
    num_rows,
    stride_dy,
    stride_a,
    stride_b,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
):
    """dy * b and dy * a of ROWS rows and BLOCK_D columns."""
    o_row, o_d, mask = tile_of(num_rows, D, BLOCK_D, ROWS)
    b_dy = tl.load(p_dy + o_row * stride_dy + o_d, mask=mask).to(tl.float32)
    b_a = tl.load(p_a + o_row * stride_a + o_d, mask=mask).to(tl.float32)
    b_b = tl.load(p_b + o_row * stride_b + o_d, mask=mask).to(tl.float32)
    tl.store(p_da + o_row * D + o_d, (b_dy * b_b).to(p_da.dtype.element_ty), mask=mask)
    tl.store(p_db + o_row * D + o_d, (b_dy * b_a).to(p_db.dtype.element_ty), mask=mask)


def launch_tiles(kernel, inputs: list[Tensor], outputs: list[Tensor]) -> None:
    """``kernel`` on [..., D] tensors of one shape: inputs of any strides, contiguous outputs."""
    like = outputs[0]
    if like.numel() == 0:
        return
    D = like.shape[-1]
    num_rows = like.numel() // D
    rows = [as_rows(x) for x in inputs]
    BLOCK_D = column_tile(D)
    ROWS = TILE_ELEMENTS // BLOCK_D
    grid = (triton.cdiv(num_rows, ROWS) * triton.cdiv(D, BLOCK_D),)
    # Triton launches on the current device, which need not be that of the tensors.
    with torch.cuda.device_of(like):
        kernel[grid](
            *rows,
            *outputs,
            num_rows,
            *(x.stride(0) for x in rows),
            D=D,
            BLOCK_D=BLOCK_D,
            ROWS=ROWS,
            num_warps=NUM_WARPS,
        )


@operator("tnl_kernels::sglu_fwd")
def sglu_fwd(a: Tensor, b: Tensor) -> Tensor:
    """a * b, [..., D] in the dtype of a."""
    y = a.new_empty(a.shape)
    launch_tiles(sglu_fwd_kernel, [a, b], [y])
    return y


@sglu_fwd.register_fake
def _(a, b):
    return a.new_empty(a.shape)


@operator("tnl_kernels::sglu_bwd")
def sglu_bwd(dy: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """da = dy b and db = dy a, [..., D]."""
    da, db = a.new_empty(a.shape), b.new_empty(b.shape)
    launch_tiles(sglu_bwd_kernel, [dy, a, b], [da, db])
    return da, db


@sglu_bwd.register_fake
def _(dy, a, b):
    return a.new_empty(a.shape), b.new_empty(b.shape)


def _keep_both(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _sglu_backward(ctx, dy):
    return torch.ops.tnl_kernels.sglu_bwd(dy, *ctx.saved_tensors)


sglu_fwd.register_autograd(_sglu_backward, setup_context=_keep_both)


def triton_sglu(a: Tensor, b: Tensor) -> Tensor:
    """The Triton form of `tnl_kernels.sglu`."""
    return torch.ops.tnl_kernels.sglu_fwd(a, b)

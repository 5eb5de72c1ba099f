"""The Triton passes of the gated SRMSNorm over rows that several devices hold parts of."""

from types import SimpleNamespace

import torch
import triton
import triton.language as tl
from torch import Tensor

from tnl_kernels.norm_triton import tile_of_rows
from tnl_kernels.rows import as_rows, row_tile


@triton.jit(do_not_specialize=["num_rows"])
def squares_kernel(p_o, p_squares, num_rows, stride_o, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr):
    """Sums of o^2 of ROWS rows."""
    o_row, o_d, mask = tile_of_rows(num_rows, D, BLOCK_D, ROWS)
    b_o = tl.load(p_o + o_row * stride_o + o_d, mask=mask, other=0.0).to(tl.float32)
    tl.store(p_squares + o_row, tl.sum(b_o * b_o, axis=1, keep_dims=True), mask=o_row < num_rows)


@triton.jit(do_not_specialize=["num_rows"])
def output_kernel(
    p_o,
    p_u,
    p_squares,
    p_y,
    num_rows,
    stride_o,
    stride_u,
    width,
    eps,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
):
    """y of ROWS rows."""
    o_row, o_d, mask = tile_of_rows(num_rows, D, BLOCK_D, ROWS)
    b_o = tl.load(p_o + o_row * stride_o + o_d, mask=mask, other=0.0).to(tl.float32)
    b_u = tl.load(p_u + o_row * stride_u + o_d, mask=mask, other=0.0).to(tl.float32)
    b_squares = tl.load(p_squares + o_row, mask=o_row < num_rows, other=0.0)
    b_y = b_o * tl.rsqrt(b_squares / width + eps) * b_u
    tl.store(p_y + o_row * D + o_d, b_y.to(p_y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def projection_kernel(
    p_dy,
    p_o,
    p_u,
    p_projection,
    num_rows,
    stride_dy,
    stride_o,
    stride_u,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Sums of o u dy of ROWS rows."""
    o_row, o_d, mask = tile_of_rows(num_rows, D, BLOCK_D, ROWS)
    b_dy = tl.load(p_dy + o_row * stride_dy + o_d, mask=mask, other=0.0).to(tl.float32)
    b_o = tl.load(p_o + o_row * stride_o + o_d, mask=mask, other=0.0).to(tl.float32)
    b_u = tl.load(p_u + o_row * stride_u + o_d, mask=mask, other=0.0).to(tl.float32)
    tl.store(p_projection + o_row, tl.sum(b_o * b_u * b_dy, axis=1, keep_dims=True), mask=o_row < num_rows)


@triton.jit(do_not_specialize=["num_rows"])
def gradients_kernel(
    p_dy,
    p_o,
    p_u,
    p_squares,
    p_projection,
    p_do,
    p_du,
    num_rows,
    stride_dy,
    stride_o,
    stride_u,
    width,
    eps,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
):
    """do and du of ROWS rows."""
    o_row, o_d, mask = tile_of_rows(num_rows, D, BLOCK_D, ROWS)
    b_dy = tl.load(p_dy + o_row * stride_dy + o_d, mask=mask, other=0.0).to(tl.float32)
    b_o = tl.load(p_o + o_row * stride_o + o_d, mask=mask, other=0.0).to(tl.float32)
    b_u = tl.load(p_u + o_row * stride_u + o_d, mask=mask, other=0.0).to(tl.float32)
    b_squares = tl.load(p_squares + o_row, mask=o_row < num_rows, other=0.0)
    b_projection = tl.load(p_projection + o_row, mask=o_row < num_rows, other=0.0)
    b_rstd = tl.rsqrt(b_squares / width + eps)
    b_do = (b_dy * b_u - b_o * (b_projection / width * b_rstd * b_rstd)) * b_rstd
    tl.store(p_do + o_row * D + o_d, b_do.to(p_do.dtype.element_ty), mask=mask)
    b_du = b_dy * b_o * b_rstd
    tl.store(p_du + o_row * D + o_d, b_du.to(p_du.dtype.element_ty), mask=mask)


def launch_parts(kernel, inputs: list[Tensor], sums: list[Tensor], outputs: list[Tensor], *options) -> None:
    """``kernel`` on inputs [..., D] of one shape and any strides, contiguous sums [...] and outputs [..., D]."""
    like = inputs[0]
    if like.numel() == 0:
        return
    D = like.shape[-1]
    num_rows = like.numel() // D
    rows = [as_rows(x) for x in inputs]
    tile = row_tile(D)
    # Triton launches on the current device, which need not be that of the tensors.
    with torch.cuda.device_of(like):
        kernel[(triton.cdiv(num_rows, tile["ROWS"]),)](
            *rows, *sums, *outputs, num_rows, *(x.stride(0) for x in rows), *options, D=D, **tile
        )


def triton_squares(o: Tensor) -> Tensor:
    """See `tnl_kernels.split_norm.torch_squares`."""
    squares = o.new_empty(o.shape[:-1], dtype=torch.float32)
    launch_parts(squares_kernel, [o], [squares], [])
    return squares


def triton_output(o: Tensor, u: Tensor, squares: Tensor, width: int, eps: float) -> Tensor:
    """See `tnl_kernels.split_norm.torch_output`."""
    y = o.new_empty(o.shape)
    launch_parts(output_kernel, [o, u], [squares], [y], width, eps)
    return y


def triton_projection(dy: Tensor, o: Tensor, u: Tensor) -> Tensor:
    """See `tnl_kernels.split_norm.torch_projection`."""
    projection = o.new_empty(o.shape[:-1], dtype=torch.float32)
    launch_parts(projection_kernel, [dy, o, u], [projection], [])
    return projection


def triton_gradients(
    dy: Tensor, o: Tensor, u: Tensor, squares: Tensor, projection: Tensor, width: int, eps: float
) -> tuple[Tensor, Tensor]:
    """See `tnl_kernels.split_norm.torch_gradients`."""
    do, du = o.new_empty(o.shape), u.new_empty(u.shape)
    launch_parts(gradients_kernel, [dy, o, u], [squares, projection], [do, du], width, eps)
    return do, du


TRITON_PASSES = SimpleNamespace(
    squares=triton_squares, output=triton_output, projection=triton_projection, gradients=triton_gradients
)

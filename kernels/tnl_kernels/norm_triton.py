"""The Triton forms of the norms: each pass reads its inputs once and writes its outputs once.

A program holds whole rows, so the mean square needs no second pass; the backward pass computes it again from the saved
input, which it must read anyway, instead of reading it from memory.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from tnl_kernels.operators import operator
from tnl_kernels.rows import as_rows, row_tile


@triton.jit
def tile_of_rows(num_rows, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr):
    """Rows [ROWS, 1], columns [1, BLOCK_D] and the mask [ROWS, BLOCK_D] of this program."""
    # int64: rows times their distance can pass 2^31 elements.
    o_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    o_d = tl.arange(0, BLOCK_D)[None, :]
    return o_row, o_d, (o_row < num_rows) & (o_d < D)


@triton.jit
def inverse_rms(b_x, eps, D: tl.constexpr):
    """1 / sqrt(mean(x^2) + eps) of each row, [ROWS, 1]."""
    return tl.rsqrt(tl.sum(b_x * b_x, axis=1, keep_dims=True) / D + eps)


@triton.jit
def through_norm(b_dy, b_x, eps, D: tl.constexpr):
    """dx = rstd (dy - x rstd^2 mean(x dy)) for y = x rstd, and rstd."""
    b_rstd = inverse_rms(b_x, eps, D)
    b_projection = tl.sum(b_x * b_dy, axis=1, keep_dims=True) / D * b_rstd * b_rstd
    return (b_dy - b_x * b_projection) * b_rstd, b_rstd


@triton.jit(do_not_specialize=["num_rows"])
def srmsnorm_fwd_kernel(p_x, p_y, num_rows, stride_x, eps, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr):
    """y of ROWS rows."""
    o_row, o_d, mask = tile_of_rows(num_rows, D, BLOCK_D, ROWS)
    b_x = tl.load(p_x + o_row * stride_x + o_d, mask=mask, other=0.0).to(tl.float32)
    b_y = b_x * inverse_rms(b_x, eps, D)
    tl.store(p_y + o_row * D + o_d, b_y.to(p_y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def add_srmsnorm_fwd_kernel(
    p_x,
    p_residual,
    p_y,
    p_sum,
    num_rows,
    stride_x,
    stride_residual,
    eps,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
):
    """residual + x and y of ROWS rows."""
    o_row, o_d, mask = tile_of_rows(num_rows, D, BLOCK_D, ROWS)
    dtype = p_sum.dtype.element_ty
    b_x = tl.load(p_x + o_row * stride_x + o_d, mask=mask, other=0.0).to(dtype).to(tl.float32)
    b_residual = tl.load(p_residual + o_row * stride_residual + o_d, mask=mask, other=0.0).to(tl.float32)
    b_sum = (b_residual + b_x).to(dtype)
    tl.store(p_sum + o_row * D + o_d, b_sum, mask=mask)
    # Of the sum as rounded: the backward pass, which has only that, then differentiates what was computed.
    b_sum = b_sum.to(tl.float32)
    b_y = b_sum * inverse_rms(b_sum, eps, D)
    tl.store(p_y + o_row * D + o_d, b_y.to(p_y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def srmsnorm_bwd_kernel(
    p_dy,
    p_x,
    p_dsum,
    p_dx,
    num_rows,
    stride_dy,
    stride_x,
    stride_dsum,
    eps,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    USE_DSUM: tl.constexpr,
):
    """dx, plus the gradient that reaches x beside the norm (that of the residual stream) with USE_DSUM."""
    o_row, o_d, mask = tile_of_rows(num_rows, D, BLOCK_D, ROWS)
    b_dy = tl.load(p_dy + o_row * stride_dy + o_d, mask=mask, other=0.0).to(tl.float32)
    b_x = tl.load(p_x + o_row * stride_x + o_d, mask=mask, other=0.0).to(tl.float32)
    if USE_DSUM:
        b_dsum = tl.load(p_dsum + o_row * stride_dsum + o_d, mask=mask, other=0.0).to(tl.float32)
    b_dx, _ = through_norm(b_dy, b_x, eps, D)
    if USE_DSUM:
        b_dx += b_dsum
    tl.store(p_dx + o_row * D + o_d, b_dx.to(p_dx.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def gated_srmsnorm_fwd_kernel(
    p_o, p_u, p_y, num_rows, stride_o, stride_u, eps, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr
):
    """y of ROWS rows."""
    o_row, o_d, mask = tile_of_rows(num_rows, D, BLOCK_D, ROWS)
    b_o = tl.load(p_o + o_row * stride_o + o_d, mask=mask, other=0.0).to(tl.float32)
    b_u = tl.load(p_u + o_row * stride_u + o_d, mask=mask, other=0.0).to(tl.float32)
    b_y = b_o * inverse_rms(b_o, eps, D) * b_u
    tl.store(p_y + o_row * D + o_d, b_y.to(p_y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def gated_srmsnorm_bwd_kernel(
    p_dy,
    p_o,
    p_u,
    p_do,
    p_du,
    num_rows,
    stride_dy,
    stride_o,
    stride_u,
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
    b_do, b_rstd = through_norm(b_dy * b_u, b_o, eps, D)
    tl.store(p_do + o_row * D + o_d, b_do.to(p_do.dtype.element_ty), mask=mask)
    b_du = b_dy * b_o * b_rstd
    tl.store(p_du + o_row * D + o_d, b_du.to(p_du.dtype.element_ty), mask=mask)


def launch_rows(kernel, inputs: list[Tensor], outputs: list[Tensor], eps: float, **flags: bool) -> None:
    """``kernel`` on [..., D] tensors of one shape: inputs of any strides (or None), contiguous outputs."""
    like = outputs[0]
    if like.numel() == 0:
        return
    D = like.shape[-1]
    num_rows = like.numel() // D
    rows = [None if x is None else as_rows(x) for x in inputs]
    strides = [D if x is None else x.stride(0) for x in rows]
    tile = row_tile(D)
    # Triton launches on the current device, which need not be that of the tensors.
    with torch.cuda.device_of(like):
        kernel[(triton.cdiv(num_rows, tile["ROWS"]),)](*rows, *outputs, num_rows, *strides, eps, D=D, **tile, **flags)


@operator("tnl_kernels::srmsnorm_fwd")
def srmsnorm_fwd(x: Tensor, eps: float) -> Tensor:
    """y [..., D] in the dtype of x."""
    y = x.new_empty(x.shape)
    launch_rows(srmsnorm_fwd_kernel, [x], [y], eps)
    return y


@srmsnorm_fwd.register_fake
def _(x, eps):
    return x.new_empty(x.shape)


@operator("tnl_kernels::srmsnorm_bwd")
def srmsnorm_bwd(dy: Tensor, x: Tensor, dsum: Tensor | None, eps: float) -> Tensor:
    """dx [..., D] in the dtype of x; ``dsum`` [..., D] is added to it before it is rounded."""
    dx = x.new_empty(x.shape)
    launch_rows(srmsnorm_bwd_kernel, [dy, x, dsum], [dx], eps, USE_DSUM=dsum is not None)
    return dx


@srmsnorm_bwd.register_fake
def _(dy, x, dsum, eps):
    return x.new_empty(x.shape)


def _keep_input(ctx, inputs, output):
    ctx.save_for_backward(inputs[0])
    ctx.eps = inputs[1]


def _srmsnorm_backward(ctx, dy):
    (x,) = ctx.saved_tensors
    return torch.ops.tnl_kernels.srmsnorm_bwd(dy, x, None, ctx.eps), None


srmsnorm_fwd.register_autograd(_srmsnorm_backward, setup_context=_keep_input)


class ForkSimpleRMSNorm(torch.autograd.Function):
    """An op cannot return its input, so x is handed on here, around the op."""

    @staticmethod
    def forward(ctx, x, eps):
        ctx.save_for_backward(x)
        ctx.eps = eps
        ctx.set_materialize_grads(False)
        return torch.ops.tnl_kernels.srmsnorm_fwd(x, eps), x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dx):
        if dy is None:
            return dx, None
        return torch.ops.tnl_kernels.srmsnorm_bwd(dy, ctx.saved_tensors[0], dx, ctx.eps), None


@operator("tnl_kernels::add_srmsnorm_fwd")
def add_srmsnorm_fwd(x: Tensor, residual: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """y [..., D] in the dtype of x, and residual + x [..., D] in the dtype of residual."""
    y, total = x.new_empty(x.shape), residual.new_empty(residual.shape)
    launch_rows(add_srmsnorm_fwd_kernel, [x, residual], [y, total], eps)
    return y, total


@add_srmsnorm_fwd.register_fake
def _(x, residual, eps):
    return x.new_empty(x.shape), residual.new_empty(residual.shape)


def _keep_sum(ctx, inputs, output):
    x, _, ctx.eps = inputs
    ctx.x_dtype = x.dtype
    ctx.save_for_backward(output[1])
    # Of two outputs one may be unused: its gradient stays None instead of zeros that are written, read and added.
    ctx.set_materialize_grads(False)


def _add_srmsnorm_backward(ctx, dy, dsum):
    if dy is not None:
        (total,) = ctx.saved_tensors
        dsum = torch.ops.tnl_kernels.srmsnorm_bwd(dy, total, dsum, ctx.eps)
    # One tensor is the gradient of both: a sum hands its gradient on to each.
    return None if dsum is None else dsum.to(ctx.x_dtype), dsum, None


add_srmsnorm_fwd.register_autograd(_add_srmsnorm_backward, setup_context=_keep_sum)


@operator("tnl_kernels::gated_srmsnorm_fwd")
def gated_srmsnorm_fwd(o: Tensor, u: Tensor, eps: float) -> Tensor:
    """y [..., D] in the dtype of o."""
    y = o.new_empty(o.shape)
    launch_rows(gated_srmsnorm_fwd_kernel, [o, u], [y], eps)
    return y


@gated_srmsnorm_fwd.register_fake
def _(o, u, eps):
    return o.new_empty(o.shape)


@operator("tnl_kernels::gated_srmsnorm_bwd")
def gated_srmsnorm_bwd(dy: Tensor, o: Tensor, u: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """do and du, [..., D] in the dtypes of o and u."""
    do, du = o.new_empty(o.shape), u.new_empty(u.shape)
    launch_rows(gated_srmsnorm_bwd_kernel, [dy, o, u], [do, du], eps)
    return do, du


@gated_srmsnorm_bwd.register_fake
def _(dy, o, u, eps):
    return o.new_empty(o.shape), u.new_empty(u.shape)


def _keep_both(ctx, inputs, output):
    o, u, ctx.eps = inputs
    ctx.save_for_backward(o, u)


def _gated_srmsnorm_backward(ctx, dy):
    return *torch.ops.tnl_kernels.gated_srmsnorm_bwd(dy, *ctx.saved_tensors, ctx.eps), None


gated_srmsnorm_fwd.register_autograd(_gated_srmsnorm_backward, setup_context=_keep_both)


def triton_srmsnorm(x: Tensor, *, eps: float = 1e-6) -> Tensor:
    """The Triton form of `tnl_kernels.srmsnorm`."""
    return torch.ops.tnl_kernels.srmsnorm_fwd(x, eps)


def triton_fork_srmsnorm(x: Tensor, *, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """The Triton form of `tnl_kernels.fork_srmsnorm`."""
    return ForkSimpleRMSNorm.apply(x, eps)


def triton_add_srmsnorm(x: Tensor, residual: Tensor, *, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """The Triton form of `tnl_kernels.add_srmsnorm`."""
    return torch.ops.tnl_kernels.add_srmsnorm_fwd(x, residual, eps)


def triton_gated_srmsnorm(o: Tensor, u: Tensor, *, eps: float = 1e-6) -> Tensor:
    """The Triton form of `tnl_kernels.gated_srmsnorm`."""
    return torch.ops.tnl_kernels.gated_srmsnorm_fwd(o, u, eps)

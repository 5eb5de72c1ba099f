"""The gated SRMSNorm of rows whose parts lie on several devices: one scalar of each row is summed over them.

What a part needs from the others is in the forward pass the sum of squares, in the backward pass the projection of the
output's gradient. How they are summed is the caller's business, so nothing here knows about processes.
"""

from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tnl_kernels.checks import check_devices, check_dtype, check_shape
from tnl_kernels.dispatch import HAS_TRITON, dispatch
from tnl_kernels.dtypes import FLOATS, compute_dtype

if HAS_TRITON:
    from tnl_kernels.split_norm_triton import TRITON_PASSES
else:
    TRITON_PASSES = None


def torch_squares(o: Tensor) -> Tensor:
    """Sum of o^2 over a part of each row: [..., D] -> [...], fp32 (fp64 for fp64)."""
    wide = o.to(compute_dtype(o.dtype))
    return torch.linalg.vecdot(wide, wide)


def torch_output(o: Tensor, u: Tensor, squares: Tensor, width: int, eps: float) -> Tensor:
    """u o / sqrt(squares / width + eps), with the squares of whole rows."""
    rstd = squares.div(width).add_(eps).rsqrt_()[..., None]
    return (o.to(rstd.dtype) * rstd).mul_(u).to(o.dtype)


def torch_projection(dy: Tensor, o: Tensor, u: Tensor) -> Tensor:
    """Sum of o u dy over a part of each row: [..., D] -> [...], fp32 (fp64 for fp64)."""
    dtype = compute_dtype(o.dtype)
    return torch.linalg.vecdot(o.to(dtype), u.to(dtype) * dy)


def torch_gradients(
    dy: Tensor, o: Tensor, u: Tensor, squares: Tensor, projection: Tensor, width: int, eps: float
) -> tuple[Tensor, Tensor]:
    """do = rstd (u dy - o rstd^2 projection / width) and du = o rstd dy, with the sums of whole rows."""
    rstd = squares.div(width).add_(eps).rsqrt_()[..., None]
    wide, dy = o.to(rstd.dtype), dy.to(rstd.dtype)
    through = (projection / width)[..., None] * rstd.square()
    do = torch.addcmul(dy * u, wide, through, value=-1).mul_(rstd)
    return do.to(o.dtype), (wide * rstd).mul_(dy).to(u.dtype)


TORCH_PASSES = SimpleNamespace(
    squares=torch_squares, output=torch_output, projection=torch_projection, gradients=torch_gradients
)


class SplitGatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, o, u, width, total, eps, passes):
        squares = passes.squares(o)
        total(squares)
        ctx.save_for_backward(o, u, squares)
        ctx.width, ctx.total, ctx.eps, ctx.passes = width, total, eps, passes
        return passes.output(o, u, squares, width, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        o, u, squares = ctx.saved_tensors
        projection = ctx.passes.projection(dy, o, u)
        ctx.total(projection)
        do, du = ctx.passes.gradients(dy, o, u, squares, projection, ctx.width, ctx.eps)
        return do, du, None, None, None, None


def split_gated_srmsnorm(
    o: Tensor, u: Tensor, *, width: int, total: Callable[[Tensor], object], eps: float = 1e-6
) -> Tensor:
    """A part of ``gated_srmsnorm`` over rows of ``width`` elements, of which ``o`` and ``u`` hold D.

    Args:
        o, u: [..., D], equal shapes and dtypes; any strides.
        width: elements of a whole row, on all devices together.
        total: called with the fp32 (fp64 for fp64) sums [...] of this part, once in the forward and once in the
            backward pass; replaces them by the sums over all parts, in place.
        eps: added to the mean square.

    Returns:
        [..., D] in the dtype of o, computed in fp32 (fp64 for fp64) and rounded once.

    Raises:
        ValueError: shapes or dtypes differ.

    Source: TransNormerLLM (arXiv 2307.14995), model parallelism of gated linear attention.
    """
    check_dtype("o", o, FLOATS)
    check_dtype("u", u, (o.dtype,))
    check_devices(o.device, u=u)
    check_shape("u", u, tuple(o.shape), "the shape of o")
    passes = dispatch(o, torch=TORCH_PASSES, triton=TRITON_PASSES)
    return SplitGatedNorm.apply(o, u, width, total, eps, passes)

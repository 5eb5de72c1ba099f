"""SRMSNorm, x / sqrt(mean(x^2) + eps) without a weight, alone, after a residual sum, and under a gate."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tnl_kernels.checks import check_devices, check_dtype, check_shape
from tnl_kernels.dispatch import HAS_TRITON, dispatch
from tnl_kernels.dtypes import FLOATS, compute_dtype

if HAS_TRITON:
    from tnl_kernels.norm_triton import (
        triton_add_srmsnorm,
        triton_fork_srmsnorm,
        triton_gated_srmsnorm,
        triton_srmsnorm,
    )
else:
    triton_add_srmsnorm = triton_fork_srmsnorm = triton_gated_srmsnorm = triton_srmsnorm = None


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x^2) + eps) over the last dimension of ``x``, kept with size 1; without x^2 in memory."""
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def normalize_backward(x: Tensor, rstd: Tensor, dy: Tensor) -> Tensor:
    """dx = rstd (dy - x rstd^2 mean(x dy)) for y = x rstd."""
    projection = torch.linalg.vecdot(x, dy)[..., None].mul_(rstd.square()).div_(x.shape[-1])
    return torch.addcmul(dy, x, projection, value=-1).mul_(rstd)


class SimpleRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, eps):
        wide = x.to(compute_dtype(x.dtype))
        rstd = inverse_rms(wide, eps)
        ctx.save_for_backward(x, rstd)
        return (wide * rstd).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, rstd = ctx.saved_tensors
        return normalize_backward(x.to(rstd.dtype), rstd, dy.to(rstd.dtype)).to(x.dtype), None


class GatedSimpleRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, o, u, eps):
        wide = o.to(compute_dtype(o.dtype))
        rstd = inverse_rms(wide, eps)
        ctx.save_for_backward(o, u, rstd)
        return (wide * rstd).mul_(u).to(o.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        o, u, rstd = ctx.saved_tensors
        wide, dy = o.to(rstd.dtype), dy.to(rstd.dtype)
        du = (wide * rstd).mul_(dy).to(u.dtype)
        return normalize_backward(wide, rstd, dy * u).to(o.dtype), du, None


def torch_srmsnorm(x: Tensor, *, eps: float = 1e-6) -> Tensor:
    """The torch form of `tnl_kernels.srmsnorm`."""
    return SimpleRMSNorm.apply(x, eps)


def torch_fork_srmsnorm(x: Tensor, *, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """The torch form of `tnl_kernels.fork_srmsnorm`."""
    return torch_srmsnorm(x, eps=eps), x


def torch_add_srmsnorm(x: Tensor, residual: Tensor, *, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """The torch form of `tnl_kernels.add_srmsnorm`."""
    residual = residual + x.to(residual.dtype)
    return SimpleRMSNorm.apply(residual, eps).to(x.dtype), residual


def torch_gated_srmsnorm(o: Tensor, u: Tensor, *, eps: float = 1e-6) -> Tensor:
    """The torch form of `tnl_kernels.gated_srmsnorm`."""
    return GatedSimpleRMSNorm.apply(o, u, eps)


def srmsnorm(x: Tensor, *, eps: float = 1e-6) -> Tensor:
    """y = x / sqrt(mean(x^2) + eps) over the last dimension, no weight.

    Args:
        x: [..., D], fp32, bf16, fp16 or fp64.
        eps: added to the mean square.

    Returns:
        [..., D] in the dtype of x, computed in fp32 (fp64 for fp64) and rounded once.

    Raises:
        ValueError: x is not of one of these dtypes.

    Source: TransNormerLLM (arXiv 2307.14995), SimpleRMSNorm.
    """
    check_dtype("x", x, FLOATS)
    # Inductor fuses the torch form with its neighbours; kernels/benchmarks/elementwise.py measures both.
    on_cuda = torch_srmsnorm if torch.compiler.is_compiling() else triton_srmsnorm
    return dispatch(x, torch=torch_srmsnorm, triton=on_cuda)(x, eps=eps)


def fork_srmsnorm(x: Tensor, *, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """y = srmsnorm(x), and x for the residual connection around what y goes into.

    The gradients of both meet in one pass, where autograd would make that of the norm and then add the other.

    Args:
        x: [..., D], fp32, bf16, fp16 or fp64.
        eps: added to the mean square.

    Returns:
        y [..., D] as `srmsnorm`, and x itself, which must not be written to.

    Raises:
        ValueError: x is not of one of these dtypes.

    Source: TransNormerLLM (arXiv 2307.14995): the pre-norm block.
    """
    check_dtype("x", x, FLOATS)
    on_cuda = torch_fork_srmsnorm if torch.compiler.is_compiling() else triton_fork_srmsnorm
    return dispatch(x, torch=torch_fork_srmsnorm, triton=on_cuda)(x, eps=eps)


def add_srmsnorm(x: Tensor, residual: Tensor, *, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """residual' = residual + x; y = srmsnorm(residual').

    Args:
        x: [..., D], what a block adds.
        residual: [..., D], the stream; its dtype may be wider than that of x.
        eps: added to the mean square.

    Returns:
        y [..., D] in the dtype of x, and residual' [..., D] in the dtype of residual; y is computed from residual' as
        rounded.

    Raises:
        ValueError: shapes differ, or a dtype is not a float.

    Source: TransNormerLLM (arXiv 2307.14995): the pre-norm block.
    """
    check_dtype("x", x, FLOATS)
    check_dtype("residual", residual, FLOATS)
    check_devices(x.device, residual=residual)
    check_shape("residual", residual, tuple(x.shape), "the shape of x")
    on_cuda = torch_add_srmsnorm if torch.compiler.is_compiling() else triton_add_srmsnorm
    return dispatch(x, residual, torch=torch_add_srmsnorm, triton=on_cuda)(x, residual, eps=eps)


def gated_srmsnorm(o: Tensor, u: Tensor, *, eps: float = 1e-6) -> Tensor:
    """y = u * srmsnorm(o), the norm over the full last dimension (all heads).

    Args:
        o, u: [..., D], equal shapes and dtypes; any strides.
        eps: added to the mean square.

    Returns:
        [..., D] in the dtype of o, computed in fp32 (fp64 for fp64) and rounded once.

    Raises:
        ValueError: shapes or dtypes differ.

    Source: TransNormerLLM (arXiv 2307.14995), gated linear attention.
    """
    check_dtype("o", o, FLOATS)
    check_dtype("u", u, (o.dtype,))
    check_devices(o.device, u=u)
    check_shape("u", u, tuple(o.shape), "the shape of o")
    on_cuda = torch_gated_srmsnorm if torch.compiler.is_compiling() else triton_gated_srmsnorm
    return dispatch(o, torch=torch_gated_srmsnorm, triton=on_cuda)(o, u, eps=eps)

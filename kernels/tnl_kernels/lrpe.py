"""LRPE: linearized relative positional encoding, which doubles the head dim."""

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tnl_kernels.checks import check_devices, check_dtype, check_num_dims, check_shape
from tnl_kernels.dispatch import HAS_TRITON, dispatch
from tnl_kernels.dtypes import FLOATS, compute_dtype

if HAS_TRITON:
    from tnl_kernels.lrpe_triton import triton_lrpe
else:
    triton_lrpe = None


def rotation(theta: Tensor, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of theta * p, [T, H, K] or [B, T, H, K] in ``dtype``.

    The phase is formed and reduced to one turn in fp64: in fp32 it is off by 3e-2 at position 10^6.
    """
    turns = positions[..., None, None].double() * (theta[:, 0].to(dtype).double() / (2 * math.pi))
    phase = turns.sub_(turns.round()).mul_(2 * math.pi).to(dtype)
    return phase.cos(), phase.sin_()


class LRPE(torch.autograd.Function):
    """Keeps x, theta and positions only; the phases are formed again in the backward pass."""

    @staticmethod
    def forward(ctx, x, theta, positions):
        dtype = compute_dtype(x.dtype)
        K = x.shape[-1]
        cos, sin = rotation(theta, positions, dtype)
        out = x.new_empty(*x.shape[:-1], 2 * K)  # [B, T, H, 2K]
        out[..., :K] = x * cos
        out[..., K:] = x * sin
        ctx.save_for_backward(x, theta, positions)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        x, theta, positions = ctx.saved_tensors
        dtype = compute_dtype(x.dtype)
        cos, sin = rotation(theta, positions, dtype)
        dcos, dsin = dout.to(dtype).chunk(2, dim=-1)  # [B, T, H, K]
        dtheta = None
        if ctx.needs_input_grad[1]:
            dphase = (dsin * cos).sub_(dcos * sin).mul_(x).mul_(positions[..., None, None].to(dtype))
            dtheta = dphase.sum((0, 1))[:, None].to(theta.dtype)  # [H, 1, K]
        dx = (dcos * cos).add_(dsin * sin).to(x.dtype)
        return dx, dtheta, None


def torch_lrpe(x: Tensor, theta: Tensor, positions: Tensor) -> Tensor:
    """The torch form of `tnl_kernels.lrpe`."""
    return LRPE.apply(x, theta, positions)


def lrpe(x: Tensor, theta: Tensor, positions: Tensor) -> Tensor:
    """y = [x cos(theta p), x sin(theta p)]: the product of two encoded vectors depends on the difference of positions.

    Args:
        x: [B, T, H, K], fp32, bf16, fp16 or fp64.
        theta: [H, 1, K], any float dtype; cast to fp32 (fp64 with fp64 x) before the phase.
        positions: [T] or [B, T] int64; the phase is reduced to one turn before it is rounded to fp32.

    Returns:
        [B, T, H, 2K] in the dtype of x, with gradients to x and theta.

    Raises:
        ValueError: a shape or dtype does not fit.

    Source: TransNormerLLM (arXiv 2307.14995), positional encoding LRPE-d.
    """
    check_num_dims("x", x, "[B, T, H, K]")
    check_dtype("x", x, FLOATS)
    B, T, H, K = x.shape
    check_shape("theta", theta, (H, 1, K), "[H, 1, K]")
    check_dtype("theta", theta, FLOATS)
    check_devices(x.device, theta=theta, positions=positions)
    check_dtype("positions", positions, (torch.int64,))
    if tuple(positions.shape) not in ((T,), (B, T)):
        raise ValueError(f"positions: got shape {tuple(positions.shape)}, expected [T] = ({T},) or [B, T] = ({B}, {T})")
    # Also under torch.compile, where the torch form takes twice the time (kernels/benchmarks/elementwise.py).
    return dispatch(x, torch=torch_lrpe, triton=triton_lrpe)(x, theta, positions)

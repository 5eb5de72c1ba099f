"""LRPE with a learnable angle for each channel: what tells layer 0 where its tokens stand."""

import torch
from tnl_kernels import lrpe
from torch import nn

PHASE_DTYPES = ("float32", "activation")


def lrpe_in_activation_dtype(x: torch.Tensor, theta: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """LRPE whose positions, angles and phases are rounded to the dtype of ``x``, as the released code computes it.

    In bf16, positions above 256 collide and phases are wrong by radians; weights that were trained so may need it so.

    Args:
        x: [B, T, H, K].
        theta: [H, 1, K].
        positions: int64 [T] or [B, T].

    Returns:
        [B, T, H, 2K] in the dtype of ``x``.
    """
    phase = positions.to(x.dtype)[..., None, None] * theta[:, 0].to(x.dtype)  # [T, H, K] or [B, T, H, K]
    return torch.cat([x * phase.cos(), x * phase.sin()], -1)


class Lrpe(nn.Module):
    """Learnable rotary encoding: ``[x cos(theta p), x sin(theta p)]``, twice the width (arXiv 2307.14995, LRPE).

    ``phase_dtype``: ``float32`` gives phases that are exact at any position; ``activation`` those of the released code.
    """

    def __init__(self, num_heads: int, head_dim: int, phase_dtype: str):
        super().__init__()
        self.phase_dtype = phase_dtype
        self.theta = nn.Parameter(torch.empty(num_heads, 1, head_dim))

    def forward(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """x [B, T, H, K], positions int64 [T] or [B, T] -> [B, T, H, 2K]."""
        rotate = lrpe if self.phase_dtype == "float32" else lrpe_in_activation_dtype
        return rotate(x, self.theta, positions)

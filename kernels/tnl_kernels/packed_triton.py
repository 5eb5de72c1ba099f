"""Attention on the packed projection by the Triton kernels: q, k, v, u read in place, one packed gradient back."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tnl_kernels.attention_launch import backward, forward, zeros
from tnl_kernels.attention_triton import new_state, or_none
from tnl_kernels.operators import operator


def parts(qkvu: Tensor, num_heads: int) -> tuple[Tensor, ...]:
    """q, k, v, u [B, T, H, K] as views into [B, T, 4 * H * K]."""
    return qkvu.unflatten(-1, (4, num_heads, -1)).unbind(2)


@operator("tnl_kernels::lightning_attention_packed_fwd")
def packed_fwd(
    qkvu: Tensor,
    slopes: Tensor,
    num_heads: int,
    silu: bool,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    output_final_state: bool,
) -> tuple[Tensor, Tensor]:
    """o [B, T, H, K] and the final state [N, H, K, K], or [0]."""
    q, k, v, _ = parts(qkvu, num_heads)
    o = q.new_empty(q.shape)
    final = new_state(k, v.shape[-1], cu_seqlens, output_final_state)
    forward(q, k, v, o, slopes, initial_state, or_none(final), cu_seqlens, silu)
    return o, final


@packed_fwd.register_fake
def _(qkvu, slopes, num_heads, silu, initial_state, cu_seqlens, output_final_state):
    q, k, _, _ = parts(qkvu, num_heads)
    return q.new_empty(q.shape), new_state(k, k.shape[-1], cu_seqlens, output_final_state)


@operator("tnl_kernels::lightning_attention_packed_bwd")
def packed_bwd(
    qkvu: Tensor,
    do: Tensor | None,
    du: Tensor | None,
    slopes: Tensor,
    num_heads: int,
    silu: bool,
    initial_state: Tensor | None,
    dfinal: Tensor | None,
    cu_seqlens: Tensor | None,
    need_dinitial: bool,
) -> tuple[Tensor, Tensor]:
    """The packed gradient [B, T, 4 * H * K], and the gradient of the initial state or [0]."""
    q, k, v, _ = parts(qkvu, num_heads)
    dqkvu = qkvu.new_empty(qkvu.shape)
    dq, dk, dv, dlast = parts(dqkvu, num_heads)
    if du is None:
        dlast.zero_()
    else:
        dlast.copy_(du.unflatten(-1, (num_heads, -1)))
    dinitial = new_state(k, v.shape[-1], cu_seqlens, need_dinitial)
    do = zeros(v) if do is None else do
    backward(
        q, k, v, do, dq, dk, dv, slopes, initial_state, dfinal, or_none(dinitial), cu_seqlens, silu
    )  # fmt: skip
    return dqkvu, dinitial


@packed_bwd.register_fake
def _(qkvu, do, du, slopes, num_heads, silu, initial_state, dfinal, cu_seqlens, need_dinitial):
    _, k, _, _ = parts(qkvu, num_heads)
    return qkvu.new_empty(qkvu.shape), new_state(k, k.shape[-1], cu_seqlens, need_dinitial)


class PackedLightningAttention(torch.autograd.Function):
    """An op cannot return a view of its input, so ``u`` is made here, around the op.

    Its gradient then enters the packed one; autograd's own would add two packed tensors.
    """

    @staticmethod
    def forward(ctx, qkvu, slopes, num_heads, silu, initial_state, output_final_state, cu_seqlens):
        o, final = torch.ops.tnl_kernels.lightning_attention_packed_fwd(
            qkvu, slopes, num_heads, silu, initial_state, cu_seqlens, output_final_state
        )
        ctx.save_for_backward(qkvu, slopes, initial_state, cu_seqlens)
        ctx.num_heads, ctx.silu = num_heads, silu
        ctx.set_materialize_grads(False)
        return o, parts(qkvu, num_heads)[3].flatten(2), or_none(final)

    @staticmethod
    @once_differentiable
    def backward(ctx, do, du, dfinal):
        qkvu, slopes, initial_state, cu_seqlens = ctx.saved_tensors
        need_dinitial = ctx.needs_input_grad[4]
        dqkvu, dinitial = torch.ops.tnl_kernels.lightning_attention_packed_bwd(
            qkvu, do, du, slopes, ctx.num_heads, ctx.silu, initial_state, dfinal, cu_seqlens, need_dinitial
        )
        return dqkvu, None, None, None, dinitial if need_dinitial else None, None, None


def triton_lightning_attention_packed(
    qkvu: Tensor,
    slopes: Tensor,
    *,
    num_heads: int,
    activation: str | None = "silu",
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The Triton form of `tnl_kernels.lightning_attention_packed`."""
    return PackedLightningAttention.apply(
        qkvu, slopes, num_heads, activation == "silu", initial_state, output_final_state, cu_seqlens
    )

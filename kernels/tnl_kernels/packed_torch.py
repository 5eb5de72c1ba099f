"""Attention on the packed projection with torch's matmuls: q, k, v, u in one tensor, one packed gradient back."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from tnl_kernels.attention_torch import attend, attend_backward, head_of
from tnl_kernels.chunks import cut, decays, document_offsets
from tnl_kernels.dtypes import compute_dtype


class PackedLightningAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkvu, slopes, num_heads, activation, initial_state, output_final_state, cu_seqlens):
        q, k, v, u = qkvu.unflatten(-1, (4, num_heads, -1)).unbind(2)  # [B, T, H, K]
        B, T, H, K = q.shape
        dtype = compute_dtype(q.dtype)
        offsets = document_offsets(B, T, cu_seqlens)
        chunks = cut(offsets, q.device)
        o = q.new_empty(B, T, H, K)
        final_state = q.new_empty(len(offsets) - 1, H, K, K, dtype=dtype) if output_final_state else None
        for i_h, decay in enumerate(decays(slopes, chunks, dtype)):
            b_q, b_k, b_v = (chunks.gather(x[:, :, i_h], dtype) for x in (q, k, v))
            if activation == "silu":
                F.silu(b_q, inplace=True)
                F.silu(b_k, inplace=True)
            b_o = attend(b_q, b_k, b_v, head_of(initial_state, i_h), decay, chunks, head_of(final_state, i_h))
            chunks.scatter(b_o, o[:, :, i_h])
        ctx.save_for_backward(qkvu, slopes, initial_state)
        ctx.num_heads, ctx.activation, ctx.offsets = num_heads, activation, offsets
        ctx.set_materialize_grads(False)
        return o, u.flatten(2), final_state

    @staticmethod
    @once_differentiable
    def backward(ctx, do, du, dfinal):
        qkvu, slopes, initial_state = ctx.saved_tensors
        q, k, v, _ = qkvu.unflatten(-1, (4, ctx.num_heads, -1)).unbind(2)  # [B, T, H, K]
        dtype = compute_dtype(q.dtype)
        chunks = cut(ctx.offsets, q.device)
        do = q.new_zeros(q.shape) if do is None else do
        dqkvu = torch.empty_like(qkvu, memory_format=torch.contiguous_format)
        dinitial = torch.empty_like(initial_state) if ctx.needs_input_grad[4] else None
        packed = dqkvu.unflatten(-1, (4, ctx.num_heads, -1))  # [B, T, 4, H, K]
        packed[:, :, 3] = 0 if du is None else du.view_as(q)
        for i_h, decay in enumerate(decays(slopes, chunks, dtype)):
            blocks = [chunks.gather(x[:, :, i_h], dtype) for x in (q, k, v, do)]
            if ctx.activation == "silu":
                before_activation = blocks[:2]
                blocks[:2] = [F.silu(x) for x in before_activation]
            states = (head_of(dfinal, i_h), head_of(initial_state, i_h))
            gradients = list(attend_backward(*blocks, *states, decay, chunks, head_of(dinitial, i_h)))
            if ctx.activation == "silu":
                gradients[:2] = map(torch.ops.aten.silu_backward, gradients[:2], before_activation)
            for i_part, gradient in enumerate(gradients):
                chunks.scatter(gradient, packed[:, :, i_part, i_h])
        return dqkvu, None, None, None, dinitial, None, None


def torch_lightning_attention_packed(
    qkvu: Tensor,
    slopes: Tensor,
    *,
    num_heads: int,
    activation: str | None = "silu",
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The chunk form of `tnl_kernels.lightning_attention_packed`."""
    return PackedLightningAttention.apply(
        qkvu, slopes, num_heads, activation, initial_state, output_final_state, cu_seqlens
    )

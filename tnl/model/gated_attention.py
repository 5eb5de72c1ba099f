"""What both token mixers of TNL are made of: lightning attention from a state, and the gated norm behind it."""

from abc import abstractmethod
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tnl_kernels import gated_srmsnorm, lightning_attention, lightning_attention_step, split_gated_srmsnorm
from tnl_kernels.dtypes import compute_dtype
from torch import nn

from tnl.model.configuration import TransnormerConfig
from tnl.model.decay import decay_slopes
from tnl.model.lrpe import Lrpe
from tnl.model.sequence_parallel import StateExchange
from tnl.model.tensor_parallel import project_back


def gated_norm(
    o: torch.Tensor, gate: torch.Tensor, norm_type: str, group: dist.ProcessGroup | None = None
) -> torch.Tensor:
    """``gate * norm(o)`` over the full width (all heads), without a weight, rounded once.

    Args:
        o, gate: [B, T, H * V] of one dtype.
        norm_type: ``simplermsnorm`` (eps 1e-6) or ``layernorm`` (eps 1e-5, torch's default).
        group: the ranks that hold the other heads, as many each; simplermsnorm only.
    """
    if group is not None:
        width = o.shape[-1] * group.size()
        return split_gated_srmsnorm(o, gate, width=width, total=partial(dist.all_reduce, group=group))
    if norm_type == "simplermsnorm":
        return gated_srmsnorm(o, gate)
    normed = F.layer_norm(o.to(compute_dtype(o.dtype)), o.shape[-1:])
    return (normed * gate).to(o.dtype)


class GatedAttention(nn.Module):
    """The base of a token mixer: its heads, their decay, and attention. A subclass sets ``out_proj`` and ``lrpe``,
    a module or None."""

    def __init__(self, config: TransnormerConfig, layer: int):
        super().__init__()
        self.num_heads, self.head_dim = config.decoder_attention_heads, config.head_dim
        self.activation = None if config.linear_act_fun == "none" else "silu"
        self.norm_type = config.mixer_norm_type
        self.slopes = decay_slopes(config.decay, self.num_heads, layer, config.decoder_layers)
        self.tensor_group: dist.ProcessGroup | None = None  # ranks that hold the other heads, see tensor_parallel

    def new_lrpe(self, config: TransnormerConfig, layer: int) -> Lrpe | None:
        """The encoding of q and k in this layer, None where it has none."""
        return Lrpe(self.num_heads, self.head_dim, config.lrpe_phase_dtype) if config.uses_lrpe(layer) else None

    def forward(
        self,
        x: torch.Tensor,
        slopes: torch.Tensor,
        positions: torch.Tensor | None,
        cu_seqlens: torch.Tensor | None,
        initial_state: torch.Tensor | None,
        output_final_state: bool,
        is_step: bool,
        exchange: StateExchange | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """x [B, T, D], slopes fp32 [H] -> (out [B, T, D], final state fp32 [N, H, K, V] or None).

        ``is_step``: one token of each sequence, T = 1, which updates ``initial_state`` in place.
        """
        sequence = dict(initial_state=initial_state, output_final_state=output_final_state, cu_seqlens=cu_seqlens)
        o, gate, state = self.mix(x, slopes, positions, is_step, sequence, exchange)
        normed = gated_norm(o.flatten(2), gate, self.norm_type, self.tensor_group)
        return project_back(normed, self.tensor_group, self.out_proj), state

    @abstractmethod
    def mix(
        self,
        x: torch.Tensor,
        slopes: torch.Tensor,
        positions: torch.Tensor | None,
        is_step: bool,
        sequence: dict,
        exchange: StateExchange | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """x [B, T, D] -> (o [B, T, H, V], gate [B, T, H * V], final state); ``sequence`` is for the attention op."""

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        slopes: torch.Tensor,
        positions: torch.Tensor | None,
        is_step: bool,
        sequence: dict,
        exchange: StateExchange | None,
        *,
        activation: str | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """q, k, v [B, T, H, K] -> (o [B, T, H, K], final state fp32 [N, H, K, V] or None).

        ``activation`` of q and k is applied first, then LRPE.
        """
        if activation is not None and (self.lrpe is not None or not is_step):
            q, k, activation = F.silu(q), F.silu(k), None
        if self.lrpe is not None:
            q, k = self.lrpe(q, positions), self.lrpe(k, positions)  # [B, T, H, 2K]
        if is_step:
            state = sequence["initial_state"]
            o = lightning_attention_step(q[:, 0], k[:, 0], v[:, 0], slopes, state, activation=activation)
            return o.unsqueeze(1), state
        attend = partial(lightning_attention, q, k, v, slopes)
        if exchange is not None:
            return exchange.attention(attend, q, k, v, slopes, activation=None)
        return attend(**sequence)

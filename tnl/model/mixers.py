"""The two halves of a TNL block: gated lightning attention over time, and the gated linear unit over channels."""

import torch
import torch.nn.functional as F
from tnl_kernels import (
    gated_srmsnorm,
    lightning_attention,
    lightning_attention_packed,
    lightning_attention_step,
    lrpe,
    sglu,
)
from torch import nn

from tnl.model.configuration import TransnormerConfig
from tnl.model.decay import decay_slopes, slopes_tensor


class Lrpe(nn.Module):
    """Learnable rotary encoding: ``[x cos(theta p), x sin(theta p)]``, twice the width (arXiv 2307.14995, LRPE)."""

    def __init__(self, num_heads: int, head_dim: int):
        super().__init__()
        self.theta = nn.Parameter(torch.empty(num_heads, 1, head_dim))

    def forward(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """x [B, T, H, K], positions int64 [T] or [B, T] -> [B, T, H, 2K]."""
        return lrpe(x, self.theta, positions)


class TokenMixer(nn.Module):
    """Gated linear attention: ``W_o(u * srms(lightning_attention(act(q), act(k), v)))``."""

    def __init__(self, config: TransnormerConfig, layer: int):
        super().__init__()
        self.num_heads, self.head_dim = config.decoder_attention_heads, config.head_dim
        self.activation = None if config.linear_act_fun == "none" else "silu"
        self.slopes = decay_slopes(config.decay, self.num_heads, layer, config.decoder_layers)
        self.qkvu_proj = nn.Linear(config.decoder_embed_dim, 4 * config.hidden_dim, bias=False)
        self.out_proj = nn.Linear(config.hidden_dim, config.decoder_embed_dim, bias=False)
        self.lrpe = Lrpe(self.num_heads, self.head_dim) if config.uses_lrpe(layer) else None

    def forward(
        self,
        x: torch.Tensor,
        positions: torch.Tensor | None,
        cu_seqlens: torch.Tensor | None,
        initial_state: torch.Tensor | None,
        output_final_state: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """x [B, T, D] -> (out [B, T, D], final state fp32 [N, H, K, V] or None)."""
        T = x.shape[1]
        qkvu = self.qkvu_proj(x)  # [B, T, 4 * H * K]
        slopes = slopes_tensor(self.slopes, x.device)
        one_step = T == 1 and cu_seqlens is None and initial_state is not None and not torch.is_grad_enabled()
        if self.lrpe is None and not one_step:
            o, u, state = lightning_attention_packed(
                qkvu,
                slopes,
                num_heads=self.num_heads,
                activation=self.activation,
                initial_state=initial_state,
                output_final_state=output_final_state,
                cu_seqlens=cu_seqlens,
            )
        else:
            q, k, v, u = qkvu.chunk(4, dim=-1)
            q, k, v = (t.unflatten(-1, (self.num_heads, self.head_dim)) for t in (q, k, v))  # [B, T, H, K]
            if self.lrpe is not None:
                q, k = (F.silu(q), F.silu(k)) if self.activation else (q, k)
                q, k = self.lrpe(q, positions), self.lrpe(k, positions)  # [B, T, H, 2K]
            if one_step:
                activation = self.activation if self.lrpe is None else None
                o = lightning_attention_step(q[:, 0], k[:, 0], v[:, 0], slopes, initial_state, activation=activation)
                o, state = o.unsqueeze(1), initial_state
            else:
                o, state = lightning_attention(
                    q,
                    k,
                    v,
                    slopes,
                    initial_state=initial_state,
                    output_final_state=output_final_state,
                    cu_seqlens=cu_seqlens,
                )
        return self.out_proj(gated_srmsnorm(o.flatten(2), u)), state


class ChannelMixer(nn.Module):
    """SGLU, the gated linear unit without activation: ``l3(l1(x) * l2(x))``."""

    def __init__(self, config: TransnormerConfig):
        super().__init__()
        self.l1 = nn.Linear(config.decoder_embed_dim, config.glu_dim, bias=False)
        self.l2 = nn.Linear(config.decoder_embed_dim, config.glu_dim, bias=False)
        self.l3 = nn.Linear(config.glu_dim, config.decoder_embed_dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, T, D] -> [B, T, D]."""
        return self.l3(sglu(self.l1(x), self.l2(x)))

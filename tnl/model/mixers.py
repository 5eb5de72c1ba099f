"""The parts of a TNL block: two kinds of gated lightning attention over time, a gated linear unit over channels."""

from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tnl_kernels import lightning_attention_packed, sglu
from torch import nn

from tnl.model.configuration import TransnormerConfig
from tnl.model.gated_attention import GatedAttention
from tnl.model.tensor_parallel import project, project_back


class TokenMixer(GatedAttention):
    """The mixer of TransNormerLLM and TransNormerLLM2: ``W_o(u * norm(lightning_attention(act(q), act(k), v)))``."""

    def __init__(self, config: TransnormerConfig, layer: int):
        super().__init__(config, layer)
        self.qkvu_proj = nn.Linear(config.decoder_embed_dim, 4 * config.hidden_dim, bias=False)
        self.out_proj = nn.Linear(config.hidden_dim, config.decoder_embed_dim, bias=False)
        self.lrpe = self.new_lrpe(config, layer)

    def mix(self, x, slopes, positions, is_step, sequence, exchange):
        """See `GatedAttention.mix`."""
        (qkvu,) = project(x, self.tensor_group, self.qkvu_proj)  # [B, T, 4 * H * K]
        if self.lrpe is None and not is_step:
            attend = partial(
                lightning_attention_packed, qkvu, slopes, num_heads=self.num_heads, activation=self.activation
            )
            if exchange is None:
                return attend(**sequence)
            q, k, v, _ = qkvu.unflatten(-1, (4, self.num_heads, -1)).unbind(2)  # [B, T, H, K]
            return exchange.attention(attend, q, k, v, slopes, self.activation)
        q, k, v, u = qkvu.chunk(4, dim=-1)
        q, k, v = (t.unflatten(-1, (self.num_heads, self.head_dim)) for t in (q, k, v))  # [B, T, H, K]
        o, state = self.attend(q, k, v, slopes, positions, is_step, sequence, exchange, activation=self.activation)
        return o, u, state


class LowRankGateMixer(GatedAttention):
    """The mixer of TransNormerLLM3: ``W_o(norm(lightning_attention(act(q), act(k), act(v))) * sigmoid(G1(G0(x))))``.

    Nothing stands between G0 [gate_dim, D] and G1 [H * K, gate_dim]: the gate's weight is their product.
    """

    def __init__(self, config: TransnormerConfig, layer: int):
        super().__init__(config, layer)
        self.qkv_proj = nn.Linear(config.decoder_embed_dim, 3 * config.hidden_dim, bias=False)
        self.output_gate = nn.Sequential(
            nn.Linear(config.decoder_embed_dim, config.gate_dim, bias=False),
            nn.Linear(config.gate_dim, config.hidden_dim, bias=False),
        )
        self.out_proj = nn.Linear(config.hidden_dim, config.decoder_embed_dim, bias=False)
        self.lrpe = self.new_lrpe(config, layer)

    def mix(self, x, slopes, positions, is_step, sequence, exchange):
        """See `GatedAttention.mix`."""
        narrow, widen = self.output_gate
        qkv, gate = project(x, self.tensor_group, self.qkv_proj, whole=(narrow,))  # [B, T, 3 * H * K], [B, T, gate_dim]
        qkv = F.silu(qkv) if self.activation else qkv
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(2)  # [B, T, H, K]
        o, state = self.attend(q, k, v, slopes, positions, is_step, sequence, exchange)
        return o, torch.sigmoid(widen(gate)), state


def token_mixer(config: TransnormerConfig, layer: int) -> GatedAttention:
    """The token mixer that ``config`` asks for: `LowRankGateMixer` where it gives a ``gate_dim``."""
    return (TokenMixer if config.gate_dim is None else LowRankGateMixer)(config, layer)


class ChannelMixer(nn.Module):
    """SGLU, the gated linear unit without activation: ``l3(l1(x) * l2(x))``."""

    def __init__(self, config: TransnormerConfig):
        super().__init__()
        self.l1 = nn.Linear(config.decoder_embed_dim, config.glu_dim, bias=False)
        self.l2 = nn.Linear(config.decoder_embed_dim, config.glu_dim, bias=False)
        self.l3 = nn.Linear(config.glu_dim, config.decoder_embed_dim, bias=False)
        self.tensor_group: dist.ProcessGroup | None = None  # ranks that hold the other channels, see tensor_parallel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, T, D] -> [B, T, D]."""
        return project_back(sglu(*project(x, self.tensor_group, self.l1, self.l2)), self.tensor_group, self.l3)

"""The LLaMA baseline as the training loop takes it: packed documents, a loss without logits, fp32 rotary phases.

Its weights have the names of transformers' `LlamaForCausalLM`, which loads what this class saves.
"""

from functools import lru_cache

import torch
from tnl_kernels.checks import check_cu_seqlens
from torch import nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.llama.modeling_llama import repeat_kv

from tnl.model.loss import IGNORE_INDEX
from tnl.model.modeling import LanguageModelHead
from tnl.model.output import TransnormerCausalLMOutput

ATTENTION = "packed_sdpa"


def packed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    *,
    scaling: float,
    dropout: float = 0.0,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Causal softmax attention inside each packed document, as an attention function of transformers.

    It is exact: a token reads its own document and nothing else. In bf16 and fp16 on a GPU it is one call of
    FlashAttention for documents of different length; otherwise PyTorch's attention, document by document, which costs
    the same arithmetic. Without ``cu_seq_lens_q`` each row of the batch is one document.

    Args:
        query, key, value: [B, H, T, K]; key and value may have fewer heads, H a multiple of theirs.
        cu_seq_lens_q: int32 [N + 1] with B = 1, offsets of the documents; from 0 to T.
        max_length_q: tokens of the longest of them.

    Returns:
        [B, T, H, K], and None in place of the weights.
    """
    assert attention_mask is None
    assert dropout == 0.0
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(module, query, key, value, None, scaling=scaling, is_causal=True)
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        groups = module.num_key_value_groups
        q, k, v = (x[0].transpose(0, 1) for x in (query, repeat_kv(key, groups), repeat_kv(value, groups)))  # [T, H, K]
        offsets = (cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q)
        # A window of all tokens before and none behind: how torch 2.11 and later say causal. (2.10 said is_causal, and
        # took no scale.)
        return varlen_attn(q, k, v, *offsets, scale=scaling, window_size=(-1, 0)).unsqueeze(0), None
    lengths = cu_seq_lens_q.diff().tolist()
    documents = zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True)
    outputs = [sdpa_attention_forward(module, *qkv, None, scaling=scaling, is_causal=True)[0] for qkv in documents]
    return torch.cat(outputs, dim=1), None


AttentionInterface.register(ATTENTION, packed_attention)


@lru_cache
def _frequencies(theta: float, head_dim: int, device: torch.device) -> torch.Tensor:
    return 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim)


class RotaryPhases(nn.Module):
    """cos and sin of the rotary positions, from fp32 frequencies that no cast, shard or meta device can reach.

    transformers keeps the frequencies in a buffer, which ``model.to(torch.bfloat16)`` and DeepSpeed round: positions
    above 256 would collide.
    """

    def __init__(self, config: LlamaConfig):
        """Raises `ValueError` for scaled rotary positions."""
        super().__init__()
        parameters = config.rope_parameters
        if parameters["rope_type"] != "default":
            raise ValueError(
                f"rope_type: {parameters['rope_type']!r}: the baseline has plain rotary positions; take a LLaMA with "
                "rope_type 'default'"
            )
        self.theta, self.head_dim = parameters["rope_theta"], config.head_dim

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """position_ids int64 [B, T] -> cos, sin [B, T, K] in the dtype of ``x``."""
        phases = position_ids.unsqueeze(-1).float() * _frequencies(self.theta, self.head_dim, x.device)
        phases = torch.cat([phases, phases], dim=-1)
        return phases.cos().to(x.dtype), phases.sin().to(x.dtype)


class LlamaBaseline(LlamaForCausalLM):
    """transformers' LLaMA behind the interface by which `tnl.training` and `tnl.evaluation` call a TNL.

    Blocks, names and initial weights are transformers'. Id 0 is a token like any other, as for a TNL.
    """

    def __init__(self, config: LlamaConfig):
        super(LlamaForCausalLM, self).__init__(config)
        self.config._attn_implementation = ATTENTION
        self.model = LlamaModel(config)
        self.model.rotary_emb = RotaryPhases(config)
        self.model.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)  # without a padding_idx
        self.vocab_size = config.vocab_size
        self.lm_head = LanguageModelHead(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        past_key_values: None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> TransnormerCausalLMOutput:
        """Loss of labelled tokens, or logits; arguments as in `TransnormerForCausalLM.forward`.

        Args:
            input_ids: int64 [B, T].
            labels: int64 [B, T], -100 ignored, shifted inside.
            shift_labels: int64 [B, T], already shifted; instead of ``labels``.
            cu_seqlens: int32 [N + 1] with B = 1: N packed documents, none of which sees another.

        Raises:
            ValueError: both kinds of labels, a state or cache to read or to make, or an unknown argument; a LLaMA
                carries no state, and generates as the class of transformers that its checkpoint names.
        """
        shift_labels = kwargs.pop("shift_labels", None)
        unknown = sorted(name for name, value in kwargs.items() if value is not None)
        if past_key_values is not None or use_cache or unknown:
            given = ", ".join(unknown) or "a state to carry"
            raise ValueError(
                f"LlamaBaseline: got {given}: it takes input_ids, labels or shift_labels, and cu_seqlens; load the "
                "checkpoint as transformers' LlamaForCausalLM for anything else"
            )
        if labels is not None and shift_labels is not None:
            raise ValueError("give labels or shift_labels, not both")
        if labels is not None:
            shift_labels = torch.full_like(labels, IGNORE_INDEX)
            shift_labels[:, :-1] = labels[:, 1:]
        packing = {}
        if cu_seqlens is not None:
            B, T = input_ids.shape
            check_cu_seqlens(cu_seqlens, B, T)
            lengths = cu_seqlens.diff()
            begins = cu_seqlens[:-1].repeat_interleave(lengths, output_size=T)
            packing["position_ids"] = (torch.arange(T, device=input_ids.device) - begins).unsqueeze(0)
            # The one number that the host waits for, once a pass: FlashAttention is launched for the longest document.
            packing |= {"cu_seq_lens_q": cu_seqlens, "max_length_q": int(lengths.max())}
        hidden = self.model(input_ids, use_cache=False, **packing).last_hidden_state
        if shift_labels is None:
            return TransnormerCausalLMOutput(logits=self.lm_head(hidden))
        loss_sum, num_tokens = self.lm_head(hidden, shift_labels)
        return TransnormerCausalLMOutput(
            loss=loss_sum / num_tokens.clamp(min=1), loss_sum=loss_sum, num_tokens=num_tokens
        )

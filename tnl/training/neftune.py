"""NEFTune (arXiv 2310.05914): noise on the embeddings in training."""

import torch
from torch import nn

from tnl.model.loss import IGNORE_INDEX


def add_noise(model: nn.Module, alpha: float) -> None:
    """Add uniform noise of at most ``alpha / sqrt(T D)`` to the embeddings wherever ``model`` trains.

    T is the length of the example that a token belongs to, as if it were alone: neither packed nor padded makes a
    difference. The hook of transformers and trl counts the padding, too, so that their noise depends on what else is in
    a batch.

    Args:
        model: a `TransnormerForCausalLM`, given labels by name when it trains. What follows the last label of a row is
            padding.
    """
    lengths: list[torch.Tensor] = []  # of each token's example, int64 [B, T] or [B, 1]

    def note(module: nn.Module, args: tuple, kwargs: dict) -> None:
        lengths.clear()
        if not module.training:
            return
        labels, cu_seqlens = kwargs["labels"], kwargs.get("cu_seqlens")
        T = labels.shape[1]
        if cu_seqlens is None:
            ends = torch.arange(1, T + 1, device=labels.device) * (labels != IGNORE_INDEX)
            lengths.append(ends.amax(1, keepdim=True).clamp(min=1))
        else:
            packed = cu_seqlens.diff().long()
            lengths.append(packed.repeat_interleave(packed, output_size=T).unsqueeze(0))

    def disturb(module: nn.Module, args: tuple, embeddings: torch.Tensor) -> torch.Tensor:
        if not lengths:
            return embeddings
        noise = torch.empty_like(embeddings, dtype=torch.float32).uniform_(-1, 1)
        scale = alpha / (lengths[0] * embeddings.shape[-1]).sqrt()
        return embeddings + (noise * scale.unsqueeze(-1)).to(embeddings.dtype)

    model.register_forward_pre_hook(note, with_kwargs=True)
    model.model.embed_tokens.register_forward_hook(disturb)

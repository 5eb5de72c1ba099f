"""NEFTune (arXiv 2310.05914): noise on the embeddings in training."""

import torch
from torch import nn


def add_noise(model: nn.Module, alpha: float) -> None:
    """Add uniform noise of at most ``alpha / sqrt(T D)`` to the embeddings wherever ``model`` trains.

    T is the length of the sequence that a token belongs to, as if it were alone: packed or not makes no difference.

    Args:
        model: a `TransnormerForCausalLM`.
    """
    lengths: list[torch.Tensor | None] = [None]

    def note(module: nn.Module, args: tuple, kwargs: dict) -> None:
        cu_seqlens = kwargs.get("cu_seqlens")
        lengths[0] = None if cu_seqlens is None else cu_seqlens.diff()

    def disturb(module: nn.Module, args: tuple, embeddings: torch.Tensor) -> torch.Tensor:
        if not module.training:
            return embeddings
        T, D = embeddings.shape[1:]
        noise = torch.empty_like(embeddings, dtype=torch.float32).uniform_(-1, 1)
        if lengths[0] is None:
            scale = alpha / (T * D) ** 0.5
        else:
            per_token = lengths[0].repeat_interleave(lengths[0].long(), output_size=T)
            scale = (alpha / (per_token * D).sqrt()).unsqueeze(-1)  # [T, 1]
        return embeddings + (noise * scale).to(embeddings.dtype)

    model.model.register_forward_pre_hook(note, with_kwargs=True)
    model.model.embed_tokens.register_forward_hook(disturb)

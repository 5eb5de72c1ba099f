"""What tells one model from another, so that a state is not continued by a model that did not make it."""

import hashlib
import inspect
from collections.abc import Iterable

import torch

from tnl.model.configuration import TransnormerConfig

SAMPLES = 16
# Keys that do not change what the layers compute.
_NOT_ARCHITECTURE = {"use_cache", "init_std", "tie_word_embeddings", "pad_token_id", "bos_token_id", "eos_token_id"}


def architecture(config: TransnormerConfig) -> dict:
    """The keys of ``config`` that decide what the model computes, with their values."""
    keys = inspect.get_annotations(TransnormerConfig).keys() - _NOT_ARCHITECTURE
    return {key: getattr(config, key) for key in sorted(keys)}


def weights_digest(model: torch.nn.Module) -> str:
    """`tensors_digest` of the parameters of a model."""
    return tensors_digest(model.named_parameters())


@torch.no_grad()
def tensors_digest(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """SHA-256 over the names of tensors and `SAMPLES` values of each, rounded to bf16.

    It costs milliseconds for any size, and the fp32 and the bf16 copy of a checkpoint have the same. Quantised
    tensors and those that are not in memory are left out.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors):
        data = tensor.detach()
        if data.is_meta or not data.is_floating_point() or type(data) is not torch.Tensor:
            continue
        values = data.flatten()[:: max(1, data.numel() // SAMPLES)][:SAMPLES].bfloat16().cpu()
        digest.update(name.encode() + values.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()

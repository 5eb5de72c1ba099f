"""What tells one model from another, so that a state is not continued by a model that did not make it."""

import hashlib
import inspect
from collections.abc import Iterable

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from tnl.model.configuration import TransnormerConfig

SAMPLES = 16
_CHECKSUM_WORDS = 2**23
# Of 64 bits, from the golden ratio: spreads neighbouring numbers.
_ODD = -7046029254386353131
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


@torch.no_grad()
def contents_digest(model: torch.nn.Module) -> str:
    """SHA-256 that depends on every value of a model's state dict, its dtypes and its shapes.

    Two checkpoints of one run, which can agree in all that `weights_digest` samples, differ here. It costs one pass
    over the weights, on their own device.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        for part, data in _plain_tensors(tensor.detach()):
            digest.update(f"{name}{part} {data.dtype} {tuple(data.shape)} {_checksum(data)}".encode())
    return digest.hexdigest()


def _plain_tensors(tensor: torch.Tensor, name: str = "") -> Iterable[tuple[str, torch.Tensor]]:
    """The tensors that a quantised one consists of, or itself."""
    if not is_traceable_wrapper_subclass(tensor):
        yield name, tensor
        return
    for inner in tensor.__tensor_flatten__()[0]:
        yield from _plain_tensors(getattr(tensor, inner), f"{name}.{inner}")


def _checksum(data: torch.Tensor) -> int:
    """Sum over the bytes of ``data`` by 8, each word mixed with its place, modulo 2^64: the same on every device."""
    words = data.contiguous().flatten().view(torch.uint8)
    words = torch.nn.functional.pad(words, (0, -len(words) % 8)).view(torch.int64)
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    for start in range(0, len(words), _CHECKSUM_WORDS):
        part = words[start : start + _CHECKSUM_WORDS]
        mixed = (part ^ (torch.arange(start, start + len(part), device=part.device) * _ODD)) * _ODD
        total += (mixed ^ (mixed >> 29)).sum()
    return total.item()

"""Linear layers whose weights are kept in 4 bits and do not train: the base of QLoRA (arXiv 2305.14314), by torchao."""

import importlib.util
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# Weights that share a scale, and scales that share one of theirs, as in the paper.
BLOCK, SCALES = 64, 256


class _FourBitLinear(torch.autograd.Function):
    """x W^T; the weight is made anew for the backward pass and not kept."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.weight = weight
        return F.linear(x, weight.get_original_weight().to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return dy @ ctx.weight.get_original_weight().to(dy.dtype), None


class FourBitLinear(nn.Linear):
    """A linear layer with its weight in NF4. It has no parameter: what broadcasts, casts, partitions or saves
    parameters leaves it alone.

    Args:
        layer: without bias, whose weight is taken.
        device: where it is packed, and stays.
    """

    def __init__(self, layer: nn.Linear, device: torch.device):
        from torchao.quantization import to_nf4

        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.register_parameter("weight", None)
        self.register_parameter("bias", None)
        blocks = layer.weight.numel() // BLOCK
        scales = next(n for n in range(min(SCALES, blocks), 0, -1) if blocks % n == 0)
        self.packed = to_nf4(layer.weight.detach().to(device), BLOCK, scales)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features]."""
        return _FourBitLinear.apply(x, self.packed)

    def _apply(self, fn, recurse=True):
        # Moves with the model, and is not cast.
        device = fn(torch.empty(0, device=self.packed.device)).device
        if device != self.packed.device:
            self.packed = self.packed.to(device)
        return self

    @property
    def num_bytes(self) -> int:
        """Bytes that the weight takes."""
        return sum(getattr(self.packed, name).nbytes for name in self.packed.__tensor_flatten__()[0])


def _named(model: nn.Module, names: Iterable[str]) -> list[tuple[str, nn.Linear]]:
    """The linear layers whose last names are among ``names``."""
    endings = tuple(f".{name}" for name in names)
    return [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and f".{n}".endswith(endings)]


def check_four_bits(model: nn.Module, names: Iterable[str]) -> None:
    """Refuse what `to_four_bits` cannot do; the model may be on the meta device.

    Raises:
        ValueError: torchao is not there, or a layer's weights are no whole number of blocks.
    """
    if importlib.util.find_spec("torchao") is None:
        raise ValueError("4 needs torchao; install it: pip install 'transnormer-llm[quant]', or set 16")
    for name, layer in _named(model, names):
        if layer.weight.numel() % BLOCK:
            raise ValueError(f"{name} has {layer.weight.numel()} weights, no multiple of {BLOCK}; set 16")


def to_four_bits(model: nn.Module, names: Iterable[str], device: torch.device) -> None:
    """Keep in 4 bits, on ``device``, the weights of all linear layers whose last names are among ``names``.

    They are packed one by one, so that the device never holds more than one of them as it was.
    """
    for name, layer in _named(model, names):
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, FourBitLinear(layer, device))

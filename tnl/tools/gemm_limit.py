"""The speed that a model's matrix products alone would allow: its linear layers without anything between them."""

import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from tnl.model.loss import chunk_rows
from tnl.tools.bench_models import seconds, synchronize

# The products run until a GPU has the clock that it can hold, then in rounds of this long.
WARM_UP_S, ROUND_S, ROUNDS = 1.0, 0.6, 5


@dataclass(frozen=True)
class GemmLimit:
    """Times on one device.

    Attributes:
        num_tokens: rows of each product.
        step_s: forward, gradient of the input and gradient of the weight of every linear layer, the head too.
        recompute_s: a second forward pass of all blocks up to the input of their last linear layer, which is all that
            checkpointing makes: nothing in the backward pass needs that layer's output.
    """

    num_tokens: int
    step_s: float
    recompute_s: float

    def tgs(self, recomputed: float = 0.0) -> float:
        """Tokens per second when this part of the blocks, 0 to 1, is computed twice."""
        return self.num_tokens / (self.step_s + recomputed * self.recompute_s)


def last_of_blocks(model: nn.Module) -> Counter:
    """(out, in) of the last linear layer of each block."""
    blocks = [[m for m in block.modules() if isinstance(m, nn.Linear)] for block in model.model.layers]
    return Counter(tuple(layers[-1].weight.shape) for layers in blocks)


def linear_shapes(model: nn.Module) -> tuple[Counter, tuple[int, int]]:
    """(out, in) of the blocks' linear layers with how often they occur, and of the head ``lm_head``; of a model on any
    device."""
    layers = {name: tuple(m.weight.shape) for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    head = layers.pop("lm_head")
    return Counter(layers.values()), head


def gemm_limit(model: nn.Module, num_tokens: int, device: torch.device, dtype: torch.dtype) -> GemmLimit:
    """Measure it, at ``num_tokens`` rows; the head in chunks of as many rows as the loss takes at a time.

    Products are written in ``dtype`` over what was there: nothing is added up, in no precision.

    Args:
        model: on any device, also meta.
    """
    blocks, head = linear_shapes(model)
    rows = min(num_tokens, chunk_rows(num_tokens, head[0], device))
    products = {shape: _products(num_tokens, *shape, device, dtype) for shape in blocks}
    head_products = _products(rows, *head, device, dtype)

    def forward(shapes: Counter) -> None:
        for shape, count in shapes.items():
            for _ in range(count):
                products[shape][0]()

    def whole() -> None:
        forward(blocks)
        for product in head_products * -(-num_tokens // rows):
            product()
        for shape, count in blocks.items():
            for _ in range(count):
                products[shape][1]()
                products[shape][2]()

    again = blocks - last_of_blocks(model)
    return GemmLimit(num_tokens, _median_s(whole, device), _median_s(lambda: forward(again), device))


def _products(n: int, num_out: int, num_in: int, device: torch.device, dtype: torch.dtype) -> list[Callable]:
    """The three products of a linear layer at ``n`` tokens, into memory of their own: y, dx, dw."""
    make = dict(device=device, dtype=dtype)
    # Random, not zeros: a GPU draws less power, and clocks higher, on data without changing bits.
    x, w, dy = torch.randn(n, num_in, **make), torch.randn(num_out, num_in, **make), torch.randn(n, num_out, **make)
    y, dx, dw = torch.empty_like(dy), torch.empty_like(x), torch.empty_like(w)
    return [
        lambda: torch.mm(x, w.t(), out=y),
        lambda: torch.mm(dy, w, out=dx),
        lambda: torch.mm(dy.t(), x, out=dw),
    ]


def _median_s(function: Callable, device: torch.device) -> float:
    """Time of one call, the median of rounds of calls in a row."""
    function()
    synchronize(device)
    once, end = seconds(function, device), time.perf_counter() + (WARM_UP_S if device.type == "cuda" else 0.0)
    while time.perf_counter() < end:
        seconds(function, device)
    count = max(1, round(ROUND_S / once)) if device.type == "cuda" else 1
    return statistics.median(seconds(function, device, count) for _ in range(ROUNDS))

"""How long a first training step of a 1B model waits for its kernels: the cold compile time of each op it uses.

    TRITON_CACHE_DIR=$(mktemp -d) python kernels/benchmarks/compile_time.py [--json PATH]

The time is that of an op's first forward and backward less that of its second; an empty cache folder makes it cold.
attention.py runs it beside its other processes, so that the figure there is an upper bound.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from shapes import normal, timed_slopes
from tnl_kernels import (
    add_srmsnorm,
    gated_srmsnorm,
    lightning_attention,
    lightning_attention_packed,
    lrpe,
    sglu,
    srmsnorm,
)
from tnl_kernels.record import save

# One row of TNL-1B: 16 heads of 128, a GLU of 5632, 64000 words.
T, H, K, F, WORDS = 2048, 16, 128, 5632, 64000
TARGET_S = 60.0


def loss_step() -> Callable[[], None]:
    """A step of the model's loss."""
    from tnl.model.loss import linear_cross_entropy

    hidden, weight = (normal(rows, H * K, device="cuda").requires_grad_() for rows in (T, WORDS))
    labels = torch.randint(WORDS, (T,), device="cuda")

    def step() -> None:
        output = linear_cross_entropy(hidden, weight, labels)
        output[0].backward()

    return step


def op_step(op: Callable, *sizes: tuple[int, ...]) -> Callable[[], None]:
    """Forward and backward of ``op`` on random bf16 tensors."""
    leaves = [normal(*size, device="cuda").requires_grad_() for size in sizes]

    def step() -> None:
        outputs = op(*leaves)
        outputs = [x for x in (outputs if isinstance(outputs, tuple) else (outputs,)) if x is not None]
        torch.autograd.grad(outputs, leaves, [torch.ones_like(x) for x in outputs])

    return step


def steps() -> dict[str, Callable[[], Callable[[], None]]]:
    """Name of an op -> what makes a step of it."""
    slopes = timed_slopes(H, "cuda")
    row = (1, T, H * K)
    return {
        "lightning_attention_packed": lambda: op_step(
            lambda x: lightning_attention_packed(x, slopes, num_heads=H), (1, T, 4 * H * K)
        ),
        # The first layer has LRPE, which doubles the head dim of q and k.
        "lightning_attention": lambda: op_step(
            lambda q, k, v: lightning_attention(q, k, v, slopes), (1, T, H, 2 * K), (1, T, H, 2 * K), (1, T, H, K)
        ),
        "lrpe": lambda: op_step(
            lambda x, theta: lrpe(x, theta, torch.arange(T, device="cuda")), (1, T, H, K), (H, 1, K)
        ),
        "srmsnorm": lambda: op_step(srmsnorm, row),
        "add_srmsnorm": lambda: op_step(add_srmsnorm, row, row),
        "gated_srmsnorm": lambda: op_step(gated_srmsnorm, row, row),
        "sglu": lambda: op_step(sglu, (1, T, F), (1, T, F)),
        "linear_cross_entropy": loss_step,
    }


def seconds(step: Callable[[], None]) -> float:
    """Wall-clock time of ``step()``, its device work included."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="PATH", help="save the times")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device")
    # Loads what is not ours to compile: cuBLAS, the allocator, autograd's threads.
    warm = normal(256, 256, device="cuda").requires_grad_()
    (warm @ warm).sum().backward()
    result: dict = {"target_s": TARGET_S, "ops": {}, "missing": {}}
    for name, make in steps().items():
        try:
            step = make()
            first = seconds(step)
            result["ops"][name] = round(first - seconds(step), 2)
        except Exception as error:
            result["missing"][name] = f"{type(error).__name__}: {str(error)[:300]}"
    result["total_s"] = round(sum(result["ops"].values()), 2)
    print(json.dumps(result, indent=1))
    save(result, arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())

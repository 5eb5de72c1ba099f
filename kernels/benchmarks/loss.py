"""What the loss of a language model costs over its three matmuls. Checks linear_cross_entropy first, then measures.

    python kernels/benchmarks/loss.py [--tiles] [--json PATH]

Needs a CUDA device. One step is the loss of 16,384 rows, and the gradients of the hidden states and the weight. The
floor is the three matmuls of these shapes alone (logits and both gradients), measured in the same run. Beside it stand
the plain formula, both as it is and compiled, and Liger-Kernel and torch's own fused loss where they are installed.
"""

import argparse
import importlib.util
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from tnl_kernels.cross_entropy_triton import LOGITS_PER_WARP, TILE_ELEMENTS, launch_cross_entropy
from tnl_kernels.limits import copy_bandwidth, median_ms
from tnl_kernels.record import environment, save
from torch import Tensor

import tnl.model.loss
from tnl.model.loss import IGNORE_INDEX, add_product_, linear_cross_entropy

N = 16384
SHAPES = [(2048, 64000), (2048, 65536), (4096, 64000), (4096, 65536)]
COMPILED_VOCAB = 64000  # each further shape costs its compile time
ROWS = [2048, 4096, 8192, 16384]
COMPILED_ROWS = 4096
TILES = [(BV, num_warps) for BV in (4096, 8192, 16384, 32768) for num_warps in (8, 16, 32)]
# Relative RMS errors: the logits are rounded to bf16 before the softmax, the gradients on their way through it.
LOSS_BOUND, GRADIENT_BOUND = 1e-3, 8e-3

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def inputs(rows: int, D: int, vocab_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [N, D] and weight [vocabulary, D] in bf16, with gradients, and labels."""
    generator = torch.Generator("cuda").manual_seed(D + vocab_size)
    hidden = torch.randn(rows, D, generator=generator, device="cuda").bfloat16().requires_grad_()
    weight = torch.randn(vocab_size, D, generator=generator, device="cuda").mul(D**-0.5).bfloat16().requires_grad_()
    labels = torch.randint(vocab_size, (rows,), generator=generator, device="cuda")
    labels[:: rows // 10] = IGNORE_INDEX
    return hidden, weight, labels


def reference(hidden: Tensor, weight: Tensor, labels: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Loss sum, dhidden and dweight of the mean loss, in ``dtype``, from the same values."""
    hidden, weight = hidden.detach().to(dtype), weight.detach().to(dtype)
    loss, dhidden, dweight = torch.zeros((), dtype=dtype, device="cuda"), [], torch.zeros_like(weight)
    keep = labels != IGNORE_INDEX
    for part, target, kept in zip(hidden.split(1024), labels.split(1024), keep.split(1024), strict=True):
        logits = part @ weight.T
        loss += F.cross_entropy(logits, target, ignore_index=IGNORE_INDEX, reduction="sum")
        onehot = torch.zeros_like(logits).scatter_(1, target.clamp(min=0)[:, None], 1.0)
        dlogits = (torch.softmax(logits, 1) - onehot) * kept[:, None] / keep.sum()
        dhidden.append(dlogits @ weight)
        dweight += dlogits.T @ part
    return [loss, torch.cat(dhidden), dweight]


def step(loss_function: Loss, hidden: Tensor, weight: Tensor, labels: Tensor) -> list[Tensor]:
    """Loss sum, and the gradients of the mean loss."""
    loss = loss_function(hidden, weight, labels)
    return [loss, *torch.autograd.grad(loss / (labels != IGNORE_INDEX).sum(), (hidden, weight))]


def errors(actual: list[Tensor], expected: list[Tensor]) -> dict[str, float]:
    """Relative RMS errors by name."""
    named = zip(("loss", "dhidden", "dweight"), actual, expected, strict=True)
    return {name: ((a.to(e.dtype) - e).norm() / e.norm()).item() for name, a, e in named}


def is_right(error: dict[str, float]) -> bool:
    """Whether all errors are within their bounds; not so a NaN."""
    return error["loss"] <= LOSS_BOUND and max(error["dhidden"], error["dweight"]) <= GRADIENT_BOUND


# The candidates


def chunked(hidden, weight, labels, rows):
    """The loss of tnl with chunks of ``rows`` rows."""
    tnl.model.loss.GPU_CHUNK_ELEMENTS = rows * len(weight)
    return linear_cross_entropy(hidden, weight, labels)[0]


def plain(hidden, weight, labels):
    """The formula, which keeps the logits, in bf16 and in fp32."""
    logits = F.linear(hidden, weight).float()
    return F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum")


@torch.compile(dynamic=False)
def compiled_gradient(logits, labels):
    """Losses and gradient of a chunk of logits, left to Inductor."""
    wide = logits.float()
    lse = torch.logsumexp(wide, 1)
    keep = labels != IGNORE_INDEX
    index = torch.where(keep, labels, 0)[:, None]
    onehot = torch.arange(logits.shape[1], device=logits.device) == index
    gradient = torch.where(keep[:, None], torch.exp(wide - lse[:, None]) - onehot.float(), 0.0)
    return torch.where(keep, lse - wide.gather(1, index)[:, 0], 0.0).sum(), gradient.to(logits.dtype)


class CompiledChunks(torch.autograd.Function):
    """The chunks of tnl around `compiled_gradient` in place of its kernel."""

    @staticmethod
    def forward(ctx, hidden, weight, labels):
        dhidden, dweight = torch.empty_like(hidden), torch.zeros_like(weight, dtype=torch.float32)
        loss = torch.zeros((), device="cuda")
        for start in range(0, len(hidden), COMPILED_ROWS):
            part = hidden[start : start + COMPILED_ROWS]
            part_loss, dlogits = compiled_gradient(F.linear(part, weight), labels[start : start + COMPILED_ROWS])
            loss += part_loss
            torch.mm(dlogits, weight, out=dhidden[start : start + COMPILED_ROWS])
            add_product_(dweight, dlogits.t(), part, is_first=start == 0)
        ctx.save_for_backward(dhidden, dweight)
        return loss

    @staticmethod
    def backward(ctx, dloss):
        scale = dloss.reshape(1)
        return *(torch.mul(x, scale, out=torch.empty_like(x, dtype=torch.bfloat16)) for x in ctx.saved_tensors), None


def liger(hidden, weight, labels, chunk_mem_const):
    """Liger-Kernel with the weight's gradient summed in fp32; its chunks hold ``chunk_mem_const`` times its default."""
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    options = dict(ignore_index=IGNORE_INDEX, lse_square_scale=0.0, label_smoothing=0.0, reduction="sum", softcap=None)
    options |= dict(return_z_loss=False, accum_dtype=torch.float32, use_token_scaling=False)
    options |= dict(return_token_accuracy=False, return_predicted_tokens=False, ce_impl=None, ce_mode=None)
    # Without bias and weights of the classes; apply takes no keywords.
    arguments = (hidden, weight, labels, None, None, *options.values(), chunk_mem_const)
    return LigerFusedLinearCrossEntropyFunction.apply(*arguments)[0]


def torch_fused(hidden, weight, labels):
    """torch's own, new in 2.13."""
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(hidden, weight, labels, reduction="sum", ignore_index=IGNORE_INDEX, options=options)


def candidates(vocab_size: int) -> dict[str, Loss]:
    """Name -> loss."""
    found: dict[str, Loss] = {f"tnl, {rows} rows": partial(chunked, rows=rows) for rows in ROWS}
    found["plain"] = plain
    if vocab_size == COMPILED_VOCAB:
        found["plain, compiled"] = torch.compile(plain, dynamic=False)
        found[f"compiled, {COMPILED_ROWS} rows"] = CompiledChunks.apply
    if importlib.util.find_spec("liger_kernel"):
        found["liger"] = partial(liger, chunk_mem_const=1)
        found["liger, 8 x chunks"] = partial(liger, chunk_mem_const=8)
    if hasattr(F, "linear_cross_entropy"):
        found["torch fused"] = torch_fused
    return found


# The measurements


def floor_ms(hidden: Tensor, weight: Tensor) -> float:
    """The three matmuls of a step, each over all rows at once."""
    hidden, weight = hidden.detach(), weight.detach()
    logits = F.linear(hidden, weight)
    products = [(hidden, weight.T), (logits, weight), (logits.T, hidden)]
    outputs = [logits, torch.empty_like(hidden), torch.empty_like(weight)]
    # Into a further tensor: the logits are a factor of the other two.
    outputs[0] = torch.empty_like(logits)
    return sum(median_ms(partial(torch.mm, *pair, out=out)) for pair, out in zip(products, outputs, strict=True))


def measure(name: str, loss_function: Loss, tensors: tuple[Tensor, ...], floor: float) -> dict:
    """Time of a step, and its peak memory over that of the inputs."""
    step(loss_function, *tensors)  # compiles
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step(loss_function, *tensors)
    peak = torch.cuda.max_memory_allocated() - held
    time = median_ms(lambda: step(loss_function, *tensors), least=5)
    return {"form": name, "ms": time, "multiple_of_floor": time / floor, "peak_GiB": peak / 2**30}


def measure_kernel(bandwidth: float, with_tiles: bool) -> list[dict]:
    """The kernel of one chunk alone, against its logits read once and written once."""
    rows, vocab_size = 8192, 64000
    logits = torch.randn(rows, vocab_size, device="cuda", dtype=torch.bfloat16)
    labels = torch.randint(vocab_size, (rows,), device="cuda")
    floor = 4 * logits.numel() / bandwidth * 1e3
    chosen = (TILE_ELEMENTS, TILE_ELEMENTS // LOGITS_PER_WARP)
    found = []
    for BV, num_warps in TILES if with_tiles else [chosen]:
        time = median_ms(partial(launch_cross_entropy, logits, labels, IGNORE_INDEX, True, BV, num_warps))
        found.append({"BV": BV, "num_warps": num_warps, "ms": time, "multiple_of_floor": time / floor})
        mark = " (chosen)" if (BV, num_warps) == chosen else ""
        print(f"kernel, {rows} x {vocab_size}, BV {BV}, {num_warps} warps: {time:.3f} ms, {time / floor:.2f} x{mark}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="PATH", help="save the rows, the device and the command")
    parser.add_argument("--tiles", action="store_true", help="measure other tiles of the kernel, too")
    arguments = parser.parse_args()

    checked = {}
    for rows, D, vocab_size, dtype in ((300, 64, 1003, torch.float64), (N, *SHAPES[0], torch.float32)):
        tensors = inputs(rows, D, vocab_size)
        error = errors(step(partial(chunked, rows=256 if rows < N else 4096), *tensors), reference(*tensors, dtype))
        checked[f"{rows} x {D} x {vocab_size} against {dtype}"] = error
        print(f"{rows} x {D} x {vocab_size} against {dtype}: {error}")
    if not all(is_right(error) for error in checked.values()):
        print("not correct, so not measured", file=sys.stderr)
        return 1

    bandwidth = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}, copy {bandwidth / 1e12:.2f} TB/s")
    kernel_rows = measure_kernel(bandwidth, arguments.tiles)
    rows = []
    for D, vocab_size in SHAPES:
        tensors = inputs(N, D, vocab_size)
        floor = floor_ms(*tensors[:2])
        rate = 6 * N * D * vocab_size / floor * 1e3
        print(f"\nN {N}, D {D}, vocabulary {vocab_size}, bf16: matmuls {floor:.2f} ms, {rate / 1e12:.0f} TFLOP/s")
        print(f"{'form':<24} {'ms':>8} {'x floor':>8} {'GiB':>8}")
        for name, loss_function in candidates(vocab_size).items():
            row = measure(name, loss_function, tensors, floor)
            rows.append({"D": D, "vocab_size": vocab_size, "floor_ms": floor, "matmul_flop_per_s": rate, **row})
            print(f"{name:<24} {row['ms']:>8.2f} {row['multiple_of_floor']:>8.2f} {row['peak_GiB']:>8.2f}", flush=True)
    result = {
        **environment(),
        "command": "python kernels/benchmarks/loss.py --json PATH" + " --tiles" * arguments.tiles,
        "shape": {"N": N, "dtype": "bfloat16"},
        "copy_bytes_per_s": bandwidth,
        "errors": checked,
        "time": "median of the loss and both gradients; peak memory over that of hidden, weight and labels",
        "kernel": kernel_rows,
        "rows": rows,
    }
    save(result, arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())

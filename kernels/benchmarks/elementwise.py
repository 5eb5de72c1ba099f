"""How far are the norms, the gate and LRPE from the memory bandwidth? Checks them against fp64, then measures.

    python kernels/benchmarks/elementwise.py [--json PATH]

The floor of a pass is the time in which the same GPU copies as many bytes as the pass must read and write, measured in
the same run. Forward and backward are measured apart, for the Triton form, the torch form as it is (eager), and the
torch form under torch.compile: the public ops take the faster one in each mode.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from tnl_kernels.glu import torch_sglu
from tnl_kernels.glu_triton import triton_sglu
from tnl_kernels.limits import copy_bandwidth
from tnl_kernels.lrpe import torch_lrpe
from tnl_kernels.lrpe_triton import triton_lrpe
from tnl_kernels.naive import naive_add_srmsnorm, naive_gated_srmsnorm, naive_lrpe, naive_sglu, naive_srmsnorm
from tnl_kernels.norm import torch_add_srmsnorm, torch_gated_srmsnorm, torch_srmsnorm
from tnl_kernels.norm_triton import triton_add_srmsnorm, triton_gated_srmsnorm, triton_srmsnorm
from tnl_kernels.record import environment, save

OPS = {
    "srmsnorm": (naive_srmsnorm, torch_srmsnorm, triton_srmsnorm),
    "add_srmsnorm": (naive_add_srmsnorm, torch_add_srmsnorm, triton_add_srmsnorm),
    "gated_srmsnorm": (naive_gated_srmsnorm, torch_gated_srmsnorm, triton_gated_srmsnorm),
    "sglu": (naive_sglu, torch_sglu, triton_sglu),
    "lrpe": (naive_lrpe, torch_lrpe, triton_lrpe),
}
NUM_INPUTS = {"srmsnorm": 1, "add_srmsnorm": 2, "gated_srmsnorm": 2, "sglu": 2}
# Tensors of the shape of x that must be read and written, forward and backward.
UNITS = {
    "srmsnorm": (2, 3),
    "add_srmsnorm": (4, 4),
    "gated_srmsnorm": (3, 5),
    "sglu": (3, 5),
    "lrpe": (3, 4),
}
CASES = [
    ("srmsnorm", (16384, 2048)),
    ("srmsnorm", (16384, 4096)),
    ("add_srmsnorm", (16384, 2048)),
    ("add_srmsnorm", (16384, 4096)),
    ("gated_srmsnorm", (16384, 2048)),
    ("gated_srmsnorm", (16384, 4096)),
    ("sglu", (16384, 5632)),
    ("lrpe", (1, 16384, 16, 128)),
]
TARGETS = {"forward": 1.2, "backward": 1.3}
BOUNDS = {torch.bfloat16: 3e-3, torch.float16: 1e-3, torch.float32: 1e-5}
CHECKED_ROWS = [(2, 257, 2048), (3, 1000), (1, 5, 130)]
CHECKED_HEADS = [(2, 257, 16, 128), (1, 50, 3, 24)]
# Two sets of tensors take turns, each larger than the L2 cache: nothing is found there that the last call left.
SETS = 2
CALLS = 10
REPEATS = 7


def inputs_of(op: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> list[torch.Tensor]:
    """Inputs on the GPU; u of the gated norm is the last quarter of a packed projection, as in the model."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device="cuda", dtype=torch.float32).to(dtype)

    if op == "lrpe":
        _, T, H, K = shape
        exponents = torch.arange(H * K, device="cuda", dtype=torch.float64) / (H * K)
        theta = (10000**-exponents).float().view(H, 1, K)
        return [normal(*shape), theta, torch.arange(T, device="cuda")]
    tensors = [normal(*shape) for _ in range(NUM_INPUTS[op])]
    if op == "gated_srmsnorm":
        tensors[1] = normal(*shape[:-1], 4 * shape[-1])[..., -shape[-1] :]
    return tensors


def with_gradients(form: Callable, tensors: list[torch.Tensor], seed: int) -> tuple:
    """Outputs, leaves and random gradients of the outputs of ``form(*tensors)``."""
    leaves = [x.detach().requires_grad_() if x.is_floating_point() else x for x in tensors]
    outputs = form(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator("cuda").manual_seed(seed)
    gradients = [torch.randn(y.shape, generator=generator, device="cuda").to(y.dtype) for y in outputs]
    return outputs, [x for x in leaves if x.requires_grad], gradients


def worst_error(op: str, shape: tuple[int, ...], dtype: torch.dtype) -> float:
    """Relative RMS error of outputs and gradients of the Triton form against the definition in fp64, the largest."""
    definition, _, form = OPS[op]
    tensors = inputs_of(op, shape, dtype, seed=1)
    if op == "lrpe":
        tensors[2] += 10**6
    wide = [x.double() if x.is_floating_point() else x for x in tensors]
    outputs, leaves, gradients = with_gradients(form, tensors, seed=2)
    expected, wide_leaves, _ = with_gradients(definition, wide, seed=2)
    actual = [*outputs, *torch.autograd.grad(outputs, leaves, gradients)]
    gradients = [g.double() for g in gradients]
    expected = [*expected, *torch.autograd.grad(expected, wide_leaves, gradients)]
    errors = [((a.double() - e).norm() / e.norm()).item() for a, e in zip(actual, expected, strict=True)]
    # A NaN, which is what the poisoned memory holds, must not be lost in max().
    return max(error if error == error else float("inf") for error in errors)


def check() -> dict[str, float]:
    """The worst error of each op and dtype; memory that a kernel leaves unwritten holds NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    errors = {}
    for op in OPS:
        for dtype in BOUNDS:
            shapes = CHECKED_HEADS if op == "lrpe" else CHECKED_ROWS
            name = f"{op} {str(dtype).removeprefix('torch.')}"
            errors[name] = max(worst_error(op, shape, dtype) for shape in shapes)
            if errors[name] > BOUNDS[dtype]:
                print(f"{name}: error {errors[name]:.1e} exceeds {BOUNDS[dtype]:.0e}", file=sys.stderr)
    torch.use_deterministic_algorithms(False)
    return errors


def milliseconds(calls: list[Callable], stream: torch.cuda.Stream) -> float:
    """Median time of one call: `CALLS` of them in a CUDA graph, so that the host's time for a launch does not count."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for i in range(CALLS):
            calls[i % len(calls)]()
    times = []
    for repeat in range(REPEATS + 1):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        if repeat > 0:
            times.append(start.elapsed_time(end) / CALLS)
    return statistics.median(times)


def measure(form: Callable, sets: list[list[torch.Tensor]], stream: torch.cuda.Stream) -> tuple[float, float]:
    """Milliseconds of forward and backward. Both run on one stream: autograd takes that of the forward pass."""
    with torch.cuda.stream(stream):
        ready = [with_gradients(form, tensors, seed=i) for i, tensors in enumerate(sets)]
        arguments = [[x.detach().requires_grad_(x.is_floating_point()) for x in tensors] for tensors in sets]
        forward = milliseconds([lambda a=a: form(*a) for a in arguments], stream)
        backward = milliseconds([lambda r=r: torch.autograd.grad(*r, retain_graph=True) for r in ready], stream)
    return forward, backward


def rows_of(op: str, shape: tuple[int, ...], bandwidth: float, stream: torch.cuda.Stream) -> list[dict]:
    """One row for each pass of one op: the floor in milliseconds, and each form's multiple of it."""
    _, torch_form, triton_form = OPS[op]
    sets = [inputs_of(op, shape, torch.bfloat16, seed) for seed in range(SETS)]
    torch.compiler.reset()
    forms = {"triton": triton_form, "eager": torch_form, "compiled": torch.compile(torch_form, dynamic=False)}
    times = {name: measure(form, sets, stream) for name, form in forms.items()}
    rows = []
    for i, direction in enumerate(TARGETS):
        bytes_moved = UNITS[op][i] * sets[0][0].numel() * sets[0][0].element_size()
        floor = 1e3 * bytes_moved / bandwidth
        row = {"op": op, "shape": list(shape), "pass": direction, "floor_ms": round(floor, 4)}
        row |= {f"{name}_over_floor": round(times[name][i] / floor, 3) for name in forms}
        rows.append(row | {"target": TARGETS[direction]})
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="PATH", help="save the rows, the device and the command")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("needs a CUDA device", file=sys.stderr)
        return 1

    errors = check()
    print("worst error against fp64: " + ", ".join(f"{name} {error:.1e}" for name, error in errors.items()))
    if any(errors[f"{op} {str(dtype).removeprefix('torch.')}"] > BOUNDS[dtype] for op in OPS for dtype in BOUNDS):
        print("not correct, so not measured", file=sys.stderr)
        return 1

    # The backward pass of one forward pass is measured many times.
    torch._functorch.config.donated_buffer = False
    stream = torch.cuda.Stream()
    bandwidth = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}: copies at {bandwidth / 1e12:.2f} TB/s")
    columns = ["triton", "eager", "compiled"]
    print(f"{'op':<16}{'shape':<22}{'pass':<10}{'floor ms':>10}" + "".join(f"{name:>10}" for name in columns))
    rows = []
    for op, shape in CASES:
        for row in rows_of(op, shape, bandwidth, stream):
            rows.append(row)
            multiples = "".join(f"{row[f'{name}_over_floor']:>9.2f}x" for name in columns)
            size = " x ".join(map(str, shape))
            print(f"{op:<16}{size:<22}{row['pass']:<10}{row['floor_ms']:>10.4f}{multiples}", flush=True)
    missed = [row for row in rows if row["triton_over_floor"] > row["target"]]
    print(f"{len(rows) - len(missed)} of {len(rows)} Triton passes within {TARGETS} times the floor")
    result = {
        **environment(),
        "command": "python kernels/benchmarks/elementwise.py --json PATH",
        "dtype": "bfloat16",
        "time": f"median of {REPEATS} CUDA graphs of {CALLS} calls, {SETS} sets of tensors in turn",
        "copy_tb_per_s": round(bandwidth / 1e12, 3),
        "errors_against_fp64": {name: float(f"{error:.2e}") for name, error in errors.items()},
        "rows": rows,
    }
    save(result, arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())

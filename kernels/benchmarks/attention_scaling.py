"""Is lightning_attention linear in T? Checks it against its definition, then measures forward + backward at T and 2T.

    python kernels/benchmarks/attention_scaling.py [--json PATH]

The time of a linear op doubles with T, that of the quadratic form (all scores at once, measured beside it) grows
fourfold. On CPU the time is that of one thread, as the process is charged for it: what else runs there counts less.
"""

import argparse
import platform
import sys
import time
from itertools import pairwise
from pathlib import Path

import torch
from tnl_kernels import lightning_attention
from tnl_kernels.naive import naive_lightning_attention
from tnl_kernels.record import save

B, H, K = 1, 2, 64
LENGTHS = [1024, 2048, 4096, 8192, 16384, 32768]
QUADRATIC_LENGTHS = [1024, 2048]
BOUND = 1e-5
# The repeats of all lengths are interleaved, so that a slow spell of a shared machine hits all of them.
REPEATS = 9


def inputs(T: int, device: str, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(T)
    return [torch.randn(B, T, H, K, generator=generator, dtype=dtype).to(device) for _ in range(4)]


def quadratic_attention(q, k, v, slopes):
    """All T x T scores at once, [B, T, H, K] -> [B, T, H, K]."""
    row = torch.arange(q.shape[1], device=q.device)
    decay = torch.exp(-slopes[:, None, None] * (row[:, None] - row).clamp(min=0)).tril()  # [H, T, T]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return ((q @ k.mT * decay) @ v).transpose(1, 2), None


def forward_backward(op, q, k, v, do, slopes) -> list[torch.Tensor]:
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    o, _ = op(*leaves, slopes)
    return [o, *torch.autograd.grad(o, leaves, do)]


def largest_error(slopes: torch.Tensor, device: str) -> float:
    """Relative RMS error of o, dq, dk, dv against the definition in fp64, the largest of all."""
    tensors = inputs(777, device)
    actual = forward_backward(lightning_attention, *tensors, slopes)
    expected = forward_backward(naive_lightning_attention, *(x.double() for x in tensors), slopes.double())
    return max(((a - e).norm() / e.norm()).item() for a, e in zip(actual, expected, strict=True))


def seconds(op, tensors, slopes) -> float:
    if not slopes.is_cuda:
        start = time.process_time()
        forward_backward(op, *tensors, slopes)
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    forward_backward(op, *tensors, slopes)
    torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(slopes: torch.Tensor, device: str) -> dict[tuple[str, int], float]:
    """Best time in seconds of each (form, T)."""
    cases = [("linear", lightning_attention, T) for T in LENGTHS]
    cases += [("quadratic", quadratic_attention, T) for T in QUADRATIC_LENGTHS]
    tensors = {T: inputs(T, device) for T in LENGTHS}
    best: dict[tuple[str, int], float] = {}
    for repeat in range(REPEATS + 1):
        for form, op, T in cases:
            elapsed = seconds(op, tensors[T], slopes)
            if repeat > 0:
                best[form, T] = min(elapsed, best.get((form, T), elapsed))
    return best


def ratio_rows(best: dict[tuple[str, int], float]) -> list[dict]:
    """For each T: time(2T) / time(T) of both forms, and time(quadratic) / time(linear)."""
    rows = []
    for T, double in pairwise(LENGTHS):
        row = {"T": T, "linear_2T_over_T": best["linear", double] / best["linear", T]}
        if ("quadratic", T) in best:
            row["quadratic_over_linear"] = best["quadratic", T] / best["linear", T]
        if ("quadratic", double) in best:
            row["quadratic_2T_over_T"] = best["quadratic", double] / best["quadratic", T]
        rows.append({name: round(value, 3) for name, value in row.items()})
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="PATH", help="save the ratios, the device and the command")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    arguments = parser.parse_args()

    slopes = torch.tensor([2.0 ** (-8 * (i_h + 1) / H) for i_h in range(H)], device=arguments.device)
    error = largest_error(slopes, arguments.device)
    print(f"error against the fp64 definition: {error:.1e} (bound {BOUND:.0e})")
    if error > BOUND:
        print("not correct, so not measured", file=sys.stderr)
        return 1

    if not slopes.is_cuda:
        torch.set_num_threads(1)
        # As in a training process: once a tensor of this size was freed, glibc keeps freed memory for the next one.
        torch.empty(31 * 2**20, dtype=torch.uint8)
    best = measure(slopes, arguments.device)
    rows = ratio_rows(best)
    growth = best["linear", LENGTHS[-1]] / best["linear", LENGTHS[0]]
    columns = ["T", "linear_2T_over_T", "quadratic_2T_over_T", "quadratic_over_linear"]
    print("".join(f"{name:>24}" for name in columns))
    for row in rows:
        print("".join(f"{row.get(name, '-'):>24}" for name in columns))
    print(f"from T = {LENGTHS[0]} to {LENGTHS[-1]}, {LENGTHS[-1] // LENGTHS[0]} times: {growth:.1f} times the time")
    on_cuda = torch.device(arguments.device).type == "cuda"
    result = {
        "device": torch.cuda.get_device_name() if on_cuda else f"{platform.machine()} CPU",
        "num_threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "command": "python kernels/benchmarks/attention_scaling.py --json PATH --device " + arguments.device,
        "shape": {"B": B, "H": H, "K": K, "V": K, "dtype": "float32"},
        "pass": "forward + backward, best of repeats",
        "repeats": REPEATS,
        "error_against_fp64": float(f"{error:.2e}"),
        "ratios": rows,
        "growth": {"T": [LENGTHS[0], LENGTHS[-1]], "linear": round(growth, 2)},
    }
    save(result, arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())

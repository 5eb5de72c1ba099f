"""How near is lightning_attention_step to the memory's bandwidth? Checks it against its definition, then measures.

    python kernels/benchmarks/step.py [--tiles] [--json PATH]

Needs a CUDA device. The floor is the state read once and written once at the bandwidth of a copy, measured in the same
run. All is measured as decoding runs it, inside a CUDA graph: as many calls in one graph as their states together leave
no room in the L2 cache. flash-linear-attention, where it is installed, stands beside.
"""

import argparse
import importlib.util
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from tnl_kernels import lightning_attention_step
from tnl_kernels.limits import copy_bandwidth, graph_ms
from tnl_kernels.naive import naive_lightning_attention_step
from tnl_kernels.record import environment, save
from tnl_kernels.step import torch_lightning_attention_step
from tnl_kernels.step_triton import launch_step, step_tile

H, D = 32, 128
BATCHES = [1, 16, 64]
DTYPE = torch.bfloat16
# Bounds of the relative RMS error: twice the rounding of a bf16 output alone, and the fp32 state.
OUTPUT_BOUND, STATE_BOUND = 4e-3, 1e-5
STATE_BYTES_IN_A_GRAPH = 2**28
TILES = [(BV, num_warps) for BV in (8, 16, 32, 64, 128) for num_warps in (2, 4, 8)]


def inputs(B: int, num_slots: int) -> tuple[torch.Tensor, ...]:
    """q, k, v as views of the packed projection, slopes, and a table of states."""
    generator = torch.Generator("cuda").manual_seed(B)
    packed = torch.randn(B, 4, H, D, generator=generator, device="cuda").to(DTYPE)
    slopes = torch.tensor([2.0 ** (-8 * (i_h + 1) / H) for i_h in range(H)], device="cuda")
    state = torch.randn(num_slots, H, D, D, generator=generator, device="cuda")
    return *packed.unbind(1)[:3], slopes, state


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm()).item()


def errors() -> tuple[float, float]:
    """Relative RMS error of the output and of the states against the definition in fp64; with padding rows."""
    q, k, v, slopes, state = inputs(5, 7)
    slots = torch.tensor([6, -1, 0, 3, 2], device="cuda")
    wide_state = state.double()
    wide = (x.double() for x in (q, k, v, slopes))
    expected = naive_lightning_attention_step(*wide, wide_state, slots=slots, activation="silu")
    o = lightning_attention_step(q, k, v, slopes, state, slots=slots, activation="silu")
    return relative_error(o, expected), relative_error(state, wide_state)


def milliseconds(calls: list[Callable[[], object]]) -> float:
    """Median time of one of ``calls``, all of them captured one after another in one CUDA graph."""
    return graph_ms(lambda: [call() for call in calls]) / len(calls)


def forms(with_tiles: bool) -> dict[str, Callable]:
    """Name -> function of (q, k, v, slopes, state, slots) for every form to be measured."""

    def triton_form(q, k, v, slopes, state, slots):
        return lightning_attention_step(q, k, v, slopes, state, slots=slots, activation="silu")

    def torch_form(q, k, v, slopes, state, slots):
        return torch_lightning_attention_step(q, k, v, slopes, state, activation="silu")

    found = {"tnl_kernels": triton_form, "torch form": torch_form}
    if importlib.util.find_spec("fla"):
        from fla.ops.simple_gla import fused_recurrent_simple_gla

        def fla_form(q, k, v, slopes, state, slots):
            q, k, v = (x.unsqueeze(1) for x in (q, k, v))
            return fused_recurrent_simple_gla(
                q, k, v, g_gamma=-slopes, scale=1.0, initial_state=state, output_final_state=True
            )

        found["fla fused_recurrent"] = fla_form  # without the activation, into a new state
    if with_tiles:
        for BV, num_warps in TILES:

            def tiled(q, k, v, slopes, state, slots, BV=BV, num_warps=num_warps):
                return launch_step(q, k, v, slopes, state, slots, "silu", BV, num_warps)

            chosen = " (chosen)" if (BV, num_warps) == step_tile(D, D) else ""
            found[f"BV {BV}, {num_warps} warps{chosen}"] = tiled
    return found


@torch.inference_mode()
def measure(bandwidth: float, with_tiles: bool) -> list[dict]:
    """One row for each batch and form."""
    rows = []
    for B in BATCHES:
        state_bytes = B * H * D * D * 4
        floor = 2 * state_bytes / bandwidth * 1e3
        copies = max(2, STATE_BYTES_IN_A_GRAPH // state_bytes)
        q, k, v, slopes, state = inputs(B, B * copies)
        tables = state.split(B)
        slots = torch.arange(B, device="cuda").flip(0)
        for name, form in forms(with_tiles).items():
            calls = [partial(form, q, k, v, slopes, table, slots) for table in tables]
            time = milliseconds(calls)
            rows.append({"B": B, "form": name, "ms": time, "floor_ms": floor, "multiple_of_floor": time / floor})
            print(f"{B:>4} {name:<28} {time * 1e3:>10.2f} {floor * 1e3:>10.2f} {time / floor:>10.2f}", flush=True)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="PATH", help="save the rows, the device and the command")
    parser.add_argument("--tiles", action="store_true", help="measure other tiles of the kernel, too")
    arguments = parser.parse_args()

    output_error, state_error = errors()
    print(f"error against fp64: o {output_error:.1e} (bound {OUTPUT_BOUND:.0e}), state {state_error:.1e}", end=" ")
    print(f"(bound {STATE_BOUND:.0e})")
    if not (output_error <= OUTPUT_BOUND and state_error <= STATE_BOUND):
        print("not correct, so not measured", file=sys.stderr)
        return 1

    bandwidth = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}, copy {bandwidth / 1e12:.2f} TB/s, H {H}, K = V = {D}, {DTYPE}, fp32 state")
    print(f"{'B':>4} {'form':<28} {'us':>10} {'floor us':>10} {'x floor':>10}")
    rows = measure(bandwidth, arguments.tiles)
    result = {
        **environment(),
        "command": "python kernels/benchmarks/step.py --json PATH" + " --tiles" * arguments.tiles,
        "shape": {"H": H, "K": D, "V": D, "dtype": "bfloat16"},
        "copy_bytes_per_s": bandwidth,
        "error_against_fp64": {"o": output_error, "state": state_error},
        "time": "median of a call inside a CUDA graph whose states do not fit the L2 cache together",
        "missing": {} if importlib.util.find_spec("fla") else {"fla fused_recurrent": "fla is not installed"},
        "rows": rows,
    }
    save(result, arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())

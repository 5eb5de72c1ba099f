"""Linear attention on one GPU: is it right, and how far are its time and memory from the hardware's floor?

    python kernels/benchmarks/attention.py --json kernels/benchmarks/results/attention_h100.json

Correctness first (correctness.py): while a case fails nothing is timed and the exit code is 1. The floor is the bytes
of q, k, v, o (forward) or q, k, v, do, dq, dk, dv (backward) over the copy bandwidth of the same run. Peers that are
missing or raise are left out, with the reason in the JSON. Under four minutes; --quick takes less than two.
"""

import argparse
import gc
import sys
import time
from pathlib import Path

import torch
from background import Background
from cases import CASES
from correctness import check_all, describe
from measure import measure
from peers import IMPLEMENTATIONS, versions
from shapes import QUICK, SCALING, TIMED, Shape, select
from tnl_kernels.limits import copy_bandwidth, matmul_rate
from tnl_kernels.record import environment, save

# Seconds from the start that the gates, and the processes beside them, may take.
GATE_S, COMPILE_S = 150.0, 110.0
MEMORY_TARGET = 1.05
GRAPH_T = 2048  # --graph: up to this length, where the gaps between kernels count


class Run:
    """The measurements so far, and the seconds that are left to the peers."""

    def __init__(self, peer_seconds: float, graph: bool):
        self.peer_seconds = peer_seconds
        self.graph = graph
        self.missing: dict[str, dict[str, str]] = {}

    def measure(self, name: str, shape: Shape) -> dict | None:
        """`measure.measure`, or None with the reason kept. Our own op is always measured, and raises."""
        start = time.monotonic()
        if name == "tnl":
            return measure(name, shape, graph=self.graph and shape.T <= GRAPH_T)
        if self.peer_seconds <= 0:
            self.miss(name, shape, "the seconds given to the peers (--peer-seconds) were spent")
            return None
        try:
            return measure(name, shape, graph=self.graph and shape.T <= GRAPH_T, least=3)
        except Exception as error:
            self.miss(name, shape, f"{type(error).__name__}: {str(error)[:300]}")
            return None
        finally:
            self.peer_seconds -= time.monotonic() - start
            gc.collect()
            torch.cuda.empty_cache()

    def miss(self, name: str, shape: Shape, reason: str) -> None:
        """Keep why a peer has no figure."""
        self.missing.setdefault(name, {})[shape.label] = reason


def rounded(value: float | None, digits: int = 4) -> float | None:
    """``value`` to ``digits`` significant digits."""
    return None if value is None else float(f"{value:.{digits}g}")


def shape_rows(shape: Shape, measured: dict[str, dict | None], bandwidth: float) -> list[dict]:
    """Two rows, forward and backward: ms and multiples of the floor, ours first."""
    rows = []
    for i_pass, direction in enumerate(("forward", "backward")):
        floor_ms = shape.floor_bytes(direction) / bandwidth * 1e3
        row = {"shape": shape.name, "T": shape.T, "pass": direction, "floor_ms": rounded(floor_ms)}
        for name in IMPLEMENTATIONS:
            result = measured.get(name)
            time_ms = None if result is None else result[f"{direction}_ms"]
            row[f"{name}_ms"] = rounded(time_ms)
            row[f"{name}_x"] = None if time_ms is None else rounded(time_ms / floor_ms, 3)
            if name == "tnl":
                row["target_x"] = shape.targets[i_pass] if shape.targets else None
        row["memory_x"] = rounded(measured["tnl"]["memory_x"])
        row["method"] = measured["tnl"]["method"]
        rows.append(row)
    return rows


def scaling_row(shape: Shape, measured: dict[str, dict | None]) -> dict:
    """Forward + backward in ms and peak memory in GiB of each implementation, for the figure."""
    row: dict = {"shape": shape.name, "T": shape.T}
    for name, result in measured.items():
        row[f"{name}_ms"] = None if result is None else rounded(result["forward_ms"] + result["backward_ms"])
        row[f"{name}_gib"] = None if result is None else rounded(result["peak_bytes"] / 2**30)
    return row


def missed_targets(row: dict) -> list[str]:
    """Which of a row's targets it does not meet: time, memory."""
    late = row["target_x"] is not None and row["tnl_x"] > row["target_x"]
    return ["time"] * late + ["memory"] * (row["memory_x"] > MEMORY_TARGET)


def print_rows(rows: list[dict]) -> None:
    """One line for each row."""
    for row in rows:
        target = "-" if row["target_x"] is None else f"{row['target_x']:.2f}"
        missed = "".join(f" MISSED {what}" for what in missed_targets(row))
        peers = [(name, row[f"{name}_x"]) for name in IMPLEMENTATIONS if name != "tnl"]
        others = " ".join(f"{name} {value:.1f}x" for name, value in peers if value is not None)
        print(
            f"{row['shape']:<28} T {row['T']:>6} {row['pass']:<8} {row['tnl_ms']:>8.3f} ms {row['tnl_x']:>6.2f}x"
            f" (target {target}) memory {row['memory_x']:.3f}{missed} {others}",
            flush=True,
        )


def print_errors(measured: dict[str, dict | None]) -> None:
    """How far each linear implementation is from the definition, where that was compared."""
    errors = {name: x["error"] for name, x in measured.items() if x and "error" in x}
    if errors:
        print("error against fp64:", " ".join(f"{name} {error:.1e}" for name, error in errors.items()), flush=True)


def correctness_rows(background: Background) -> list[dict]:
    """The rows of the gates that run side by side."""
    rows = background.correctness(GATE_S)
    for row in rows:
        print(describe(row), flush=True)
    return rows


def failures(rows: list[dict]) -> list[dict]:
    """The rows that failed, printed."""
    failed = [row for row in rows if not row["ok"]]
    if failed:
        title = f"{len(failed)} of {len(rows)} cases are not right, so nothing is timed:"
        print("\n".join([title, *map(describe, failed)]), file=sys.stderr)
    return failed


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="PATH", help="save all figures, versions and the command")
    parser.add_argument("--quick", action="store_true", help="fewer shapes, no peers, no figure, no compile time")
    parser.add_argument("--graph", action="store_true", help=f"time T <= {GRAPH_T} in CUDA graphs")
    parser.add_argument("--shapes", metavar="TEXTS", help="shapes with one of these in their name: 'D64,T1024'")
    parser.add_argument("--no-peers", action="store_true", help="our op only")
    parser.add_argument("--peer-seconds", type=float, default=90.0, metavar="S", help="time given to all peers")
    parser.add_argument("--no-gates", action="store_true", help="time without the check; nothing is saved")
    arguments = parser.parse_args(argv)
    try:
        arguments.selected = select(QUICK if arguments.quick else TIMED, arguments.shapes)
    except ValueError as error:
        parser.error(f"--shapes: {error}")
    if arguments.no_gates and arguments.json:
        parser.error("--no-gates: figures that were not checked are not saved; leave out --json")
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device")
    return arguments


def main(argv: list[str] | None = None) -> int:
    """The command line: gates, floors, shapes, scaling."""
    arguments = parse(argv)
    start = time.monotonic()
    with_peers = not (arguments.quick or arguments.no_peers)
    result = environment() | {"peers": versions(), "command": f"python kernels/benchmarks/attention.py {flags(argv)}"}
    if not arguments.no_gates:
        with Background(peers=with_peers, cold=not arguments.quick) as background:
            result["correctness"] = correctness_rows(background)
            if failures(result["correctness"]):
                return 1
            result["not_compiled_ahead"] = background.wait_for_compilers(COMPILE_S)
            result["cold_compile"] = background.cold_compile(COMPILE_S)
        if not arguments.quick:
            result["correctness"] += check_all([case for case in CASES if case.huge], "cuda")
            if failures(result["correctness"]):
                return 1
        print(f"{len(result['correctness'])} cases are right, {time.monotonic() - start:.0f} s")
        print(f"cold compile: {result['cold_compile']}; not compiled ahead: {result['not_compiled_ahead']}")

    gc.collect()
    torch.cuda.empty_cache()
    bandwidth, rate = copy_bandwidth(), matmul_rate()
    result |= {"copy_tb_s": rounded(bandwidth / 1e12), "matmul_tflop_s": rounded(rate / 1e12)}
    print(f"{result['gpu']}: copy {result['copy_tb_s']} TB/s, bf16 matmul {result['matmul_tflop_s']} TFLOP/s")

    run = Run(arguments.peer_seconds if with_peers else 0.0, arguments.graph)
    result |= {"memory_target_x": MEMORY_TARGET, "rows": [], "details": [], "scaling": [], "missing": run.missing}
    # Ours at every shape first: what the peers take does not endanger it.
    ours = {shape: run.measure("tnl", shape) for shape in arguments.selected}
    for shape in arguments.selected:
        print_rows(shape_rows(shape, {"tnl": ours[shape]}, bandwidth))
    save(result, arguments.json)
    scaling = [] if arguments.quick or arguments.shapes else SCALING
    for shape in scaling:
        names = ("tnl", *(shape.peers if with_peers else ()))
        result["scaling"].append(scaling_row(shape, {name: run.measure(name, shape) for name in names}))
        print(result["scaling"][-1], flush=True)
    for shape in arguments.selected:
        measured = {"tnl": ours[shape]}
        if with_peers:
            measured |= {name: run.measure(name, shape) for name in shape.peers}
            print_rows(shape_rows(shape, measured, bandwidth))
            print_errors(measured)
        result["rows"] += shape_rows(shape, measured, bandwidth)
        result["details"].append({"shape": shape.label} | measured)
        save(result, arguments.json)
    for name, reasons in run.missing.items():
        print(f"{name}: {reasons}")
    result["seconds"] = round(time.monotonic() - start)
    save(result, arguments.json)
    missed = [f"{row['shape']} T{row['T']} {row['pass']}" for row in result["rows"] if missed_targets(row)]
    print(f"{result['seconds']} s; targets missed in {len(missed)} of {len(result['rows'])} rows: {'; '.join(missed)}")
    return 0


def flags(argv: list[str] | None) -> str:
    """The command's arguments as they were given, but for the place of the JSON."""
    given = sys.argv[1:] if argv is None else argv
    return " ".join("PATH" if before == "--json" else word for before, word in zip(["", *given], given, strict=False))


if __name__ == "__main__":
    sys.exit(main())

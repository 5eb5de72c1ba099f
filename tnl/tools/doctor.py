"""Is this machine fit to train on? What it has, which tiles attention takes on it, and every op against its definition.

Wrong numbers come from compilers and drivers without any error: this finds them before a run of weeks does.
"""

import json
import re
import time
from pathlib import Path

import torch
from tnl_kernels import tiles as table

from tnl.errors import CannotWriteError, ConfigError
from tnl.files import write_atomically
from tnl.tools.doctor_checks import BF16, FP32, NAMES, cases_of, check, message_of, repeatability
from tnl.tools.doctor_machine import (
    KIB,
    cache_row,
    describe_gpu,
    gpu_is_seen,
    gpus,
    machine,
    no_gpu,
    nvidia_smi,
    triton_cache,
)
from tnl.tools.tables import format_rows

HEAD_DIMS = ((64, 64), (128, 128), (256, 128))


def doctor(device: str | None = None, json_file: Path | None = None, report=print) -> bool:
    """Print the machine, the attention tiles and the checks of all ops; True when every check passes.

    Args:
        device: cpu, cuda or cuda:1; None takes the first GPU, or the CPU where torch sees none.
        json_file: also write all figures here, first without the checks: a crash leaves the rest.

    Raises:
        ConfigError: there is no such device.
        CannotWriteError: ``json_file`` cannot be written.
    """
    chosen = pick_device(device)
    on_gpu = chosen.type == "cuda"
    smi, cards, cache = nvidia_smi(), gpus(), triton_cache()
    tiles = [row for K, V in HEAD_DIMS for dtype in (BF16, FP32) for row in tile_rows(K, V, dtype, chosen)]
    figures = {"device": str(chosen), "machine": machine(smi, cache), "gpus": cards, "tiles": tiles if on_gpu else []}
    save(json_file, figures)
    rows = [(f"GPU {card['device']}", describe_gpu(card)) for card in cards] or [("GPU", no_gpu(smi))]
    report(format_rows("machine", rows + list(figures["machine"].items())))
    report("")
    report(format_tiles(tiles) if on_gpu else "attention tiles: none, a CPU takes the torch forms")
    report("")

    cases = cases_of(chosen.type)
    width = max(len(case.name) for case in cases)
    report(f"checks on {chosen}" + "; the first run compiles the kernels, which takes minutes" * on_gpu)
    start = time.perf_counter()
    checks = [cache_row(cache)] if on_gpu else gpu_is_seen(smi) if device is None else []
    for row in checks:
        report(format_check(row, width))
    results = []
    for case in cases:
        results.append(check(case, chosen))
        report(format_check(results[-1], width))
    checks += [*results, repeatability(results)]
    report(format_check(checks[-1], width))
    failed = sum(not row["ok"] for row in checks)
    seconds = time.perf_counter() - start
    save(json_file, figures | {"checks": checks, "ok": not failed, "seconds": round(seconds, 1)})
    report("")
    if failed:
        report(f"{failed} of {len(checks)} checks FAILED on {chosen}, {seconds:.0f} s. What to do:\n{cure(cache)}")
    else:
        report(f"all {len(checks)} checks passed on {chosen}, {seconds:.0f} s")
    return not failed


def pick_device(text: str | None) -> torch.device:
    """The device of ``--device``, or the best there is.

    Raises:
        ConfigError: it is no device, or torch does not see it.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if text is None:
        return torch.device("cuda", 0) if count else torch.device("cpu")
    match = re.fullmatch(r"cpu|cuda(?::(\d+))?", text)
    if match is None:
        raise ConfigError(f"--device: {text!r} is no device of this program; give cpu, cuda or cuda:NUMBER")
    if text == "cpu":
        return torch.device("cpu")
    if not count:
        raise ConfigError(f"--device: {text}, but this machine has {no_gpu(nvidia_smi())}; correct that or give cpu")
    index = int(match[1] or 0)
    if index >= count:
        raise ConfigError(f"--device: {text}, but torch sees {count} GPU(s); give one of cuda:0 to cuda:{count - 1}")
    return torch.device("cuda", index)


def tile_rows(K: int, V: int, dtype: torch.dtype, device: torch.device) -> list[dict]:
    """Tiles and shared memory of the forward pass and of the roles of the backward pass; with SiLU where K = V."""
    silu = K == V
    head = {"K": K, "V": V, "dtype": NAMES[dtype], "silu": silu}
    try:
        _, available, _ = table.properties(device)
        forward = table.attention_tiles(K, V, dtype, silu, device)
        backward = table.attention_bwd_tiles(K, V, dtype, silu, device)
    # Too little shared memory for any tiles, or a GPU that does not answer.
    except (ValueError, RuntimeError) as error:
        return [head | {"pass": "both", "problem": message_of(error)}]
    launch = backward.num_warps, backward.num_stages
    walks = [
        ("forward", K, forward),
        ("backward dq, dk", V, table.Tiles(backward.chunk_k, backward.columns_k, *launch)),
        ("backward dv", K, table.Tiles(backward.chunk_v, backward.columns_v, *launch)),
    ]
    return [
        head
        | {"pass": name, **tiles._asdict()}
        | {"shared_memory_bytes": table.shared_memory(tiles, table.block(inner), dtype, silu)}
        | {"available_bytes": available}
        for name, inner, tiles in walks
    ]


def format_tiles(rows: list[dict]) -> str:
    """The table of `tile_rows`."""
    lines = [
        "attention tiles (with SiLU where K = V); shared memory in KiB: what a program needs at most, and can have",
        f"  {'K x V':<8}  dtype  {'pass':<15}  chunk  columns  warps  stages  needs  can have",
    ]
    for row in rows:
        start = f"  {row['K']}x{row['V']}".ljust(12) + f"{row['dtype']:<5}  {row['pass']:<15}  "
        if "problem" in row:
            lines.append(start + row["problem"])
            continue
        lines.append(
            f"{start}{row['chunk']:>5}  {row['columns']:>7}  {row['num_warps']:>5}  {row['num_stages']:>6}  "
            f"{row['shared_memory_bytes'] / KIB:>5.1f}  {row['available_bytes'] / KIB:>8.1f}"
        )
    return "\n".join(lines)


def format_check(row: dict, width: int) -> str:
    """One line: PASS or FAIL, the check, and its relative error beside the bound or its message."""
    if "errors" in row:
        error = "not finite" if row["error"] is None else f"{row['error']:.1e}"
        result = f"{error:>10} {'<=' if row['ok'] else '> '} {row['bound']:.0e}  {row['worst']}"
    else:
        result = row["message"]
    return f"  {'PASS' if row['ok'] else 'FAIL'}  {row['check']:<{width}}  {result}"


def cure(cache: dict) -> str:
    """What to do about a failed check, the likeliest first."""
    return (
        "  1. follow the message of the first FAIL, if it names a cure; later ones may be its consequence\n"
        "  2. install the tested versions: pip install -c constraints.txt torch triton (in a checkout of TNL)\n"
        f"  3. remove Triton's cache folder, rm -r {cache['folder']}, and run tnl doctor again\n"
        "  4. if it still fails, do not train here; report it with this output and the file of --json"
    )


def save(file: Path | None, figures: dict) -> None:
    """Write the figures as JSON, if a file is given.

    Raises:
        CannotWriteError: the disk refused.
    """
    if file is None:
        return
    try:
        write_atomically(file.expanduser(), json.dumps(figures, indent=1) + "\n")
    except OSError as error:
        raise CannotWriteError(f"{file}: {error.strerror}; choose another file") from None

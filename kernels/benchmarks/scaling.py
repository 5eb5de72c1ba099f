"""Joins results of `tnl bench train` on different numbers of GPUs into one, with the efficiency of each.

    python kernels/benchmarks/scaling.py RESULT.json ONE_GPU.json FOUR_GPUS.json ...

Efficiency is tokens per GPU and second over those of one GPU with the same model, kind and recomputation, at the
length that is nearest to a GPU's own part of a sequence.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path

from tnl_kernels.record import save

MACHINE = ("gpu", "torch", "triton")
# Overrides that one GPU cannot share, or that change only how its work is divided.
DIVIDING = ("train.sequence_parallel", "train.zero_stage", "train.tensor_parallel", "train.reduce_gradients")


def overrides_of(result: dict) -> tuple[str, dict[str, str]]:
    """The model's name and the overrides of the command that measured ``result``.

    Raises:
        ValueError: it is another command.
    """
    words = shlex.split(result["command"])
    if words[:3] != ["tnl", "bench", "train"]:
        raise ValueError(f"{result['command']!r} is not tnl bench train")
    given = dict(word.split("=", 1) for word in words[4:] if "=" in word and not word.startswith("--"))
    return words[3], given


def joined(results: list[dict]) -> dict:
    """One result whose rows are those of ``results``, the fewest GPUs first.

    Raises:
        ValueError: they were measured on different machines, or not by `tnl bench train`.
    """
    if len({tuple(result[key] for key in MACHINE) for result in results}) > 1:
        raise ValueError("measured on different GPUs, or with different torch or triton: join results of one machine")
    rows = []
    for result in sorted(results, key=lambda result: result["world_size"]):
        model, given = overrides_of(result)
        part = int(given.get("train.sequence_parallel", 1))
        layout = ", ".join(f"{key.removeprefix('train.')}={value}" for key, value in given.items())
        shared = (model, *sorted(f"{key}={value}" for key, value in given.items() if key not in DIVIDING))
        for row in result["rows"]:
            rows.append(
                {
                    "model": model,
                    "gpus": result["world_size"],
                    "layout": layout or None,
                    "tokens_per_step": result["tokens_per_step"],
                    "micro_tokens": result["micro_tokens"],
                    "overrides": [f"{key}={value}" for key, value in given.items()],
                    "shared": (*shared, row["kind"]),
                    "own_length": row["length"] // part,
                }
                | {key: row.get(key) for key in ("kind", "length", "tgs", "of_limit", "mfu", "peak_gib", "oom")}
            )
    for row in rows:
        single = [other for other in rows if other["gpus"] == 1 and other["shared"] == row["shared"] and other["tgs"]]
        row |= {"one_gpu_length": None, "efficiency": None}
        if single and row["tgs"] and row["gpus"] > 1:
            one = min(single, key=lambda other: abs(other["length"] - row["own_length"]))
            row |= {"one_gpu_length": one["length"], "efficiency": row["tgs"] / one["tgs"]}
    hidden = ("shared", "own_length")
    return {
        **{key: results[0][key] for key in MACHINE},
        "command": "; ".join(result["command"] for result in results),
        "rows": [{key: value for key, value in row.items() if key not in hidden} for row in rows],
    }


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("result", type=Path, help="the file to write")
    parser.add_argument("parts", type=Path, nargs="+", help="what tnl bench train --json wrote")
    arguments = parser.parse_args(argv)
    try:
        save(joined([json.loads(path.read_text(encoding="utf-8")) for path in arguments.parts]), arguments.result)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())

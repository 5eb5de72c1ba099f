"""`tnl probe`: what a model does with long texts. Each probe prints, and writes JSON and a figure to a folder."""

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from tnl_kernels.record import environment
from tqdm import tqdm

from tnl.config import read_yaml
from tnl.errors import CannotWriteError, ConfigError, DataError
from tnl.evaluation.harness_package import check_harness
from tnl.evaluation.haystack import start_ids, text_ids
from tnl.evaluation.position_loss import position_loss
from tnl.evaluation.retrieval import Retrieval, haystack_of, make_samples, retrieve, summary
from tnl.evaluation.state_reader import PIECE_TOKENS
from tnl.files import write_atomically
from tnl.generation.load import load_model
from tnl.model.state import state_bytes
from tnl.tools.bench_models import numbers, peak_gib, start_peak, synchronize
from tnl.tools.probe_plots import draw_grids, draw_lengths, draw_positions
from tnl.training.export import resolve_model
from tnl.training.run_folder import CONFIG

Report = Callable[[str], None]
RSS_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes


def probe_retrieval(
    name: str,
    kind: Retrieval,
    *,
    lengths: Sequence[int],
    depths: int,
    samples: int,
    candidates: int,
    text: Path | None,
    seed: int,
    output: Path,
    report: Report = print,
) -> dict:
    """A number that stands at ``depths`` places of texts of each length: is it the answer, or at least more likely
    than others?

    Args:
        name: run folder, model folder or hub name.
        lengths: tokens of the prompts, in rising order.
        samples: numbers for each place.
        candidates: numbers that the true one is ranked among.
        text: what the haystack is of; None takes the standard library's source code.

    Raises:
        ConfigError: see `retrieve`; the model cannot be loaded.
        DataError: the text is too short.
        CannotWriteError: the folder cannot be written to; found out first.
    """
    _prepare(output)
    model, tokenizer = _load(name)
    repeats = kind.filler is not None
    haystack = haystack_of(kind, tokenizer, lengths[-1]) if repeats else text_ids(tokenizer, text, lengths[-1])
    places = np.linspace(0, 1, depths).tolist() if depths > 1 else [0.5]
    facts = make_samples(kind, tokenizer, len(lengths) * depths * samples, candidates, seed)
    with tqdm(total=sum(lengths) * depths * samples, unit="token", unit_scale=True, disable=None) as bar:
        found = retrieve(model, tokenizer, kind, haystack, facts, lengths, places, finished=bar.update)
    of = {"kind": kind.name, "lengths": list(lengths), "depths": places, "candidates": candidates, "seed": seed}
    of |= {"text": None if text is None else str(text), "template": asdict(kind)}
    result = _described(name, model, of) | summary(found, candidates)
    panels = [
        (title, np.array([row[key] for row in result["rows"]]).reshape(len(lengths), depths).T)
        for title, key in (
            ("greedy decoding gives the number", "exact_match"),
            (f"most likely of {candidates} numbers", "most_likely"),
        )
    ]
    labels = ("depth of the fact", "tokens of the prompt")
    rows, columns = [f"{place:.0%}" for place in places], [f"{length:,}" for length in lengths]
    _write(
        output, kind.name, result, lambda path: draw_grids(panels, rows, columns, labels, f"{kind.name}: {name}", path)
    )
    report(
        f"{kind.name}, {len(found)} prompts of {lengths[0]:,} to {lengths[-1]:,} tokens: greedy decoding gives the "
        f"number in {_percent(result, 'exact_match')}, it is the most likely of {candidates} in "
        f"{_percent(result, 'most_likely')}, chance {result['chance']:.0%}"
    )
    report(f"wrote {output / kind.name}.json and .png")
    return result


def probe_positions(
    name: str,
    *,
    length: int,
    texts: int,
    buckets: int,
    trained: int | None,
    text: Path | None,
    output: Path,
    report: Report = print,
) -> dict:
    """Loss by position, in ``texts`` consecutive parts of a text of ``length`` tokens each.

    Args:
        trained: tokens of a training sequence, a mark in the figure; None takes it from a run folder.

    Raises:
        ConfigError, DataError, CannotWriteError: as `probe_retrieval`.
        NonFiniteError: a loss is not finite.
    """
    if buckets > length:
        raise ConfigError(f"--buckets: {buckets} of {length} positions; give at most as many")
    _prepare(output)
    model, tokenizer = _load(name)
    trained = trained or _trained_length(Path(name))
    start = start_ids(tokenizer)
    # Without a token that begins a text, its first token is read and not predicted.
    own = length + 1 - len(start)
    parts = text_ids(tokenizer, text, texts * own).reshape(texts, own)
    ids = np.concatenate([np.tile(start, (texts, 1)), parts], axis=1)
    rows = position_loss(model, ids, buckets).rows()
    of = {"length": length, "texts": texts, "trained": trained, "text": None if text is None else str(text)}
    result = _described(name, model, of) | {"rows": rows}
    _write(output, "positions", result, lambda path: draw_positions(rows, trained, f"Loss by position: {name}", path))
    for row in rows:
        error = "" if row["loss_stderr"] is None else f" +- {row['loss_stderr']:.4f}"
        report(f"positions {row['begin']:>9,} to {row['end']:>9,}: {row['loss']:.4f}{error} nats")
    report(f"wrote {output / 'positions'}.json and .png")
    return result


def probe_lengths(name: str, *, lengths: Sequence[int], output: Path, report: Report = print) -> dict:
    """Time and memory of the log-likelihood of one text of random tokens of each length, the shortest first.

    Raises:
        ConfigError, CannotWriteError: as `probe_retrieval`.
    """
    _prepare(output)
    model, _ = _load(name)
    draw = np.random.default_rng(0)
    rows = []
    for length in lengths:
        ids = draw.integers(3, model.config.vocab_size, (1, 1 + length))
        # Compiles: a first piece, one behind a state, and the last, which may be a single token.
        position_loss(model, ids[:, : 1 + 2 * PIECE_TOKENS + length % PIECE_TOKENS], 1)
        start_peak(model.device)
        synchronize(model.device)
        began = time.perf_counter()
        loss = position_loss(model, ids, 1)
        synchronize(model.device)
        seconds = time.perf_counter() - began
        row = {"tokens": length, "seconds": seconds, "tokens_per_s": length / seconds}
        row |= {"peak_gib": peak_gib(model.device)}
        row |= {"peak_process_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT / 2**30}
        row |= {"loss": float(loss.losses[0, 0])}
        rows.append(row)
        peak = row["peak_gib"] or row["peak_process_gib"]
        report(f"{length:>9,} tokens: {seconds:.3f} s, {row['tokens_per_s']:,.0f} tokens/s, peak {peak:.3f} GiB")
    of = {"lengths": list(lengths), "state_bytes": state_bytes(model.config)}
    command = {"command": f"tnl probe lengths {name} --lengths {numbers(lengths)}"}
    result = _described(name, model, of) | command | {"rows": rows}
    _write(output, "lengths", result, lambda path: draw_lengths(rows, f"Reading one text: {name}", path))
    report(f"wrote {output / 'lengths'}.json and .png")
    return result


def probe_ruler(
    name: str,
    *,
    tasks: Sequence[str],
    lengths: Sequence[int],
    samples: int,
    output: Path,
    allow_empty: bool = False,
    report: Report = print,
) -> dict:
    """RULER's tasks; those whose data cannot be had here are named with what they need, the others run.

    Args:
        allow_empty: count an empty answer as a wrong one.

    Raises:
        ConfigError: no such task or length, no lm-eval, or no task at all could run.
        DataError: answers are empty; raised when all is written.
        CannotWriteError: as `probe_retrieval`.
    """
    check_harness()
    from tnl.evaluation.ruler import check_tasks, ruler

    check_tasks(tasks, lengths)
    _prepare(output)
    model, tokenizer = _load(name)

    def show(row: dict) -> None:
        error = f" +- {row['score_stderr']:.1%}" if row.get("score_stderr") is not None else ""
        report(f"{row['task']}, {row['length']:,} tokens: {row['problem'] or format(row['score'], '.1%') + error}")

    rows = ruler(model, tokenizer, tasks, lengths, samples, show, allow_empty=allow_empty)
    result = _described(name, model, {"tasks": list(tasks), "lengths": list(lengths)}) | {"rows": rows}
    scores = np.array([row.get("score", np.nan) for row in rows]).reshape(len(tasks), len(lengths))
    columns, labels = [f"{length:,}" for length in lengths], ("task", "tokens of the prompt")
    _write(
        output,
        "ruler",
        result,
        lambda path: draw_grids([("score", scores)], tasks, columns, labels, f"RULER: {name}", path),
    )
    report(f"wrote {output / 'ruler'}.json and .png")
    refused = [row for row in rows if row.get("empty_answers") and row["problem"]]
    if refused:
        names = ", ".join(dict.fromkeys(row["task"] for row in refused))
        raise DataError(f"{names}: answers are empty; give --allow-empty to count them as wrong")
    if not np.isfinite(scores).any():
        raise ConfigError("--tasks: none of them could run; see the reasons above")
    return result


def _load(name: str):
    """Model and tokenizer; in fp32 on a CPU."""
    return load_model(resolve_model(name), dtype=None if torch.cuda.is_available() else torch.float32)


def _described(name: str, model, settings: dict) -> dict:
    """What figures must say of themselves."""
    return environment() | {"model": name, "dtype": str(model.dtype).removeprefix("torch."), "settings": settings}


def _percent(result: dict, key: str) -> str:
    error = result[f"{key}_stderr"]
    return f"{result[key]:.1%}" + ("" if error is None else f" +- {error:.1%}")


def _trained_length(path: Path) -> int | None:
    """Of a run folder."""
    file = path / CONFIG
    return read_yaml(file)["train"]["sequence_length"] if file.is_file() else None


def _prepare(folder: Path) -> None:
    """Make the folder before the work, not after it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CannotWriteError(f"{folder}: {error.strerror}; give another --output") from None
    if not os.access(folder, os.W_OK):
        raise CannotWriteError(f"{folder}: not writable; give another --output")


def _write(folder: Path, name: str, result: dict, draw: Callable[[Path], None]) -> None:
    try:
        write_atomically(folder / f"{name}.json", json.dumps(result, indent=1) + "\n")
        draw(folder / f"{name}.png")
    except OSError as error:
        raise CannotWriteError(f"{folder}: {error.strerror}; free the disk, or give another --output") from None

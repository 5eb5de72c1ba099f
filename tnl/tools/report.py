"""The report of a run folder: plots of its metrics and a table of what the run reached and cost."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tnl.config import read_yaml
from tnl.errors import CannotWriteError, DataError
from tnl.tools.figures import BLUE, GREEN, ORANGE, STYLE, number_formatter, save_figure, short
from tnl.tools.report_page import write_page
from tnl.tools.report_scores import Series, draw_scores, read_series, score_rows
from tnl.training.status import read_status

# Fields of every row of a kind; all but "skipped" are numbers, and null stands for one that is not finite or not known.
FIELDS = {
    "train": (
        "step",
        "time",
        "tokens",
        "skipped",
        "loss",
        "grad_norm",
        "lr",
        "tokens_per_s",
        "tgs",
        "mfu",
        "step_time_s",
    ),
    "evaluation": ("step", "tokens", "loss"),
    "layers": ("step",),
    "scores": ("step", "tokens"),
}
NEVER_NULL = ("step", "time", "tokens", "skipped")


@dataclass(frozen=True)
class Report:
    """What `report` wrote and found."""

    folder: Path  # holds loss.png, run.png, scores.png where there are scores, and index.html, which shows them
    rows: list[tuple[str, str]]  # the table: what, value with its unit
    notes: list[str]  # what the reader must know to trust the table


@dataclass(frozen=True)
class Metrics:
    """The rows of a run as columns ``[N]`` by field name (float64, NaN for null).

    ``scores`` holds what else is in rows of scores, and of evaluations by source, each over the tokens trained on.
    """

    train: dict[str, np.ndarray]
    evaluation: dict[str, np.ndarray]
    notes: list[str]
    scores: dict[str, Series]


def report(run_dir: Path) -> Report:
    """Write ``loss.png``, ``run.png`` and ``index.html`` to ``run_dir/report`` and return them with a table of the run.

    Reads ``metrics.jsonl``, and ``run_status.json`` and ``config.yaml`` if there are any. Raises DataError for metrics
    that are missing, empty or malformed, ConfigError for a ``config.yaml`` that is no YAML, and CannotWriteError if the
    plots cannot be written.
    """
    run_dir = Path(run_dir)
    metrics = read_metrics(run_dir)
    window = max(1, metrics.train["step"].size // 50)
    folder = run_dir / "report"
    try:
        folder.mkdir(exist_ok=True)
        name = run_dir.resolve().name
        _plot(metrics, window, name, folder)
        plots = ["loss.png", "run.png"]
        if metrics.scores:
            draw_scores(metrics.scores, name, folder / "scores.png")
            plots.append("scores.png")
        rows = _run_rows(run_dir) + _table(metrics, window) + score_rows(metrics.scores)
        write_page(folder, name, rows, run_dir / "metrics.jsonl", plots)
    except OSError as error:
        raise CannotWriteError(f"{folder}: cannot write the report: {error}; free the disk or the folder") from error
    return Report(folder, rows, metrics.notes)


def read_metrics(run_dir: Path) -> Metrics:
    """Read and check ``run_dir/metrics.jsonl``: one JSON object a line, of a kind of `FIELDS`.

    A killed run may leave a torn last line, which is left out with a note. Raises DataError with file and line.
    """
    path = Path(run_dir) / "metrics.jsonl"
    if not path.is_file():
        raise DataError(f"{path}: not found; pass the folder of a run that has logged a step")
    lines = path.read_bytes().split(b"\n")
    rows: dict[str, list[dict[str, Any]]] = {kind: [] for kind in FIELDS}
    notes = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:  # not JSON, or not UTF-8
            if number == len(lines):  # without a newline at its end
                notes.append(f"{path.name}:{number} is torn (the run was stopped while it wrote) and left out")
                continue
            raise DataError(f"{path}:{number}: not a JSON object ({error}); repair or remove this line") from error
        problem = _problem(row)
        if problem:
            raise DataError(f"{path}:{number}: {problem}; repair or remove this line")
        rows[row["kind"]].append(row)
    if not rows["train"]:
        raise DataError(f"{path}: no training steps; let the run log a step, then report again")
    columns = (_columns(rows["train"], "train"), _columns(rows["evaluation"], "evaluation"))
    return Metrics(*columns, notes, read_series(rows["evaluation"], rows["scores"]))


def _problem(row: Any) -> str | None:
    """What is wrong with one parsed row, or None."""
    if not isinstance(row, dict):
        return f"a {type(row).__name__} where a JSON object is expected"
    kind = row.get("kind")
    if not isinstance(kind, str) or kind not in FIELDS:
        return f"kind {kind!r} is not one of {', '.join(FIELDS)}"
    for field in FIELDS[kind]:
        if field not in row:
            return f"{kind} row without {field!r}"
        value = row[field]
        if value is None and field not in NEVER_NULL:
            continue
        wanted = {"skipped": bool, "step": int}.get(field, (int, float))
        if not isinstance(value, wanted) or (isinstance(value, bool) and field != "skipped"):
            return f"{field} is {value!r}, which is not a {'boolean' if field == 'skipped' else 'number'}"
    return None


def _columns(rows: list[dict[str, Any]], kind: str) -> dict[str, np.ndarray]:
    """Rows as columns."""
    columns = {field: np.array([row[field] for row in rows], np.float64) for field in FIELDS[kind]}
    for values in columns.values():
        values[~np.isfinite(values)] = math.nan
    return columns


def _smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Centred mean over about ``window`` values, ``[N]``: NaN values are left out of the means, and stay NaN.

    Near the start the window shrinks to both sides alike, since a one-sided one would lie far below the steep first
    losses.
    """
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    numbers = np.concatenate([[0], np.cumsum(finite)])
    places = np.arange(values.size)
    reach = np.minimum(window // 2, places)
    first, end = places - reach, np.minimum(places + reach + 1, values.size)
    return np.where(finite, (sums[end] - sums[first]) / np.maximum(numbers[end] - numbers[first], 1), math.nan)


def _table(metrics: Metrics, window: int) -> list[tuple[str, str]]:
    """The table of `Report`; rates are means over the logged steps that were not skipped."""
    train, evaluation = metrics.train, metrics.evaluation
    taken = train["skipped"] == 0
    losses = train["loss"][np.isfinite(train["loss"])][-window:]
    rows = [
        ("steps", f"{train['step'][-1]:,.0f}"),
        ("tokens", short(train["tokens"][-1])),
        (f"final train loss, mean of {losses.size} logged", _loss_text(_mean(losses))),
    ]
    if np.isfinite(evaluation["loss"]).any():
        best = np.nanargmin(evaluation["loss"])
        for which, row in (("best", best), ("last", -1)):
            at = f"{which} held-out loss, step {evaluation['step'][row]:,.0f}"
            rows.append((at, _loss_text(evaluation["loss"][row])))
    mfu = _mean(train["mfu"][taken])
    wall_s = train["time"].max() - train["time"].min() + np.nan_to_num(train["step_time_s"][0])
    return [
        *rows,
        ("tokens/s, mean", short(_mean(train["tokens_per_s"][taken]))),
        ("tokens/s per GPU, mean", short(_mean(train["tgs"][taken]))),
        ("model FLOPs utilization, mean", "not known" if math.isnan(mfu) else f"{mfu:.1%}"),
        ("wall time, pauses included", _duration(wall_s)),
        ("skipped steps", f"{(~taken).sum():,}"),
    ]


def _run_rows(run_dir: Path) -> list[tuple[str, str]]:
    """How the last attempt stands and what the run was asked to do, as far as the folder tells."""
    rows = []
    status = read_status(run_dir)
    # Another program's file of this name is none of a run.
    if _is_status(status):
        code = f", exit code {status['exit_code']}" if "exit_code" in status else ""
        rows.append(("status", f"{status['state']}, step {status['step']:,} of {status['total_steps']:,}{code}"))
    path = run_dir / "config.yaml"
    if path.is_file():
        train = read_yaml(path).get("train")
        if isinstance(train, dict):
            rows.append(("train settings", ", ".join(f"{key} {value}" for key, value in train.items())))
    return rows


def _is_status(found: Any) -> bool:
    """Whether the content of ``run_status.json`` is what `write_status` writes."""
    numbers = ("step", "total_steps")
    return isinstance(found, dict) and "state" in found and all(isinstance(found.get(name), int) for name in numbers)


def _mean(values: np.ndarray) -> float:
    """Mean of the values that are known, NaN if none is."""
    known = values[np.isfinite(values)]
    return float(known.mean()) if known.size else math.nan


def _loss_text(nats: float) -> str:
    return f"{nats:.4f} nats, {nats / math.log(2):.4f} bits" if math.isfinite(nats) else "not finite"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min {seconds:02d} s"


def _plot(metrics: Metrics, window: int, name: str, folder: Path) -> None:
    """Write ``loss.png`` and ``run.png``."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure  # without pyplot: no display and no global state; saving uses Agg
    from matplotlib.ticker import LogLocator, NullFormatter

    train = metrics.train
    with rc_context(STYLE):
        figure = Figure(figsize=(11, 4.4), layout="constrained")
        whole, late = figure.subplots(1, 2)
        _draw_loss(whole, metrics, window, f"{name}: loss")
        _draw_loss(late, metrics, window, "The last half")
        _show_last_half(late, metrics)
        save_figure(figure, folder / "loss.png")

        figure = Figure(figsize=(11, 7), layout="constrained")
        figure.suptitle(name, x=0.01, ha="left", fontsize=13, fontweight="bold")
        (loss, rate), (norm, speed) = figure.subplots(2, 2)
        _draw_loss(loss, metrics, window, "Loss")
        _draw_series(rate, train, "lr", 1, BLUE, "Learning rate", "learning rate")
        rate.yaxis.set_major_formatter("{x:g}")
        rate.set_ylim(bottom=0)
        _draw_series(norm, train, "grad_norm", window, BLUE, "Gradient norm", "L2 norm before clipping")
        norm.set_yscale("log")
        norm.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        norm.yaxis.set_major_formatter("{x:g}")
        norm.yaxis.set_minor_formatter(NullFormatter())
        _mark_skipped(norm, train)
        _draw_series(speed, train, "tokens_per_s", window, GREEN, "Throughput", "tokens per second")
        speed.yaxis.set_major_formatter(number_formatter())
        speed.set_ylim(bottom=0)
        save_figure(figure, folder / "run.png")


def _draw_loss(axes: Any, metrics: Metrics, window: int, title: str) -> None:
    """Train and held-out loss in nats on the left scale and in bits on the right one."""
    train, evaluation = metrics.train, metrics.evaluation
    _draw_series(axes, train, "loss", window, BLUE, title, "nats per token", label="train")
    if np.isfinite(evaluation["loss"]).any():
        label = f"held-out, best {np.nanmin(evaluation['loss']):.3f} nats"
        axes.plot(evaluation["tokens"], evaluation["loss"], "o", ms=6, mec="white", mew=0.8, color=ORANGE, label=label)
    bits = axes.secondary_yaxis("right", functions=(lambda nats: nats / math.log(2), lambda bits: bits * math.log(2)))
    bits.set_ylabel("bits per token")
    axes.legend(loc="upper right")


def _show_last_half(axes: Any, metrics: Metrics) -> None:
    """Limit the axes to the last half of the tokens: beside the first losses, the late ones are one flat line."""
    end = metrics.train["tokens"][-1]
    late = np.concatenate([rows["loss"][rows["tokens"] >= end / 2] for rows in (metrics.train, metrics.evaluation)])
    late = late[np.isfinite(late)]
    if late.size:
        axes.set_ylim(late.min() - 0.01, late.max() + 0.01 + 0.3 * np.ptp(late))  # room above for the legend
    axes.set_xlim(0.49 * end, 1.01 * end)


def _draw_series(
    axes: Any, train: dict[str, np.ndarray], field: str, window: int, color: str, title: str, unit: str, label: str = ""
) -> None:
    """One field over the tokens seen: the logged values, pale, under their running mean where there are enough."""
    axes.set(title=title, xlabel="training tokens", ylabel=unit)
    axes.xaxis.set_major_formatter(number_formatter())
    axes.margins(x=0.02)
    if window == 1:
        marker = "." if train["step"].size <= 30 else ""  # a few values, or one, do not show as a line
        axes.plot(train["tokens"], train[field], marker=marker, color=color, label=label)
        return
    axes.plot(train["tokens"], train[field], color=color, alpha=0.3, lw=0.7, label=label and f"{label}, logged")
    mean = _smooth(train[field], window)
    axes.plot(train["tokens"], mean, color=color, label=label and f"{label}, mean of {window} logged")


def _mark_skipped(axes: Any, train: dict[str, np.ndarray]) -> None:
    """A tick on the lower edge at each step whose update was not applied."""
    skipped = train["tokens"][train["skipped"] == 1]
    if skipped.size:
        at_edge = axes.get_xaxis_transform()
        label = f"skipped step ({skipped.size})"
        axes.plot(skipped, np.full(skipped.size, 0.02), "^", ms=6, color=ORANGE, transform=at_edge, label=label)
        axes.legend(loc="upper right")

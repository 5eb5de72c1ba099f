"""Runs side by side: held-out loss by tokens and by the time that training took. Results of `tnl evaluate` are left to
`tnl.tools.score_comparison`."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tnl.config import read_yaml
from tnl.errors import CannotWriteError, ConfigError, DataError
from tnl.files import sha256_of, write_atomically
from tnl.tools.figures import BLUE, GREEN, GREY, ORANGE, STYLE, number_formatter, save_figure
from tnl.tools.report import read_metrics
from tnl.tools.score_comparison import compare_scores, distinct_names, is_result, lines
from tnl.tools.tables import format_rows
from tnl.training.metrics import finite_or_none
from tnl.training.run_folder import TOKENIZER

# By the order of the runs; of lines and markers, so that a print in grey still tells them apart.
LINES = ((BLUE, "o-"), (ORANGE, "s--"), (GREEN, "^-."), (GREY, "D:"))
# What says which tokens are held out. Not the window: a model that gains by a longer one may show it.
HELDOUT_KEYS = (("data", "shards"), ("data", "source"), ("data", "heldout_fraction"), ("evaluation", "max_tokens"))


@dataclass(frozen=True)
class Curve:
    """The held-out losses of a run: columns [N] over its evaluations.

    Attributes:
        name: of the run folder; ``kind`` of its model, tnl or llama.
        tokens, seconds: trained on before each evaluation, and for how long, evaluations and checkpoints left out.
        loss: nats per token.
        rate: tokens per second of training.
        heldout: what says which tokens the losses are of, by configuration key.
    """

    name: str
    kind: str
    tokens: np.ndarray
    seconds: np.ndarray
    loss: np.ndarray
    rate: float
    heldout: dict[str, str]

    def loss_after(self, seconds: float) -> float:
        """Loss after so much training, between two evaluations by a straight line; NaN before the first one."""
        return float(np.interp(seconds, self.seconds, self.loss, left=math.nan))


def read_curve(run: Path) -> Curve:
    """The curve of a run folder.

    Raises:
        DataError: its metrics are missing or malformed, or hold no held-out loss.
    """
    metrics = read_metrics(run)
    train, evaluation = metrics.train, metrics.evaluation
    known = np.isfinite(evaluation["loss"])
    if not known.any():
        raise DataError(
            f"{run}: no held-out loss to compare; prepare the data with heldout_fraction above 0, and let the run end "
            "or set evaluation.every"
        )
    order = np.argsort(train["step"], kind="stable")
    seconds = np.cumsum(train["step_time_s"][order])
    tokens, loss = evaluation["tokens"][known], evaluation["loss"][known]
    config = run / "config.yaml"
    settings = read_yaml(config) if config.is_file() else {}
    return Curve(
        run.resolve().name,
        settings.get("model", {}).get("kind", "tnl"),
        tokens,
        np.interp(tokens, train["tokens"][order], seconds),
        loss,
        float(train["tokens"][order][-1] / seconds[-1]),
        _heldout(run, settings),
    )


def _heldout(run: Path, settings: dict) -> dict[str, str]:
    found = {f"{section}.{key}": str(settings.get(section, {}).get(key)) for section, key in HELDOUT_KEYS}
    tokenizer = run / TOKENIZER / "tokenizer.model"
    return found | ({"tokenizer": sha256_of(tokenizer)[:12]} if tokenizer.is_file() else {})


def _differences(curves: list[Curve], names: list[str]) -> list[str]:
    """A note, if anything says that the losses are of different tokens."""
    differences = []
    for key in dict.fromkeys(key for curve in curves for key in curve.heldout):
        values = [curve.heldout.get(key, "not known") for curve in curves]
        if len(set(values)) > 1:
            told = ", ".join(f"{value} in {name}" for name, value in zip(names, values, strict=True))
            differences.append(f"{key} is {told}")
    return [f"held-out losses may be of different tokens: {'; '.join(differences)}"] if differences else []


def show_comparison(paths: list[Path], folder: Path, report: Callable[[str], None] = print) -> None:
    """Compare run folders, or two results of `tnl evaluate`, and print what was found.

    Raises:
        ConfigError: some of both; see `compare` and `compare_scores`.
        DataError, CannotWriteError: see there.
    """
    results = [path for path in paths if is_result(path)]
    if results and len(results) < len(paths):
        other = next(path for path in paths if path not in results)
        raise ConfigError(
            f"{other}: no result of tnl evaluate, and {results[0]} is one; compare results with results, or runs with "
            "runs"
        )
    if results:
        found, notes = compare_scores(paths, folder)
        report(format_rows(f"first {paths[0]}, second {paths[1]}: scores, difference, interval of 95 %", lines(found)))
    else:
        rows, notes = compare(paths, folder)
        for row in rows:
            equal = row["heldout_loss_at_equal_time"]
            facts = {
                "tokens": f"{row['tokens']:,}",
                "training time": f"{row['seconds']:,.0f} s, {row['tokens_per_s']:,.0f} tokens/s",
                "held-out loss": f"{row['heldout_loss']:.4f} nats",
                "held-out loss when the shortest run had ended": "not known" if equal is None else f"{equal:.4f} nats",
            }
            report(format_rows(f"{row['run']} ({row['kind']})", list(facts.items())))
    for note in notes:
        report(f"note: {note}")
    report(f"plot: {folder / 'comparison.png'}")


def compare(runs: list[Path], folder: Path) -> tuple[list[dict], list[str]]:
    """Write ``comparison.png`` and ``comparison.json`` to ``folder``; returns a row for each run, and notes on
    what keeps their losses from being compared.

    Raises:
        ConfigError: fewer than two runs, or more than there are kinds of lines.
        DataError: see `read_curve`.
        CannotWriteError: the folder cannot be written to.
    """
    if not 2 <= len(runs) <= len(LINES):
        raise ConfigError(f"runs: {len(runs)} given; compare 2 to {len(LINES)} run folders")
    curves = [read_curve(run) for run in runs]
    shortest = min(curve.seconds[-1] for curve in curves)
    names = distinct_names(runs)
    rows = [
        {
            "run": name,
            "kind": curve.kind,
            "tokens": int(curve.tokens[-1]),
            "tokens_per_s": curve.rate,
            "seconds": float(curve.seconds[-1]),
            "heldout_loss": float(curve.loss[-1]),
            "heldout_loss_at_equal_time": finite_or_none(curve.loss_after(shortest)),
        }
        for name, curve in zip(names, curves, strict=True)
    ]
    notes = _differences(curves, names)
    columns = ("tokens", "seconds", "loss")
    points = {
        name: {key: getattr(curve, key).tolist() for key in columns} for name, curve in zip(names, curves, strict=True)
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _draw(curves, names, folder / "comparison.png")
        text = json.dumps({"rows": rows, "notes": notes, "curves": points}, indent=1, allow_nan=False)
        write_atomically(folder / "comparison.json", text + "\n")
    except OSError as error:
        raise CannotWriteError(
            f"{folder}: cannot write the comparison: {error}; free the disk or the folder"
        ) from error
    return rows, notes


def _draw(curves: list[Curve], names: list[str], path: Path) -> None:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=(11, 4.4), layout="constrained")
        for axes, key, title, unit in zip(
            figure.subplots(1, 2),
            ("tokens", "seconds"),
            ("Held-out loss by tokens", "Held-out loss by training time"),
            ("training tokens", "seconds of training"),
            strict=True,
        ):
            for curve, name, (color, style) in zip(curves, names, LINES, strict=False):
                label = f"{name} ({curve.kind})"
                axes.plot(getattr(curve, key), curve.loss, style, ms=4, color=color, label=label)
            axes.set(title=title, xlabel=unit, ylabel="nats per token")
            axes.xaxis.set_major_formatter(number_formatter())
            axes.legend()
        save_figure(figure, path)

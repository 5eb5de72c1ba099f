"""Benchmarks and losses by source in the report of a run."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tnl.data.source_names import SOURCE_LOSS
from tnl.tools.figures import BLUE, STYLE, number_formatter, save_figure

ERROR = " stderr"  # behind the name of a score
WIDTH = 3  # panels side by side


@dataclass(frozen=True, eq=False)
class Series:
    """A score over a run: columns [N], NaN where it is not known."""

    tokens: np.ndarray
    values: np.ndarray
    errors: np.ndarray


def read_series(evaluations: Sequence[dict[str, Any]], scores: Sequence[dict[str, Any]]) -> dict[str, Series]:
    """By name, what rows of a run's metrics hold beside the fields that all have: losses by source of the first kind,
    everything of the second."""
    points: dict[str, list[tuple]] = {}
    for row in evaluations:
        for name in row:
            if name.startswith(SOURCE_LOSS):
                label = f"held-out loss, {name.removeprefix(SOURCE_LOSS)}"
                points.setdefault(label, []).append((row["tokens"], row[name], None))
    for row in scores:
        for name in row:
            if name not in ("kind", "time", "step", "tokens") and not name.endswith(ERROR):
                points.setdefault(name, []).append((row["tokens"], row[name], row.get(name + ERROR)))
    return {name: Series(*np.array(found, dtype=np.float64).T) for name, found in points.items()}


def score_rows(series: dict[str, Series]) -> list[tuple[str, str]]:
    """The last value of each, for the table of a report."""
    rows = []
    for name, found in series.items():
        error = "" if math.isnan(found.errors[-1]) else f" +- {found.errors[-1]:.4g}"
        rows.append((name, f"{found.values[-1]:.4g}{error}"))
    return rows


def draw_scores(series: dict[str, Series], title: str, path: Path) -> None:
    """A panel for each, with standard errors."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    height = -(-len(series) // WIDTH)
    with rc_context(STYLE):
        figure = Figure(figsize=(11, 2.6 * height + 0.5), layout="constrained")
        figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
        panels = figure.subplots(height, WIDTH, squeeze=False).flatten()
        for axes, (name, found) in zip(panels, series.items(), strict=False):
            low, high = found.values - np.nan_to_num(found.errors), found.values + np.nan_to_num(found.errors)
            axes.fill_between(found.tokens, low, high, color=BLUE, alpha=0.2, lw=0)
            axes.plot(found.tokens, found.values, "o-", ms=3, color=BLUE)
            axes.set_title(name, fontsize=10)
            axes.xaxis.set_major_formatter(number_formatter())
        figure.supxlabel("training tokens; bands are standard errors", fontsize=10)
        for axes in panels[len(series) :]:
            axes.set_visible(False)
        save_figure(figure, path)

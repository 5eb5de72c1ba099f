"""Figures of the long-context probes."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tnl.tools.figures import BLUE, GREEN, GREY, ORANGE, STYLE, number_formatter, save_figure


def draw_grids(
    panels: Sequence[tuple[str, np.ndarray]],
    rows: Sequence[str],
    columns: Sequence[str],
    labels: tuple[str, str],
    title: str,
    path: Path,
) -> None:
    """Heat maps side by side, the score written into each cell.

    Args:
        panels: a title and scores [rows, columns] from 0 to 1 each, NaN where there is none.
        labels: of the vertical and of the horizontal axis.
    """
    from matplotlib import colormaps, rc_context
    from matplotlib.figure import Figure

    colors = colormaps["cividis"].with_extremes(bad="white")  # told apart with every kind of colour blindness
    size = (2 + len(panels) * max(4.0, 0.75 * len(columns)), max(3.0, 1.6 + 0.38 * len(rows)))
    with rc_context(STYLE | {"axes.grid": False}):
        figure = Figure(figsize=size, layout="constrained")
        figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
        for axes, (name, scores) in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels, strict=True):
            image = axes.imshow(scores, vmin=0, vmax=1, aspect="auto", cmap=colors)
            axes.set(title=name, xlabel=labels[1], ylabel=labels[0])
            axes.set_xticks(range(len(columns)), columns)
            axes.set_yticks(range(len(rows)), rows)
            for (i, j), score in np.ndenumerate(scores):
                if np.isfinite(score):
                    color = "black" if score > 0.5 else "white"
                    axes.text(j, i, f"{score:.0%}", ha="center", va="center", fontsize=8, color=color)
        figure.colorbar(image, ax=figure.axes, shrink=0.8)
        save_figure(figure, path)


def draw_positions(rows: Sequence[dict], trained: int | None, title: str, path: Path) -> None:
    """Loss by position with its standard error, and where training ended."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    middles = np.array([(row["begin"] + row["end"]) / 2 for row in rows])
    losses = np.array([row["loss"] for row in rows])
    errors = np.array([row["loss_stderr"] or 0.0 for row in rows])
    with rc_context(STYLE):
        figure = Figure(figsize=(9, 4.6), layout="constrained")
        axes = figure.subplots()
        axes.fill_between(middles, losses - errors, losses + errors, color=BLUE, alpha=0.2, lw=0)
        axes.plot(middles, losses, "o-", ms=3, color=BLUE, label="mean and standard error")
        if trained is not None:
            axes.axvline(trained, color=ORANGE, ls="--", label=f"length of training, {trained:,} tokens")
        axes.set(title=title, xlabel="position in the text, tokens", ylabel="nats per token")
        axes.xaxis.set_major_formatter(number_formatter())
        other = axes.secondary_yaxis("right", functions=(np.exp, lambda x: np.log(np.maximum(x, 1e-300))))
        other.set_ylabel("perplexity")
        axes.legend()
        save_figure(figure, path)


def draw_lengths(rows: Sequence[dict], title: str, path: Path) -> None:
    """Time and memory of reading one text, by its length."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    tokens = [row["tokens"] for row in rows]
    memory = "peak_gib" if rows[0]["peak_gib"] is not None else "peak_process_gib"
    with rc_context(STYLE):
        figure = Figure(figsize=(11, 4.4), layout="constrained")
        figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
        time, space = figure.subplots(1, 2)
        time.plot(tokens, [row["seconds"] for row in rows], "o-", color=BLUE)
        time.set(title="Time", xlabel="tokens", ylabel="seconds", xscale="log", yscale="log")
        space.plot(tokens, [row[memory] for row in rows], "s-", color=GREEN)
        name = "Peak GPU memory" if memory == "peak_gib" else "Peak memory of the process so far"
        space.set(title=name, xlabel="tokens", ylabel="GiB", xscale="log")
        space.set_ylim(0, 1.1 * max(row[memory] for row in rows))
        for axes in (time, space):
            axes.xaxis.set_major_formatter(number_formatter())
            axes.tick_params(colors=GREY)
        save_figure(figure, path)

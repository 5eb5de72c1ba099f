"""The HTML page of a run's report: its table, where the time of a step goes, norms of the blocks, and the plots."""

import html
import json
from pathlib import Path
from typing import Any

from tnl.training.timing import PHASES

STYLE = "body{font:15px sans-serif;max-width:62em;margin:2em auto}td,th{padding:.2em 1em .2em 0;text-align:left}"


def write_page(folder: Path, title: str, rows: list[tuple[str, str]], metrics: Path, plots: list[str]) -> Path:
    """Write ``index.html`` to ``folder``, beside the plots that it shows; it needs no network and runs no code.

    Args:
        rows: the table of the run.
        metrics: its metrics.jsonl, checked before.
        plots: file names in ``folder``.
    """
    train, layers = _last_rows(metrics)
    parts = [f"<h1>{html.escape(title)}</h1>", _table(rows)]
    timing = _timing(train)
    if timing:
        parts += ["<h2>Time of a step</h2>", _table(timing)]
    if layers:
        parts += [f"<h2>Norms of the blocks, step {int(layers['step'])}</h2>", _table(_norms(layers))]
    parts += [f'<p><img src="{html.escape(name)}" alt="{html.escape(name)}" width="100%"></p>' for name in plots]
    path = folder / "index.html"
    head = f'<!doctype html><meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>'
    path.write_text("\n".join([head, *parts, ""]), encoding="utf-8")
    return path


def _last_rows(path: Path) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """The training rows, and the last row of norms."""
    train, layers = [], None
    for line in path.read_bytes().split(b"\n"):
        if b'"train"' in line or b'"layers"' in line:
            try:
                row = json.loads(line)
            except ValueError:  # the last line, cut short
                continue
            if row["kind"] == "train":
                train.append(row)
            elif row["kind"] == "layers":
                layers = row
    return train, layers


def _norms(layers: dict[str, Any]) -> list[tuple[str, str]]:
    """Of each block's gradient, and of its state where it has one."""
    keys = {"gradient": "grad_norms", "state": "state_norms"}
    columns = [(name, layers[key]) for name, key in keys.items() if key in layers]
    rows = []
    for i in range(len(layers["grad_norms"])):
        found = [f"{name} {'not finite' if norms[i] is None else format(norms[i], '.4g')}" for name, norms in columns]
        rows.append((f"block {i}", ", ".join(found)))
    return rows


def _timing(train: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Mean seconds and share of each phase, and the most memory that was held."""
    timed = [row for row in train if all(f"{phase}_s" in row for phase in PHASES)]
    if not timed:
        return []
    whole = sum(row["step_time_s"] for row in timed)
    rows = []
    for phase in PHASES:
        seconds = sum(row[f"{phase}_s"] for row in timed)
        rows.append((phase, f"{1000 * seconds / len(timed):.2f} ms, {seconds / whole:.1%}"))
    peaks = [row["peak_memory_bytes"] for row in timed if row.get("peak_memory_bytes") is not None]
    return [*rows, *([("peak memory", f"{max(peaks) / 2**30:.2f} GiB")] if peaks else [])]


def _table(rows: list[tuple[str, str]]) -> str:
    cells = (f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>" for name, value in rows)
    return "\n".join(["<table>", *cells, "</table>"])

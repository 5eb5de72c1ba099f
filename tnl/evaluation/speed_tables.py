"""Figures of `tnl bench train` and `tnl bench generate` as tables of the report, beside the published ones."""

import json
import math
from pathlib import Path
from typing import Any

from tnl import config as configuration
from tnl.errors import DataError
from tnl.evaluation.score_tables import OURS, PUBLISHED, Cell, Row, Table
from tnl.evaluation.suite_settings import SpeedSettings

TRAIN, GENERATE = "tnl bench train", "tnl bench generate"
HEADS = ("model", "parameters")


def speed_tables(files: list[Path]) -> list[Table]:
    """A table of training and one of generation, as far as there are files of them.

    Raises:
        DataError: a file is not what one of these commands wrote.
    """
    rows: dict[str, list[Row]] = {}
    for file in files:
        figures = _read(file)
        kind = next((kind for kind in (TRAIN, GENERATE) if str(figures.get("command")).startswith(f"{kind} ")), None)
        if kind is None:
            raise DataError(f"{file}: not written by {TRAIN} --json or {GENERATE} --json; correct --bench")
        try:
            found = _train_rows(figures) if kind == TRAIN else _generate_rows(figures)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise DataError(f"{file}: incomplete ({type(error).__name__}: {error}); measure again") from None
        rows.setdefault(kind, []).extend(found)
    return [_table(kind.rpartition(" ")[2], rows[kind]) for kind in (TRAIN, GENERATE) if kind in rows]


def _read(file: Path) -> dict[str, Any]:
    try:
        figures = json.loads(file.expanduser().read_bytes())
    except OSError as error:
        raise DataError(f"{file}: {error.strerror}; correct --bench") from None
    except ValueError as error:
        raise DataError(f"{file}: not JSON ({error}); correct --bench") from None
    return figures if isinstance(figures, dict) else {}


def _table(name: str, rows: list[Row]) -> Table:
    settings = configuration.load(SpeedSettings, f"speed/{name}")
    columns = list(settings.columns)
    more = {column for row in rows for column in row.cells} - {*columns}
    if more:
        columns = sorted({*columns, *more}, key=int)
    published = [
        Row((row.model, row.parameters), {k: Cell(v) for k, v in row.scores.items()}, PUBLISHED, row.source)
        for row in settings.published
    ]
    digits = {column: 1 if column == "tokens/s" else 0 for column in columns}
    return Table(settings.title, HEADS, tuple(columns), (*rows, *published), settings.notes, digits)


def _source(figures: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {figures[name]}" for name in ("torch", "triton", "transformers") if figures.get(name))
    return f"{figures['gpu'] or 'CPU'}, {figures['dtype']}, {versions}: {figures['command']}"


def _cell(value: Any) -> Cell:
    """A figure; ValueError where it is none."""
    if not math.isfinite(float(value)):
        raise ValueError(f"{value} is no figure")
    return Cell(float(value))


def _train_rows(figures: dict[str, Any]) -> list[Row]:
    """One row for each kind of model, one column for each length."""
    name, found = figures["command"].split()[3], {}
    for row in figures["rows"]:
        if not row["oom"]:
            found.setdefault((row["kind"], row["parameters"]), {})[str(int(row["length"]))] = _cell(row["tgs"])
    return [
        Row((f"{name} ({kind})", f"{parameters / 1e9:.2f}B"), cells, OURS, _source(figures))
        for (kind, parameters), cells in found.items()
    ]


def _generate_rows(figures: dict[str, Any]) -> list[Row]:
    """TNL's best batch, and that of the LLaMA of equal size if it was measured."""
    name, rows = figures["command"].split()[3], []
    for label, steps, whole in (("tnl", "rows", "generate"), ("llama", "llama", "llama_generate")):
        if not figures.get(steps):
            continue
        best = max(figures[steps], key=lambda row: row["decode_tokens_per_s"])
        cells = {"of decoding alone": _cell(best["decode_tokens_per_s"]), "batch": _cell(best["batch"])}
        if figures.get(whole):
            cells["tokens/s"] = _cell(max(row["tokens_per_s"] for row in figures[whole]))
        rows.append(Row((f"{name} ({label})", "-"), cells, OURS, _source(figures)))
    return rows

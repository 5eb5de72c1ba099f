"""Tables of a report, and how they are written: as text, Markdown and JSON. The page is `tnl.evaluation.score_page`."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

OURS, PUBLISHED = "measured here", "published"


@dataclass(frozen=True)
class Cell:
    """A number with its standard error, in the unit of its column.

    Attributes:
        note: what a reader must know of this number alone.
    """

    value: float
    stderr: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Row:
    """One line of a table.

    Attributes:
        texts: leading cells, as many as the table has ``heads``.
        cells: by column; a column may be missing.
        kind: `OURS` or `PUBLISHED`.
        source: where the numbers come from.
    """

    texts: tuple[str, ...]
    cells: dict[str, Cell]
    kind: str
    source: str


@dataclass(frozen=True)
class Table:
    """Rows below a title.

    Attributes:
        heads: of the texts that each row begins with.
        digits: behind the point, by column; 2 where nothing is said.
        is_detail: left out in the terminal.
    """

    title: str
    heads: tuple[str, ...]
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()
    digits: dict[str, int] = field(default_factory=dict)
    is_detail: bool = False

    @property
    def is_comparison(self) -> bool:
        """Whether numbers of others stand beside ours."""
        return any(row.kind == PUBLISHED for row in self.rows)


@dataclass(frozen=True)
class ScoreReport:
    """All that is shown.

    Attributes:
        facts: name and value of what the numbers depend on.
        missing: task -> why it was not measured.
        record: further figures for programs, JSON values.
    """

    title: str
    facts: tuple[tuple[str, str], ...]
    tables: tuple[Table, ...]
    missing: dict[str, str]
    record: dict[str, Any]


def number(cell: Cell | None, digits: int) -> str:
    """A cell as it is shown; a dash where there is none."""
    if cell is None:
        return "-"
    value = f"{cell.value:,.{digits}f}" if abs(cell.value) < 1e7 else f"{cell.value:.3g}"
    error = "" if cell.stderr is None or cell.stderr >= 1e7 else f" +- {cell.stderr:,.{digits}f}"
    return value + error


def texts_of(table: Table) -> tuple[list[str], list[list[str]], list[str]]:
    """Heads, lines and footnotes of a table: sources are footnotes, marked by letters where there are several."""
    sources = list(dict.fromkeys(row.source for row in table.rows))
    is_one = len(sources) == 1
    notes = {} if is_one else {source: _mark(i) for i, source in enumerate(sources)}
    lines = []
    for row in table.rows:
        mark = "" if is_one else f" [{notes[row.source]}]"
        line = [row.texts[0] + mark, *row.texts[1:]]
        for column in table.columns:
            cell = row.cells.get(column)
            text = number(cell, table.digits.get(column, 2))
            if cell is not None and cell.note:
                text += f" [{notes.setdefault(cell.note, _mark(len(notes)))}]"
            line.append(text)
        lines.append(line)
    footnotes = [*(sources if is_one else ()), *(f"[{mark}] {note}" for note, mark in notes.items())]
    return [*table.heads, *table.columns], lines, [*footnotes, *table.notes]


def _mark(index: int) -> str:
    """a, b, ..., z, aa, ab, ..."""
    last = chr(ord("a") + index % 26)
    return last if index < 26 else _mark(index // 26 - 1) + last


def to_text(report: ScoreReport) -> str:
    """The report for a terminal."""
    parts = [report.title]
    for table in (table for table in report.tables if not table.is_detail):
        heads, lines, footnotes = texts_of(table)
        widths = [max(len(row[i]) for row in [heads, *lines]) for i in range(len(heads))]
        parts += ["", table.title, _aligned(heads, widths, len(table.heads))]
        parts.append("-" * (sum(widths) + 2 * len(widths) - 2))
        parts += [_aligned(line, widths, len(table.heads)) for line in lines]
        parts += [f"  {note}" for note in footnotes]
    if report.missing:
        parts += ["", "Not measured:", *(f"  {reason}" for reason in unique_reasons(report))]
    return "\n".join(parts)


def _aligned(cells: Sequence[str], widths: Sequence[int], num_heads: int) -> str:
    padded = (
        cell.ljust(width) if i < num_heads else cell.rjust(width)
        for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
    )
    return "  ".join(padded).rstrip()


def to_markdown(report: ScoreReport) -> str:
    """The report as Markdown."""
    parts = [f"# {_escape(report.title)}", ""]
    for table in report.tables:
        heads, lines, footnotes = texts_of(table)
        rule = ["---"] * len(table.heads) + ["---:"] * len(table.columns)
        parts += [f"## {_escape(table.title)}", "", _line([_escape(x) for x in heads]), _line(rule)]
        for row, line in zip(table.rows, lines, strict=True):
            marked = table.is_comparison and row.kind == OURS
            parts.append(_line([f"**{_escape(x)}**" if marked else _escape(x) for x in line]))
        parts += ["", *(f"- {_escape(note)}" for note in footnotes), ""]
    if report.missing:
        parts += ["## Not measured", "", *(f"- {_escape(reason)}" for reason in unique_reasons(report)), ""]
    parts += ["## How it was measured", "", "| | |", "| --- | --- |"]
    parts += [_line([_escape(name), _escape(value)]) for name, value in report.facts]
    return "\n".join([*parts, ""])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _escape(text: str) -> str:
    """Text that Markdown and the HTML in it leave alone."""
    for mark in "\\|*_<`[":
        text = text.replace(mark, f"\\{mark}" if mark != "<" else "&lt;")
    return text


def unique_reasons(report: ScoreReport) -> list[str]:
    """Why tasks were not measured, each reason once."""
    return list(dict.fromkeys(report.missing.values()))


def to_json(report: ScoreReport) -> dict[str, Any]:
    """The report for programs."""
    return {
        "title": report.title,
        "facts": dict(report.facts),
        "tables": [asdict(table) for table in report.tables],
        "missing": report.missing,
        **report.record,
    }

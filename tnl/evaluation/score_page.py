"""The report as one HTML page that needs nothing beside it and runs no code."""

import html

from tnl.evaluation.score_tables import OURS, ScoreReport, Table, texts_of, unique_reasons

STYLE = (
    "body{font:15px sans-serif;max-width:90em;margin:2em auto;padding:0 1em}table{border-collapse:collapse}"
    "td,th{padding:.25em .8em;text-align:right;border-bottom:1px solid #ddd;white-space:nowrap}"
    "td.name,th.name{text-align:left}tr.ours{background:#eef5ff;font-weight:bold}small{color:#555}"
    ".wide{overflow-x:auto}"
)
POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def to_html(report: ScoreReport) -> str:
    """The page."""
    parts = ["<!doctype html>", '<html lang="en"><meta charset="utf-8">']
    parts.append(f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">')
    parts.append(f"<title>{html.escape(report.title)}</title><style>{STYLE}</style>")
    parts.append(f"<h1>{html.escape(report.title)}</h1>")
    for table in report.tables:
        parts += _table(table)
    if report.missing:
        parts += ["<h2>Not measured</h2><ul>", *(f"<li>{html.escape(x)}</li>" for x in unique_reasons(report)), "</ul>"]
    parts.append("<h2>How it was measured</h2><table>")
    for name, value in report.facts:
        parts.append(f'<tr><th class="name">{html.escape(name)}</th><td class="name">{html.escape(value)}</td></tr>')
    return "\n".join([*parts, "</table></html>", ""])


def _table(table: Table) -> list[str]:
    heads, lines, footnotes = texts_of(table)
    parts = [f'<h2>{html.escape(table.title)}</h2><div class="wide"><table>', _row("th", heads, len(table.heads), "")]
    for row, line in zip(table.rows, lines, strict=True):
        parts.append(
            _row("td", line, len(table.heads), ' class="ours"' if table.is_comparison and row.kind == OURS else "")
        )
    parts.append("</table></div>")
    return [*parts, *(f"<p><small>{html.escape(note)}</small></p>" for note in footnotes)]


def _row(tag: str, cells: list[str], num_heads: int, mark: str) -> str:
    begins = [f'<{tag} class="name">' if i < num_heads else f"<{tag}>" for i in range(len(cells))]
    shown = (f"{begin}{html.escape(cell)}</{tag}>" for begin, cell in zip(begins, cells, strict=True))
    return f"<tr{mark}>{''.join(shown)}</tr>"

"""One structure of rows, written as text, Markdown, JSON and HTML."""

import html
import json
import re

import pytest

from tests.checkout import ROOT
from tnl.errors import DataError
from tnl.evaluation.score_page import to_html
from tnl.evaluation.score_tables import OURS, PUBLISHED, Cell, Row, ScoreReport, Table, to_json, to_markdown, to_text
from tnl.evaluation.speed_tables import speed_tables

RESULTS = ROOT / "kernels/benchmarks/results"
WRITERS = {"text": to_text, "markdown": to_markdown, "html": to_html, "json": lambda r: json.dumps(to_json(r))}


@pytest.fixture
def report():
    rows = (
        Row(("mine", "3M"), {"A": Cell(41.5, 0.125), "B": Cell(123456.0, note="of 1 of 2 tasks only")}, OURS, "here"),
        Row(("theirs", "1B"), {"A": Cell(63.271)}, PUBLISHED, "arXiv 1234.5678, Table 9"),
    )
    table = Table("A <table>", ("model", "parameters"), ("A", "B"), rows, ("a note | of *it*",), {"A": 2, "B": 0})
    detail = Table("All", ("task",), ("value",), (Row(("one_two",), {"value": Cell(0.5)}, OURS, "here"),), (), {}, True)
    missing = {"piqa": "piqa: is not here", "x": "piqa: is not here"}
    return ScoreReport("mine: <b>", (("seed", "0"),), (table, detail), missing, {"scores": {"a": 1}})


@pytest.mark.parametrize("writer", WRITERS)
def test_every_writer_shows_every_number_and_source(writer, report):
    text = WRITERS[writer](report)
    wanted = ["mine", "theirs", "arXiv 1234.5678, Table 9", "of 1 of 2 tasks only"]
    wanted += ["41.5", "0.125", "63.271", "123456"] if writer == "json" else ["41.50 +- 0.12", "63.27", "123,456"]
    for part in wanted:
        assert part in text, part


def test_text_is_aligned_and_leaves_details_out(report):
    lines = to_text(report).splitlines()
    head = next(line for line in lines if line.startswith("model"))
    ours = next(line for line in lines if line.startswith("mine [a]"))
    theirs = next(line for line in lines if line.startswith("theirs [b]"))
    ends = [match.end() for match in re.finditer(r"\bA\b", head)]
    assert ours[: ends[0]].endswith("41.50 +- 0.12")
    assert theirs[: ends[0]].endswith("63.27")
    assert theirs.endswith("-")
    assert "one_two" not in to_text(report)
    assert to_text(report).count("piqa: is not here") == 1


def test_markdown_has_whole_rows_and_marks_ours(report):
    lines = to_markdown(report).splitlines()
    rows = [line for line in lines if line.startswith("| ") and not line.startswith(("| |", "| ---"))]
    assert len({line.replace("\\|", "").count("|") for line in rows if "mine" in line or "theirs" in line}) == 1
    assert any(line.startswith("| **mine") for line in rows)
    assert "one\\_two" in to_markdown(report)
    assert "A &lt;table>" in to_markdown(report)


def test_the_page_needs_nothing_beside_it_and_runs_nothing(report):
    page = to_html(report)
    assert "<b>" not in page
    assert html.escape("A <table>") in page
    assert not re.search(r"<script|<link|<img|src=|href=|url\(", page)
    assert "default-src 'none'" in page
    assert page.count('<tr class="ours">') == 1


def test_numbers_that_are_very_large_are_short():
    table = Table("t", ("m",), ("A",), (Row(("x",), {"A": Cell(1.23456e12, 1e9)}, OURS, "s"),))
    assert "1.23e+12" in to_text(ScoreReport("t", (), (table,), {}, {}))


# Benchmarks of speed

TRAINED = (
    '{"command": "tnl bench train tnl-1b", "gpu": null, "dtype": "float32", '
    '"rows": [{"kind": "tnl", "parameters": 1, "oom": false, "tgs": %s, "length": %s}]}'
)


def test_measured_speed_joins_the_published(tmp_path):
    train, generate = speed_tables([RESULTS / "train_1b_h100.json", RESULTS / "generate_h100.json"])
    ours = {row.texts[0]: row for row in train.rows if row.kind == OURS}
    assert ours["tnl-1b (tnl)"].cells["16384"].value == pytest.approx(87484, abs=1)
    assert ours["tnl-1b (llama)"].cells["16384"].value == pytest.approx(36031, abs=1)
    assert any(row.source == "arXiv 2401.04658, Table 1" for row in train.rows)
    assert train.columns[:2] == ("1024", "2048")
    best = {row.texts[0]: row for row in generate.rows}
    assert best["tnl-7b (tnl)"].cells["tokens/s"].value == pytest.approx(12917, abs=1)
    assert best["tnl-7b (tnl)"].cells["batch"].value == 768
    assert best["TNL-7B"].cells["tokens/s"].value == 2819.6
    assert "H100" in best["tnl-7b (tnl)"].source


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ('{"command": "tnl doctor"}', "not written by tnl bench train --json"),
        ('{"command": "tnl bench train tnl-1b", "rows": [{}]}', "incomplete (KeyError: 'oom')"),
        (TRAINED % ("NaN", "2048"), "incomplete (ValueError: nan is no figure)"),
        (TRAINED % ("3", '"long"'), "incomplete (ValueError: invalid literal for int()"),
    ],
)
def test_another_file_is_refused(content, message, tmp_path):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(DataError) as error:
        speed_tables([tmp_path / "x.json"])
    assert message in str(error.value)

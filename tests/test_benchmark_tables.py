"""Documents show what the benchmarks' JSON files hold."""

import importlib
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Scripts that import each other by name, as they do when they are run.
sys.path.append(str(ROOT / "kernels" / "benchmarks"))
tables = importlib.import_module("tables")

DOCUMENTS = [ROOT / "kernels" / "README.md", ROOT / "README.md"]
RESULT = {
    "gpu": "NVIDIA H100 80GB HBM3",
    "torch": "2.11.0",
    "triton": "3.6.0",
    "command": "python kernels/benchmarks/attention.py",
    "rows": [
        {"shape": "B4 H32 D128", "T": 1024, "pass": "forward", "tnl_ms": 0.0593, "tnl_x": 1.357, "peer_ms": None},
        {"shape": "B1 H16 D128", "T": 131072, "pass": "backward", "tnl_ms": 1234.5, "tnl_x": 21.04, "gain": 2},
    ],
    "scaling": [{"T": 1024, "time": 3e-7}],
}
WHERE = "Measured on NVIDIA H100 80GB HBM3, torch 2.11.0, triton 3.6.0.\n\n"


@pytest.fixture
def results(tmp_path):
    (tmp_path / "attention_h100.json").write_text(json.dumps(RESULT))
    return tmp_path


def test_a_table_has_every_column_in_the_order_of_the_rows(results):
    assert tables.table("attention", results) == WHERE + (
        "| shape | T | pass | tnl ms | tnl x | peer ms | gain |\n"
        "| --- | --- | --- | --- | --- | --- | --- |\n"
        "| B4 H32 D128 | 1024 | forward | 0.059 | 1.36 | - | - |\n"
        "| B1 H16 D128 | 131072 | backward | 1234 | 21 | - | 2 |"
    )


def test_a_marker_chooses_section_rows_and_columns(results):
    assert tables.table("attention pass=forward columns=T,tnl_x:times_the_floor", results) == WHERE + (
        "| T | times the floor |\n| --- | --- |\n| 1024 | 1.36 |"
    )
    assert "| peer ms |" in tables.table("attention shape=B4_H32_D128", results)
    assert "B4" not in tables.table("attention shape=B4_H32_D128", results)
    assert tables.table("attention of=scaling", results).endswith("| 1024 | 3e-07 |")


@pytest.mark.parametrize(
    ("marker", "message"),
    [
        ("loss", "no .*loss_h100.json; the benchmark writes it with --json"),
        ("attention of=row", "no rows under 'row'; there are: rows, scaling"),
        ("attention columns=T,ms", "no column 'ms'; there are: shape, T, pass"),
        ("attention pass=sideways", "no row .* 'sideways'"),
        ("attention quick", "'quick' is not KEY=VALUE"),
    ],
)
def test_a_wrong_marker_says_what_is_there(results, marker, message):
    with pytest.raises(ValueError, match=message):
        tables.table(marker, results)


def test_cells():
    values = [None, True, 0.0593, 1.357, 21.04, 697.3, 1234.5, 3e-7, 7, [8192, 2048], "a|b"]
    cells = ["-", "yes", "0.059", "1.36", "21", "697", "1234", "3e-07", "7", "8192 x 2048", "a\\|b"]
    assert [tables.number(value) for value in values] == cells


def test_a_result_that_does_not_say_where_it_is_from_is_refused(results):
    (results / "loss_h100.json").write_text(json.dumps({"rows": [{"T": 1}], "torch": "2.11.0", "command": ""}))
    with pytest.raises(ValueError, match=r"loss_h100\.json does not say gpu, triton"):
        tables.table("loss", results)


def test_a_document_is_filled_checked_and_left_alone_around_its_tables(results, capsys):
    document = results / "page.md"
    document.write_text("before\n<!-- table: attention of=scaling -->\nold\n<!-- end -->\nafter\n")
    arguments = [str(document), "--results", str(results)]
    assert tables.main([*arguments, "--check"]) == 1
    assert "stale" in capsys.readouterr().err
    assert "old" in document.read_text()
    assert tables.main(arguments) == 0
    filled = document.read_text()
    assert filled.startswith("before\n<!-- table: attention of=scaling -->\nMeasured on")
    assert filled.endswith("| 1024 | 3e-07 |\n<!-- end -->\nafter\n")
    assert tables.main([*arguments, "--check"]) == 0
    assert tables.main(arguments) == 0
    assert document.read_text() == filled


@pytest.mark.parametrize(
    "text",
    [
        "<!-- table: attention -->\n",
        "<!-- end -->\n",
        "<!-- table: attention -->\n<!-- table: attention -->\n<!-- end -->\n",
    ],
)
def test_a_marker_without_its_end_is_an_error(results, text, capsys):
    document = results / "page.md"
    document.write_text(text)
    assert tables.main([str(document), "--results", str(results)]) == 1
    assert "needs a line <!-- end -->" in capsys.readouterr().err
    assert document.read_text() == text


@pytest.mark.parametrize("document", DOCUMENTS, ids=["kernels", "project"])
def test_a_readme_shows_the_stored_results(document):
    assert tables.main([str(document), "--check"]) == 0


@pytest.mark.parametrize(
    "path", sorted((ROOT / "kernels/benchmarks/results").glob("*_h100.json")), ids=lambda p: p.stem
)
def test_a_stored_result_says_where_it_was_measured(path):
    result = json.loads(path.read_text(encoding="utf-8"))
    assert {"gpu", "torch", "triton", "command", "rows"} <= set(result)
    assert result["rows"]

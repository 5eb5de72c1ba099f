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
scaling = importlib.import_module("scaling")

DOCUMENTS = [ROOT / "kernels" / "README.md", ROOT / "README.md", ROOT / "docs" / "evaluation.md"]
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


def training(kind_tgs: dict[str, list[float | None]], **values) -> dict:
    """A result in the form of `tnl bench train`, at lengths 16,384 and 524,288."""
    rows = [
        {"kind": kind, "length": length, "parameters": 10**9, "tgs": tgs, "oom": tgs is None}
        | ({} if tgs is None else {"of_limit": 0.8125, "mfu": 0.5, "peak_gib": 61.5})
        for kind, figures in kind_tgs.items()
        for length, tgs in zip((16384, 524288), figures, strict=True)
    ]
    wide = [{"length": 16384, "tnl_tgs": 90000.4, "tnl_of_limit": 0.8125, "times_fla": 1.25, "llama_tgs": "OOM"}]
    described = RESULT | {"command": "tnl bench train tnl-1b --lengths 16384,524288", "rows": rows, "table": wide}
    made_with = {"world_size": 1, "tokens_per_step": 131072, "engine": "deepspeed 0.19.7", "dtype": "bf16"}
    made_with["micro_tokens"] = 16384
    return described | made_with | values


def write(folder, **results) -> None:
    for name, result in results.items():
        (folder / f"{name}.json").write_text(json.dumps(result))


def test_a_training_table_says_what_a_step_was_and_shares_in_percent(tmp_path):
    write(tmp_path, train_1b_h100=training({"tnl": [90000.4, None]}))
    columns = "columns=length,tnl_tgs:TNL,tnl_of_limit%:of_its_limit,times_fla:times_fla,llama_tgs:LLaMA"
    text = tables.table(f"train_1b of=table {columns}", tmp_path)
    assert text.startswith(
        "Measured on NVIDIA H100 80GB HBM3, torch 2.11.0, triton 3.6.0, deepspeed 0.19.7, bf16, 131,072 tokens a step "
        "or one sequence."
    )
    assert text.splitlines()[2] == "| length | TNL | of its limit | times fla | LLaMA |"
    assert text.splitlines()[4] == "| 16384 | 90000 | 81.2 % | 1.25 | OOM |"


def test_one_table_of_several_files_leaves_out_those_that_are_not_there(tmp_path):
    marker = "train_385m,train_1b,train_3b kind=tnl columns=result,length,tgs,mfu%"
    with pytest.raises(ValueError, match=r"no .*train_385m_h100.json, .*train_1b_h100.json, .*train_3b_h100.json"):
        tables.table(marker, tmp_path)
    write(tmp_path, train_3b_h100=training({"tnl": [30000.0, None], "llama": [1.0, 2.0]}))
    assert [line[:12] for line in tables.table(marker, tmp_path).splitlines()[4:]] == ["| train_3b |"] * 2
    write(tmp_path, train_1b_h100=training({"tnl": [90000.0, 89000.0]}, tokens_per_step=65536))
    lines = tables.table(marker, tmp_path).splitlines()
    assert "131,072 tokens a step" in lines[0]
    assert "65,536 tokens a step" in lines[0]
    assert lines[4:] == [
        "| train_1b | 16384 | 90000 | 50.0 % |",
        "| train_1b | 524288 | 89000 | 50.0 % |",
        "| train_3b | 16384 | 30000 | 50.0 % |",
        "| train_3b | 524288 | - | - |",
    ]


def test_results_on_more_gpus_are_joined_with_their_efficiency(tmp_path):
    command = "tnl bench train tnl-1b {} --lengths 16384,524288"
    four = {"world_size": 4, "tokens_per_step": 524288}
    write(
        tmp_path,
        one=training({"tnl": [100000.0, None], "llama": [50000.0, None]}),
        data=training({"tnl": [95000.0, None]}, command=command.format("train.zero_stage=2"), **four),
        shared=training({"tnl": [98000.0, 92000.0]}, command=command.format("train.sequence_parallel=4"), **four),
        other=training({"tnl": [20000.0, None]}, command="tnl bench train tnl-7b train.zero_stage=3", **four),
        full=training({"tnl": [7e4, None]}, command=command.format("train.activation_checkpointing=full"), **four),
    )
    names = ("shared", "one", "data", "other", "full")
    out = tmp_path / "train_scaling_h200.json"
    assert scaling.main([str(out), *(str(tmp_path / f"{name}.json") for name in names)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [row["gpus"] for row in rows] == [1] * 4 + [4] * 8
    found = {(row["model"], row["layout"], row["length"]): row for row in rows if row["kind"] == "tnl" and row["tgs"]}
    assert found["tnl-1b", "zero_stage=2", 16384]["efficiency"] == pytest.approx(0.95)
    assert found["tnl-1b", "sequence_parallel=4", 524288]["efficiency"] == pytest.approx(0.92)
    assert found["tnl-1b", "sequence_parallel=4", 524288]["one_gpu_length"] == 16384
    for alone in (("tnl-7b", "zero_stage=3"), ("tnl-1b", "activation_checkpointing=full"), ("tnl-1b", None)):
        assert found[*alone, 16384]["efficiency"] is None
    columns = "columns=model,gpus,layout,length,tgs,efficiency%"
    text = tables.table(f"train_scaling_h200 kind=tnl {columns}", tmp_path)
    assert "| tnl-1b | 4 | zero_stage=2 | 16384 | 95000 | 95.0 % |" in text


@pytest.mark.parametrize(
    ("values", "message"),
    [({"torch": "2.12"}, "measured on different GPUs"), ({"command": "python x.py"}, "is not tnl bench train")],
)
def test_results_that_do_not_belong_together_are_not_joined(values, message):
    with pytest.raises(ValueError, match=message):
        scaling.joined([training({"tnl": [1.0, 2.0]}), training({"tnl": [1.0, 2.0]}, **values)])


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


@pytest.mark.parametrize("document", DOCUMENTS, ids=["kernels", "project", "evaluation"])
def test_a_readme_shows_the_stored_results(document):
    assert tables.main([str(document), "--check"]) == 0


@pytest.mark.parametrize(
    "path", sorted((ROOT / "kernels/benchmarks/results").glob("*_h100.json")), ids=lambda p: p.stem
)
def test_a_stored_result_says_where_it_was_measured(path):
    result = json.loads(path.read_text(encoding="utf-8"))
    assert {"gpu", "torch", "triton", "command"} <= set(result)
    assert any(isinstance(value, list) and value and isinstance(value[0], dict) for value in result.values())

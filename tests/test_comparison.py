"""`tnl compare`: curves of several runs, by tokens and by time."""

import json

import numpy as np
import pytest

from tests.test_report import evaluation_row, is_png, train_row, write_run
from tnl.errors import EXIT_DATA, EXIT_USAGE
from tnl.tools.comparison import compare, read_curve


def run_of(folder, *, seconds: float, losses: dict[int, float], kind: str = "tnl", more: str = ""):
    """A run of 40 steps of 1,000 tokens that take ``seconds`` each."""
    rows = [train_row(step, step_time_s=seconds) for step in range(1, 41)]
    rows += [evaluation_row(step, loss) for step, loss in losses.items()]
    run = write_run(folder, rows)
    (run / "config.yaml").write_text(f"model:\n  kind: {kind}\n{more}")
    return run


def test_a_curve_counts_training_time_and_nothing_else(tmp_path):
    curve = read_curve(run_of(tmp_path / "run", seconds=0.5, losses={10: 5.0, 40: 4.0}))
    assert (curve.name, curve.kind, curve.rate) == ("run", "tnl", 2000.0)
    assert curve.tokens.tolist() == [10_000, 40_000]
    assert curve.seconds == pytest.approx([5.0, 20.0])
    assert curve.loss_after(12.5) == pytest.approx(4.5)
    assert np.isnan(curve.loss_after(4.0))


def test_the_slower_run_is_also_judged_when_the_quicker_has_ended(tmp_path):
    quick = run_of(tmp_path / "quick", seconds=0.5, losses={20: 5.0, 40: 4.0})
    slow = run_of(tmp_path / "slow", seconds=1.0, losses={20: 4.9, 40: 3.9}, kind="llama")
    rows, notes = compare([quick, slow], tmp_path / "out")
    assert notes == []
    assert [row["kind"] for row in rows] == ["tnl", "llama"]
    assert [row["heldout_loss"] for row in rows] == [4.0, 3.9]
    assert [row["heldout_loss_at_equal_time"] for row in rows] == pytest.approx([4.0, 4.9])
    assert is_png(tmp_path / "out" / "comparison.png")
    assert json.loads((tmp_path / "out" / "comparison.json").read_text())["rows"] == rows


def test_runs_of_one_name_are_told_apart_and_what_is_not_known_is_null(tmp_path, tnl_command):
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
    runs = [run_of(tmp_path / place / "run", seconds=n, losses={40: 4.0}) for n, place in ((1.0, "a"), (0.25, "b"))]
    code, out, _ = tnl_command("compare", *runs, "--output", tmp_path / "out")
    assert code == 0
    assert "a/run (tnl)" in out
    assert "not known" in out
    found = json.loads((tmp_path / "out" / "comparison.json").read_text(), parse_constant=pytest.fail)
    assert list(found["curves"]) == ["a/run", "b/run"]
    assert [row["heldout_loss_at_equal_time"] for row in found["rows"]] == [None, 4.0]


def test_the_command_prints_each_run(tmp_path, tnl_command):
    runs = [run_of(tmp_path / name, seconds=1.0, losses={40: 4.0}) for name in ("a", "b")]
    code, out, _ = tnl_command("compare", *runs, "--output", tmp_path / "out")
    assert code == 0
    assert "a (tnl)" in out
    assert "b (tnl)" in out
    assert "held-out loss  " in out


def test_runs_that_hold_out_different_tokens_are_compared_with_a_note(tmp_path, tnl_command):
    first = run_of(tmp_path / "a", seconds=1.0, losses={40: 4.0}, more="data:\n  shards: x\n")
    second = run_of(tmp_path / "b", seconds=1.0, losses={40: 4.0}, more="data:\n  shards: y\n")
    for run in (first, second):
        (run / "tokenizer").mkdir()
        (run / "tokenizer/tokenizer.model").write_text(run.name)
    code, out, _ = tnl_command("compare", first, second, "--output", tmp_path / "out")
    assert code == 0
    assert "note: held-out losses may be of different tokens: data.shards is x in a, y in b; tokenizer is " in out
    assert len(json.loads((tmp_path / "out/comparison.json").read_text())["notes"]) == 1


def test_bad_input_is_one_message(tmp_path, tnl_command):
    run = run_of(tmp_path / "run", seconds=1.0, losses={})
    code, _, err = tnl_command("compare", run, run)
    assert (code, err.count("\n")) == (EXIT_DATA, 1)
    assert "no held-out loss to compare" in err
    whole = run_of(tmp_path / "whole", seconds=1.0, losses={40: 4.0})
    code, _, err = tnl_command("compare", whole, whole)
    assert (code, err.count("\n")) == (EXIT_USAGE, 1)
    assert "one of them is given twice" in err
    code, _, err = tnl_command("compare", run)
    assert (code, err.count("\n")) == (EXIT_USAGE, 1)
    assert "compare 2 to 4 run folders" in err

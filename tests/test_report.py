"""The report of a run folder: what it writes, what its table says, and which metrics it refuses."""

import json
import math
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

from tnl.errors import CannotWriteError, ConfigError, DataError
from tnl.tools.report import read_metrics, report
from tnl.training.status import write_status


def train_row(step: int, **changes) -> dict:
    loss = 3 + 5 * math.exp(-step / 20) + 0.1 * math.sin(7 * step)
    return {
        "kind": "train",
        "step": step,
        "time": 1.7e9 + 2 * step,
        "tokens": 1000 * step,
        "loss": loss,
        "loss_bits": loss / math.log(2),
        "grad_norm": 1.0,
        "lr": 1e-3,
        "tokens_per_s": 500.0,
        "tgs": 250.0,
        "mfu": 0.4,
        "step_time_s": 2.0,
        "skipped": False,
    } | changes


def evaluation_row(step: int, loss: float | None) -> dict:
    bits = loss and loss / math.log(2)
    row = {"kind": "evaluation", "step": step, "tokens": 1000 * step, "loss": loss}
    return row | {"bits_per_token": bits, "bits_per_byte": None}


def write_run(folder: Path, rows: list[dict], tail: str = "") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    return folder


def is_png(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG\r\n")


def test_plots_and_table(tmp_path):
    rows = [train_row(step) for step in range(1, 201)]
    rows[49] = train_row(50, loss=None, loss_bits=None, grad_norm=None, skipped=True, tokens_per_s=1e9)
    rows += [evaluation_row(100, 3.2), evaluation_row(150, 3.1), evaluation_row(200, 3.15)]
    run = write_run(tmp_path / "run", rows)
    write_status(run, "finished", 200, 200, exit_code=0)
    (run / "config.yaml").write_text("train:\n  steps: 200\n  precision: bf16\n")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = report(run)
    assert result.folder == run / "report"
    for name in ("loss.png", "run.png"):
        assert is_png(result.folder / name)
        assert (result.folder / name).stat().st_size < 150_000
    final = np.mean([row["loss"] for row in rows[196:200]])
    assert dict(result.rows) == {
        "status": "finished, step 200 of 200, exit code 0",
        "train settings": "steps 200, precision bf16",
        "steps": "200",
        "tokens": "200k",
        "final train loss, mean of 4 logged": f"{final:.4f} nats, {final / math.log(2):.4f} bits",
        "best held-out loss, step 150": "3.1000 nats, 4.4724 bits",
        "last held-out loss, step 200": "3.1500 nats, 4.5445 bits",
        "tokens/s, mean": "500",
        "tokens/s per GPU, mean": "250",
        "model FLOPs utilization, mean": "40.0%",
        "wall time, pauses included": "6 min 40 s",
        "skipped steps": "1",
    }
    assert result.notes == []


@pytest.mark.parametrize(
    "rows",
    [
        [train_row(1)],
        [train_row(1, mfu=None), evaluation_row(1, 3.0)],
        [train_row(step, loss=None, grad_norm=None, skipped=True) for step in range(1, 120)]
        + [evaluation_row(9, None)],
        [train_row(step, lr=0, tokens_per_s=0) for step in range(1, 4)],
    ],
    ids=["one step", "one evaluation", "nothing finite", "zeros"],
)
def test_runs_with_little_to_show(tmp_path, rows):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        folder = report(write_run(tmp_path, rows)).folder
    assert is_png(folder / "loss.png")
    assert is_png(folder / "run.png")


def test_what_is_unknown_is_said(tmp_path):
    rows = [train_row(1, loss=None, mfu=None, tokens_per_s=None), evaluation_row(1, None)]
    table = dict(report(write_run(tmp_path, rows)).rows)
    assert table["final train loss, mean of 0 logged"] == "not finite"
    assert table["model FLOPs utilization, mean"] == table["tokens/s, mean"] == "not known"
    assert not any("held-out" in what for what in table)


def test_nulls_and_non_finite_numbers_are_gaps(tmp_path):
    rows = [train_row(1), train_row(2, loss=None), train_row(3, loss=math.inf), train_row(4, loss=math.nan)]
    loss = read_metrics(write_run(tmp_path, rows)).train["loss"]
    assert np.isnan(loss).tolist() == [False, True, True, True]


def test_torn_last_line_is_left_out_with_a_note(tmp_path):
    whole = json.dumps(train_row(3))
    for tail in ('{"kind": "tra', "{", whole[:-1]):
        metrics = read_metrics(write_run(tmp_path, [train_row(1), train_row(2)], tail))
        assert metrics.train["step"].tolist() == [1, 2]
        assert ["metrics.jsonl:3 is torn" in note for note in metrics.notes] == [True]
    metrics = read_metrics(write_run(tmp_path, [train_row(1), train_row(2)], whole))
    assert metrics.train["step"].tolist() == [1, 2, 3]
    assert metrics.notes == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"kind": "tra', "not a JSON object"),
        ("[1]", "a list where"),
        ('{"kind": "test"}', "kind 'test' is not one of train, evaluation, layers"),
        ('{"kind": ["train"]}', "is not one of train, evaluation, layers"),
        ('{"step": 3}', "kind None is not one of"),
        ('{"kind": "evaluation", "step": 3, "loss": 1.0}', "evaluation row without 'tokens'"),
        (json.dumps(train_row(3, loss="3.1")), "loss is '3.1', which is not a number"),
        (json.dumps(train_row(3, tokens=None)), "tokens is None, which is not a number"),
        (json.dumps(train_row(3, loss=True)), "loss is True, which is not a number"),
        (json.dumps(train_row(3, skipped=1)), "skipped is 1, which is not a boolean"),
    ],
)
def test_malformed_line_is_named(tmp_path, line, message):
    run = write_run(tmp_path, [train_row(1), train_row(2)], f"{line}\n{json.dumps(train_row(4))}\n")
    with pytest.raises(DataError) as caught:
        report(run)
    assert str(caught.value).startswith(f"{run / 'metrics.jsonl'}:3: ")
    assert message in str(caught.value)


def test_bytes_that_are_not_text_are_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"kind": "\xff\xfe"}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl:1: not a JSON object"):
        report(tmp_path)


def test_missing_and_empty_metrics_are_named_with_the_cure(tmp_path):
    with pytest.raises(DataError, match=r"metrics\.jsonl: not found; pass the folder of a run"):
        report(tmp_path)
    for rows, tail in (([], ""), ([], "\n\n"), ([], '{"kind'), ([evaluation_row(1, 3.0)], "")):
        with pytest.raises(DataError, match=r"metrics\.jsonl: no training steps; let the run log a step"):
            report(write_run(tmp_path, rows, tail))


def test_broken_config_is_named(tmp_path):
    run = write_run(tmp_path, [train_row(1)])
    (run / "config.yaml").write_text("train: {")
    with pytest.raises(ConfigError, match=r"config\.yaml: not a valid YAML"):
        report(run)


def test_folder_that_cannot_be_written_is_named(tmp_path):
    run = write_run(tmp_path, [train_row(1)])
    (run / "report").write_text("a file in the way")
    with pytest.raises(CannotWriteError, match="cannot write the report"):
        report(run)


def test_import_is_light():
    code = "import sys, tnl.tools.report; sys.exit('matplotlib' in sys.modules or 'PIL' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


@pytest.mark.parametrize(
    "status", ["[]", "3", "{}", '{"state": "up"}', '{"state": "up", "step": "a", "total_steps": 3}']
)
def test_a_status_of_another_program_is_left_out(tmp_path, status):
    run = write_run(tmp_path / "run", [train_row(1)])
    (run / "run_status.json").write_text(status)
    (run / "config.yaml").write_text("train: [1, 2]\n")
    assert not {"status", "train settings"} & {name for name, _ in report(run).rows}

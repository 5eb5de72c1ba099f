"""Where the time of a step goes, norms of blocks, traces, and the page that shows them."""

import io
import json

import pytest
import torch
from rich.console import Console

from tests.tiny_corpus import tiny_shards
from tests.tiny_run import rows, tiny_run, trajectory
from tnl.errors import ConfigError
from tnl.tools.report import report
from tnl.training.pretrain import pretrain
from tnl.training.timing import PHASES, StepTimer


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """A folder of shards without a held-out split."""
    return tiny_shards(tmp_path_factory.mktemp("data"))


def run(shards, output, *overrides):
    pretrain(tiny_run(shards, output, "train.steps=4", *overrides), console=Console(file=io.StringIO()))
    return output


@pytest.fixture(scope="module")
def observed(shards, tmp_path_factory):
    """A run that records all there is."""
    output = tmp_path_factory.mktemp("runs") / "observed"
    return run(shards, output, "logging.layer_norms_every=2", "logging.profile_steps=[2, 3]", "train.zero_stage=2")


def test_the_phases_add_up_to_the_step(observed):
    for row in rows(observed):
        parts = [row[f"{phase}_s"] for phase in PHASES]
        assert all(part >= 0 for part in parts)
        assert row["backward_s"] > 0
        # What is left is the gathering of what is logged.
        assert sum(parts) <= row["step_time_s"]
        assert sum(parts) > 0.5 * row["step_time_s"] or row["step"] in (2, 3)  # a trace stops the clock for long
        assert row["peak_memory_bytes"] is None  # of a GPU only


@pytest.mark.parametrize("stage", [0, 3])
def test_norms_of_blocks_are_the_same_at_every_stage(stage, observed, shards, tmp_path):
    found = rows(run(shards, tmp_path / "run", "logging.layer_norms_every=2", f"train.zero_stage={stage}"), "layers")
    expected = rows(observed, "layers")
    assert [row["step"] for row in found] == [2, 4]
    for a, b in zip(found, expected, strict=True):
        assert a["grad_norms"] == pytest.approx(b["grad_norms"], rel=1e-4)
        assert len(a["grad_norms"]) == 2
        # The blocks are a part of the model.
        whole = rows(observed)[a["step"] - 1]["grad_norm"]
        assert 0 < sum(norm**2 for norm in a["grad_norms"]) < whole**2


def test_looking_changes_nothing(observed, shards, tmp_path):
    assert trajectory(run(shards, tmp_path / "run", "train.zero_stage=2")) == trajectory(observed)


def test_a_trace_of_the_steps_is_written(observed):
    (trace,) = (observed / "profile").iterdir()
    assert trace.name == "steps_2_3_rank0.json"
    names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert "aten::mm" in names


@pytest.mark.parametrize("steps", ["[3, 2]", "[0, 2]", "[2, 5]"])
def test_steps_to_trace_must_be_steps(steps, shards, tmp_path):
    with pytest.raises(ConfigError, match=r"logging\.profile_steps"):
        tiny_run(shards, tmp_path, "train.steps=4", f"logging.profile_steps={steps}")


def test_the_page_shows_time_norms_and_plots(observed):
    page = (report(observed).folder / "index.html").read_text()
    for text in ("Time of a step", "backward", "Gradient norms, step 4", "block 1", 'src="loss.png"', 'src="run.png"'):
        assert text in page
    assert "<script" not in page


def test_a_timer_counts_each_phase_once():
    timer = StepTimer(torch.device("cpu"))
    for phase in ("data", "forward", "backward", "forward", "reduce"):
        timer.mark(phase)
    split = timer.split()
    assert list(split) == [f"{phase}_s" for phase in PHASES]
    assert split["optimizer_s"] == split["reduce_s"] == 0 < split["forward_s"]
    assert timer.split() == dict.fromkeys(split, 0.0)

"""Where the time of a step goes, norms of blocks, traces, and the page that shows them."""

import io
import json
import statistics

import pytest
import torch
from rich.console import Console

from tests.tiny_corpus import tiny_shards
from tests.tiny_run import rows, tiny_run, trajectory
from tnl.data.loader import TrainLoader, num_labelled
from tnl.data.shards import ShardSet
from tnl.errors import ConfigError
from tnl.generation.load import load_model
from tnl.model import TransnormerForCausalLM
from tnl.tools.report import report
from tnl.training.deepspeed_import import deepspeed
from tnl.training.export import resolve_model
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
    left = []
    for row in rows(observed):
        parts = [row[f"{phase}_s"] for phase in PHASES]
        assert all(part >= 0 for part in parts)
        assert row["backward_s"] > 0
        left.append(1 - sum(parts) / row["step_time_s"])
        assert row["peak_memory_bytes"] is None  # of a GPU only
    # Reading the loss; the median, for another process may get the core meanwhile.
    assert -1e-6 < statistics.median(left) < 0.01


@pytest.mark.parametrize(
    ("overrides", "tolerance"),
    [
        ("train.zero_stage=0", 1e-4),
        ("train.zero_stage=1", 1e-4),
        ("train.zero_stage=3", 1e-4),
        ("train.zero_stage=3 train.offload_optimizer=cpu", 1e-4),
        ("train.zero_stage=2 train.precision=bf16", 2e-2),
        ("train.zero_stage=1 train.precision=fp16 train.loss_scale_power=8", 2e-3),
        ("train.zero_stage=3 train.precision=fp16 train.loss_scale_power=8", 2e-3),
    ],
)
def test_norms_of_blocks_are_the_same_at_every_stage_and_precision(
    overrides, tolerance, observed, shards, tmp_path, monkeypatch
):
    monkeypatch.setattr(type(deepspeed.accelerator.get_accelerator()), "is_fp16_supported", lambda self: True)
    found = rows(run(shards, tmp_path / "run", "logging.layer_norms_every=2", *overrides.split()), "layers")
    expected = rows(observed, "layers")
    assert [row["step"] for row in found] == [2, 4]
    for a, b in zip(found, expected, strict=True):
        for name in ("grad_norms", "state_norms"):
            assert a[name] == pytest.approx(b[name], rel=tolerance)
            assert len(a[name]) == 2
        # The blocks are a part of the model.
        whole = rows(observed)[a["step"] - 1]["grad_norm"]
        assert 0 < sum(norm**2 for norm in a["grad_norms"]) < whole**2


def test_norms_of_blocks_are_those_of_the_gradients(shards, tmp_path):
    """Of the first step, made again by autograd alone."""
    settings = tiny_run(shards, tmp_path / "run", "train.steps=3", "train.zero_stage=2", "logging.layer_norms_every=1")
    pretrain(settings, console=Console(file=io.StringIO()))
    torch.manual_seed(settings.seed)
    model = TransnormerForCausalLM(settings.model.to_config()).train()
    (batches,) = TrainLoader(ShardSet.open(shards), 32, 4, 2, seed=settings.seed).steps(0, 1)
    for batch in batches:
        batch.pop("sample_ids")
        (model(**batch).loss_sum / sum(map(num_labelled, batches))).backward()
    expected = [torch.stack([p.grad.norm() for p in block.parameters()]).norm().item() for block in model.model.layers]
    assert rows(tmp_path / "run", "layers")[0]["grad_norms"] == pytest.approx(expected, rel=1e-5)


def test_norms_of_states_are_those_behind_the_first_window(observed, shards):
    """Of the last step, by the model that it left."""
    model, _ = load_model(resolve_model(str(observed)))
    ((batch, *_),) = TrainLoader(ShardSet.open(shards), 32, 4, 2, seed=3).steps(3, 4)
    with torch.no_grad():
        state = model(batch["input_ids"][:1, :32], use_cache=True).past_key_values
    expected = [layer.norm().item() for layer in state.layers]
    assert rows(observed, "layers")[-1]["state_norms"] == pytest.approx(expected, rel=1e-5)


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
    for text in (
        "Time of a step",
        "backward",
        "Norms of the blocks, step 4",
        "block 1",
        ", state ",
        'src="loss.png"',
        'src="run.png"',
    ):
        assert text in page
    assert "<script" not in page


def test_a_timer_counts_each_phase_and_nothing_between_steps(monkeypatch):
    now = 100.0
    monkeypatch.setattr("tnl.training.timing.time.perf_counter", lambda: now)
    timer = StepTimer(torch.device("cpu"))
    for _ in range(2):
        timer.begin()
        for phase, seconds in (("forward", 1), ("backward", 2), ("forward", 4), ("reduce", 8)):
            now += seconds
            timer.mark(phase)
        now += 16
        timer.end()
        split = timer.split()
        found = {phase: split.pop(f"{phase}_s") for phase in PHASES}
        assert found == {"data": 1, "forward": 2 + 8, "backward": 4, "optimizer": 0, "reduce": 16}
        assert split == {"step_time_s": 31}
        now += 1000  # an evaluation

"""Training segment by segment: the loss and, where asked for, the gradient of the whole window in the memory of one."""

import itertools
import subprocess
import sys

import pytest
import torch

from tests.closeness import assert_close
from tests.segment_memory import Engine
from tests.test_pretrain import train
from tests.test_processes import ROOT, environment
from tests.tiny_corpus import tiny_shards
from tests.tiny_model import random_ids, tiny_model
from tests.tiny_run import VOCAB_SIZE, rows, tiny_run, trajectory
from tnl.data.shards import ShardSet
from tnl.errors import ConfigError
from tnl.evaluation.heldout import heldout_loss
from tnl.model import TransnormerState
from tnl.training.segments import segment_losses
from tnl.training.settings import TrainSettings

CPU = torch.device("cpu")
WINDOW = 48
STEPS = "train.steps=6"
# Documents of two windows: across one edge and across several, beginning at an edge and beside it, of one token.
DOCUMENTS = [[0, 5, 30, 35, 36], [0, 24, 25]]
MIXERS = {"low-rank gate": {"gate_dim": 4, "mixer_norm_type": "layernorm"}, "gate": {}}


def batch(packed: bool) -> dict:
    """A micro-batch as the loader makes it."""
    ids = random_ids(2, WINDOW)
    labels, cu_seqlens = ids.clone(), None
    if packed:
        starts = [i * WINDOW + start for i, window in enumerate(DOCUMENTS) for start in window]
        ids, labels = ids.view(1, -1), labels.view(1, -1)
        labels[0, starts] = -100
        cu_seqlens = torch.tensor([*starts, 2 * WINDOW], dtype=torch.int32)
    return {"input_ids": ids, "labels": labels, "cu_seqlens": cu_seqlens}


def gradients(model) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return found


def whole(model, inputs) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss sum and gradients of one forward and backward pass."""
    loss_sum = model(**inputs, use_cache=False).loss_sum
    loss_sum.backward()
    return loss_sum.detach(), gradients(model)


def by_segments(model, inputs, scale: float = 1.0, **values) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The same, segment by segment."""
    settings = TrainSettings(steps=1, sequence_length=WINDOW, global_batch_size=2, micro_batch_size=2, **values)
    total = torch.zeros(())
    for loss_sum in segment_losses(Engine(model), inputs, settings, CPU):
        (loss_sum * scale).backward()
        total += loss_sum.detach()
    return total, gradients(model)


def assert_equal(found, expected) -> None:
    assert_close("loss", found[0], expected[0])
    for name, gradient in expected[1].items():
        assert_close(name, found[1][name], gradient)


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "batch"])
def test_exact_segments_have_the_gradient_of_the_whole_window(packed, mixer):
    model = tiny_model(decoder_layers=3, linear_use_lrpe_list=[1, 0, 1], **MIXERS[mixer]).train()
    expected = whole(model, batch(packed))
    for length in (6, 12, 48):
        assert_equal(by_segments(model, batch(packed), segment_length=length, segment_gradient="exact"), expected)


def test_checkpointed_exact_segments_have_the_gradient_of_the_whole_window():
    model = tiny_model().train()
    expected = whole(model, batch(True))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_equal(by_segments(model, batch(True), segment_length=12, segment_gradient="exact"), expected)


def by_detached_documents(model, inputs, length) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Each document alone, cut where its window is, its state carried without a gradient."""
    total = torch.zeros(())
    ids = inputs["input_ids"].flatten()
    for start, stop in itertools.pairwise(inputs["cu_seqlens"].tolist()):
        state = TransnormerState()
        edges = sorted({start, stop, *(e for e in range(0, 2 * WINDOW, length) if start < e < stop)})
        for begin, end in itertools.pairwise(edges):
            following = torch.full((1, end - begin), -100)
            following[0, : min(end + 1, stop) - begin - 1] = ids[begin + 1 : min(end + 1, stop)]
            output = model(ids[None, begin:end], shift_labels=following, past_key_values=state)
            output.loss_sum.backward()
            total += output.loss_sum.detach()
            state = state.detach()
    return total, gradients(model)


@pytest.mark.parametrize("mixer", MIXERS)
def test_truncated_segments_keep_the_loss_and_cut_the_gradient_between_them(mixer):
    model = tiny_model(decoder_layers=3, linear_use_lrpe_list=[1, 0, 1], **MIXERS[mixer]).train()
    loss, gradient = whole(model, batch(True))
    found = by_segments(model, batch(True), segment_length=12)
    assert_close("loss", found[0], loss)
    assert_equal(found, by_detached_documents(model, batch(True), 12))
    with pytest.raises(AssertionError, match="relative RMS error"):
        assert_equal(found, (loss, gradient))


def test_a_scale_of_the_loss_scales_the_gradient_through_states_once():
    model = tiny_model().train()
    loss, expected = whole(model, batch(True))
    found = by_segments(model, batch(True), scale=4096.0, segment_length=12, segment_gradient="exact")
    assert_equal(found, (loss, {name: gradient * 4096.0 for name, gradient in expected.items()}))


def test_a_state_goes_on_in_other_sequences():
    model = tiny_model()
    state = model(random_ids(3, 9), use_cache=True).past_key_values
    found = state.continued(torch.tensor([2, -1, 0, -1]))
    assert found.positions.tolist() == [9, 0, 9, 0]
    for new, old in zip(found.layers, state.layers, strict=True):
        assert torch.equal(new[[0, 2]], old[[2, 0]])
        assert not new[[1, 3]].any()
    assert TransnormerState().continued(torch.tensor([-1])).layers is None


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """A folder of shards with a held-out split."""
    return tiny_shards(tmp_path_factory.mktemp("data"), heldout_fraction=0.1)


@pytest.fixture(scope="module")
def straight(shards, tmp_path_factory):
    """A short run of whole windows."""
    output = tmp_path_factory.mktemp("runs") / "straight"
    train(tiny_run(shards, output, STEPS))
    return output


@pytest.mark.parametrize(
    "overrides",
    [
        ["train.zero_stage=0", "train.micro_batch_size=4"],
        ["train.zero_stage=1", "train.activation_checkpointing=selective"],
        ["train.zero_stage=2", "train.activation_checkpointing=full"],
        ["train.zero_stage=3"],
    ],
    ids=" ".join,
)
def test_a_run_by_exact_segments_is_the_run_of_whole_windows(shards, straight, tmp_path, overrides):
    segments = ["train.segment_length=8", "train.segment_gradient=exact"]
    train(tiny_run(shards, tmp_path / "run", STEPS, *segments, *overrides))
    for kind, key in [("train", "loss"), ("train", "grad_norm"), ("evaluation", "loss")]:
        found, expected = ([row[key] for row in rows(run, kind)] for run in (tmp_path / "run", straight))
        assert found == pytest.approx(expected, rel=1e-4), key


def test_a_truncated_run_learns_and_resumes_identically(shards, straight, tmp_path, monkeypatch):
    settings = [tiny_run(shards, tmp_path / name, STEPS, "train.segment_length=8") for name in ("once", "twice")]
    train(settings[0])
    losses = [row["loss"] for row in rows(tmp_path / "once")]
    assert losses[0] == pytest.approx(rows(straight)[0]["loss"], rel=1e-6)
    assert losses[-1] < losses[0] - 0.2
    assert losses[-1] != pytest.approx(rows(straight)[-1]["loss"], rel=1e-6)

    def stop_at_three(name, *, step=None):
        if name == "step" and step == 3:
            (tmp_path / "twice/STOP").touch()

    monkeypatch.setattr("tnl.training.pretrain.fault_point", stop_at_three)
    assert train(settings[1])[0] == "preempted"
    monkeypatch.undo()
    assert train(settings[1])[0] == "finished"
    assert trajectory(tmp_path / "twice") == trajectory(tmp_path / "once")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.segment_length=7"], r"train\.segment_length: 7 does not divide sequence_length 32; set a divisor"),
        (["train.segment_length=64"], r"train\.segment_length: 64 does not divide sequence_length 32"),
        (["train.segment_length=0"], r"train\.segment_length: .*greater than or equal to 2"),
        (["train.segment_gradient=exact"], r"train\.segment_gradient: exact needs segment_length"),
        (["train.segment_length=8", "train.sequence_parallel=2"], r"train\.segment_length: .*sequence_parallel"),
        (["train.segment_length=8", "model.kind=llama"], r"train\.segment_length: .*model\.kind"),
    ],
)
def test_settings_that_cannot_be_run_by_segments_are_refused(shards, tmp_path, overrides, message):
    with pytest.raises(ConfigError, match=message) as caught:
        tiny_run(shards, tmp_path / "run", *overrides)
    assert "1 problem" in str(caught.value)


def test_heldout_windows_in_pieces_have_the_loss_of_whole_windows(shards):
    model, heldout = tiny_model(vocab_size=VOCAB_SIZE), ShardSet.open(shards, "heldout")
    expected = heldout_loss(model, heldout, device=CPU, length=64, window=64)
    for world_size in (1, 2, 3):
        parts, calls = [], []
        for rank in range(world_size):
            handle = model.register_forward_pre_hook(lambda *_, rank=rank, calls=calls: calls.append(rank))
            parts.append(
                heldout_loss(model, heldout, device=CPU, length=16, window=64, rank=rank, world_size=world_size)
            )
            handle.remove()
        assert len({calls.count(rank) for rank in range(world_size)}) == 1
        assert sum(part.num_predicted for part in parts) == expected.num_predicted
        assert sum(part.loss_sum for part in parts) == pytest.approx(expected.loss_sum, rel=1e-6)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_window():
    worker = [sys.executable, "tests/segment_memory.py"]
    parts = ["4096:1024:exact", "16384:1024:truncated", "16384:1024:exact", "16384:16384:truncated"]
    done = subprocess.run(
        [*worker, *parts], env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    short, truncated, exact, whole = map(float, done.stdout.split())
    assert max(truncated, exact) < short + 8
    assert whole > short + 50  # one segment of 16k tokens: the measure shows what it should

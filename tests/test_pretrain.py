"""The training loop in one process: what it writes, how it resumes, and how it ends on bad input."""

import io
import json
import math
import signal
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console

from tests.closeness import assert_close
from tests.tiny_corpus import tiny_shards, tiny_texts
from tests.tiny_run import VOCAB_SIZE, rows, tiny_run, trajectory
from tnl.errors import (
    CannotWriteError,
    CheckpointError,
    ConfigError,
    DataError,
    NonFiniteError,
    RunInUseError,
)
from tnl.training.commit import CheckpointStore
from tnl.training.lock import RunLock
from tnl.training.pretrain import pretrain
from tnl.training.status import read_status


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """A folder of shards with a held-out split."""
    return tiny_shards(tmp_path_factory.mktemp("data"), heldout_fraction=0.1)


def train(settings, **kwargs) -> tuple[str, str]:
    """Outcome and printed text of a run."""
    out = io.StringIO()
    outcome = pretrain(settings, console=Console(file=out, width=200), **kwargs)
    return outcome, out.getvalue()


def fault(monkeypatch, plan: str) -> None:
    monkeypatch.setenv("TNL_TESTING", "1")
    monkeypatch.setenv("TNL_FAULT", plan)


@pytest.fixture(scope="module")
def straight(shards, tmp_path_factory):
    """An uninterrupted run of 12 steps."""
    output = tmp_path_factory.mktemp("runs") / "straight"
    train(tiny_run(shards, output))
    return output


def test_a_run_learns_and_records_every_step(straight):
    train_rows, evaluations = rows(straight), rows(straight, "evaluation")
    assert [row["step"] for row in train_rows] == list(range(1, 13))
    assert train_rows[0]["loss"] == pytest.approx(math.log(VOCAB_SIZE), abs=0.3)
    assert train_rows[-1]["loss"] < train_rows[0]["loss"] - 0.3
    for row in train_rows:
        assert row["loss_bits"] == pytest.approx(row["loss"] / math.log(2))
        assert row["tokens"] == row["step"] * 4 * 32
        assert row["tgs"] == row["tokens_per_s"] > 0
        assert 0 < row["mfu"] < 1
        assert row["grad_norm"] > 0
        assert not row["skipped"]
    assert train_rows[1]["lr"] == 3e-3  # the peak, at the last step of the warm-up
    assert [row["step"] for row in evaluations] == [12]
    assert evaluations[0]["bits_per_byte"] > 0
    status = read_status(straight)
    assert (status["state"], status["step"], status["exit_code"]) == ("finished", 12, 0)
    assert CheckpointStore(straight / "checkpoints").steps() == [10, 12]


def test_golden_losses(straight):
    """The losses of the first steps are those that were stored when the loop was known to be right."""
    golden = json.loads((Path(__file__).parent / "golden/tiny_run.json").read_text())
    assert [row["loss"] for row in rows(straight)] == pytest.approx(golden["losses"], rel=1e-4)


def test_two_runs_are_identical(shards, straight, tmp_path):
    train(tiny_run(shards, tmp_path / "again"))
    assert trajectory(tmp_path / "again") == trajectory(straight)


def test_a_finished_run_does_nothing(shards, straight):
    before = (straight / "metrics.jsonl").read_text()
    outcome, text = train(tiny_run(shards, straight))
    assert outcome == "finished"
    assert "nothing to train" in text
    assert (straight / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize("how", ["file", "signal"])
def test_a_stopped_run_saves_and_goes_on_identically(shards, straight, tmp_path, how, monkeypatch):
    output = tmp_path / "run"
    settings = tiny_run(shards, output)
    if how == "file":
        output.mkdir()
        (output / ".lock").touch()
        real = __import__("tnl.training.pretrain", fromlist=["fault_point"]).fault_point

        def stop_at_seven(name, *, step=None):
            if name == "step" and step == 7:
                (output / "STOP").touch()
            return real(name, step=step)
    else:

        def stop_at_seven(name, *, step=None):
            if name == "step" and step == 7:
                signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr("tnl.training.pretrain.fault_point", stop_at_seven)
    outcome, text = train(settings)
    assert outcome == "preempted"
    assert "stopped on request" in text
    assert read_status(output)["exit_code"] == 75
    assert CheckpointStore(output / "checkpoints").steps() == [5, 8]
    monkeypatch.undo()
    outcome, text = train(settings)
    assert outcome == "finished"
    assert "resumed at step 8" in text
    assert trajectory(output) == trajectory(straight)


def test_resume_from_a_named_step_repeats_the_run(shards, straight, tmp_path):
    settings = tiny_run(shards, tmp_path / "run")
    train(settings)
    assert train(settings, resume="10")[0] == "finished"
    assert trajectory(tmp_path / "run") == trajectory(straight)
    with pytest.raises(CheckpointError, match="steps there: 10, 12"):
        train(settings, resume="7")


def test_resuming_an_older_step_sets_newer_checkpoints_aside(shards, straight, tmp_path, monkeypatch):
    output = tmp_path / "run"
    settings = tiny_run(shards, output)
    train(settings)

    def stop_at_ten(name, *, step=None):
        if name == "step" and step == 10:
            (output / "STOP").touch()

    monkeypatch.setattr("tnl.training.pretrain.fault_point", stop_at_ten)
    assert train(settings, resume="10")[0] == "preempted"
    monkeypatch.undo()
    assert CheckpointStore(output / "checkpoints").steps() == [10, 11]
    assert len(list((output / "checkpoints").glob("step_00000012.set-aside-*"))) == 1
    _, text = train(settings)
    assert "resumed at step 11" in text
    assert trajectory(output) == trajectory(straight)


def test_a_stop_that_an_earlier_run_did_not_see_stops_no_later_one(shards, tmp_path):
    settings = tiny_run(shards, tmp_path / "run", "train.steps=3", "checkpoint.every=3")
    settings.output.mkdir()
    (settings.output / "STOP").touch()
    assert train(settings)[0] == "finished"
    assert not (settings.output / "STOP").exists()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"resume": "7"}, "no such checkpoint .* steps there: none"),
        ({"resume": "7", "fresh": True}, "only one of them"),
    ],
)
def test_a_resume_of_nothing_leaves_no_folder(shards, tmp_path, how, message):
    with pytest.raises((CheckpointError, ConfigError), match=message):
        train(tiny_run(shards, tmp_path / "run"), **how)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("resume", ["none", "banana", "-1"])
def test_a_resume_that_is_no_step_is_a_usage_error(shards, straight, resume):
    with pytest.raises(ConfigError, match="--resume"):
        train(tiny_run(shards, straight), resume=resume)


def test_a_damaged_newest_checkpoint_is_passed_over_with_a_warning(shards, straight, tmp_path):
    settings = tiny_run(shards, tmp_path / "run")
    train(settings)
    (weights,) = (tmp_path / "run/checkpoints/step_00000012/engine").glob("*model_states.pt")
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    _, text = train(settings)
    assert "mp_rank_00_model_states.pt" in text
    assert "resumed at step 10" in text
    assert trajectory(tmp_path / "run") == trajectory(straight)


def test_accumulation_and_workers_do_not_change_the_losses(shards, straight, tmp_path):
    reference = [row["loss"] for row in rows(straight)]
    for name, overrides in {
        "one": ["train.micro_batch_size=1"],
        "four": ["train.micro_batch_size=4"],
        "workers": ["data.num_workers=2"],
    }.items():
        train(tiny_run(shards, tmp_path / name, *overrides))
        assert [row["loss"] for row in rows(tmp_path / name)] == pytest.approx(reference, abs=1e-5)


def test_without_packing_documents_share_a_window(shards, straight, tmp_path):
    train(tiny_run(shards, tmp_path / "run", "data.packing=false"))
    assert rows(tmp_path / "run")[-1]["loss"] < rows(tmp_path / "run")[0]["loss"] - 0.3
    assert trajectory(tmp_path / "run") != trajectory(straight)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_non_finite_step_is_left_out_and_counted(shards, straight, tmp_path, stage, monkeypatch):
    fault(monkeypatch, "loss:step=4:action=nan")
    train(tiny_run(shards, tmp_path / "run", f"train.zero_stage={stage}"))
    train_rows = rows(tmp_path / "run")
    assert [row["step"] for row in train_rows if row["skipped"]] == [5]
    assert train_rows[4]["grad_norm"] is None
    reference = rows(straight)
    # The update before the bad step still counts; the bad step itself changed nothing.
    assert train_rows[4]["loss"] == pytest.approx(reference[4]["loss"], abs=1e-5)
    assert all(math.isfinite(row["loss"]) for row in train_rows[5:])
    assert train_rows[-1]["loss"] < train_rows[0]["loss"] - 0.3


def test_weights_do_not_change_in_a_left_out_step(shards, tmp_path, monkeypatch):
    fault(monkeypatch, "loss:action=nan")
    settings = tiny_run(shards, tmp_path / "run", "train.steps=3", "checkpoint.every=1")
    train(settings)
    store = CheckpointStore(tmp_path / "run/checkpoints")
    files = [store.path(step) / "engine/mp_rank_00_model_states.pt" for step in (2, 3)]
    first, second = (torch.load(file, weights_only=True)["module"] for file in files)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_too_many_non_finite_steps_end_the_run(shards, tmp_path, monkeypatch):
    fault(monkeypatch, "loss:action=nan")
    with pytest.raises(NonFiniteError, match="3 steps in a row") as caught:
        train(tiny_run(shards, tmp_path / "run", "train.max_skipped_steps=2"))
    assert caught.value.exit_code == read_status(tmp_path / "run")["exit_code"] == 76


@pytest.mark.parametrize("point", ["ckpt.begin", "ckpt.shard.pre", "ckpt.shard.mid", "ckpt.manifest.pre"])
def test_a_full_disk_ends_the_run_and_loses_nothing(shards, straight, tmp_path, point, monkeypatch):
    settings = tiny_run(shards, tmp_path / "run")
    real = CheckpointStore.begin

    def second_save_fails(self, step):
        if step == 10:
            fault(monkeypatch, f"{point}:action=enospc")
        return real(self, step)

    monkeypatch.setattr(CheckpointStore, "begin", second_save_fails)
    with pytest.raises(CannotWriteError, match="free some space") as caught:
        train(settings)
    assert caught.value.exit_code == read_status(tmp_path / "run")["exit_code"] == 73
    store = CheckpointStore(tmp_path / "run/checkpoints")
    assert [p.name for p in store.root.glob("step_*")] == ["step_00000005"]
    monkeypatch.undo()
    train(settings)
    assert trajectory(tmp_path / "run") == trajectory(straight)


def test_a_folder_of_another_configuration_is_refused_with_the_keys(shards, straight, tmp_path):
    with pytest.raises(ConfigError, match=r"optimizer\.lr: was 0\.003, now 0\.001"):
        train(tiny_run(shards, straight, "optimizer.lr=1e-3"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other/notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="no run folder"):
        train(tiny_run(shards, tmp_path / "other"))
    assert (tmp_path / "other/notes.txt").read_text() == "mine"


def test_a_checkpoint_of_another_layout_is_refused_whatever_the_file_beside_it_says(shards, tmp_path):
    train(tiny_run(shards, tmp_path / "run", "train.steps=6", "train.zero_stage=2"))
    file = tmp_path / "run/config.yaml"
    file.write_text(file.read_text().replace("zero_stage: 2", "zero_stage: 3"))
    with pytest.raises(CheckpointError, match="saved with another configuration than this one; undo the change"):
        train(tiny_run(shards, tmp_path / "run", "train.steps=6", "train.zero_stage=3"), resume="5")


def test_fresh_keeps_the_old_folder_aside(shards, tmp_path):
    settings = tiny_run(shards, tmp_path / "run", "train.steps=3")
    train(settings)
    train(tiny_run(shards, tmp_path / "run", "train.steps=3", "optimizer.lr=1e-3"), fresh=True)
    (old,) = tmp_path.glob("run.old-*")
    assert rows(old)[-1]["lr"] != rows(tmp_path / "run")[-1]["lr"]


def test_a_folder_in_use_is_refused(shards, tmp_path):
    (tmp_path / "run").mkdir()
    lock = RunLock(tmp_path / "run")
    try:
        with pytest.raises(RunInUseError, match="in use"):
            train(tiny_run(shards, tmp_path / "run"))
        with pytest.raises(RunInUseError, match="in use"):
            train(tiny_run(shards, tmp_path / "run"), fresh=True)
    finally:
        lock.close()


def test_data_that_does_not_belong_to_the_run_is_refused(shards, tmp_path):
    settings = tiny_run(shards, tmp_path / "run", "train.steps=6")
    train(settings)
    other = tiny_shards(tmp_path, texts=tiny_texts(seed=1), heldout_fraction=0.1)
    # The finished run must look at its data again: go back to step 5.
    with pytest.raises(DataError, match="tokenizer"):
        train(tiny_run(other, tmp_path / "run", "train.steps=6"), resume="5")


def test_a_tokenizer_larger_than_the_model_is_refused(shards, tmp_path):
    with pytest.raises(DataError, match=r"model\.vocab_size"):
        train(tiny_run(shards, tmp_path / "run", "model.vocab_size=300"))


def test_a_truncated_shard_is_refused(tmp_path):
    folder = tiny_shards(tmp_path, heldout_fraction=0.1)
    shard = sorted(folder.glob("train*"))[0]
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(DataError, match=shard.name):
        train(tiny_run(folder, tmp_path / "run"))


def test_bf16_trains_with_fp32_master_weights(shards, straight, tmp_path):
    for stage in (2, 3):
        output = tmp_path / f"bf16-{stage}"
        train(tiny_run(shards, output, "train.precision=bf16", f"train.zero_stage={stage}"))
        losses = torch.tensor([row["loss"] for row in rows(output)])
        expected = torch.tensor([row["loss"] for row in rows(straight)])
        # bf16 rounds weights and activations to 3 digits; over 12 steps the losses stay within 1 %.
        assert_close(f"bf16 losses at stage {stage}", losses, expected, ratio=1e-2)


def test_activation_checkpointing_does_not_change_the_losses(shards, straight, tmp_path):
    train(tiny_run(shards, tmp_path / "run", "train.activation_checkpointing=full"))
    losses = [row["loss"] for row in rows(tmp_path / "run")]
    assert losses == pytest.approx([row["loss"] for row in rows(straight)], abs=1e-6)


def test_deepspeed_keys_pass_through(shards, tmp_path):
    overrides = ["train.steps=3", "train.zero_stage=2", "deepspeed.zero_optimization.reduce_bucket_size=1000"]
    assert train(tiny_run(shards, tmp_path / "run", *overrides))[0] == "finished"


def test_wandb_offline_records_the_run_without_the_command_line(shards, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setattr("sys.argv", ["tnl", "CANARY-ARGUMENT"])
    train(tiny_run(shards, tmp_path / "run", "train.steps=3", "logging.wandb=offline"))
    (file,) = (tmp_path / "run").rglob("*.wandb")
    deadline = time.monotonic() + 30  # its own process writes the file
    while b"train/loss" not in file.read_bytes():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert not any(b"CANARY-ARGUMENT" in p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("deepspeed.zero_optimization.reduce_bucket_sise=1", "did you mean reduce_bucket_size"),
        ("train.zero_stage=2 deepspeed.zero_optimization.compute_grad_norm=false", "compute_grad_norm: the norm shows"),
        ("model.vocab_size=300", "model.vocab_size"),
        ("train.sequence_length=1000000", "train.sequence_length"),
        ("output={folder}/r[1]", "patterns"),
        ("train.compile=true", "train.compile"),
        (
            "train.global_batch_size=6 train.micro_batch_size=3 train.sequence_parallel=2",
            "do not divide into groups of 2",
        ),
    ],
)
def test_what_is_refused_leaves_no_folder(shards, tmp_path, override, message):
    with pytest.raises((ConfigError, DataError), match=message):
        train(tiny_run(shards, tmp_path / "run", *override.format(folder=tmp_path).split()))
    assert list(tmp_path.iterdir()) == []


def test_until_its_first_checkpoint_a_run_may_be_corrected(shards, tmp_path, monkeypatch):
    fault(monkeypatch, "ckpt.begin:action=enospc")
    with pytest.raises(CannotWriteError):
        train(tiny_run(shards, tmp_path / "run"))
    monkeypatch.undo()
    assert train(tiny_run(shards, tmp_path / "run", "optimizer.lr=1e-3"))[0] == "finished"


def test_wandb_without_a_key_is_refused_and_can_be_corrected_in_the_same_folder(shards, tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ConfigError, match="WANDB_API_KEY"):
        train(tiny_run(shards, tmp_path / "run", "logging.wandb=online"))
    assert train(tiny_run(shards, tmp_path / "run", "train.steps=3"))[0] == "finished"

"""A run that is out of GPU memory: one message with the plan and the cures, and an exit code that says so."""

import re

import pytest
import torch

from tests.tiny_corpus import tiny_shards
from tests.tiny_run import tiny_run
from tnl.errors import EXIT_USAGE, ConfigError
from tnl.training.memory import memory_plan
from tnl.training.out_of_memory import advice, cures
from tnl.training.pretrain import pretrain
from tnl.training.status import read_status

TEXT = "CUDA out of memory. Tried to allocate 2.00 GiB. If reserved but unallocated memory is large try something"


def test_a_run_ends_with_the_plan_and_the_cures(tmp_path, monkeypatch):
    output = tmp_path / "run"
    settings = tiny_run(tiny_shards(tmp_path), output)

    def full(*_, **__):
        raise torch.OutOfMemoryError(TEXT)

    monkeypatch.setattr("tnl.training.pretrain.TrainStep.run", full)
    with pytest.raises(ConfigError, match="rank 0 is out of GPU memory: CUDA out of memory") as error:
        pretrain(settings)
    text = str(error.value)
    assert len(text.splitlines()) == 1
    assert "tnl plan expects tensors of" in text
    assert "train.micro_batch_size=1" in text
    assert "If reserved" not in text
    status = read_status(output)
    assert (status["state"], status["exit_code"], status["error"]) == ("failed", EXIT_USAGE, text)


def test_cures_take_less_than_the_plan(tmp_path):
    settings = tiny_run(tmp_path, tmp_path, "train.micro_batch_size=4", "train.sequence_length=2097152")
    planned = memory_plan(settings, 1).peak / 2**30
    found = list(cures(settings, 1))
    assert [cure.partition("=")[0] for cure in found] == ["train.micro_batch_size", "train.activation_checkpointing"]
    assert all(float(re.search(r"\(([0-9.]+) GiB", cure)[1]) < planned for cure in found)


@pytest.mark.parametrize(
    ("overrides", "offered"),
    [
        ("train.reduce_gradients=every_step", "train.reduce_gradients=every_pass"),
        ("train.activation_checkpointing=every_k train.activation_checkpointing_k=2", "activation_checkpointing=full"),
    ],
)
def test_cures_are_settings_that_go_together(tmp_path, overrides, offered):
    size = ["model.hidden_size=2048", "model.glu_dim=5632", "model.num_layers=8", "train.sequence_length=16384"]
    given = [*size, "train.zero_stage=2", "train.precision=bf16", *overrides.split()]
    found = [cure.partition(" (")[0] for cure in cures(tiny_run(tmp_path, tmp_path, *given), 2)]
    assert any(offered in cure for cure in found)
    for cure in found:
        assert tiny_run(tmp_path, tmp_path, *given, *cure.split())


def test_a_llama_gets_the_cures_of_its_own_plan(tmp_path):
    assert "train.micro_batch_size" in advice(tiny_run(tmp_path, tmp_path, "model.kind=llama"), 1)
    least = ("train.activation_checkpointing=full", "train.micro_batch_size=1", "train.zero_stage=2")
    found = advice(tiny_run(tmp_path, tmp_path, "model.kind=llama", *least), 1)
    assert "tnl plan expects tensors of" in found
    assert "what would take less: a shorter train.sequence_length, or more GPUs" in found

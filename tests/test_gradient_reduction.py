"""Gradients that are reduced once a step: their sums in fp32, and the run that they make."""

import gc
import io
import weakref

import pytest
import torch
from rich.console import Console
from torch import nn

from tests.closeness import assert_close
from tests.tiny_corpus import tiny_shards
from tests.tiny_model import random_ids, tiny_model
from tests.tiny_run import rows, tiny_run
from tnl.errors import ConfigError
from tnl.training.gradient_sums import GradientSum, sum_gradients
from tnl.training.pretrain import pretrain


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """A folder of shards without a held-out split."""
    return tiny_shards(tmp_path_factory.mktemp("data"))


def run(settings) -> list[dict]:
    pretrain(settings, console=Console(file=io.StringIO()))
    return rows(settings.output)


def backward(model, seed: int) -> None:
    ids = random_ids(2, 9, seed=seed)
    model(input_ids=ids, labels=ids).loss.backward()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_that_reduces_once_is_the_run_that_reduces_after_every_pass(precision, shards, tmp_path):
    shared = ["train.steps=4", "train.zero_stage=2", f"train.precision={precision}", "train.micro_batch_size=1"]
    every_pass = run(tiny_run(shards, tmp_path / "pass", *shared))
    every_step = run(tiny_run(shards, tmp_path / "step", *shared, "train.reduce_gradients=every_step"))
    tolerance = 1e-6 if precision == "fp32" else 5e-3
    for key in ("loss", "grad_norm"):
        assert [row[key] for row in every_step] == pytest.approx([row[key] for row in every_pass], rel=tolerance)


@pytest.mark.parametrize("reduce", ["every_pass", "every_step"])
def test_a_step_of_bf16_whose_gradients_are_not_finite_is_skipped(reduce, shards, tmp_path, monkeypatch):
    monkeypatch.setenv("TNL_TESTING", "1")
    monkeypatch.setenv("TNL_FAULT", "loss:step=2:action=nan")
    settings = [f"train.reduce_gradients={reduce}", "train.zero_stage=2", "train.precision=bf16", "train.steps=4"]
    assert [row["skipped"] for row in run(tiny_run(shards, tmp_path / "run", *settings))] == [False, False, True, False]


@pytest.mark.parametrize("fused", [False, True])
def test_the_sums_are_those_of_fp32(fused):
    model, wide = tiny_model().train().bfloat16(), {}
    for seed in range(3):
        backward(model, seed)
        for name, p in model.named_parameters():
            wide[name] = wide.get(name, 0) + p.grad.double()
        model.zero_grad()
    names = {p: name for name, p in model.named_parameters()}
    sums = sum_gradients(model, fused=fused)
    for seed in range(3):
        backward(model, seed)
        assert all(p.grad is None for p in model.parameters())
    assert {names[p] for p, _ in sums} == set(wide)
    for p, total in sums:
        assert_close(names[p], total.take(torch.float32), wide[names[p]], ratio=1e-6)


def test_a_sum_keeps_what_bf16_would_lose():
    p = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    total = GradientSum(p)
    for value in [1.0] + 128 * [2.0**-9]:
        p.grad = torch.full_like(p, value)
        total.add_gradient(p)
    assert p.grad is None
    assert total.take(torch.bfloat16).item() == 1.25
    assert total.take(torch.bfloat16) is None  # nothing was added since


def test_weights_in_fp32_keep_their_own_gradients():
    model = tiny_model().train()
    assert sum_gradients(model, fused=True) == []
    backward(model, 0)
    assert all(p.grad is not None for p in model.parameters())


def test_evaluation_adds_nothing():
    model = tiny_model().bfloat16()
    sums = sum_gradients(model, fused=True)
    with torch.no_grad():
        model(input_ids=random_ids(1, 5))
    assert all(total.take(torch.float32) is None for _, total in sums)


def test_the_sums_let_the_model_go():
    model = tiny_model().train().bfloat16()
    sums = sum_gradients(model, fused=True)
    backward(model, 0)
    watched = weakref.ref(model.model.layers[0].channel_mixer.l1.weight)
    del model, sums
    gc.collect()
    assert watched() is None


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.zero_stage=1"], r"reduce_gradients: every_step is for zero_stage 2, got 1"),
        (["train.zero_stage=3"], r"reduce_gradients: every_step is for zero_stage 2, got 3"),
        (["train.zero_stage=2", "train.offload_optimizer=cpu"], r"reduce_gradients: every_step keeps all gradients"),
    ],
)
def test_what_does_not_go_with_it_is_refused(overrides, message, shards, tmp_path):
    with pytest.raises(ConfigError, match=message):
        tiny_run(shards, tmp_path / "run", "train.reduce_gradients=every_step", *overrides)

"""The kind tnl-fla of `tnl bench train`: the same model as ours, and refused where it would not be."""

import importlib.util
import json

import pytest
import torch
from tnl_kernels import lightning_attention
from tnl_kernels.naive import naive_lightning_attention

from tests.closeness import assert_close
from tests.tiny_model import random_ids, tiny_config
from tnl import config as configuration
from tnl.errors import ConfigError
from tnl.model import TransnormerForCausalLM
from tnl.model.settings import ModelSettings
from tnl.tools import bench_fla, bench_train
from tnl.tools.bench_engines import Place

SMALL = ["model.vocab_size=100", "model.hidden_size=32", "model.num_heads=2", "model.glu_dim=48"]
CPU = torch.device("cpu")


def attention(q, k, v, log_decay):
    return lightning_attention(q, k, v, -log_decay)[0]


def settings_of(*overrides: str):
    model = configuration.load(ModelSettings, "model/tnl-tiny").model_dump(mode="json")
    return bench_train.settings_of(model, bench_fla.KIND, 32, 128, 64, Place(0, 2, CPU), [*SMALL, *overrides])


def test_weights_loss_and_gradients_are_ours():
    config, ids = tiny_config(no_scale_embedding=False, decoder_layers=3), random_ids(2, 37)
    models = []
    for make in (TransnormerForCausalLM, lambda config: bench_fla.PlainTransnormer(config, attention)):
        torch.manual_seed(1)
        models.append(make(config).train())
    ours, plain = models
    weights = plain.state_dict()
    assert weights.keys() == ours.state_dict().keys()
    for name, weight in ours.state_dict().items():
        assert torch.equal(weights[name], weight), name
    outputs = [model(input_ids=ids, labels=ids, use_cache=False) for model in models]
    assert outputs[1].num_tokens == outputs[0].num_tokens == 2 * 36
    assert outputs[1].loss_sum.item() == pytest.approx(outputs[0].loss_sum.item(), rel=1e-6)
    for output in outputs:
        output.loss_sum.backward()
    named = dict(plain.named_parameters())
    for name, parameter in ours.named_parameters():
        # In float32, theta's gradient is what is left of a sum that cancels.
        assert_close(name, named[name].grad, parameter.grad, 1e-3 if name.endswith("theta") else 2e-5)


def test_its_norm_is_exact_in_bf16():
    x = torch.randn(3, 5, 64, dtype=torch.bfloat16)
    wide = x.double()
    expected = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
    assert_close("srms", bench_fla.srms(x), expected)


def test_it_is_a_row_beside_ours_and_names_what_it_was_compared_with(tmp_path):
    lines, file = [], tmp_path / "train.json"
    for checkpointing in ("none", "full"):
        bench_train.bench_train(
            "tnl-tiny",
            lengths=[16, 32],
            tokens_per_step=64,
            micro_tokens=32,
            kinds=["tnl", "tnl-fla"],
            steps=1,
            warmup=1,
            engine="torch",
            overrides=[*SMALL, "optimizer.lr=3e-2", f"train.activation_checkpointing={checkpointing}"],
            json_file=file,
            report=lines.append,
            plain_attention=attention,
        )
        result = json.loads(file.read_text())
        ours, plain = result["rows"][:2], result["rows"][2:]
        assert [row["kind"] for row in plain] == ["tnl-fla"] * 2
        for a, b, wide in zip(ours, plain, result["table"], strict=True):
            assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)
            assert (b["limit_tgs"], b["parameters"]) == (a["limit_tgs"], a["parameters"])
            assert wide["times_fla"] == pytest.approx(a["tgs"] / b["tgs"])
        assert result["fla"]["version"] is None
        assert 0 < result["fla"]["gradient_difference"] < 1e-3
    assert sum("compared with ours" in line for line in lines) == 2


def test_the_first_step_of_the_definition_is_the_same():
    found = bench_fla.agreement(
        settings_of(), lambda q, k, v, g: naive_lightning_attention(q, k, v, -g)[0].to(q.dtype), CPU, torch.float32
    )
    assert found["loss_difference"] < 1e-6


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda q, k, v, g: lightning_attention(q, k, v, -1.1 * g)[0], "the gradient of .* away from ours"),
        (lambda q, k, v, g: torch.full_like(v, float("nan")) * attention(q, k, v, g), "the gradient of .* nan"),
    ],
    ids=["decay", "nan"],
)
def test_another_model_is_not_measured(wrong, message):
    with pytest.raises(ConfigError, match=message):
        bench_fla.agreement(settings_of(), wrong, CPU, torch.float32)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.gate_dim=8"], "model: gate_dim"),
        (["model.mixer_norm=layernorm", "model.activation=none"], "model: linear_act_fun; model: mixer_norm_type"),
        (["train.segment_length=16"], "train.segment_length"),
        (["train.sequence_parallel=2"], "train.sequence_parallel"),
        (["train.tensor_parallel=2"], "train.tensor_parallel"),
        (["train.activation_checkpointing=selective"], "selective"),
    ],
)
def test_what_it_is_not_written_for_is_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        bench_fla.prepare([settings_of(*overrides)], attention, CPU, torch.float32)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says that there is no GPU")
def test_without_fla_or_a_gpu_it_says_so(tnl_command):
    options = ["--tokens-per-step", "64", "--micro-tokens", "32", "--lengths", "32", "--engine", "torch"]
    code, _, err = tnl_command("bench", "train", "tnl-tiny", *SMALL, *options, "--kinds", "tnl,tnl-fla")
    assert code == 2
    there = importlib.util.find_spec("fla") is not None
    assert ("need a GPU" if there else "the package fla is not installed; pip install fla-core") in err

"""Saving and loading, and decay, positions and weights after every way in which a model comes to be."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from tests.checkout import python_path
from tests.closeness import assert_close
from tests.reference_model import reference_slopes
from tests.tiny_model import random_ids, tiny_config, tiny_model
from tnl.model import TransnormerConfig, TransnormerForCausalLM, TransnormerModel

HEADS, LAYERS = 4, 2
LOW_RANK_GATE = dict(gate_dim=5)  # the token mixer of TransNormerLLM3


def expected_theta(num_heads=HEADS, head_dim=8):
    j = torch.arange(num_heads * head_dim, dtype=torch.float64)
    return (10000 ** (-2 * j / (num_heads * head_dim))).view(num_heads, 1, head_dim)


def check_slopes(model):
    """The slopes that each layer uses are exact to fp32."""
    for i, layer in enumerate(model.model.layers):
        slopes = torch.tensor(layer.token_mixer.slopes, dtype=torch.float64)
        assert_close(f"layer {i}", slopes, reference_slopes("released", HEADS, i, LAYERS))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A saved `tiny_model` and its folder."""
    folder = tmp_path_factory.mktemp("model")
    model = tiny_model()
    model.save_pretrained(folder)
    return model, folder


@pytest.fixture
def editable(saved, tmp_path):
    """A copy of the folder, and functions that change its weights and its config."""
    source = saved[1]

    def write_weights(change):
        weights = load_file(source / "model.safetensors")
        change(weights)
        save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})

    def write_config(**values):
        config = json.loads((source / "config.json").read_text()) | values
        (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))

    write_weights(lambda weights: None)
    write_config()
    return tmp_path, write_weights, write_config


def test_a_saved_model_loads_with_equal_logits(saved):
    model, folder = saved
    loaded, ids = AutoModelForCausalLM.from_pretrained(folder), random_ids(2, 20)
    assert isinstance(loaded, TransnormerForCausalLM)
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_the_file_holds_the_tied_weight_once(saved):
    model, folder = saved
    assert set(load_file(folder / "model.safetensors")) == set(model.state_dict()) - {"lm_head.weight"}


def test_a_model_without_its_head_loads_with_equal_hidden_states(saved):
    model, folder = saved
    loaded, ids = AutoModel.from_pretrained(folder), random_ids(1, 9)
    assert isinstance(loaded, TransnormerModel)
    assert torch.equal(loaded(ids).last_hidden_state, model.model(ids).last_hidden_state)


def test_an_untied_head_is_saved_and_loaded(tmp_path):
    model, ids = tiny_model(tie_word_embeddings=False), random_ids(1, 9)
    model.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, model(ids).logits)


def test_config_round_trip_changes_nothing(tmp_path):
    config = tiny_config(linear_use_lrpe_list=[0, 1], decay="paper", linear_act_fun="none", hidden_dim=64)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, TransnormerConfig)
    assert loaded.to_dict() | {"_name_or_path": ""} == config.to_dict()


def test_a_checkpoint_with_a_duplicate_of_the_tied_head_loads(saved, editable):
    folder, write_weights, _ = editable
    write_weights(lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"].clone()}))
    ids = random_ids(1, 9)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(loaded(ids).logits, saved[0](ids).logits)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    AutoModel.from_pretrained(folder)  # which has no head


def test_a_released_config_loads_without_its_remote_code_and_tied(saved, editable):
    folder, _, write_config = editable
    (folder / "planted.py").write_text("raise SystemExit('remote code was run')")
    write_config(
        auto_map={"AutoConfig": "planted.Config", "AutoModelForCausalLM": "planted.Model"},
        tie_word_embeddings=None,
        decay=None,
        add_bos_token=False,
    )
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert not hasattr(loaded.config, "auto_map")
    assert loaded.config.decay == "released"
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_a_missing_weight_is_an_error(editable):
    folder, write_weights, _ = editable
    write_weights(lambda w: w.pop("model.layers.1.channel_mixer.l2.weight"))
    with pytest.raises(ValueError, match=r"missing: model\.layers\.1\.channel_mixer\.l2\.weight"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_an_unknown_weight_is_an_error(editable):
    folder, write_weights, _ = editable
    write_weights(lambda w: w.update({"model.layers.0.token_mixer.gate": torch.ones(1)}))
    with pytest.raises(ValueError, match=r"not of this model: model\.layers\.0\.token_mixer\.gate"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_loading_info_is_given_when_asked(saved):
    _, info = TransnormerForCausalLM.from_pretrained(saved[1], output_loading_info=True)
    assert not info["missing_keys"]


# Routes


def test_a_new_model_has_the_slopes_and_theta_of_the_formula():
    model = tiny_model()
    check_slopes(model)
    assert_close("theta", model.model.layers[0].token_mixer.lrpe.theta, expected_theta())


def test_new_weights_have_the_configured_deviation():
    model = tiny_model(init_std=0.05)
    for name, weight in model.state_dict().items():
        if "theta" not in name:
            assert weight.std().item() == pytest.approx(0.05, rel=0.1), name


def test_a_model_built_in_bf16_has_exact_slopes_and_rounded_theta():
    model = AutoModelForCausalLM.from_config(tiny_config(), dtype=torch.bfloat16)
    check_slopes(model)
    assert_close("theta", model.model.layers[0].token_mixer.lrpe.theta, expected_theta())


def test_a_model_loaded_in_bf16_equals_the_saved_one_cast_to_bf16(saved):
    loaded, ids = AutoModelForCausalLM.from_pretrained(saved[1], dtype=torch.bfloat16), random_ids(1, 30)
    check_slopes(loaded)
    assert torch.equal(loaded.model.layers[0].token_mixer.lrpe.theta, expected_theta().bfloat16())
    assert torch.equal(loaded(ids).logits, tiny_model().bfloat16()(ids).logits)


def test_a_model_built_on_the_meta_device_and_then_loaded_computes_the_same(saved):
    model, ids = saved[0], random_ids(1, 30)
    with torch.device("meta"):
        built = TransnormerForCausalLM(model.config)
    built.to_empty(device="cpu")
    built.tie_weights()
    built.load_state_dict(model.state_dict())
    check_slopes(built)
    assert torch.equal(built.eval()(ids).logits, model(ids).logits)


DEEPSPEED_ROUTES = """
import json, os, sys
import torch, torch.distributed as dist
folder = sys.argv[1]
dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=0, world_size=1)
import deepspeed
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
deepspeed.init_distributed("gloo", verbose=False)
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations import HfDeepSpeedConfig
import tnl.model

config = AutoConfig.from_pretrained(folder)
ids = torch.arange(3, 33).unsqueeze(0)
results = {}

def describe(engine):
    engine.eval()
    with torch.no_grad():
        logits = engine(ids).logits[0].tolist()
    model = engine.module
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        return dict(
            slopes=[layer.token_mixer.slopes for layer in model.model.layers],
            theta=model.model.layers[0].token_mixer.lrpe.theta.tolist(),
            std=model.model.embed_tokens.weight.std().item(),
            logits=logits,
        )

def settings(stage):
    return dict(train_micro_batch_size_per_gpu=1, zero_optimization=dict(stage=stage), bf16=dict(enabled=True))

model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
engine, *_ = deepspeed.initialize(
    model=model, optimizer=optimizer, config=settings(1) | {"zero_allow_untested_optimizer": True}
)
results["bf16 engine"] = describe(engine)

try:
    with deepspeed.zero.Init(config_dict_or_path=settings(3)):
        tnl.model.TransnormerForCausalLM(config)
except ValueError as error:
    results["zero.Init alone"] = str(error)

held = HfDeepSpeedConfig(settings(3))
for name, model in (
    ("zero.Init, from_config", AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)),
    ("zero.Init, from_pretrained", AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)),
    ("zero.Init, low-rank gate", AutoModelForCausalLM.from_pretrained(f"{folder}/gated", dtype=torch.bfloat16)),
):
    results[name] = describe(deepspeed.initialize(model=model, config=settings(3))[0])
with open(f"{folder}/results.json", "w") as file:
    json.dump(results, file)
"""


@pytest.fixture(scope="module")
def deepspeed_routes(tmp_path_factory):
    """What `DEEPSPEED_ROUTES` reports, from a process of its own: DeepSpeed's state is global."""
    pytest.importorskip("deepspeed")
    folder = tmp_path_factory.mktemp("deepspeed")
    tiny_model().save_pretrained(folder)
    tiny_model(**LOW_RANK_GATE).save_pretrained(folder / "gated")
    environment = os.environ | {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
        "DS_ACCELERATOR": "cpu",
        "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONPATH": python_path(),
    }
    process = subprocess.run(
        [sys.executable, "-c", DEEPSPEED_ROUTES, str(folder)], env=environment, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    return json.loads((folder / "results.json").read_text())


ROUTES = ["bf16 engine", "zero.Init, from_config", "zero.Init, from_pretrained", "zero.Init, low-rank gate"]


@pytest.mark.parametrize("route", ROUTES)
def test_slopes_are_exact_under_deepspeed(deepspeed_routes, route):
    for i, slopes in enumerate(deepspeed_routes[route]["slopes"]):
        slopes = torch.tensor(slopes, dtype=torch.float64)
        assert_close(f"layer {i}", slopes, reference_slopes("released", HEADS, i, LAYERS))


@pytest.mark.parametrize("route", ROUTES)
def test_theta_is_that_of_the_formula_under_deepspeed(deepspeed_routes, route):
    theta = torch.tensor(deepspeed_routes[route]["theta"])
    assert_close("theta", theta, expected_theta().bfloat16(), 0.0)


@pytest.mark.parametrize(
    ("route", "values"),
    [("bf16 engine", {}), ("zero.Init, from_pretrained", {}), ("zero.Init, low-rank gate", LOW_RANK_GATE)],
    ids=str,
)
def test_logits_under_deepspeed_equal_those_of_the_model_cast_to_bf16(deepspeed_routes, route, values):
    logits = torch.tensor(deepspeed_routes[route]["logits"], dtype=torch.bfloat16)
    assert_close("logits", logits, tiny_model(**values).bfloat16()(torch.arange(3, 33).unsqueeze(0)).logits[0])


def test_weights_made_under_deepspeed_have_the_configured_deviation(deepspeed_routes):
    assert deepspeed_routes["zero.Init, from_config"]["std"] == pytest.approx(0.2, rel=0.1)


def test_a_model_built_directly_under_zero_init_is_refused_with_the_cure(deepspeed_routes):
    assert "AutoModelForCausalLM.from_config or from_pretrained" in deepspeed_routes["zero.Init alone"]

"""What the settings make of DeepSpeed: initial weights, dtypes, offload, and a configuration without defaults."""

import io

import pytest
import torch
from rich.console import Console

from tests.attention_operators import use_operators
from tests.tiny_corpus import tiny_shards
from tests.tiny_model import tiny_config
from tests.tiny_run import rows, tiny_run
from tnl.errors import ConfigError
from tnl.model import TransnormerForCausalLM
from tnl.training import blocks, engine
from tnl.training.deepspeed_import import deepspeed
from tnl.training.engine import build_engine, build_model, deepspeed_config, init_ranks
from tnl.training.memory import overlaps
from tnl.training.pretrain import pretrain


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """A folder of shards without a held-out split."""
    return tiny_shards(tmp_path_factory.mktemp("data"))


def losses(settings) -> list[float]:
    pretrain(settings, console=Console(file=io.StringIO()))
    return [row["loss"] for row in rows(settings.output)]


@pytest.fixture(scope="module")
def straight(shards, tmp_path_factory):
    """The losses at ZeRO stage 0."""
    return losses(tiny_run(shards, tmp_path_factory.mktemp("runs") / "straight", "train.steps=5"))


@pytest.mark.parametrize(
    "overrides",
    [
        "train.zero_stage=3",
        "train.zero_stage=2 train.offload_optimizer=cpu",
        "train.zero_stage=3 train.offload_optimizer=cpu train.offload_parameters=cpu",
        "train.zero_stage=1 train.activation_checkpointing=full",
        "train.zero_stage=2 train.activation_checkpointing=selective",
        "train.zero_stage=3 train.activation_checkpointing=selective_matmuls",
        "train.zero_stage=3 train.activation_checkpointing=every_k train.activation_checkpointing_k=2",
    ],
)
def test_no_loss_changes(overrides, shards, straight, tmp_path):
    found = losses(tiny_run(shards, tmp_path / "run", "train.steps=5", *overrides.split()))
    assert found == pytest.approx(straight, abs=2e-6)


@pytest.mark.parametrize("stage", [2, 3])
def test_compiled_blocks_train_under_zero(stage, shards, straight, tmp_path, monkeypatch):
    use_operators(monkeypatch)
    monkeypatch.setattr(blocks, "form_of", lambda device: "triton")
    real = blocks.prepare_blocks
    monkeypatch.setattr(engine, "prepare_blocks", lambda *arguments: real(*arguments, backend="aot_eager"))
    torch._dynamo.reset()
    overrides = ["train.steps=5", "train.compile=true", f"train.zero_stage={stage}"]
    assert losses(tiny_run(shards, tmp_path / "run", *overrides)) == pytest.approx(straight, abs=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_weights_at_stage_3_are_those_of_one_process(precision, shards, tmp_path):
    settings = tiny_run(shards, tmp_path, "train.zero_stage=3", f"train.precision={precision}")
    dtype = engine.PRECISION[precision]

    def make():
        torch.manual_seed(5)
        return TransnormerForCausalLM(tiny_config(init_std=0.02))

    whole, random_state = make(), torch.get_rng_state()
    parts = build_model(make, settings, init_ranks())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert parts.lm_head.weight is parts.model.embed_tokens.weight
    found = dict(parts.named_parameters())
    assert found.keys() == dict(whole.named_parameters()).keys()
    for name, expected in whole.named_parameters():
        assert found[name].numel() == 0  # nobody holds it
        with deepspeed.zero.GatheredParameters(found[name]):
            assert torch.equal(found[name], expected.to(dtype)), name


@pytest.mark.parametrize("stage", [2, 3])
def test_bf16_has_fp32_masters_moments_and_sums(stage, shards, tmp_path):
    settings = tiny_run(shards, tmp_path, f"train.zero_stage={stage}", "train.precision=bf16")
    ranks = init_ranks()
    made = build_engine(settings, build_model(lambda: TransnormerForCausalLM(tiny_config()), settings, ranks), ranks)
    ids = torch.arange(3, 23)[None]
    summed = set()
    for _ in range(made.gradient_accumulation_steps()):
        made.backward(made(input_ids=ids, labels=ids, use_cache=False).loss, scale_wrt_gas=False)
        gradients = (deepspeed.utils.safe_get_full_grad(p) for p in made.module.parameters())
        summed |= {g.dtype for g in gradients if g is not None}
        made.step()
    assert not made.tput_timer.config.enabled  # it would wait for the device twice a pass
    assert {p.dtype for p in made.module.parameters()} == {torch.bfloat16}
    assert made.get_data_types() == (torch.bfloat16, torch.float32)
    masters = (deepspeed.utils.safe_get_full_fp32_param(p) for p in made.module.parameters())
    assert {p.dtype for p in masters} == {torch.float32}
    states = made.optimizer.optimizer.state.values()
    assert {s[name].dtype for s in states for name in ("exp_avg", "exp_avg_sq")} == {torch.float32}
    assert summed == {torch.float32}


def test_fp16_is_refused_where_it_does_not_exist(shards, tmp_path, monkeypatch):
    monkeypatch.setattr(type(deepspeed.accelerator.get_accelerator()), "is_fp16_supported", lambda self: False)
    with pytest.raises(ConfigError, match=r"train\.precision: fp16 is not supported"):
        deepspeed_config(tiny_run(shards, tmp_path, "train.zero_stage=2", "train.precision=fp16"), 1)


def test_every_key_that_training_depends_on_is_written(shards, tmp_path, monkeypatch):
    monkeypatch.setattr(type(deepspeed.accelerator.get_accelerator()), "is_fp16_supported", lambda self: True)
    overrides = ["train.zero_stage=2", "train.loss_scale_power=12", "train.loss_scale_window=50"]
    found = deepspeed_config(tiny_run(shards, tmp_path, *overrides, "train.precision=fp16"), 1)
    assert found["fp16"] == {
        "enabled": True,
        "loss_scale": 0,
        "initial_scale_power": 12,
        "loss_scale_window": 50,
        "hysteresis": 2,
        "min_loss_scale": 1,
    }
    assert found["data_types"] == {"grad_accum_dtype": "fp32"}
    zero = found["zero_optimization"]
    assert zero["overlap_comm"] is overlaps(1) is False
    assert deepspeed_config(tiny_run(shards, tmp_path), 2)["zero_optimization"]["overlap_comm"]
    # What DeepSpeed would fill in, if it were left out, is the same.
    assert zero["reduce_bucket_size"] == zero["allgather_bucket_size"] == 500_000_000


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("train.zero_stage=1 train.offload_optimizer=cpu", "offload_optimizer: needs zero_stage 2 or 3"),
        ("train.zero_stage=2 train.offload_parameters=cpu", "offload_parameters: needs zero_stage 3"),
        ("train.zero_stage=3 train.offload_optimizer=nvme", "offload_path: goes with nvme"),
        ("train.offload_path=/x", "offload_path: goes with nvme"),
        ("train.sequence_parallel=2 train.compile=true", "compile: does not go with sequence_parallel"),
    ],
)
def test_what_does_not_go_together_is_refused(overrides, message, shards, tmp_path):
    with pytest.raises(ConfigError, match=message):
        tiny_run(shards, tmp_path, *overrides.split())


def test_nvme_without_its_operator_is_refused(shards, tmp_path, monkeypatch):
    builder = deepspeed.ops.op_builder.AsyncIOBuilder
    monkeypatch.setattr(builder, "is_compatible", lambda self, verbose=False: False)
    overrides = ["train.zero_stage=3", "train.offload_optimizer=nvme", f"train.offload_path={tmp_path}"]
    with pytest.raises(ConfigError, match="libaio"):
        deepspeed_config(tiny_run(shards, tmp_path, *overrides), 1)

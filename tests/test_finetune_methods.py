"""What trains, what a checkpoint holds of it and what an export: full, some parameters, LoRA, on every ZeRO stage."""

import json
import os
import re

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.closeness import assert_close
from tests.tiny_model import random_ids, tiny_model
from tests.tiny_run import rows, trajectory
from tests.tiny_tuning import PackedData, PackedRows, tiny_base, tune, tuning
from tnl.errors import CheckpointError, ConfigError
from tnl.model.four_bit import FourBitLinear
from tnl.training.commit import CheckpointStore
from tnl.training.export import export_run, resolve_model
from tnl.training.finetune import finetune
from tnl.training.methods import apply_method

FULL = {"kind": "full"}
LORA = {"kind": "lora", "rank": 4, "dropout": 0.1, "neftune_alpha": 1.0}
LAST_BLOCK = {"kind": "full", "train_only": ["model.layers.1.*"]}
FOUR_BITS = {"kind": "lora", "rank": 4, "base_bits": 4}
# With the stages on which each is tried: LoRA on all of them.
CASES = {
    "full": (FULL, (0,)),
    "lora": (LORA, (0, 1, 2, 3)),
    "last block": (LAST_BLOCK, (3,)),
    "dora": ({"kind": "lora", "rank": 4, "dora": True}, (2,)),
    "four bits": (FOUR_BITS, (2,)),
}
IDS = random_ids(2, 9)


def of_stage(stage: int) -> list[str]:
    return [f"train.zero_stage={stage}", *(["train.precision=bf16"] if stage >= 2 else [])]


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_base(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def tuned(base, tmp_path_factory):
    """LoRA in fp32 at stage 0: its run folder."""
    output = tmp_path_factory.mktemp("runs") / "lora"
    tune(tuning(base, output, LORA))
    return output


@pytest.mark.parametrize(("name", "stage"), [(name, stage) for name in CASES for stage in CASES[name][1]])
def test_a_resumed_run_is_identical(base, tmp_path, name, stage):
    method, _ = CASES[name]
    # What ZeRO-3 gathers in the first step after loading is not what it gathers in others.
    selective = ["train.activation_checkpointing=selective"] if stage == 3 else []
    settings = tuning(base, tmp_path / "run", method, *of_stage(stage), *selective)
    tune(settings)
    straight = trajectory(tmp_path / "run")
    assert [step for step, *_ in straight] == list(range(1, 7))
    assert rows(tmp_path / "run")[-1]["loss"] < rows(tmp_path / "run")[0]["loss"]
    tune(settings, resume="3")
    assert trajectory(tmp_path / "run") == straight


def test_full_tuning_begins_with_the_weights_of_the_checkpoint(base, tmp_path):
    tune(tuning(base, tmp_path / "run", FULL, "train.steps=1"))
    total, count = 0.0, 0
    for batch in (PackedRows(2).micro_batch(0, row) for row in range(2)):
        output = tiny_model()(**batch, use_cache=False)
        total, count = total + output.loss_sum.item(), count + output.num_tokens.item()
    assert rows(tmp_path / "run")[0]["loss"] == pytest.approx(total / count, rel=1e-6)


@pytest.mark.parametrize("stage", [0, 3])
def test_a_checkpoint_of_lora_holds_the_adapters_alone(base, tmp_path, stage):
    tune(tuning(base, tmp_path / "run", LORA, *of_stage(stage), "train.steps=1"))
    (file,) = (tmp_path / "run/checkpoints/step_00000001/engine").glob("*model_states.pt")
    from tnl.training.checkpoint import safe_globals

    with torch.serialization.safe_globals(safe_globals()):
        content = torch.load(file, weights_only=True)
    assert content["module"]
    assert all(".lora_" in name for name in content["module"])
    assert not content.get("frozen_param_fragments")


@pytest.mark.parametrize(("name", "stage"), [("lora", 0), ("lora", 3), ("dora", 2)])
def test_an_adapter_is_exported_as_peft_has_it_and_merged(base, tmp_path, name, stage):
    tune(tuning(base, tmp_path / "run", CASES[name][0], *of_stage(stage)))
    adapter, merged = (tmp_path / "adapter", tmp_path / "merged")
    export_run(tmp_path / "run", adapter)
    export_run(tmp_path / "run", merged, merge=True)
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    assert not (adapter / "model.safetensors").exists()
    expected = logits(PeftModel.from_pretrained(load(base), adapter))
    assert_close("merged", logits(load(merged)), expected)
    assert not torch.allclose(expected, logits(load(base)), atol=0.1)


def test_an_adapter_names_its_base_from_anywhere(tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    tiny_base(tmp_path / "work/runs/base")
    monkeypatch.chdir(tmp_path / "work")
    tune(tuning("runs/base", "out", LORA, "train.steps=1"))
    monkeypatch.chdir(tmp_path)
    adapter = export_run(tmp_path / "work/out", tmp_path / "adapter")
    found = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert found == str(tmp_path / "work/runs/base")


def test_an_adapter_for_more_token_ids_than_the_base_has_is_exported_merged_alone(base, tmp_path):
    tune(tuning(base, tmp_path / "run", LORA, "train.steps=1", vocab_size=64))
    with pytest.raises(ConfigError, match=rf"run: 3 token ids that the base {base} has not, .*; add --merge"):
        export_run(tmp_path / "run", tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
    assert load(export_run(tmp_path / "run", tmp_path / "merged", merge=True)).config.vocab_size == 64


def test_only_the_parameters_that_train_change(base, tmp_path):
    tune(tuning(base, tmp_path / "run", LAST_BLOCK, *of_stage(2)))
    before, after = tiny_model(), load(export_run(tmp_path / "run", tmp_path / "export"))
    changed = [name for name, p in after.named_parameters() if not torch.equal(p, before.get_parameter(name))]
    assert changed == [name for name, _ in before.named_parameters() if name.startswith("model.layers.1.")]


def test_other_commands_get_the_merged_model(tuned, tmp_path):
    folder = resolve_model(str(tuned))
    assert_close("resolved", logits(load(folder)), logits(load(export_run(tuned, tmp_path / "m", merge=True))))


def test_adapted_weights_in_four_bits_take_little_memory_and_gradients_pass(base):
    model = tiny_model(decoder_embed_dim=128, glu_dim=256, no_scale_embedding=True)
    plain = logits(model)
    method = tuning(base, base / "none", FOUR_BITS).method
    apply_method(method, model, torch.device("cpu"))
    packed = [module for module in model.modules() if isinstance(module, FourBitLinear)]
    assert len(packed) == 5 * 2
    # A half byte for a weight, and a byte for each 64.
    assert sum(p.num_bytes for p in packed) < 0.54 * sum(p.in_features * p.out_features for p in packed)
    assert_close("logits", logits(model), plain, ratio=0.6)
    x = torch.randn(3, packed[0].in_features, requires_grad=True)
    packed[0](x).sum().backward()
    assert_close("dx", x.grad, packed[0].packed.get_original_weight().sum(0).expand(3, -1))


def test_noise_is_that_of_an_example_alone(base):
    model = tiny_model()
    method = tuning(base, base / "none", FULL | {"neftune_alpha": 3.0}).method
    apply_method(method, model, torch.device("cpu"))
    ids, D = random_ids(1, 12), 32
    seen = []
    model.model.layers[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    clean = model.model.embed_tokens.weight[ids[0]]
    for cu_seqlens, lengths in ((None, [12]), (torch.tensor([0, 3, 12], dtype=torch.int32), [3, 9])):
        torch.manual_seed(0)
        model.train()(ids, labels=ids, cu_seqlens=cu_seqlens)
        parts = (seen.pop()[0] - clean).abs().split(lengths)
        for part, length in zip(parts, lengths, strict=True):
            assert 0.9 < part.max() / (3.0 / (length * D) ** 0.5) <= 1 + 1e-4
    labels = ids.repeat(2, 1)
    labels[1, 5:] = -100
    torch.manual_seed(0)
    model.train()(ids.repeat(2, 1), labels=labels)
    for row, length in zip((seen.pop() - clean).abs(), (12, 5), strict=True):
        assert 0.9 < row.max() / (3.0 / (length * D) ** 0.5) <= 1 + 1e-4
    model.eval()(ids)
    assert torch.equal(seen.pop()[0], clean)


def test_a_step_without_labels_is_no_nan(base, tmp_path):
    for stage in (0, 2):
        output = tmp_path / f"run{stage}"
        data = PackedData(PackedRows(2, masked_step=2))
        tune(tuning(base, output, LORA, *of_stage(stage)), data)
        found = rows(output)
        assert (found[2]["loss"], found[2]["grad_norm"], found[2]["skipped"]) == (0.0, 0.0, False)
        assert found[-1]["loss"] < found[0]["loss"]


def test_the_best_checkpoint_outlives_newer_ones_and_is_exported(base, tmp_path):
    data = PackedData(PackedRows(2), losses=(9.0, 3.0, 1.0, 2.0, 2.5, 4.0, 5.0))
    tune(tuning(base, tmp_path / "run", FULL, "evaluation.every=1", "checkpoint.every=1"), data)
    assert CheckpointStore(tmp_path / "run/checkpoints").steps() == [2, 5, 6]
    assert [row["step"] for row in rows(tmp_path / "run", "evaluation")] == list(range(7))
    best, second = export_run(tmp_path / "run", tmp_path / "best", "best"), tmp_path / "second"
    assert torch.equal(logits(load(best)), logits(load(export_run(tmp_path / "run", second, 2))))


def test_without_evaluation_there_is_no_best(tuned, tmp_path):
    with pytest.raises(CheckpointError, match="no best checkpoint"):
        export_run(tuned, tmp_path / "best", "best")


def test_another_base_is_refused_where_the_frozen_weights_come_from_it(base, tmp_path):
    own = tiny_base(tmp_path / "model")
    settings = tuning(own, tmp_path / "run", LORA)
    tune(settings)
    tiny_base(own, seed=1)
    with pytest.raises(CheckpointError, match="began from other weights"):
        tune(settings, resume="3")
    with pytest.raises(CheckpointError, match=r"another config\.json than the run began from; put the old"):
        export_run(tmp_path / "run", tmp_path / "merged", merge=True)


def test_a_base_of_other_shapes_is_refused_by_name(base, tuned, tmp_path):
    other = tiny_base(tmp_path / "other", decoder_attention_heads=2, glu_dim=40)
    with pytest.raises(ConfigError) as caught:
        tune(tuning(other, tmp_path / "run", LORA))
    assert re.search(r"model\.num_heads: 4, but init_from .*other has 2", str(caught.value))
    assert re.search(r"model\.glu_dim: 48, but init_from .*other has 40", str(caught.value))
    assert not (tmp_path / "run").exists()
    adapter = export_run(tuned, tmp_path / "adapter")
    with pytest.raises(RuntimeError, match=r"size mismatch for .*layers\.0\.channel_mixer\.l1\.lora_B"):
        PeftModel.from_pretrained(load(other), adapter)


def test_a_base_that_was_moved_is_the_same(tmp_path):
    own = tiny_base(tmp_path / "model")
    for name, method in {"lora": LORA, "full": FULL}.items():
        output = tmp_path / name
        tune(tuning(own, output, method))
        straight = trajectory(output)
        moved = tiny_base(tmp_path / f"moved {name}")
        tune(tuning(moved, output, method), resume="3")
        assert trajectory(output) == straight
        with pytest.raises(CheckpointError, match="began from other weights"):
            tune(tuning(tiny_base(tmp_path / f"other {name}", seed=1), output, method), resume="3")


def test_recomputation_and_one_reduction_a_step_do_not_change_lora(base, tmp_path):
    plain = ["train.precision=bf16", "train.zero_stage=2"]
    changed = [*plain, "train.activation_checkpointing=full", "train.reduce_gradients=every_step"]
    for name, overrides in {"plain": plain, "changed": [*changed, "logging.layer_norms_every=3"]}.items():
        tune(tuning(base, tmp_path / name, LORA, *overrides))
    found, expected = ([row["loss"] for row in rows(tmp_path / name)] for name in ("changed", "plain"))
    assert found == pytest.approx(expected, rel=1e-2)
    assert [len(row["grad_norms"]) for row in rows(tmp_path / "changed", "layers")] == [2, 2]


def test_a_full_run_goes_on_without_its_base(tmp_path):
    own = tiny_base(tmp_path / "model")
    settings = tuning(own, tmp_path / "run", FULL)
    tune(settings)
    straight = trajectory(tmp_path / "run")
    os.rename(own, tmp_path / "moved")
    tune(settings, resume="3")
    assert trajectory(tmp_path / "run") == straight
    export_run(tmp_path / "run", tmp_path / "export")


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (LORA | {"targets": ["q_proj", "l1"]}, "no linear layer q_proj; its blocks have qkvu_proj, out_proj, l1"),
        (LORA | {"targets": ["lm_head"]}, "method.targets: lm_head cannot have LoRA"),
        ({"kind": "full", "train_only": ["layers.7.*"]}, "method.train_only: no parameter has a name like layers.7"),
        (FOUR_BITS, "method.base_bits: model.layers.0.channel_mixer.l1 has 1120 weights, no multiple of 64; set 16"),
    ],
)
def test_names_that_the_model_has_not_are_refused(base, tmp_path, method, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        finetune(tuning(base, tmp_path / "run", method, glu_dim=35))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("method", "overrides", "message"),
    [
        (LORA, ["train.tensor_parallel=2"], "train.tensor_parallel: does not go with method.kind lora"),
        (LORA, ["train.compile=true"], "train.compile: does not go with method.kind lora"),
        (LORA | {"dora": True}, of_stage(3), "method.dora: needs whole weights"),
        (FOUR_BITS, of_stage(3), "method.base_bits: weights in 4 bits are whole"),
        (FOUR_BITS | {"dora": True}, [], "method.dora: needs the weights themselves"),
        (FULL, ["train.epochs=2"], "train.steps: give either steps or epochs"),
        (FULL, ["train.segment_length=12"], "train.segment_length: examples are not cut"),
        (FULL, ["schedule.warmup_steps=2", "schedule.warmup_ratio=0.1"], "schedule.warmup_ratio: give either"),
        (FULL, ["method.rank=4"], "method.rank: unknown key"),
    ],
)
def test_what_does_not_go_together_is_refused(base, tmp_path, method, overrides, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        tuning(base, tmp_path / "run", method, *overrides)


def test_epochs_and_part_of_the_warmup_become_steps(base, tmp_path):
    settings = tuning(base, tmp_path / "run", FULL, "train.steps=null", "train.epochs=3", "schedule.warmup_ratio=0.1")
    found = settings.resolved(6.5)
    assert (found.train.steps, found.train.epochs) == (20, None)
    assert (found.schedule.warmup_steps, found.schedule.warmup_ratio) == (2, None)
    assert found.resolved(6.5) == found

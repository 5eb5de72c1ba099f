"""LoRA adapters of peft: they train, save, load, merge and generate, also where head and embedding are one matrix."""

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from tests.closeness import assert_close
from tests.tiny_model import random_ids, tiny_model
from tnl.model.adapters import lora_config

MIXERS = {"released": {}, "low-rank gate": dict(gate_dim=4)}
IDS = random_ids(2, 9)


def adapted(seed=0, model=None, **options) -> PeftModel:
    """A tiny model with LoRA, in evaluation mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        base = tiny_model(**(model or {}))
        return get_peft_model(base, lora_config(base.config, r=4, lora_alpha=8, **options)).eval()


def train(model, steps=12) -> list[float]:
    """Losses of training on `IDS` alone."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def assert_loss_is_that_of_the_logits(model):
    output = model(input_ids=IDS, labels=IDS, output_logits=True)
    assert_close("loss", output.loss, F.cross_entropy(output.logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()))


@pytest.mark.parametrize("mixer", MIXERS)
def test_the_targets_are_the_linear_layers_of_the_blocks(mixer):
    model = tiny_model(**MIXERS[mixer])
    expected = {name for name, module in model.model.layers.named_modules() if isinstance(module, nn.Linear)}
    wrapped = get_peft_model(model, lora_config(model.config)).base_model.model.model.layers
    assert {name for name, module in wrapped.named_modules() if hasattr(module, "lora_A")} == expected


def test_only_adapters_train_and_the_loss_falls():
    model = adapted()
    base = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    losses = train(model)
    assert losses[-1] < 0.5 * losses[0]
    assert all("lora_" in name for name, p in model.named_parameters() if p.requires_grad)
    assert all(torch.equal(p, base[name]) for name, p in model.named_parameters() if name in base)


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_saved_adapter_loads_on_a_fresh_base(mixer, tmp_path):
    model = adapted(model=MIXERS[mixer])
    train(model, 2)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 100_000
    fresh = PeftModel.from_pretrained(tiny_model(**MIXERS[mixer]), tmp_path)
    assert not torch.equal(logits(fresh), logits(tiny_model(**MIXERS[mixer])))
    assert torch.equal(logits(fresh), logits(model))


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_merged_adapter_is_a_plain_model(mixer, tmp_path):
    model = adapted(model=MIXERS[mixer])
    train(model, 2)
    expected = logits(model)
    merged = model.merge_and_unload()
    assert_close("merged", logits(merged), expected)
    merged.save_pretrained(tmp_path)
    assert_close("loaded", logits(AutoModelForCausalLM.from_pretrained(tmp_path)), expected)


def test_generation_uses_the_adapter():
    model = adapted()
    train(model, 4)
    options = dict(input_ids=IDS, max_new_tokens=6, do_sample=False)
    tokens = model.generate(**options)
    with model.disable_adapter():
        assert not torch.equal(model.generate(**options), tokens)
    assert torch.equal(model.merge_and_unload().generate(**options), tokens)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_gradients_of_adapters_are_equal(use_reentrant):
    def gradients(checkpointed):
        model = adapted()
        train(model, 1)  # lora_B begins at zero and hides errors in lora_A's gradient
        if checkpointed:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model.train()
        model(input_ids=IDS, labels=IDS).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    plain, checkpointed = gradients(False), gradients(True)
    assert all(gradient.any() for gradient in plain.values())
    for name, gradient in plain.items():
        assert_close(name, checkpointed[name], gradient)


# The head makes the loss, and may be the embedding


def test_lora_on_a_separate_head_trains_and_merges():
    model = adapted(model=dict(tie_word_embeddings=False), target_modules=["qkvu_proj", "lm_head"])
    losses = train(model)
    assert losses[-1] < 0.5 * losses[0]
    assert_loss_is_that_of_the_logits(model)
    expected = logits(model)
    assert_close("merged", logits(model.merge_and_unload()), expected)


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens"])
def test_lora_on_a_tied_head_is_refused(name):
    with pytest.raises(ValueError, match=f"target_modules: {name} cannot have LoRA"):
        adapted(target_modules=["qkvu_proj", name])


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens"])
def test_a_trained_embedding_stays_the_head(name, tmp_path):
    model = adapted(modules_to_save=[name])
    start = logits(model)
    losses = train(model)
    assert losses[-1] < 0.5 * losses[0]
    assert_loss_is_that_of_the_logits(model)
    expected = logits(model)
    assert not torch.equal(start, expected)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_model(), tmp_path)), expected)
    merged = model.merge_and_unload()
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert_close("merged", logits(merged), expected)


def test_a_trained_head_of_its_own_is_saved_with_the_adapter(tmp_path):
    untied = dict(tie_word_embeddings=False)
    model = adapted(model=untied, modules_to_save=["lm_head"])
    train(model, 2)
    assert_loss_is_that_of_the_logits(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_model(**untied), tmp_path)), logits(model))


def test_some_rows_of_the_embedding_train():
    model = adapted(trainable_token_indices=[7, 11])
    rows = model.get_input_embeddings().weight.clone()
    train(model, 4)
    assert_loss_is_that_of_the_logits(model)
    expected = logits(model)
    merged = model.merge_and_unload()
    changed = (merged.model.embed_tokens.weight != rows).any(1).nonzero().flatten()
    assert changed.tolist() == [7, 11]
    assert_close("merged", logits(merged), expected)


def test_lora_of_peft_alone_on_a_tied_head_has_the_right_loss():
    base = tiny_model()
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["lm_head"]))
    train(model, 2)
    assert_loss_is_that_of_the_logits(model)

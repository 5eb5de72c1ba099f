"""`from_pretrained` with a device map and a dtype: where the weights lie, in what, and that the model still works."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.tiny_model import random_ids, tiny_model

IDS = random_ids(2, 9)
LAYERS = [f"model.layers.{i}" for i in range(4)]
MAPS = {
    "auto": "auto",
    "one device": {"": "cpu"},
    "layers on disk": {"model.embed_tokens": "cpu", "lm_head": "cpu"} | dict.fromkeys(LAYERS[:2], "cpu"),
    "embeddings on disk": {"model.embed_tokens": "disk", "lm_head": "disk"} | dict.fromkeys(LAYERS, "cpu"),
    "all on disk": {"": "disk"},
}
MAPS["layers on disk"] |= dict.fromkeys(LAYERS[2:], "disk")


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def saved(request, tmp_path_factory):
    """A model and its folder."""
    folder = tmp_path_factory.mktemp("model")
    model = tiny_model(decoder_layers=4, tie_word_embeddings=request.param)
    model.save_pretrained(folder)
    return model, folder


def assert_works_like(model, expected):
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, expected(IDS).logits)
        assert torch.equal(model(IDS, labels=IDS).loss, expected(IDS, labels=IDS).loss)
    options = dict(max_new_tokens=4, do_sample=False)
    assert torch.equal(model.generate(IDS, **options), expected.generate(IDS, **options))


@pytest.mark.parametrize("device_map", MAPS)
def test_a_model_works_wherever_its_weights_lie(device_map, saved, tmp_path):
    expected, folder = saved
    model = AutoModelForCausalLM.from_pretrained(folder, device_map=MAPS[device_map], offload_folder=tmp_path)
    away = {name for name, weight in model.named_parameters() if weight.device.type == "meta"}
    assert bool(away) == ("disk" in device_map)
    assert_works_like(model, expected)


def test_an_automatic_map_keeps_blocks_whole(saved, tmp_path):
    expected, folder = saved
    limits = {"cpu": expected.get_memory_footprint() * 2 // 3}
    model = AutoModelForCausalLM.from_pretrained(folder, device_map="auto", max_memory=limits, offload_folder=tmp_path)
    assert set(model.hf_device_map.values()) == {"cpu", "disk"}
    assert not [name for name in model.hf_device_map if name.startswith("model.layers.") and name.count(".") > 2]
    assert_works_like(model, expected)


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("value", [torch.bfloat16, "bfloat16"])
def test_weights_are_loaded_in_the_dtype_asked_for(name, value, saved):
    model = AutoModelForCausalLM.from_pretrained(saved[1], **{name: value})
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert model(IDS).logits.dtype == torch.bfloat16


def test_without_a_dtype_weights_keep_theirs(tmp_path):
    tiny_model().to(torch.bfloat16).save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).dtype == torch.bfloat16

"""What `save_pretrained` writes, which is what `push_to_hub` uploads: a folder that loads by itself."""

import json

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, GenerationConfig

from tests.tiny_model import random_ids, tiny_model

IDS = random_ids(2, 9)


def test_a_folder_holds_configuration_weights_and_generation(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"config.json", "generation_config.json", "model.safetensors"}
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "transnormer"
    assert config["architectures"] == ["TransnormerForCausalLM"]
    assert (config["dtype"], config["tie_word_embeddings"], config["vocab_size"]) == ("float32", True, 61)
    assert "auto_map" not in config


def test_generation_settings_are_kept(tmp_path):
    model = tiny_model()
    model.generation_config = GenerationConfig(do_sample=True, temperature=0.7, pad_token_id=0)
    model.save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).generation_config.temperature == 0.7


def test_shards_hold_every_weight_once_and_load(tmp_path):
    model = tiny_model(decoder_layers=4)
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shards = sorted(tmp_path.glob("model-*-of-*.safetensors"))
    assert len(shards) > 2
    found = {}
    for shard in shards:
        with safe_open(shard, framework="pt") as file:
            found |= dict.fromkeys(file.keys(), shard.name)
    assert index["weight_map"] == found
    assert set(found) == set(model.state_dict()) - {"lm_head.weight"}
    assert index["metadata"]["total_size"] == 4 * model.num_parameters()
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(IDS).logits, model(IDS).logits)

"""The LLaMA to compare with: as many parameters as the TNL, for every model that ships."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from tests.tiny_model import random_ids, tiny_config
from tnl.config import load
from tnl.model import TransnormerForCausalLM
from tnl.model.baseline import llama_config
from tnl.model.settings import ModelSettings

PRESETS = sorted(file.stem for file in (Path(__file__).parent.parent / "configs/model").glob("*.yaml"))


def counts(config) -> tuple[int, int]:
    """Parameters of the TNL and of its LLaMA, both counted in models on the meta device."""
    with torch.device("meta"):
        tnl, llama = TransnormerForCausalLM(config), LlamaForCausalLM(llama_config(config))
    return tnl.num_parameters(), llama.num_parameters()


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("tied", [True, False])
def test_every_preset_has_a_llama_of_as_many_parameters(preset, tied):
    tnl, llama = counts(load(ModelSettings, f"model/{preset}").to_config(tie_word_embeddings=tied))
    assert abs(llama - tnl) <= 0.005 * tnl


@pytest.mark.parametrize("preset", PRESETS)
def test_the_sizes_suit_tensor_cores(preset):
    llama = llama_config(load(ModelSettings, f"model/{preset}").to_config())
    assert llama.intermediate_size % (64 if llama.hidden_size >= 1024 else 32) == 0
    assert llama.head_dim in (64, 128)
    assert llama.num_key_value_heads == llama.num_attention_heads


def test_the_mlp_is_wider_by_a_third_of_the_width():
    config = load(ModelSettings, "model/tnl-7b").to_config()
    assert abs(llama_config(config).intermediate_size - (11008 + 4096 / 3)) <= 64


def test_the_small_model_runs_and_keeps_the_vocabulary():
    config = tiny_config(pad_token_id=None)
    tnl, llama = counts(config)
    assert abs(llama - tnl) <= 0.005 * tnl
    llama = LlamaForCausalLM(llama_config(config, max_position_embeddings=64)).eval()
    assert llama(random_ids(2, 9)).logits.shape == (2, 9, config.vocab_size)
    assert llama.lm_head.weight is llama.model.embed_tokens.weight


def test_fields_are_handed_on_and_replaced():
    config = llama_config(tiny_config(init_std=0.3), max_position_embeddings=512, rms_norm_eps=1e-5)
    assert (config.initializer_range, config.max_position_embeddings, config.rms_norm_eps) == (0.3, 512, 1e-5)
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (0, 1, None)


def test_heads_of_odd_size_are_refused():
    with pytest.raises(ValueError, match="decoder_embed_dim: 36 does not divide into 4 heads of an even size"):
        llama_config(tiny_config(decoder_embed_dim=36))

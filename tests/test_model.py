"""The model against a plain fp64 model, its names and sizes, its configuration."""

import pytest
import torch
import torch.nn.functional as F

from tests.closeness import assert_close
from tests.reference_model import expected_logits
from tests.tiny_model import VOCAB, random_ids, tiny_config, tiny_model
from tnl.config import find_config, load
from tnl.model import TransnormerConfig, TransnormerForCausalLM
from tnl.model.flops import num_parameters, training_flops_per_token
from tnl.model.settings import ModelSettings

PRESETS = {
    "tnl-tiny": 2_224_320,
    "tnl-70m": 74_449_408,
    "tnl-160m": 156_500_736,
    "tnl-410m": 412_877_824,
    "tnl-44m": 44_171_776,
    "tnl-385m": 398_984_192,
    "tnl-1b": 1_020_266_496,
    "tnl-3b": 2_911_111_680,
    "tnl-7b": 6_836_719_616,
    "tnl-15b": 14_833_382_400,
}


def check_against_reference(model, T=70, ratio=None):
    ids = random_ids(2, T, vocab=model.config.vocab_size)
    with torch.no_grad():
        assert_close("logits", model(ids).logits, expected_logits(model, ids), ratio)


@pytest.mark.parametrize("lrpe", [[1, 0, 0], [], [0, 0, 0], [0, 1], [1, 1, 1]], ids=str)
def test_logits_equal_the_reference_for_lrpe_in_any_layers(lrpe):
    check_against_reference(tiny_model(decoder_layers=3, linear_use_lrpe_list=lrpe))


@pytest.mark.parametrize("decay", ["released", "paper", "none"])
def test_logits_equal_the_reference_for_every_decay(decay):
    check_against_reference(tiny_model(decay=decay, decoder_layers=3))


def test_logits_equal_the_reference_without_activation():
    check_against_reference(tiny_model(linear_act_fun="none"))


def test_logits_equal_the_reference_for_a_single_layer():
    check_against_reference(tiny_model(decoder_layers=1))


def test_logits_equal_the_reference_for_heads_wider_than_the_model():
    check_against_reference(tiny_model(hidden_dim=64))


def test_logits_equal_the_reference_with_a_head_of_its_own():
    check_against_reference(tiny_model(tie_word_embeddings=False))


def test_an_empty_lrpe_list_means_no_lrpe():
    assert not any("theta" in name for name in tiny_model(linear_use_lrpe_list=[]).state_dict())


def test_swish_is_another_name_of_silu():
    ids = random_ids(1, 9)
    assert torch.equal(tiny_model(linear_act_fun="swish")(ids).logits, tiny_model()(ids).logits)


def test_a_later_token_does_not_change_earlier_logits():
    model, ids = tiny_model(), random_ids(1, 150)
    changed = ids.clone()
    changed[0, 100] = 3 if ids[0, 100] != 3 else 4
    with torch.no_grad():
        before, after = model(ids).logits[0], model(changed).logits[0]
    assert torch.equal(before[:100], after[:100])
    assert not torch.equal(before[100], after[100])


def test_bf16_logits_stay_near_the_reference_of_the_same_rounded_weights():
    # Every product and sum on the residual stream is rounded; gates and scores multiply rounded factors.
    check_against_reference(tiny_model().bfloat16(), T=150, ratio=2e-2)


def test_bf16_logits_stay_near_fp32():
    model, ids = tiny_model(), random_ids(2, 150)
    with torch.no_grad():
        expected = model(ids).logits
        # As above, and rounding the weights alone moves the logits by 1.2e-2.
        assert_close("logits", model.bfloat16()(ids).logits, expected, 3e-2)


def test_state_dict_has_exactly_the_released_names():
    names = {"model.embed_tokens.weight", "lm_head.weight", "model.layers.0.token_mixer.lrpe.theta"}
    for i in range(2):
        names |= {f"model.layers.{i}.token_mixer.{part}.weight" for part in ("qkvu_proj", "out_proj")}
        names |= {f"model.layers.{i}.channel_mixer.{part}.weight" for part in ("l1", "l2", "l3")}
    assert set(tiny_model().state_dict()) == names


def test_weights_have_the_released_shapes():
    shapes = {name: tuple(w.shape) for name, w in tiny_model(hidden_dim=64).state_dict().items()}
    assert shapes["model.layers.0.token_mixer.qkvu_proj.weight"] == (4 * 64, 32)
    assert shapes["model.layers.0.token_mixer.out_proj.weight"] == (32, 64)
    assert shapes["model.layers.0.token_mixer.lrpe.theta"] == (4, 1, 16)
    assert shapes["model.layers.0.channel_mixer.l3.weight"] == (32, 48)


def test_the_head_is_the_embedding():
    model = tiny_model()
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_their_number_of_parameters(name):
    config = load(ModelSettings, f"model/{name}").to_config()
    with torch.device("meta"):
        model = TransnormerForCausalLM(config)
    assert sum(p.numel() for p in model.parameters()) == num_parameters(config) == PRESETS[name]


def test_every_preset_is_listed():
    assert {path.stem for path in find_config("model/tnl-tiny").parent.glob("*.yaml")} == set(PRESETS)


@pytest.mark.parametrize(
    "values",
    [
        dict(tie_word_embeddings=False),
        dict(hidden_dim=64),
        dict(linear_use_lrpe_list=[]),
        dict(hidden_dim=64, gate_dim=5),
    ],
)
def test_num_parameters_counts_every_parameter(values):
    model = tiny_model(**values)
    assert num_parameters(model.config) == sum(p.numel() for p in model.parameters())


def test_training_flops_are_six_per_weight_and_twelve_per_state_element():
    config = tiny_config(linear_use_lrpe_list=[])
    weights = num_parameters(config)
    assert training_flops_per_token(config) == 6 * weights + 12 * 2 * 4 * 8 * 8
    assert training_flops_per_token(tiny_config()) == 6 * weights + 12 * 3 * 4 * 8 * 8


def test_training_flops_of_the_low_rank_gate_are_those_of_its_weights():
    config = tiny_config(linear_use_lrpe_list=[], gate_dim=5)
    assert training_flops_per_token(config) == 6 * num_parameters(config) + 12 * 2 * 4 * 8 * 8


def test_settings_become_the_config():
    settings = ModelSettings(
        vocab_size=50,
        hidden_size=64,
        num_layers=3,
        num_heads=4,
        glu_dim=96,
        lrpe_layers=(0, 2),
        decay="paper",
        activation="none",
        gate_dim=5,
        mixer_norm="layernorm",
        scale_embedding=False,
        tie_embeddings=False,
        init_std=0.1,
    )
    expected = TransnormerConfig(
        vocab_size=50,
        decoder_embed_dim=64,
        decoder_layers=3,
        decoder_attention_heads=4,
        glu_dim=96,
        linear_use_lrpe_list=[1, 0, 1],
        decay="paper",
        linear_act_fun="none",
        gate_dim=5,
        mixer_norm_type="layernorm",
        no_scale_embedding=True,
        tie_word_embeddings=False,
        init_std=0.1,
    )
    assert settings.to_config().to_dict() == expected.to_dict()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(norm_type="layernorm"), "'layernorm' is unknown, use simplermsnorm"),
        (dict(linear_act_fun="gelu"), "'gelu' is unknown, use silu, swish or none"),
        (dict(decay="fast"), "'fast' is unknown, use one of released, paper, none"),
        (dict(decoder_attention_heads=5), "5 does not divide 32"),
        (dict(decoder_attention_heads=0), "decoder_attention_heads: 0 must be a whole number of at least 1"),
        (dict(vocab_size=0, glu_dim=-4), "vocab_size: 0 must be .*; glu_dim: -4 must"),
        (dict(decoder_layers="two"), "decoder_layers: 'two' must be a whole number"),
        (dict(bias=True), "bias: true is not supported"),
        (dict(linear_use_lrpe_list=[1, 0, 0]), "3 entries for 2 layers"),
        (dict(gate_dim=0), "gate_dim: 0 must be a whole number of at least 1, or null"),
        (dict(mixer_norm_type="rmsnorm"), "mixer_norm_type: 'rmsnorm' is unknown, use one of simplermsnorm, layernorm"),
        (dict(lrpe_phase_dtype="bf16"), "lrpe_phase_dtype: 'bf16' is unknown, use one of float32, activation"),
    ],
)
def test_a_bad_config_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**values)


def test_all_problems_of_a_config_are_reported_together():
    with pytest.raises(ValueError, match=r"decoder_attention_heads.*norm_type"):
        tiny_config(decoder_attention_heads=5, norm_type="layernorm")


def test_config_takes_the_names_of_transformers():
    config = TransnormerConfig(hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=96)
    assert (config.decoder_embed_dim, config.decoder_layers, config.decoder_attention_heads) == (64, 3, 4)
    assert (config.hidden_dim, config.glu_dim, config.head_dim) == (64, 96, 16)


def test_ids_and_embeddings_give_the_same_logits():
    model, ids = tiny_model(no_scale_embedding=False), random_ids(2, 9)
    assert torch.equal(model(inputs_embeds=model.get_input_embeddings()(ids)).logits, model(ids).logits)


def test_ids_and_embeddings_together_are_refused():
    model, ids = tiny_model(), random_ids(1, 4)
    with pytest.raises(ValueError, match="exactly one"):
        model(ids, inputs_embeds=model.get_input_embeddings()(ids))


def test_logits_to_keep_are_the_last_ones():
    model, ids = tiny_model(), random_ids(2, 9)
    assert_close("logits", model(ids, logits_to_keep=3).logits, model(ids).logits[:, -3:])


def test_hidden_states_are_embeddings_then_blocks_with_the_final_norm():
    model, ids = tiny_model(), random_ids(2, 9)
    output = model.model(ids, output_hidden_states=True)
    assert len(output.hidden_states) == 3
    assert torch.equal(output.hidden_states[0], model.model.embed_tokens(ids))
    assert torch.equal(output.hidden_states[-1], output.last_hidden_state)


def test_hidden_states_of_a_padded_batch_keep_its_shape():
    ids = random_ids(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    hidden = tiny_model()(ids, attention_mask=mask, output_hidden_states=True).hidden_states
    assert [tuple(h.shape) for h in hidden] == [(2, 9, 32)] * 3


def test_resized_embeddings_keep_the_loss():
    ids = random_ids(1, 6)
    for tied in (True, False):
        model = tiny_model(tie_word_embeddings=tied)
        model.resize_token_embeddings(VOCAB + 3, mean_resizing=False)
        output = model(ids, labels=ids, output_logits=True)
        assert output.logits.shape[-1] == VOCAB + 3
        assert_close("loss", output.loss, F.cross_entropy(output.logits[0, :-1], ids[0, 1:]))

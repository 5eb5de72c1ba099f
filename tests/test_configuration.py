"""Values of a configuration that would give another model than meant are refused, from a file and as arguments."""

import json

import pytest
from transformers import AutoConfig

from tests.tiny_model import tiny_config

WRONG = [
    ("no_scale_embedding", "false", "must be true or false"),
    ("tie_word_embeddings", "no", "must be true or false"),
    ("use_cache", None, "must be true or false"),
    ("decoder_layers", True, "must be a whole number of at least 1"),
    ("glu_dim", 48.0, "must be a whole number of at least 1"),
    ("gate_dim", True, "must be a whole number of at least 1, or null"),
    ("linear_use_lrpe_list", "10", "must be a list of 0 and 1"),
    ("linear_use_lrpe_list", {"0": 1}, "must be a list of 0 and 1"),
    ("linear_use_lrpe_list", [2], "must be a list of 0 and 1"),
    ("linear_use_lrpe_list", 1, "must be a list of 0 and 1"),
    ("init_std", "0.02", "must be a number of at least 0"),
    ("init_std", float("nan"), "must be a number of at least 0"),
    ("lrpe_phase_dtype", "bfloat16", "use one of float32, activation"),
]


@pytest.mark.parametrize(("name", "value", "message"), WRONG)
def test_a_value_that_no_model_has_is_refused(name, value, message, tmp_path):
    tiny_config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"{name}: .*{message}"):
        AutoConfig.from_pretrained(tmp_path, **{name: value})
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {name: value}))
    with pytest.raises(ValueError, match=f"{name}: .*{message}"):
        AutoConfig.from_pretrained(tmp_path)


def test_two_names_of_one_setting_must_agree(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps(values | {"hidden_size": 32}))
    assert AutoConfig.from_pretrained(tmp_path).hidden_size == 32
    file.write_text(json.dumps(values | {"hidden_size": 64}))
    with pytest.raises(ValueError, match=r"config.json: hidden_size: 64 and decoder_embed_dim: 32 are one setting"):
        AutoConfig.from_pretrained(tmp_path)


def test_an_argument_replaces_the_value_of_the_file_under_either_name(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    for name in ("intermediate_size", "glu_dim"):
        config, unused = AutoConfig.from_pretrained(tmp_path, return_unused_kwargs=True, **{name: 7, "other": 1})
        assert (config.glu_dim, unused) == (7, {"other": 1})

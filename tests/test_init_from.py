"""Pretraining that begins from a checkpoint: its weights, its model section, more token ids, and what is refused."""

import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.tiny_corpus import tiny_shards, tiny_texts
from tests.tiny_model import tiny_config, tiny_model
from tests.tiny_run import rows, trajectory
from tests.tiny_tuning import tiny_base
from tnl.data.shards import TOKENIZER_FILE, ShardSet
from tnl.data.tokenizer_export import export_tokenizer
from tnl.errors import CheckpointError, ConfigError, DataError
from tnl.evaluation.heldout import heldout_loss
from tnl.model.loading import is_finite
from tnl.training.base_checkpoint import open_files
from tnl.training.export import export_run
from tnl.training.pretrain import pretrain
from tnl.training.run_configuration import load_settings
from tnl.training.settings import PretrainSettings

IDS = dict(vocab_size=340, eos_token_id=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Shards, and a model with their tokenizer, which has values that no model section can say."""
    folder = tmp_path_factory.mktemp("init_from")
    shards = tiny_shards(folder, heldout_fraction=0.1)
    tiny_base(folder / "base", hidden_dim=64, lrpe_phase_dtype="activation", **IDS)
    export_tokenizer(shards / TOKENIZER_FILE, folder / "base", add_bos=True)
    return folder


def settings_from(folder: Path, base: Path, output: Path, *overrides: str, model: dict | None = None):
    tree = {
        "output": str(output),
        "init_from": str(base),
        "data": {"shards": str(folder / "shards")},
        "train": {"steps": 3, "sequence_length": 32, "global_batch_size": 4, "micro_batch_size": 2},
        "optimizer": {"lr": 1e-3},
        "schedule": {"warmup_steps": 1},
        "evaluation": {"at_start": True},
    }
    if model:
        tree["model"] = model
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(tree))
    return load_settings(PretrainSettings, file, list(overrides))


@pytest.fixture(scope="module")
def straight(folder):
    """A run of three steps."""
    pretrain(settings_from(folder, folder / "base", folder / "run"))
    return folder / "run"


def test_a_run_begins_with_the_weights_of_the_checkpoint(folder, straight):
    model = AutoModelForCausalLM.from_pretrained(folder / "base").eval()
    shards = ShardSet.open(folder / "shards", "heldout")
    expected = heldout_loss(model, shards, device=torch.device("cpu"), window=32)
    assert rows(straight, "evaluation")[0]["step"] == 0
    assert rows(straight, "evaluation")[0]["loss"] == pytest.approx(expected.loss, rel=1e-6)
    assert rows(straight)[-1]["loss"] < rows(straight)[0]["loss"]


def test_divided_weights_are_the_same(folder, straight, tmp_path):
    pretrain(settings_from(folder, folder / "base", tmp_path / "run", "train.zero_stage=3"))
    losses = [row["loss"] for row in rows(tmp_path / "run")]
    assert losses == pytest.approx([row["loss"] for row in rows(straight)], abs=1e-5)


def test_an_export_keeps_what_no_model_section_can_say(straight, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(export_run(straight, tmp_path / "export"))
    found = [model.config.hidden_dim, model.config.lrpe_phase_dtype, model.config.eos_token_id]
    assert found == [64, "activation", 2]
    assert model.model.layers[0].token_mixer.out_proj.weight.shape == (32, 64)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "export")) == 340


def test_a_run_goes_on_without_the_checkpoint(folder, straight, tmp_path):
    shutil.copytree(folder / "base", tmp_path / "base")
    settings = settings_from(folder, tmp_path / "base", tmp_path / "run", "checkpoint.every=1")
    pretrain(settings)
    shutil.rmtree(tmp_path / "base")
    pretrain(settings, resume="2")
    assert trajectory(tmp_path / "run") == trajectory(straight)


def test_a_run_is_a_checkpoint_to_begin_from(folder, straight, tmp_path):
    settings = settings_from(folder, straight, tmp_path / "run")
    assert settings.model.num_heads == 4
    pretrain(settings)
    assert rows(tmp_path / "run")[0]["loss"] < rows(straight)[0]["loss"]
    first, before = rows(tmp_path / "run", "evaluation")[0], rows(straight, "evaluation")[-1]
    assert first["loss"] == pytest.approx(before["loss"], rel=1e-6)


@pytest.mark.parametrize("tied", [True, False])
def test_a_greater_vocabulary_keeps_the_old_rows_and_has_their_mean(folder, tmp_path, tied):
    base = tiny_base(tmp_path / "base", **IDS, tie_word_embeddings=tied)
    settings = settings_from(folder, base, tmp_path / "run", model={"vocab_size": 344})
    opened, old = open_files(settings, {}), tiny_model(**IDS, tie_word_embeddings=tied)
    assert opened.new_rows == 4
    assert opened.config.vocab_size == 344
    for name in ["model.embed_tokens.weight", *([] if tied else ["lm_head.weight"])]:
        rows_now, rows_old = opened.read(name), old.get_parameter(name)
        assert torch.equal(rows_now[:340], rows_old)
        assert torch.allclose(rows_now[340:], rows_old.mean(0), atol=1e-3)
        assert len(rows_now[340:].unique(dim=0)) == 4
    assert torch.equal(
        opened.read("model.layers.1.channel_mixer.l1.weight"), old.model.layers[1].channel_mixer.l1.weight
    )
    pretrain(settings)
    model = AutoModelForCausalLM.from_pretrained(export_run(tmp_path / "run", tmp_path / "export"))
    assert model.lm_head.weight.shape == (344, 32)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


def test_a_model_section_that_differs_is_refused_by_key(folder, tmp_path):
    given = {"num_heads": 2, "vocab_size": 100, "glu_dim": 48}
    with pytest.raises(ConfigError) as caught:
        settings_from(folder, folder / "base", tmp_path / "run", model=given)
    lines = str(caught.value).splitlines()
    assert lines[0].endswith("2 problems")
    assert re.search(r"model\.num_heads: 2, but init_from .*base has 4; set that or remove it", lines[1])
    assert re.search(r"model\.vocab_size: 100, .* has 340; set that or a greater number", lines[2])


def test_shards_of_another_tokenizer_are_refused(folder, tmp_path):
    other = tiny_shards(tmp_path, texts=tiny_texts(seed=1), heldout_fraction=0.1)
    settings = settings_from(folder, folder / "base", tmp_path / "run", f"data.shards={other}")
    with pytest.raises(DataError, match=r"another tokenizer than that of init_from; .* tokenizer\.model="):
        pretrain(settings)
    assert not (tmp_path / "run").exists()


def spoil(file: Path, how: str) -> None:
    """Change the weights that a file holds."""
    weights = load_file(file)
    name = "model.layers.1.channel_mixer.l1.weight"
    if how == "missing":
        del weights[name]
    elif how == "unexpected":
        weights["model.layers.2.channel_mixer.l1.weight"] = weights[name].clone()
    elif how == "shape":
        weights[name] = weights[name][:-1].clone()
    else:
        weights[name][0, 0] = float("nan")
    save_file(weights, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", r"missing: model\.layers\.1\.channel_mixer\.l1\.weight"),
        ("unexpected", r"not of this model: model\.layers\.2\.channel_mixer\.l1\.weight"),
        ("shape", r"of another shape: model\.layers\.1\.channel_mixer\.l1\.weight \[47, 32\] for \[48, 32\]"),
        ("nan", r"not finite: model\.layers\.1\.channel_mixer\.l1\.weight"),
    ],
)
def test_weights_that_are_not_those_of_the_model_are_refused_by_name(folder, tmp_path, how, message):
    base = tiny_base(tmp_path / "base", **IDS)
    spoil(base / "model.safetensors", how)
    with pytest.raises(CheckpointError, match=message):
        pretrain(settings_from(folder, base, tmp_path / "run"))


def test_what_is_no_tnl_is_refused(folder, tmp_path):
    from transformers import LlamaConfig

    LlamaConfig().save_pretrained(tmp_path / "llama")
    with pytest.raises(ConfigError, match="model_type 'llama', expected transnormer"):
        settings_from(folder, tmp_path / "llama", tmp_path / "run")
    with pytest.raises(ConfigError, match=r"init_from: .*nothing: no such folder; give a run folder"):
        settings_from(folder, tmp_path / "nothing", tmp_path / "run")
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun/config.yaml").write_text("output: begun\n")
    with pytest.raises(ConfigError, match=r"init_from: .*begun: a run without a checkpoint yet"):
        settings_from(folder, tmp_path / "begun", tmp_path / "run")


def test_pickled_weights_are_read(folder, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    tiny_config(**IDS).save_pretrained(base)
    torch.save(tiny_model(**IDS).state_dict(), base / "pytorch_model.bin")
    opened = open_files(settings_from(folder, base, tmp_path / "run"), {})
    assert all(is_finite(opened.read(name)) for name, _ in tiny_model(**IDS).named_parameters())
    saved = tiny_base(tmp_path / "safe", **IDS)
    assert open_files(settings_from(folder, saved, tmp_path / "run"), {}).weights.keys() <= opened.weights.keys()


def test_a_run_that_would_begin_from_itself_is_refused_and_stays_as_it_is(folder, straight):
    before = sorted(straight.rglob("*"))
    with pytest.raises(ConfigError, match="lies in it; choose another"):
        pretrain(settings_from(folder, straight, straight), fresh=True)
    assert sorted(straight.rglob("*")) == before


def test_the_home_folder_is_known(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    settings = settings_from(folder, Path("~/base"), tmp_path / "run")
    assert settings.init_from == str(folder / "base")


def test_a_base_that_computes_something_else_has_another_fingerprint(folder, tmp_path):
    shutil.copytree(folder / "base", tmp_path / "base")
    config = tmp_path / "base" / "config.json"
    settings = settings_from(folder, tmp_path / "base", tmp_path / "run")
    before = open_files(settings, {}).fingerprint
    config.write_text(config.read_text().replace('"lrpe_phase_dtype": "activation"', '"lrpe_phase_dtype": "float32"'))
    assert open_files(settings, {}).fingerprint != before

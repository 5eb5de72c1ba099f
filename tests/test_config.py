"""Configurations: what ships is valid, every misspelt key and wrong value is refused with its path and cure."""

import math
import re
import time
import types
import typing
from pathlib import Path

import pytest
from pydantic import BaseModel

from tnl import config
from tnl.data.settings import PrepareSettings
from tnl.errors import ConfigError
from tnl.evaluation.suite_settings import SpeedSettings, SuiteSettings
from tnl.model.settings import ModelSettings
from tnl.plain_yaml import read_yaml, read_yaml_text, write_yaml_text
from tnl.training.finetune_settings import FinetuneSettings
from tnl.training.settings import DERIVED_DEEPSPEED_KEYS, PASSED_DEEPSPEED_KEYS, PretrainSettings

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "configs"
EXAMPLE = str(Path(__file__).parent / "example_run.yaml")
SHIPPED = sorted(str(file.relative_to(CONFIGS)) for file in CONFIGS.rglob("*.yaml"))
KINDS = {"pretrain": PretrainSettings, "finetune": FinetuneSettings, "data": PrepareSettings, "model": ModelSettings}
KINDS |= {"evaluate": SuiteSettings, "speed": SpeedSettings}
# What the checkpoint brings that such a run begins from.
FROM_CHECKPOINT = {"finetune": {"model": {"preset": "tnl-tiny"}}}


def pretrain(*overrides: str) -> PretrainSettings:
    return config.load(PretrainSettings, EXAMPLE, list(overrides))


def refusal(*overrides: str) -> list[str]:
    """The lines after the first of the message that these overrides of the example are refused with."""
    with pytest.raises(ConfigError) as caught:
        pretrain(*overrides)
    head, *lines = str(caught.value).splitlines()
    count = len(lines)
    assert head == f"{EXAMPLE}: {count} problem{'s' if count > 1 else ''}"
    assert all(re.match(r"  [\w.-]+: \S", line) for line in lines), lines
    return [line[2:] for line in lines]


@pytest.fixture(scope="module")
def complete() -> dict:
    """A valid configuration in which every key stands."""
    return pretrain("schedule.name=wsd", "schedule.decay_steps=100", "logging.peak_tflops=100").model_dump(mode="json")


# What ships


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_configuration_is_valid(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kind = Path(name).parts[0]
    settings = KINDS[kind]
    assert isinstance(config.load(settings, CONFIGS / name, values=FROM_CHECKPOINT.get(kind)), settings)
    assert config.find_config(name.removesuffix(".yaml")) == CONFIGS / name
    assert config.find_config(f"configs/{name}") == CONFIGS / name


def test_shipped_kinds_are_known():
    assert {Path(name).parts[0] for name in SHIPPED} == set(KINDS)


def test_keys_of_settings_are_no_secrets():
    for settings in KINDS.values():
        assert not [key for key in config._dotted_keys(settings) if config.SECRET.search(key)]


# Precedence


def test_default_preset_file_override(tmp_path):
    file = tmp_path / "run.yaml"
    base = "output: o\ndata: {shards: s}\noptimizer: {lr: 1e-3}\n"
    base += "train: {steps: 9, sequence_length: 8, global_batch_size: 2, micro_batch_size: 2}\n"
    preset = read_yaml(CONFIGS / "model/tnl-tiny.yaml")

    file.write_text(base + "model: {preset: tnl-tiny}\n")
    settings = config.load(PretrainSettings, file)
    assert settings.model.init_std == 0.02  # default
    assert settings.model.glu_dim == preset["glu_dim"]

    file.write_text(base + "model: {preset: tnl-tiny, glu_dim: 99, init_std: 0.5}\n")
    settings = config.load(PretrainSettings, file)
    assert settings.model.init_std == 0.5
    assert settings.model.glu_dim == 99
    assert settings.model.hidden_size == preset["hidden_size"]

    settings = config.load(PretrainSettings, file, ["model.glu_dim=7", "model.init_std=0.25", "model.glu_dim=8"])
    assert settings.model.init_std == 0.25
    assert settings.model.glu_dim == 8

    settings = config.load(PretrainSettings, file, ["model.preset=tnl-44m"])
    assert settings.model.num_layers == 8
    assert settings.model.glu_dim == 99


def test_an_override_mapping_is_merged():
    settings = pretrain("train={steps: 77}", "checkpoint={}")
    assert settings.train.steps == 77
    assert settings.train.sequence_length == pretrain().train.sequence_length
    assert settings.checkpoint == pretrain().checkpoint


def test_scientific_notation_in_file_and_override(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(Path(EXAMPLE).read_text().replace("lr: 2e-3", "lr: 1e-4"))
    assert config.load(PretrainSettings, file).optimizer.lr == 1e-4
    assert config.load(PretrainSettings, file, ["optimizer.lr=2e-3"]).optimizer.lr == 2e-3


def test_effective_configuration_reads_back(tmp_path, complete):
    settings = pretrain("logging.wandb_project='1e5'", "output='010'", "data.shards='null'", "optimizer.eps=1e-30")
    file = tmp_path / "config.yaml"
    file.write_text(config.dump(settings))
    assert config.load(PretrainSettings, file) == settings
    for text in ("1e5", "010", "no", "~", "1.", "true", "12:30", "\u00e4: #", " a", "2026-01-01", "=", "<<", "-"):
        assert read_yaml_text(write_yaml_text({"a": text})) == {"a": text}
    assert read_yaml_text(write_yaml_text(complete)) == complete


# Misspelt keys


def keys_of(tree: dict, path: tuple = ()) -> list[tuple]:
    keys = []
    for key, value in tree.items():
        keys.append((*path, key))
        if isinstance(value, dict):
            keys += keys_of(value, (*path, key))
    return keys


def changed(tree: dict, path: tuple, value: object = None, name: str | None = None) -> dict:
    """A copy of ``tree`` with another value, or another name, at ``path``."""
    first, *rest = path
    if rest:
        return tree | {first: changed(tree[first], tuple(rest), value, name)}
    if name is None:
        return tree | {first: value}
    return {name if key == first else key: old for key, old in tree.items()}


def misspellings(key: str) -> set[str]:
    dropped = {key[:i] + key[i + 1 :] for i in range(len(key))}
    swapped = {key[:i] + key[i + 1] + key[i] + key[i + 2 :] for i in range(len(key) - 1)}
    case = {key.upper(), key.capitalize(), key.title(), key[:-1] + key[-1].upper()}
    return (dropped | swapped | case | {key.replace("_", "-"), key.replace("_", "")}) - {key, ""}


def test_every_misspelt_key_is_refused_with_the_right_cure(complete, record_property):
    tree = complete | {"deepspeed": {key: {} for key in PASSED_DEEPSPEED_KEYS}}
    config.validate(PretrainSettings, tree, "run.yaml")
    began, total, wrong = time.monotonic(), 0, []
    for path in keys_of(tree):
        for name in misspellings(path[-1]):
            total += 1
            with pytest.raises(ConfigError) as caught:
                config.validate(PretrainSettings, changed(tree, path, name=name), "run.yaml")
            where = ".".join((*path[:-1], name))
            (line,) = (line for line in str(caught.value).splitlines() if line.startswith(f"  {where}: "))
            assert "unknown key" in line or "cannot be passed through" in line
            if not line.endswith(f", did you mean {path[-1]}?"):
                wrong.append(line)
    seconds = time.monotonic() - began
    rate = 1 - len(wrong) / total
    record_property("misspellings", total)
    record_property("right_cure", f"{rate:.4f}")
    print(f"{total} misspellings refused in {seconds:.1f} s, right cure {rate:.2%}; wrong: {wrong}")
    assert total > 1000
    assert rate >= 0.95, wrong
    assert seconds < 15


def test_a_key_in_the_wrong_section_is_sent_to_the_right_one():
    assert refusal("train.warmup_steps=3") == ["train.warmup_steps: unknown key, did you mean schedule.warmup_steps?"]
    assert refusal("every=3") == ["every: unknown key, did you mean checkpoint.every or evaluation.every?"]
    assert refusal("model.LR=3") == ["model.LR: unknown key, did you mean optimizer.lr?"]


def test_a_key_like_no_other_lists_the_known_ones():
    assert refusal("data.qqqq=1") == ["data.qqqq: unknown key, known: shards, packing, num_workers"]


def test_keys_of_a_source_are_checked_by_its_kind():
    def lines(*overrides):
        with pytest.raises(ConfigError) as caught:
            config.load(PrepareSettings, "data/jsonl-example", list(overrides))
        return [line[2:] for line in str(caught.value).splitlines()[1:]]

    assert lines("source.text_feld=t") == ["source.text_feld: unknown key, did you mean text_field?"]
    assert lines("source.kind=foo") == [
        "source.kind: must be one of 'text', 'jsonl', 'dataset', 'stdlib', got \"foo\"",
    ]
    assert lines("source.kind=null") == [
        "source.kind: must be one of 'text', 'jsonl', 'dataset', 'stdlib', got \"None\"",
    ]
    assert lines("source.kind=stdlib")[0] == "source.path: unknown key, known: kind, max_bytes"
    assert lines("tokenizer.model=m") == [
        "tokenizer: give either model (a sentencepiece file) or vocab_size (to train one)"
    ]


# Wrong values

WRONG = ["three", "''", "-1", "0", "1.5", ".nan", ".inf", "-.inf", "1e999", "null", "true", "yes", "[]", "[1]", "{}"]
WRONG += ["{a: 1}", "9" * 19, "9" * 5000, "'3'", "[[[]]]", "2026-13-45"]


def kinds_of(annotation) -> set[type]:
    """The types of YAML values that a field of this annotation may take."""
    origin = typing.get_origin(annotation)
    if origin in (types.UnionType, typing.Union):
        return set().union(*map(kinds_of, typing.get_args(annotation)))
    if origin is typing.Annotated:
        return kinds_of(annotation.__origin__)
    if origin is typing.Literal:
        return {type(value) for value in typing.get_args(annotation)}
    if origin is tuple:
        return {list}
    if origin is dict or issubclass(annotation, BaseModel):
        return {dict}
    return {Path: {str}, float: {int, float}}.get(annotation, {annotation})


def test_every_wrong_value_is_refused_or_taken_as_it_stands(complete):
    refused = taken = 0
    for path in keys_of(complete):
        section = PretrainSettings
        for part in path[:-1]:
            section = section.model_fields[part].annotation
        kinds = kinds_of(section.model_fields[path[-1]].annotation)
        for text in WRONG:
            value = read_yaml_text(text)
            tree = changed(complete, path, value)
            try:
                settings, message = config.validate(PretrainSettings, tree, "run.yaml"), ""
            except ConfigError as error:
                settings, message = None, str(error)
            if settings is None:
                refused += 1
                assert message.startswith("run.yaml: ")
                assert path[-1] in message
                continue
            taken += 1
            assert type(value) in kinds, (path, text)
            found = settings.model_dump(mode="json")
            for part in path:
                found = found[part]
            # An integer is taken for a float; {} is a section of defaults; the path "" is ".".
            same = found == float(value) if isinstance(found, float) else found == value
            assert same or value in ({}, ""), (path, text)
            assert not isinstance(value, float) or math.isfinite(value)
    print(f"{refused} values refused, {taken} taken")
    assert refused > 8 * taken > 0


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("train.steps=three", 'train.steps: input should be a valid integer, got "three"'),
        ("train.steps=true", "train.steps: input should be a valid integer, got true"),
        ("train.steps=null", "train.steps: input should be a valid integer, got null"),
        ("train.steps=0", "train.steps: input should be greater than or equal to 1, got 0"),
        ("optimizer.lr=-1e-3", "optimizer.lr: input should be greater than 0, got -0.001"),
        ("optimizer.lr=.nan", "optimizer.lr: input should be a finite number, got NaN"),
        ("optimizer.lr=.inf", "optimizer.lr: input should be a finite number, got Infinity"),
        ("data.packing=yes", 'data.packing: input should be a valid boolean, got "yes"'),
        ("train=5", "train: input should be an object, got 5"),
        ("output=", "output: input should be a valid string, got null"),
        ("model.num_heads=15", "model.num_heads: 15 does not divide hidden_size 192"),
        ("schedule.warmup_steps=600", "schedule.warmup_steps: 600 must be below train.steps 600"),
        ("schedule.decay_steps=9", "schedule.decay_steps: cosine has none; remove it, or set name: wsd"),
        ("train.micro_batch_size=3", "train.global_batch_size: 8 is no multiple of micro_batch_size 3"),
        ("optimizer.betas=[0.9, 1]", "optimizer.betas: each must be in [0, 1), got [0.9, 1.0]"),
    ],
)
def test_message(override, line):
    assert refusal(override) == [line]


def test_message_of_heads_that_do_not_divide():
    overrides = ["model.preset=tnl-1b", "model.num_heads=15"]
    assert refusal(*overrides) == ["model.num_heads: 15 does not divide hidden_size 2048"]


def test_wsd_decays_after_the_warm_up():
    lines = refusal("schedule.name=wsd", "schedule.decay_steps=571")
    assert lines == ["schedule.decay_steps: 571 is more than the 570 steps after the warm-up; lower it"]
    assert pretrain("schedule.name=wsd", "schedule.decay_steps=570").schedule.decay_steps == 570


@pytest.mark.parametrize(("precision", "stages"), [("bf16", (0, 1)), ("fp16", (0,))])
def test_precisions_that_a_zero_stage_cannot_train(precision, stages):
    for stage in range(4):
        overrides = [f"train.precision={precision}", f"train.zero_stage={stage}"]
        if stage in stages:
            (line,) = refusal(*overrides)
            assert line.startswith("train.zero_stage: ")
            assert f"got {stage}; set zero_stage: 2" in line
        else:
            assert pretrain(*overrides).train.zero_stage == stage


def test_all_problems_at_once(tmp_path):
    lines = refusal(
        "modle=1",
        "train.stepz=5",
        "train.precision=bf17",
        "optimizer.lr=fast",
        "model.num_heads=15",
        "deepspeed={train_batch_size: 1, fp16: {}, zero_optimisation: {}, zero_optimization: {stage: 1}}",
        "logging.wandb_api_key=x",
    )
    assert [line.split(":")[0] for line in lines] == [
        "logging.wandb_api_key",
        "model.num_heads",
        "train.precision",
        "train.stepz",
        "optimizer.lr",
        "deepspeed.train_batch_size",
        "deepspeed.fp16",
        "deepspeed.zero_optimisation",
        "deepspeed.zero_optimization.stage",
        "modle",
    ]


def test_missing_keys_are_all_named(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("seed: 3\noptimizer: {}\n")
    with pytest.raises(ConfigError) as caught:
        config.load(PretrainSettings, file)
    cure = "missing, this key must be given"
    keys = ["output", "model", "data", "train", "optimizer.lr"]
    assert str(caught.value).splitlines() == [f"{file}: 5 problems", *(f"  {key}: {cure}" for key in keys)]


def test_a_long_key_or_value_is_cut_in_the_message(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(f"? {'k' * 100_000}\n: 1\nseed: {'v' * 100_000}\n")
    with pytest.raises(ConfigError) as caught:
        config.load(PretrainSettings, file)
    assert len(str(caught.value)) < 1000


# DeepSpeed keys


@pytest.mark.parametrize("key", DERIVED_DEEPSPEED_KEYS)
def test_derived_deepspeed_keys_are_refused(key):
    cure = f"derived from {DERIVED_DEEPSPEED_KEYS[key]}, set that instead"
    assert refusal(f"deepspeed.{key}=1") == [f"deepspeed.{key}: {cure}"]


def test_deepspeed_keys():
    assert pretrain("deepspeed.zero_optimization={overlap_comm: true}").deepspeed["zero_optimization"]
    assert refusal("deepspeed.zero_optimization.stage=2") == [
        "deepspeed.zero_optimization.stage: derived from train.zero_stage, set that instead"
    ]
    for value in ("stage", "3", "[stage]", "null"):
        assert refusal(f"deepspeed.zero_optimization={value}") == ["deepspeed.zero_optimization: must be a mapping"]
    (line,) = refusal("deepspeed.elasticity={}")
    assert line.startswith("deepspeed.elasticity: cannot be passed through, ")


# Secrets


@pytest.mark.parametrize(
    "key",
    [
        "logging.wandb_api_key",
        "logging.WANDB_API_KEY",
        "logging.apikey",
        "api-key",
        "hf_token",
        "HF_TOKEN",
        "token",
        "data.access_token",
        "password",
        "logging.passwd",
        "secret",
        "aws_secret_access_key",
        "client_secret",
        "deepspeed.tensorboard.credentials",
        "deepspeed.csv_monitor.private_key",
    ],
)
def test_secrets_are_refused_and_not_shown(key, tmp_path):
    for value in ("CANARY", "'CANARY'", "[CANARY]", "{a: CANARY}"):
        (line,) = refusal(f"{key}={value}")
        assert line == f"{key}: a secret does not belong in a configuration, set it in the environment instead"


def test_secrets_in_lists_and_in_broken_yaml_are_not_shown(tmp_path):
    assert refusal("deepspeed.flops_profiler=[{x: [{hf_token: CANARY}]}]")[0].startswith(
        "deepspeed.flops_profiler.0.x.0.hf_token: a secret"
    )
    file = tmp_path / "run.yaml"
    for text in (
        '"CANARY',
        "[CANARY",
        "'a\nCANARY",
        "{CANARY: CANARY: 1}",
        "!CANARY x",
        "*CANARY",
        "\tCANARY",
        "%CANARY",
    ):
        with pytest.raises(ConfigError, match=r"^logging\.api_key: not a valid YAML text: line \d: ") as caught:
            pretrain(f"logging.api_key={text}")
        assert "CANARY" not in str(caught.value).replace("directive", "")
        file.write_text(f"logging:\n  api_key: {text}\n")
        with pytest.raises(ConfigError, match=r": not a valid YAML text: line \d: ") as caught:
            config.load(PretrainSettings, file)
        assert "CANARY" not in str(caught.value)
    for text in ("CANARY", "=CANARY", "a..b=CANARY", ".=CANARY"):
        with pytest.raises(ConfigError, match=r"an override is section\.key=value") as caught:
            pretrain(text)
        assert "CANARY" not in str(caught.value) or text == "CANARY"


# Names and paths


@pytest.mark.parametrize("name", ["nope", "configs", "/dev/zero", "pretrain", "../configs/pretrain", "quickstart"])
def test_an_unknown_name_lists_the_shipped_ones(name, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(ConfigError) as caught:
        config.load(PretrainSettings, name)
    assert str(caught.value).startswith(f"{name}: no such file; give a path, or one of the shipped names: ")
    for shipped in SHIPPED:
        assert shipped.removesuffix(".yaml") in str(caught.value)


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b"])
def test_a_name_that_is_no_path(name):
    with pytest.raises(ConfigError, match="cannot be opened"):
        config.load(PretrainSettings, name)


@pytest.mark.parametrize(
    "preset",
    ["../../x", "../pretrain/quickstart", "/etc/passwd", "x.yaml", "{cwd}/x", "{cwd}/x.yaml", "x" * 5000, "''", "."],
)
def test_a_preset_is_a_shipped_model(preset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.yaml").write_text((CONFIGS / "model/tnl-tiny.yaml").read_text())
    (line,) = refusal(f"model.preset={preset.format(cwd=tmp_path)}")
    assert line.startswith("model.preset: no shipped model ")
    assert "tnl-1b" in line


def test_a_preset_out_of_the_folder_by_traversal_that_exists(tmp_path):
    outside = tmp_path / "x.yaml"
    outside.write_text("glu_dim: 1\n")
    upwards = "/".join([".."] * len((CONFIGS / "model").parts))
    (line,) = refusal(f"model.preset={upwards}{outside.with_suffix('')}")
    assert line.startswith("model.preset: no shipped model ")


def test_a_misspelt_preset():
    assert refusal("model.preset=tnl1b") == ['model.preset: no shipped model "tnl1b", did you mean tnl-1b?']


def test_values_of_a_program_are_taken_as_they_are():
    odd = "/tmp/a #b: [x] 'y\"~"
    values = {"output": odd, "train": {"steps": 7, "sequence_length": 9}}
    settings = config.load(PretrainSettings, EXAMPLE, ["train.steps=80"], values)
    assert (str(settings.output), settings.train.steps, settings.train.sequence_length) == (odd, 80, 9)

"""Checkpoints in the released layout: they load as they are, what does not fit is named, and nothing of them is run."""

import json
import os
import pickle
import runpy
import subprocess
import sys
from pathlib import Path

import jinja2
import pytest
import torch
from jinja2.exceptions import SecurityError
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from tests.checkout import python_path
from tests.released_layout import (
    AUTO_MAP,
    PLANTED,
    VOCAB,
    Payload,
    hub_cache,
    released_config,
    released_model,
    write_released,
)
from tests.tiny_corpus import tiny_shards
from tests.tiny_model import random_ids
from tnl.errors import EXIT_CHECKPOINT, EXIT_USAGE, ConfigError
from tnl.generation.load import load_model
from tnl.model import TransnormerConfig, TransnormerForCausalLM

HEAD, EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def model():
    return released_model()


@pytest.fixture(scope="module")
def ids():
    return random_ids(2, 11, vocab=VOCAB)


def weights_of(model, head: str = "shared") -> dict[str, torch.Tensor]:
    """The state dict of a model whose tied head shares its memory, is a duplicate, or is absent."""
    weights = dict(model.state_dict())
    if head == "absent":
        del weights[HEAD]
    elif head == "duplicate":
        weights[HEAD] = weights[HEAD].clone()
    return weights


# Loading


@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize("head", ["shared", "duplicate", "absent"])
def test_a_released_checkpoint_loads_with_equal_logits(model, ids, tmp_path, head, num_shards):
    folder = write_released(tmp_path / "released", weights_of(model, head), num_shards)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert isinstance(loaded, TransnormerForCausalLM)
    assert loaded.dtype == torch.bfloat16
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    hidden = AutoModel.from_pretrained(folder)(ids).last_hidden_state
    assert torch.equal(hidden, model.model(ids).last_hidden_state)


def test_pickle_to_safetensors_and_back_is_bit_equal(model, tmp_path):
    released = write_released(tmp_path / "released", weights_of(model), 3)
    loaded = AutoModelForCausalLM.from_pretrained(released)
    loaded.save_pretrained(tmp_path / "safe")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "safe")
    torch.save(again.state_dict(), tmp_path / "weights.bin")
    back = write_released(tmp_path / "back", torch.load(tmp_path / "weights.bin", weights_only=True))
    for other in (loaded, again, AutoModelForCausalLM.from_pretrained(back)):
        assert other.state_dict().keys() == model.state_dict().keys()
        for name, tensor in model.state_dict().items():
            assert torch.equal(other.state_dict()[name].view(torch.uint8), tensor.view(torch.uint8)), name


def test_a_version_as_metaseq_writes_it_is_left_aside(model, tmp_path):
    weights = weights_of(model) | {"decoder.version": torch.tensor([3.0])}
    folder = write_released(tmp_path / "released", weights)
    for loader in (AutoModelForCausalLM, AutoModel):
        _, info = loader.from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"]


def test_an_untied_head_is_loaded(tmp_path, ids):
    model = released_model(tie_word_embeddings=False)
    folder = write_released(tmp_path / "released", weights_of(model), tie_word_embeddings=False)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(folder)(ids).logits, model(ids).logits)


def run_program(program: str, *arguments: Path) -> str:
    """Standard output of a program in a process of its own, which finds the packages here."""
    environment = os.environ | {"PYTHONPATH": python_path()}
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


TNL_FIRST = """
import sys
import tnl
assert not {"torch", "transformers"} & set(sys.modules)

import importlib.util
importlib.util.find_spec("transformers")  # as other libraries look whether it is there
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

for auto in (AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer):
    print(type(auto.from_pretrained(sys.argv[1])).__module__)
"""


def test_importing_tnl_first_is_enough(model, tmp_path):
    folder = write_released(tmp_path / "released", weights_of(model))
    modules = ["configuration", "modeling", "modeling", "tokenization"]
    assert run_program(TNL_FIRST, folder).split() == [f"tnl.model.{name}" for name in modules]


TRANSFORMERS_FIRST = """
import gc
import sys
from transformers import AutoModelForCausalLM
import tnl

def kilobytes(field):
    (line,) = (line for line in open("/proc/self/status") if line.startswith(field))
    return int(line.split()[1])

AutoModelForCausalLM.from_pretrained(sys.argv[1])  # what is imported and allocated once
for folder in sys.argv[2:]:
    gc.collect()
    open("/proc/self/clear_refs", "w").write("5")  # the peak counts from here
    before = kilobytes("VmRSS")
    model = AutoModelForCausalLM.from_pretrained(folder)
    print((kilobytes("VmHWM") - before) * 1024)
    del model
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_peaks_below_1_2_times_the_size_of_the_checkpoint(model, tmp_path):
    sizes = dict(vocab_size=VOCAB, decoder_embed_dim=1024, glu_dim=4096, decoder_layers=6, decoder_attention_heads=8)
    with torch.device("meta"):
        large = TransnormerForCausalLM(TransnormerConfig(**sizes))
    weights = {name: torch.full(p.shape, 0.01, dtype=torch.bfloat16) for name, p in large.named_parameters()}
    del sizes["vocab_size"]
    pickles = write_released(tmp_path / "pickles", weights, 3, hidden_dim=1024, linear_use_lrpe_list=[1], **sizes)
    safe = tmp_path / "safe"
    AutoModelForCausalLM.from_pretrained(pickles).save_pretrained(safe, max_shard_size="80MB")
    assert len(list(safe.glob("*.safetensors"))) > 2
    tiny = write_released(tmp_path / "tiny", weights_of(model))
    output = run_program(TRANSFORMERS_FIRST, tiny, pickles, safe)
    size = sum(tensor.nbytes for tensor in weights.values())
    assert size > 200e6
    peaks = {name: int(line) / size for name, line in zip(("pickles", "safe"), output.split(), strict=True)}
    assert all(0.5 < peak < 1.2 for peak in peaks.values()), peaks


# The configuration


def test_keys_that_have_no_effect_are_dropped(tmp_path, model):
    old = dict(torchscript=False, is_decoder=False, tokenizer_class="BaiChuanTokenizer", temperature=0.7, top_k=5)
    folder = write_released(tmp_path / "released", weights_of(model), linear_use_lrpe=0, **old)
    AutoConfig.from_pretrained(folder).save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved/config.json").read_text())
    ours = {"decay", "gate_dim", "lrpe_phase_dtype", "mixer_norm_type", "tie_word_embeddings", "dtype"}
    dropped = {"auto_map", "add_bos_token", "torch_dtype", "_name_or_path"}
    assert saved.keys() - ours == released_config().keys() - dropped


@pytest.mark.parametrize(
    "key",
    ["_attn_implementation_internal", "_attn_implementation", "attn_implementation", "transformers_weights", "_new"],
)
def test_a_key_that_chooses_code_is_refused_by_name(tmp_path, model, key):
    folder = write_released(tmp_path / "released", weights_of(model), **{key: "someone/kernel"})
    for loader in (AutoConfig, TransnormerConfig, AutoModelForCausalLM, TransnormerForCausalLM):
        with pytest.raises(ValueError, match=rf"released/config.json: {key}: would choose code"):
            loader.from_pretrained(folder)
    with pytest.raises(ValueError, match=rf"{key}: would choose code"):
        TransnormerConfig.from_json_file(folder / "config.json")


def test_an_unknown_key_is_refused_with_the_known_one(tmp_path, model):
    folder = write_released(tmp_path / "released", weights_of(model), decoder_layer=3)
    with pytest.raises(ValueError, match=r"released/config.json: decoder_layer: unknown key, did you mean decoder_lay"):
        AutoConfig.from_pretrained(folder)


def test_standard_names_stand_for_those_of_the_released_files(tmp_path, model, ids):
    names = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
    released = dict(decoder_embed_dim=None, decoder_layers=None, decoder_attention_heads=None, glu_dim=None)
    folder = write_released(tmp_path / "released", weights_of(model), **names, **released, hidden_dim=None)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert (loaded.config.hidden_size, loaded.config.decoder_embed_dim, loaded.config.hidden_dim) == (32, 32, 32)
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_what_transformers_itself_writes_is_accepted(tmp_path):
    config = TransnormerConfig(
        num_labels=3, problem_type="regression", output_hidden_states=True, dtype="float16", eos_token_id=[2, 3]
    )
    config.quantization_config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    assert TransnormerConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path, attn_implementation="eager", output_hidden_states=False)
    assert loaded.quantization_config == config.quantization_config
    assert (loaded.num_labels, loaded.output_hidden_states) == (3, False)


@pytest.mark.parametrize("values", [{"dtype": "load"}, {"torch_dtype": "nothing"}, {"dtype": 3}])
def test_a_dtype_that_torch_has_not_is_refused(values):
    with pytest.raises(ValueError, match=r"dtype: .* is unknown"):
        TransnormerConfig(**values)


# Weights that do not fit


def test_every_problem_of_the_weights_is_named_at_once(model, tmp_path):
    weights = {name: tensor.clone() for name, tensor in weights_of(model, "absent").items()}
    del weights["model.layers.1.channel_mixer.l2.weight"]
    weights["model.layers.7.token_mixer.gate"] = torch.ones(1)
    weights["model.layers.0.channel_mixer.l1.weight"] = torch.zeros(8, 32)
    weights["model.layers.0.channel_mixer.l3.weight"][3, 4] = torch.nan
    weights["model.layers.1.token_mixer.out_proj.weight"][0, 0] = -torch.inf
    folder = write_released(tmp_path / "released", weights)
    with pytest.raises(ValueError, match="weights do not fit") as caught:
        AutoModelForCausalLM.from_pretrained(folder)
    message = str(caught.value)
    assert message.startswith(f"{folder}: ")
    for part in (
        "missing: model.layers.1.channel_mixer.l2.weight;",
        "not of this model: model.layers.7.token_mixer.gate;",
        "of another shape: model.layers.0.channel_mixer.l1.weight [8, 32] for [48, 32];",
        "not finite: model.layers.0.channel_mixer.l3.weight, model.layers.1.token_mixer.out_proj.weight",
    ):
        assert part in message


@pytest.mark.parametrize("head", ["shared", "duplicate", "absent"])
def test_a_vocabulary_of_another_size_is_named(model, tmp_path, head):
    folder = write_released(tmp_path / "released", weights_of(model, head), vocab_size=VOCAB + 8)
    with pytest.raises(ValueError, match=rf"of another shape: .*{EMBEDDINGS} \[{VOCAB}, 32\] for \[{VOCAB + 8}, 32\]"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_damaged_safetensors_file_is_named(model, tmp_path):
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ValueError, match=rf"{tmp_path}: a file of weights is damaged"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_weights_may_come_without_a_folder(model, ids):
    loaded = TransnormerForCausalLM.from_pretrained(None, config=model.config, state_dict=model.state_dict())
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_a_name_that_is_no_model_is_refused_as_in_transformers(tmp_path):
    with pytest.raises(OSError, match="nowhere"):
        TransnormerForCausalLM.from_pretrained(pretrained_model_name_or_path=str(tmp_path / "nowhere"))


def test_other_shapes_are_left_out_when_asked(model, tmp_path):
    weights = weights_of(model) | {"model.layers.0.channel_mixer.l1.weight": torch.zeros(8, 32)}
    folder = write_released(tmp_path / "released", weights)
    loaded = AutoModelForCausalLM.from_pretrained(folder, ignore_mismatched_sizes=True)
    assert loaded.model.layers[0].channel_mixer.l1.weight.shape == (48, 32)


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        (lambda w: w.update({HEAD: w[EMBEDDINGS] + 1}), {}, "tied by tie_word_embeddings, but not equal"),
        (lambda w: w.pop(HEAD), {"tie_word_embeddings": False}, f"missing: {HEAD}"),
    ],
)
def test_a_head_that_contradicts_the_configuration_is_refused(model, tmp_path, change, config, message):
    weights = weights_of(model)
    change(weights)
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(write_released(tmp_path / "released", weights, **config))


# Files outside the folder


def point_index_at(folder: Path, shard) -> None:
    """Let the index name ``shard`` in place of the second one."""
    file = folder / "pytorch_model.bin.index.json"
    index = json.loads(file.read_text())
    second = sorted(set(index["weight_map"].values()))[1]
    index["weight_map"] = {k: shard if v == second else v for k, v in index["weight_map"].items()}
    file.write_text(json.dumps(index))


@pytest.mark.parametrize("kind", ["parent", "absolute", "link", "inner parent", "number", "list"])
def test_an_index_that_names_files_outside_its_folder_is_refused(model, tmp_path, kind):
    folder = write_released(tmp_path / "released", weights_of(model), 3)
    outside = tmp_path / "outside.bin"
    (folder / "pytorch_model-00002-of-00003.bin").rename(outside)
    (folder / "link.bin").symlink_to(outside)
    names = {
        "parent": "../outside.bin",
        "absolute": str(outside),
        "link": "link.bin",
        "inner parent": "custom_generate/../../outside.bin",
        "number": 3,
    }
    point_index_at(folder, names.get(kind, ["../outside.bin"]))
    for loader in (AutoModelForCausalLM, TransnormerForCausalLM):
        with pytest.raises(ValueError, match=r"pytorch_model.bin.index.json: (names|not an index)"):
            loader.from_pretrained(folder)


def test_an_index_of_a_variant_that_names_files_outside_is_refused(model, tmp_path):
    folder = tmp_path / "model"
    model.save_pretrained(folder, variant="fp16", max_shard_size="20KB")
    file = folder / "model.safetensors.index.fp16.json"
    index = json.loads(file.read_text())
    name = index["weight_map"][EMBEDDINGS]
    (folder / name).rename(tmp_path / name)
    index["weight_map"] = {k: f"../{v}" if v == name else v for k, v in index["weight_map"].items()}
    file.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"index.fp16.json: names '../model"):
        AutoModelForCausalLM.from_pretrained(folder, variant="fp16")


def test_the_hub_cache_loads_by_name_and_by_folder(model, ids, tmp_path):
    snapshot = hub_cache(
        write_released(tmp_path / "released", weights_of(model), 3), tmp_path / "cache", "someone/model"
    )
    for name in ("someone/model", snapshot):
        loaded = AutoModelForCausalLM.from_pretrained(name, cache_dir=tmp_path / "cache", local_files_only=True)
        assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize("shard", ["../../../../outside.bin", f"../{'0' * 40}/pytorch_model-00001-of-00003.bin"])
def test_an_index_in_the_hub_cache_that_names_files_outside_is_refused(model, tmp_path, shard):
    folder = write_released(tmp_path / "released", weights_of(model), 3)
    (folder / "pytorch_model-00002-of-00003.bin").rename(tmp_path / "outside.bin")
    point_index_at(folder, shard)
    hub_cache(folder, tmp_path / "cache", "someone/model")
    with pytest.raises(ValueError, match=rf"names '{shard}', which is outside its folder"):
        AutoModelForCausalLM.from_pretrained("someone/model", cache_dir=tmp_path / "cache", local_files_only=True)


# Code that a checkpoint brings


PATHS = ["AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoTokenizer", "load_model", "generate", "evaluate"]
PATHS += ["convert"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return tiny_shards(tmp_path_factory.mktemp("data"))


@pytest.fixture
def load_through(tnl_command, shards, tmp_path):
    """Load a folder through one of `PATHS`; returns the exit code of a command."""

    def load(path: str, folder: Path) -> int:
        if path == "load_model":
            load_model(str(folder))
        elif path == "generate":
            return tnl_command("generate", folder, "--prompt", "def", "--max-new-tokens", "2")[0]
        elif path == "evaluate":
            return tnl_command("evaluate", folder, "--data", shards)[0]
        elif path == "convert":
            return tnl_command("convert", folder, tmp_path / "converted")[0]
        else:
            auto = {c.__name__: c for c in (AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer)}
            auto[path].from_pretrained(folder)
        return 0

    return load


def pickled(kind: str, weights: dict, payload: Payload, file: Path) -> None:
    """Write a pickle with ``payload`` in it."""
    if kind == "an entry":
        torch.save(weights | {"payload": payload}, file)
    elif kind == "the whole":
        torch.save(payload, file)
    elif kind == "before 1.6":
        torch.save(weights | {"payload": payload}, file, _use_new_zipfile_serialization=False)
    else:
        file.write_bytes(pickle.dumps(payload))


KINDS = ["an entry", "the whole", "before 1.6", "no torch file"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_malicious_pickle_runs_nothing(model, tmp_path, load_through, kind):
    canary = tmp_path / "canary"
    folder = write_released(tmp_path / "released", weights_of(model))
    pickled(kind, weights_of(model), Payload(canary), folder / "pytorch_model.bin")
    for path in ("AutoModel", "AutoModelForCausalLM"):
        with pytest.raises(ValueError, match="a pickled file holds more than tensors"):
            load_through(path, folder)
    with pytest.raises(ConfigError, match="the weights cannot be loaded"):
        load_through("load_model", folder)
    assert load_through("generate", folder) == EXIT_USAGE
    assert load_through("evaluate", folder) == EXIT_USAGE
    assert load_through("convert", folder) == EXIT_CHECKPOINT
    assert not canary.exists()
    torch.load(folder / "pytorch_model.bin", weights_only=False) if kind != "no torch file" else pickle.loads(
        (folder / "pytorch_model.bin").read_bytes()
    )
    assert canary.exists(), "the payload is harmless, so this test proves nothing"


@pytest.mark.parametrize("path", PATHS)
def test_planted_code_is_not_run(model, tmp_path, load_through, path):
    folder = write_released(tmp_path / "released", weights_of(model))
    canary = tmp_path / "canary"
    generation = json.loads((folder / "generation_config.json").read_text())
    generation["custom_generate"] = str(folder)
    (folder / "generation_config.json").write_text(json.dumps(generation))
    code = load_through(path, folder)
    # Shards of another tokenizer are refused only after the model has been loaded.
    assert code == (65 if path == "evaluate" else 0)
    assert not canary.exists()
    for planted in PLANTED:
        runpy.run_path(str(folder / planted))
        assert canary.exists(), "the planted code is harmless, so this test proves nothing"
        canary.unlink()


@pytest.mark.parametrize("path", PATHS)
def test_a_malicious_config_runs_nothing(model, tmp_path, load_through, path):
    keys = ["_attn_implementation_internal", "attn_implementation", "transformers_weights", "custom_pipelines"]
    elsewhere = {name: f"someone/model--{place}" for name, place in AUTO_MAP.items()}
    folder = write_released(
        tmp_path / "released",
        weights_of(model),
        auto_map=elsewhere,
        trust_remote_code=True,
        **dict.fromkeys(keys, str(tmp_path / "released")),
    )
    if path == "AutoTokenizer":
        load_through(path, folder)
    elif path in ("generate", "evaluate", "convert"):
        assert load_through(path, folder) == EXIT_USAGE
    else:
        with pytest.raises(ValueError, match=r"config.json: .*_attn_implementation_internal"):
            load_through(path, folder)
    assert not (tmp_path / "canary").exists()


ESCAPES = ["cycler.__init__.__globals__.os.mkdir({!r})", "().__class__.__mro__[1].__subclasses__()"]


@pytest.mark.parametrize("expression", ESCAPES)
def test_a_malicious_chat_template_runs_nothing(model, tmp_path, expression):
    folder = write_released(tmp_path / "released", weights_of(model))
    template = "{{ " + expression.format(str(tmp_path / "canary")) + " }}"
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == template
    with pytest.raises(SecurityError):
        tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], tokenize=False)
    assert not (tmp_path / "canary").exists()
    jinja2.Template(template).render(x=1)
    assert (tmp_path / "canary").exists() == ("mkdir" in expression)


def test_a_malicious_adapter_runs_nothing(tmp_path):
    peft = pytest.importorskip("peft")
    model = released_model()
    folder = write_released(tmp_path / "released", weights_of(model))
    adapter = {"peft_type": "LORA", "base_model_name_or_path": str(folder), "target_modules": ["l1"], "r": 2}
    (folder / "adapter_config.json").write_text(json.dumps(adapter))
    torch.save({"payload": Payload(tmp_path / "canary")}, folder / "adapter_model.bin")
    with pytest.raises(OSError, match=r"adapter_model.safetensors"):
        AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(pickle.UnpicklingError):
        peft.PeftModel.from_pretrained(model, folder)
    assert not (tmp_path / "canary").exists()

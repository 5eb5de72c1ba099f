"""`tnl convert`: what it writes is bit for bit what it read, and what it cannot convert it names and leaves alone."""

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from tests.released_layout import VOCAB, Payload, released_config, released_model, write_released
from tests.tiny_model import random_ids
from tnl import errors
from tnl.files import sha256_of
from tnl.model import weight_files
from tnl.tools.convert import convert

ROOT = Path(__file__).resolve().parents[1]
HEAD, EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"
LAYER = "model.layers.0.channel_mixer.l1.weight"


@pytest.fixture(scope="module")
def model():
    return released_model()


@pytest.fixture
def released(model, tmp_path):
    return write_released(tmp_path / "released", model.state_dict())


def bits(weights: dict[str, torch.Tensor]) -> dict[str, list[int]]:
    return {name: tensor.contiguous().flatten().view(torch.uint8).tolist() for name, tensor in weights.items()}


def without_head(model) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if name != HEAD}


def metaseq_names(model) -> dict[str, torch.Tensor]:
    renamed = {name.replace("model.", "decoder.", 1): tensor for name, tensor in model.state_dict().items()}
    renamed["decoder.output_projection.weight"] = renamed.pop(HEAD)
    return renamed | {"decoder.version": torch.tensor([3.0])}


# What is written


@pytest.mark.parametrize("num_shards", [1, 3])
def test_pickles_become_safetensors(model, tmp_path, tnl_command, num_shards):
    source = write_released(tmp_path / "released", model.state_dict(), num_shards)
    (source / "LICENSE").write_text("terms")
    destination = tmp_path / "safe"
    code, out, err = tnl_command("convert", source, destination)
    assert (code, out, err) == (0, f"wrote {destination}: every tensor verified\n", "")
    assert bits(load_file(destination / "model.safetensors")) == bits(without_head(model))
    loaded, ids = AutoModelForCausalLM.from_pretrained(destination), random_ids(1, 9, vocab=VOCAB)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert {file.suffix for file in destination.iterdir()} == {".safetensors", ".json", ".model", ".md", ""}
    config = json.loads((destination / "config.json").read_text())
    assert (config["dtype"], config["architectures"]) == ("bfloat16", ["TransnormerForCausalLM"])
    assert "auto_map" not in (destination / "config.json").read_text()
    assert "auto_map" not in (destination / "tokenizer_config.json").read_text()
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (source, destination)]
    assert tokenizers[0]("def f(x):\n    12")["input_ids"] == tokenizers[1]("def f(x):\n    12")["input_ids"]
    assert sha256_of(source / "tokenizer.model") == sha256_of(destination / "tokenizer.model")
    assert GenerationConfig.from_pretrained(destination).eos_token_id == 2
    assert (destination / "LICENSE").read_text() == "terms"
    assert {file.stat().st_mode & 0o777 for file in destination.iterdir()} == {0o644}
    assert not (tmp_path / "canary").exists()


def test_the_model_card_says_what_it_is(model, released, tmp_path):
    card = (convert(released, tmp_path / "safe") / "README.md").read_text()
    assert f"| parameters | {model.num_parameters():,} (bfloat16;" in card
    assert "`released`" in card
    assert str(tmp_path) not in card
    hashes = dict(re.findall(r"^\| (\S+) \| `([0-9a-f]{64})` \|$", card, flags=re.MULTILINE))
    assert {"model.safetensors", "config.json", "tokenizer.model"} <= hashes.keys()
    assert hashes == {name: sha256_of(tmp_path / "safe" / name) for name in hashes}
    (program,) = re.findall(r"^```python\n(.*?)^```$", card, flags=re.MULTILINE | re.DOTALL)
    compile(program, "card", "exec")
    assert 'from_pretrained("safe")' in program


def test_back_to_pickles_in_the_released_layout(model, released, tmp_path, tnl_command):
    safe = convert(released, tmp_path / "safe")
    assert tnl_command("convert", safe, tmp_path / "back", "--to", "pickle")[0] == 0
    weights = torch.load(tmp_path / "back/pytorch_model.bin", weights_only=True)
    assert bits(weights) == bits(model.state_dict())
    assert weights[HEAD].data_ptr() == weights[EMBEDDINGS].data_ptr()
    assert not list((tmp_path / "back").glob("*.safetensors"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert bits(loaded.state_dict()) == bits(model.state_dict())


@pytest.mark.parametrize("to", ["safetensors", "pickle"])
def test_a_large_model_is_split(model, released, tmp_path, to):
    folder = convert(released, tmp_path / "split", to=to, max_shard_size="20KB")
    stem, suffix = ("model", "safetensors") if to == "safetensors" else ("pytorch_model", "bin")
    shards = sorted(folder.glob(f"{stem}-*-of-*.{suffix}"))
    assert len(shards) > 1
    index = json.loads((folder / f"{stem}.{suffix}.index.json").read_text())
    assert index["weight_map"].keys() == (model.state_dict() if to == "pickle" else without_head(model)).keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in without_head(model).values())
    assert bits(AutoModelForCausalLM.from_pretrained(folder).state_dict()) == bits(model.state_dict())


def test_an_untied_head_is_kept(tmp_path):
    model = released_model(tie_word_embeddings=False)
    source = write_released(tmp_path / "released", model.state_dict(), tie_word_embeddings=False)
    assert bits(load_file(convert(source, tmp_path / "safe") / "model.safetensors")) == bits(model.state_dict())


def test_a_separate_head_in_the_memory_of_the_embeddings_is_written_out(model, tmp_path):
    source = write_released(tmp_path / "released", model.state_dict(), tie_word_embeddings=False)
    assert bits(load_file(convert(source, tmp_path / "safe") / "model.safetensors")) == bits(model.state_dict())


def test_no_key_for_code_stays_beside_the_weights(released, tmp_path):
    AutoTokenizer.from_pretrained(released).save_pretrained(released)
    edit_json(
        released / "tokenizer_config.json",
        tokenizer_class="PreTrainedTokenizerFast",
        auto_map={"AutoTokenizer": ["x.X", None]},
    )
    edit_json(released / "generation_config.json", custom_generate="x", auto_map={"a": "x"}, trust_remote_code=True)
    safe = convert(released, tmp_path / "safe")
    assert "auto_map" not in json.loads((safe / "tokenizer_config.json").read_text())
    assert json.loads((safe / "generation_config.json").read_text()).keys() == {
        *("bos_token_id", "eos_token_id", "pad_token_id"),
        *("_from_model_config", "transformers_version"),
    }


def test_generation_settings_that_transformers_would_not_write_are_kept(released, tmp_path):
    edit_json(released / "generation_config.json", do_sample=False, temperature=0.7)
    safe = convert(released, tmp_path / "safe")
    assert GenerationConfig.from_pretrained(safe).temperature == 0.7


def test_further_chat_templates_can_be_read(released, tmp_path):
    templates = [{"name": name, "template": name} for name in ("default", "tool_use")]
    edit_json(released / "tokenizer_config.json", chat_template=templates)
    safe = convert(released, tmp_path / "safe")
    assert (safe / "additional_chat_templates").stat().st_mode & 0o777 == 0o755
    assert AutoTokenizer.from_pretrained(safe).chat_template == {name["name"]: name["name"] for name in templates}


def test_of_licences_only_files_of_the_folder_are_copied(released, tmp_path):
    (tmp_path / "outside").write_text("private")
    (released / "LICENSE").symlink_to(tmp_path / "outside")
    (released / "LICENSES").mkdir()
    (released / "LICENSE.txt").write_text("terms")
    safe = convert(released, tmp_path / "safe")
    assert [file.name for file in safe.glob("LICENSE*")] == ["LICENSE.txt"]


@pytest.mark.parametrize("values", [{}, {"gate_dim": 5}], ids=["TNL", "TNL3"])
def test_parameters_of_mixed_dtypes_stay_as_they_are(tmp_path, values):
    model = released_model(**values)
    weights = {name: torch.nn.Parameter(tensor) for name, tensor in without_head(model).items()}
    theta = "model.layers.0.token_mixer.lrpe.theta"
    weights[theta] = torch.nn.Parameter(weights[theta].float() * 1.001)
    source = write_released(tmp_path / "released", weights, torch_dtype=None, **values)
    written = load_file(convert(source, tmp_path / "safe") / "model.safetensors")
    assert bits(written) == bits({name: tensor.detach() for name, tensor in weights.items()})
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "safe").dtype == torch.bfloat16
    assert "(bfloat16 and float32;" in (tmp_path / "safe/README.md").read_text()


@pytest.mark.parametrize("wrapped", [False, True])
def test_names_of_metaseq_are_read(model, tmp_path, tnl_command, wrapped):
    weights = metaseq_names(model)
    file, config = tmp_path / "checkpoint_last.pt", tmp_path / "config.json"
    extra = {"cfg": {"model": {"arch": "tnl"}}, "args": argparse.Namespace(lr=0.1), "extra_state": {"epoch": 1}}
    torch.save({"model": weights, **extra} if wrapped else weights, file)
    config.write_text(json.dumps(released_config()))
    assert tnl_command("convert", file, tmp_path / "safe", "--config", config)[0] == 0
    assert bits(load_file(tmp_path / "safe/model.safetensors")) == bits(without_head(model))


# What is refused


def change(folder: Path, edit) -> None:
    """Edit the weights of a checkpoint."""
    weights = {name: tensor.clone() for name, tensor in torch.load(folder / "pytorch_model.bin").items()}
    edit(weights)
    torch.save(weights, folder / "pytorch_model.bin")


def edit_json(file: Path, **values) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-3000])


def no_weights(folder: Path) -> None:
    (folder / "pytorch_model.bin").unlink()


def outside_index(folder: Path) -> None:
    (folder / "pytorch_model.bin").rename(folder.parent / "outside.bin")
    content = {"metadata": {}, "weight_map": {EMBEDDINGS: "../outside.bin"}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(content))


def absent_shard(folder: Path) -> None:
    no_weights(folder)
    content = {"metadata": {}, "weight_map": {EMBEDDINGS: "pytorch_model-00001-of-00001.bin"}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(content))


def edited_config(**values):
    return lambda folder: (folder / "config.json").write_text(json.dumps(released_config(**values)))


REFUSED = {
    "missing": (lambda f: change(f, lambda w: w.pop(LAYER)), 77, f"missing: {LAYER}"),
    "extra": (lambda f: change(f, lambda w: w.update(gate=torch.ones(2).bfloat16())), 77, "not of this model: gate"),
    "shape": (lambda f: change(f, lambda w: w.update({LAYER: w[LAYER].T})), 77, f"{LAYER} [32, 48] for [48, 32]"),
    "nan": (lambda f: change(f, lambda w: w[LAYER].fill_(torch.nan)), 77, f"not finite: {LAYER}"),
    "head": (lambda f: change(f, lambda w: w[HEAD].add_(1)), 77, f"not equal to the embeddings: {HEAD}"),
    "cut": (lambda f: cut(f / "pytorch_model.bin"), 77, "pytorch_model.bin: damaged"),
    "no pickle": (lambda f: (f / "pytorch_model.bin").write_text("hello"), 77, "or no file of weights"),
    "empty": (lambda f: (f / "pytorch_model.bin").write_text(""), 77, "pytorch_model.bin: damaged"),
    "a list": (lambda f: torch.save([torch.ones(2)], f / "pytorch_model.bin"), 77, "no state dict"),
    "sparse": (lambda f: change(f, lambda w: w.update({LAYER: w[LAYER].to_sparse()})), 77, "no state dict"),
    "no values": (lambda f: change(f, lambda w: w.update({LAYER: w[LAYER].to("meta")})), 77, "no state dict"),
    "a number as name": (lambda f: change(f, lambda w: w.update({1: torch.ones(2)})), 77, "no state dict"),
    "integers": (lambda f: change(f, lambda w: w.update({LAYER: w[LAYER].int()})), 77, "floating-point numbers: "),
    "bad safetensors": (lambda f: (f / "model.safetensors").write_text("hello"), 77, "model.safetensors: damaged"),
    "no weights": (no_weights, 2, "no files of weights"),
    "outside": (outside_index, 77, "outside its folder"),
    "absent shard": (absent_shard, 77, "pytorch_model-00001-of-00001.bin, not there"),
    "no config": (lambda f: (f / "config.json").unlink(), 2, "--config"),
    "unknown key": (edited_config(glu_dims=3), 2, "config.json: glu_dims: unknown key, did you mean glu_dim?"),
    "wrong value": (edited_config(decoder_layers=0), 2, "decoder_layers: 0 must be"),
    "no list": (edited_config(linear_use_lrpe_list=1), 2, "config.json: "),
    "dtype of config": (edited_config(torch_dtype="load"), 2, "dtype: 'load' is unknown"),
    "malformed config": (lambda f: (f / "config.json").write_text("{"), 2, "config.json: "),
    "quantised": (edited_config(quantization_config={"quant_method": "torchao"}), 2, "quantization_config"),
    "tokenizer": (lambda f: (f / "tokenizer.model").write_text("hello"), 65, "released: "),
    "generation": (lambda f: (f / "generation_config.json").write_text("{"), 65, "generation_config.json"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_wrong_is_named_and_nothing_is_left(name, released, tmp_path, tnl_command):
    spoil, exit_code, message = REFUSED[name]
    spoil(released)
    code, out, err = tnl_command("convert", released, tmp_path / "safe")
    assert (code, out) == (exit_code, "")
    assert err.startswith(f"error: {released}")
    assert message in err
    assert err.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} <= {"released", "outside.bin"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["released", "released"], "released: exists already"),
        (["nothing", "safe"], "nothing: no such file or folder"),
        (["released", "safe", "--max-shard-size", "0"], "--max-shard-size: '0' is no size"),
        (["released", "safe", "--max-shard-size", "100B"], "--max-shard-size: '100B' is no size"),
        (["released", "safe", "--to", "onnx"], "'onnx' is not one of"),
    ],
)
def test_usage(arguments, message, released, tmp_path, tnl_command, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = tnl_command("convert", *arguments)
    assert code == errors.EXIT_USAGE
    assert message in err
    assert [path.name for path in tmp_path.iterdir()] == ["released"]


def test_code_beside_the_weights_of_metaseq_is_not_run(model, tmp_path, tnl_command):
    torch.save({"model": metaseq_names(model), "cfg": Payload(tmp_path / "canary")}, tmp_path / "last.pt")
    (tmp_path / "config.json").write_text(json.dumps(released_config()))
    code, _, err = tnl_command("convert", tmp_path / "last.pt", tmp_path / "safe")
    assert code == errors.EXIT_CHECKPOINT
    assert "holds more than tensors" in err
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("to", ["safetensors", "pickle"])
def test_a_single_wrong_bit_is_found(released, tmp_path, tnl_command, monkeypatch, to):
    save = weight_files.write_safetensors if to == "safetensors" else weight_files.write_pickle

    def damage(*arguments):
        save(*arguments)
        (file,) = [*arguments[-2].glob("*.safetensors"), *arguments[-2].glob("*.bin")]
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)

    monkeypatch.setattr(f"tnl.tools.convert.{save.__name__}", damage)
    code, _, err = tnl_command("convert", released, tmp_path / "converted", "--to", to)
    assert code == errors.EXIT_CHECKPOINT
    assert "what was written differs: model." in err
    assert not (tmp_path / "converted").exists()


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from tnl.errors import CannotWriteError
from tnl.tools.convert import convert

source, destination = map(Path, sys.argv[1:])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
for to in ("safetensors", "pickle"):
    try:
        convert(source, destination, to=to)
    except CannotWriteError as error:
        print(error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files")
def test_a_full_disk_is_reported_and_nothing_is_left(released, tmp_path):
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, released, tmp_path / "converted"],
        capture_output=True,
        text=True,
        timeout=120,
        # The limit would cut the bytecode of what is imported under it.
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("free some space") == 2
    assert [path.name for path in tmp_path.iterdir()] == ["released"]

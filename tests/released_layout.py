"""Tiny checkpoints in the layout of the released models: pickles, a config.json that names code, and that code."""

import json
from pathlib import Path

import torch

from tests import tiny_tokenizers
from tests.tiny_model import tiny_model
from tnl.model import TransnormerForCausalLM

VOCAB = 400
AUTO_MAP = {
    "AutoConfig": "configuration_transnormer.TransnormerConfig",
    "AutoModel": "modeling_transnormer.TransnormerModel",
    "AutoModelForCausalLM": "modeling_transnormer.TransnormerForCausalLM",
}
PLANTED = [
    "configuration_transnormer.py",
    "modeling_transnormer.py",
    "tokenization_baichuan.py",
    "custom_generate/generate.py",
]


class Payload:
    """Creates ``canary`` when it is unpickled by a loader that runs what it is told."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self):
        return (Path.touch, (self.canary,))


def released_model(**values) -> TransnormerForCausalLM:
    """The model that `write_released` writes, in bf16."""
    return tiny_model(vocab_size=VOCAB, eos_token_id=2, **values).bfloat16()


def released_config(**changes) -> dict:
    """The content of config.json with all keys of the released files; None leaves a key out."""
    config = {
        "architectures": ["TransnormerForCausalLM"],
        "auto_map": AUTO_MAP,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "vocab_size": VOCAB,
        "use_cache": True,
        "init_std": 0.02,
        "decoder_embed_dim": 32,
        "decoder_layers": 2,
        "decoder_attention_heads": 4,
        "no_scale_embedding": True,
        "add_bos_token": False,
        "norm_type": "simplermsnorm",
        "linear_use_lrpe_list": [1, 0],
        "hidden_dim": 32,
        "linear_act_fun": "silu",
        "glu_dim": 48,
        "bias": False,
        "model_type": "transnormer",
        "torch_dtype": "bfloat16",
        "transformers_version": "4.31.0",
        "_name_or_path": "OpenNLPLab/TransNormerLLM-385M",
    }
    return {key: value for key, value in (config | changes).items() if value is not None}


def write_released(
    folder: Path, weights: dict[str, torch.Tensor], num_shards: int = 1, canary: Path | None = None, **config
) -> Path:
    """Write a checkpoint.

    Args:
        weights: as they shall stand in the pickles.
        canary: what the planted code would create; default ``canary`` beside the folder.
        config: changes of `released_config`.
    """
    tiny_tokenizers.released_tokenizer(folder, tiny_tokenizers.tiny_model())
    plant(folder, canary or folder.parent / "canary")
    (folder / "config.json").write_text(json.dumps(released_config(**config)), encoding="utf-8")
    generation = {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    (folder / "generation_config.json").write_text(json.dumps(generation), encoding="utf-8")
    if num_shards == 1:
        torch.save(weights, folder / "pytorch_model.bin")
        return folder
    names = [f"pytorch_model-{i + 1:05d}-of-{num_shards:05d}.bin" for i in range(num_shards)]
    for i, name in enumerate(names):
        torch.save(dict(list(weights.items())[i::num_shards]), folder / name)
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in weights.values())},
        "weight_map": {tensor: names[i % num_shards] for i, tensor in enumerate(weights)},
    }
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def plant(folder: Path, canary: Path) -> None:
    """Put code that creates ``canary`` wherever remote code may stand."""
    for name in PLANTED:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f"import pathlib\npathlib.Path({str(canary)!r}).touch()\n", encoding="utf-8")


def hub_cache(folder: Path, cache: Path, name: str) -> Path:
    """Move a model folder into a hub cache as the hub's client lays it out, links to blobs; returns the snapshot."""
    repository = cache / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / ("0" * 40)
    for part in (repository / "blobs", repository / "refs", snapshot):
        part.mkdir(parents=True)
    (repository / "refs/main").write_text("0" * 40)
    for i, file in enumerate(file for file in sorted(folder.iterdir()) if file.is_file()):
        file.rename(repository / "blobs" / str(i))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(i))
    return snapshot

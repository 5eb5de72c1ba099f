"""`tnl convert`: a checkpoint from pickles to safetensors or back, verified bit by bit."""

import re
import shutil
from pathlib import Path
from typing import Literal

import torch
from transformers import AutoTokenizer, GenerationConfig

from tnl.errors import CheckpointError, ConfigError, DataError
from tnl.files import new_folder, sha256_of
from tnl.model import TransnormerConfig, TransnormerForCausalLM
from tnl.model.loading import is_finite, stays_in_folder
from tnl.model.weight_files import read_weights, weight_files, write_pickle, write_safetensors

_SHARD_SIZE = re.compile(r"[1-9]\d*[KMGT]B", re.ASCII | re.IGNORECASE)
_TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json")


def convert(
    source: Path,
    destination: Path,
    *,
    to: Literal["safetensors", "pickle"] = "safetensors",
    max_shard_size: str = "5GB",
    config_file: Path | None = None,
) -> Path:
    """Write the model of ``source`` to a new folder: weights, config.json without keys that name code, tokenizer, and a
    README.md with what it is.

    The weights are memory-mapped and written shard by shard. Afterwards both sides are read anew, and every tensor
    compared bit by bit.

    Args:
        source: model folder, or a file of weights, also as metaseq saves them (``decoder.*``, wrapped or not).
        max_shard_size: such as ``5GB``; larger models are split.
        config_file: the config.json of the model; default that in the folder of the weights.

    Raises:
        ConfigError: no weights, no config.json or one that is not a TNL model's; ``destination`` exists.
        CheckpointError: a file is damaged or runs code, or the weights are not those of the configuration, or not
            finite.
        DataError: the tokenizer's files cannot be read.
        CannotWriteError: the destination cannot be written; nothing is left there.
    """
    if not _SHARD_SIZE.fullmatch(max_shard_size):
        raise ConfigError(f"--max-shard-size: {max_shard_size!r} is no size; give for example 5GB or 500MB")
    if not source.exists():
        raise ConfigError(f"{source}: no such file or folder; give a model folder or a file of weights")
    if destination.exists():
        raise ConfigError(f"{destination}: exists already; choose another folder or remove it")
    files = weight_files(source)
    folder = files[0].parent
    config = _read_config(config_file or folder / "config.json")
    weights, ties = _fit(read_weights(files), config, source)
    config.architectures = [TransnormerForCausalLM.__name__]
    if config.dtype is None:
        config.dtype = next(iter(weights.values())).dtype
    with new_folder(destination) as scratch:
        if to == "safetensors":
            write_safetensors(weights, scratch, max_shard_size)
        else:
            write_pickle(weights, ties, scratch, max_shard_size)
        _verify(source, scratch, ties)
        config.save_pretrained(scratch)
        _carry_over(folder, scratch)
        (scratch / "README.md").write_text(_card(folder, scratch, destination, config, weights), "utf-8")
    return destination


def _read_config(file: Path) -> TransnormerConfig:
    if not file.is_file():
        raise ConfigError(f"{file}: no such file; give the model's config.json with --config")
    try:
        config = TransnormerConfig.from_json_file(file)
    # The last two are what values of a wrong JSON type lead to.
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigError(str(error) if str(file) in str(error) else f"{file}: {error}") from None
    if hasattr(config, "quantization_config"):
        raise ConfigError(f"{file}: quantization_config: convert the weights from which this model was made")
    return config


def _fit(
    tensors: dict[str, torch.Tensor], config: TransnormerConfig, source: Path
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors to write, tied ones once, in the order of the model; and {tied name: name}."""
    with torch.device("meta"):
        model = TransnormerForCausalLM(config)
    ties = dict(model.all_tied_weights_keys)
    shapes = {name: parameter.shape for name, parameter in model.state_dict().items() if name not in ties}
    expected = {*shapes, *ties}
    problems = {
        "missing": shapes.keys() - tensors.keys(),
        "not of this model": tensors.keys() - expected,
        "of another shape": {
            f"{name} {list(tensors[name].shape)} for {list(shape)}"
            for name, shape in shapes.items()
            if name in tensors and tensors[name].shape != shape
        },
        "tied by tie_word_embeddings, but not equal to the embeddings": {
            alias
            for alias, name in ties.items()
            if alias in tensors and name in tensors and not _same_bits(tensors[alias], tensors[name])
        },
        "not of floating-point numbers": {
            name for name, tensor in tensors.items() if name in expected and not tensor.is_floating_point()
        },
        "not finite": {name for name, tensor in tensors.items() if name in expected and not is_finite(tensor)},
    }
    found = [f"{kind}: {', '.join(sorted(names))}" for kind, names in problems.items() if names]
    if found:
        raise CheckpointError(f"{source}: weights do not fit the configuration; {'; '.join(found)}")
    return {name: tensors[name] for name in shapes}, ties


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(*(tensor.contiguous().flatten().view(torch.uint8) for tensor in (one, other)))


def _verify(source: Path, written: Path, ties: dict[str, str]) -> None:
    """Read both sides anew and compare every tensor.

    Raises:
        CheckpointError: a tensor differs.
    """
    before, after = read_weights(weight_files(source)), read_weights(weight_files(written))
    names = (before.keys() | after.keys()) - ties.keys()
    pairs = {name: (name, name) for name in names} | {
        alias: (alias if alias in before else name, alias) for alias, name in ties.items() if alias in after
    }
    wrong = [
        name
        for name, (old, new) in pairs.items()
        if old not in before or new not in after or not _same_bits(before[old], after[new])
    ]
    if wrong:
        raise CheckpointError(
            f"{source}: read again, what was written differs: {', '.join(sorted(wrong))}; check disk and memory of "
            "this machine"
        )


def _carry_over(source: Path, destination: Path) -> None:
    """Tokenizer and generation settings, read and written anew, so that no key for remote code stays; the licence."""
    tokenizer = generation = None
    try:
        if any((source / name).is_file() for name in _TOKENIZER_FILES):
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        if (source / "generation_config.json").is_file():
            generation = GenerationConfig.from_pretrained(source)
    # The libraries raise several types, plain Exception among them, for a file that they cannot read.
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(f"{source}: {reason}; correct the file, or convert without it") from None
    if tokenizer is not None:
        tokenizer.init_kwargs.pop("auto_map", None)
        tokenizer.save_pretrained(destination)
    if generation is not None:
        for key in vars(generation).keys() - vars(GenerationConfig()).keys():
            delattr(generation, key)
        # `save_pretrained` would refuse settings of sampling beside greedy search, which models have.
        generation.to_json_file(destination / "generation_config.json")
    # A link may lead to what its reader would not give away.
    for file in (file for file in source.glob("LICENSE*") if file.is_file() and stays_in_folder(file, source)):
        shutil.copyfile(file, destination / file.name)


def _card(
    source: Path, folder: Path, destination: Path, config: TransnormerConfig, weights: dict[str, torch.Tensor]
) -> str:
    """The text of README.md."""
    num_parameters = sum(tensor.numel() for tensor in weights.values())
    dtype = " and ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in weights.values()}))
    files = sorted(file for file in folder.iterdir() if file.suffix in (".safetensors", ".bin", ".json", ".model"))
    hashes = "\n".join(f"| {file.name} | `{sha256_of(file)}` |" for file in files)
    tokenizer = any((folder / name).is_file() for name in _TOKENIZER_FILES)
    load_tokenizer = f'tokenizer = AutoTokenizer.from_pretrained("{destination.name}")\n' if tokenizer else ""
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [transnormer, linear-attention]
---

# {destination.name}

A TransNormerLLM language model (lightning attention: linear attention with a fixed decay). `tnl convert` wrote it from
`{source.resolve().name}` and compared every tensor with the original bit by bit.

| | |
|---|---|
| parameters | {num_parameters:,} ({dtype}; tied weights counted once) |
| layers, width, heads | {config.decoder_layers}, {config.decoder_embed_dim}, {config.decoder_attention_heads} |
| width of the gated linear unit | {config.glu_dim} |
| vocabulary | {config.vocab_size} |

No code of this folder is needed or run:

```python
import tnl
from transformers import AutoModelForCausalLM{", AutoTokenizer" if tokenizer else ""}

model = AutoModelForCausalLM.from_pretrained("{destination.name}")
{load_tokenizer}```

| file | SHA-256 |
|---|---|
{hashes}
"""

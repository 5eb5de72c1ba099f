"""The tensors of a checkpoint, whatever its files are called, memory-mapped; and writing them as one or more files."""

import argparse
import json
import pickle
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import load_file, save_file

from tnl.errors import CannotWriteError, CheckpointError, ConfigError
from tnl.model.loading import indexed_shards

# What metaseq, in which the models were trained, calls them. Its other buffers hold no weights.
_METASEQ_NAMES = {"decoder.output_projection.weight": "lm_head.weight"}
_METASEQ_BUFFERS = ("decoder.version", "decoder.embed_positions._float_tensor")


def weight_files(source: Path) -> list[Path]:
    """The files that hold the weights of a model folder: safetensors before pickles, then a single ``.pt``.

    Raises:
        ConfigError: there are none, or more than one ``.pt``.
        CheckpointError: the index of the shards is malformed, or names a file that is not there, or outside the folder.
    """
    if source.is_file():
        return [source]
    for stem in ("model.safetensors", "pytorch_model.bin"):
        if (source / stem).is_file():
            return [source / stem]
        index = source / f"{stem}.index.json"
        if index.is_file():
            try:
                shards = indexed_shards(index)
            except ValueError as error:
                raise CheckpointError(str(error)) from None
            absent = [shard.name for shard in shards if not shard.is_file()]
            if absent:
                raise CheckpointError(f"{index}: names {', '.join(absent)}, not there; download the model again")
            return shards
    others = sorted(source.glob("*.pt"))
    if len(others) != 1:
        raise ConfigError(
            f"{source}: {len(others) or 'no'} files of weights (model.safetensors, pytorch_model.bin, or one .pt "
            "expected); give a model folder, or the file itself"
        )
    return others


def read_weights(files: list[Path]) -> dict[str, torch.Tensor]:
    """All tensors, under the names of the released models; nothing is read from the disk before it is used, except
    from pickles that torch wrote before version 1.6.

    Raises:
        CheckpointError: a file is damaged, or holds more than tensors, or a tensor is there twice.
    """
    tensors = {}
    for file in files:
        for name, tensor in _read_file(file).items():
            if name in _METASEQ_BUFFERS:
                continue
            if name.startswith("decoder."):
                name = _METASEQ_NAMES.get(name, f"model.{name.removeprefix('decoder.')}")
            if name in tensors:
                raise CheckpointError(f"{file}: {name} is also in another file; download the model again")
            tensors[name] = tensor.detach()
    return tensors


def _read_file(file: Path) -> dict[str, torch.Tensor]:
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        # metaseq puts the arguments of its command line beside the weights, in this class without behaviour.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=_is_archive(file))
    except pickle.UnpicklingError:
        raise CheckpointError(
            f"{file}: holds more than tensors, which unpickling would run as code, so nothing of it was loaded; get "
            "the model from its authors, as safetensors if they have it"
        ) from None
    except (PermissionError, MemoryError):
        raise
    # Of a damaged file the reader says KeyError, RuntimeError, OSError and more.
    except Exception as error:
        reason = " ".join([type(error).__name__, *str(error).splitlines()[:1]])[:200]
        raise CheckpointError(f"{file}: damaged, or no file of weights ({reason}); download it again") from None
    if isinstance(content, dict) and isinstance(content.get("model"), dict):
        content = content["model"]
    if not isinstance(content, dict) or not all(map(_is_weight, content.keys(), content.values())):
        raise CheckpointError(f"{file}: no state dict, names with tensors expected; give the weights of a model")
    return content


def _is_weight(name, value) -> bool:
    """Whether it is a name with a tensor that has its values in memory, one for each index."""
    plain = isinstance(value, torch.Tensor) and value.layout == torch.strided and value.device.type == "cpu"
    return isinstance(name, str) and plain and not value.is_quantized


def _is_archive(file: Path) -> bool:
    """Whether torch wrote it since version 1.6; only such a file can be memory-mapped."""
    with open(file, "rb") as content:
        return content.read(4) == b"PK\x03\x04"


def write_safetensors(tensors: dict[str, torch.Tensor], folder: Path, max_shard_size: str) -> None:
    """``model.safetensors``, or shards with their index."""

    def save(part: dict[str, torch.Tensor], file: Path) -> None:
        # safetensors refuses tensors that share memory, such as a separate head that is equal to the embeddings.
        owners = Counter(tensor.data_ptr() for tensor in part.values())
        ready = {
            name: tensor.clone(memory_format=torch.contiguous_format)
            if owners[tensor.data_ptr()] > 1
            else tensor.contiguous()
            for name, tensor in part.items()
        }
        save_file(ready, file, metadata={"format": "pt"})

    _write(tensors, {}, folder, "model", "safetensors", max_shard_size, save)


def write_pickle(tensors: dict[str, torch.Tensor], ties: dict[str, str], folder: Path, max_shard_size: str) -> None:
    """``pytorch_model.bin``, or shards with their index, as the released models have it.

    Args:
        ties: further names of some tensors, {name: name in ``tensors``}; torch stores such a tensor once.
    """

    def save(part: dict[str, torch.Tensor], file: Path) -> None:
        try:
            torch.save(part, file)
        # What torch says when the disk is full is no OSError.
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise CannotWriteError(f"{file}: {reason}; free some space or choose another folder") from None

    _write(tensors, ties, folder, "pytorch_model", "bin", max_shard_size, save)


def _write(
    tensors: dict[str, torch.Tensor],
    ties: dict[str, str],
    folder: Path,
    stem: str,
    suffix: str,
    max_shard_size: str,
    save: Callable[[dict[str, torch.Tensor], Path], None],
) -> None:
    split = split_torch_state_dict_into_shards(
        tensors, filename_pattern=f"{stem}{{suffix}}.{suffix}", max_shard_size=max_shard_size
    )
    weight_map = {}
    for file, names in split.filename_to_tensors.items():
        part = {name: tensors[name] for name in names}
        part |= {alias: part[name] for alias, name in ties.items() if name in part}
        save(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": dict(sorted(weight_map.items()))}
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

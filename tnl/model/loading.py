"""Checks of what a checkpoint folder holds: keys of its config.json, files that its index names, loaded weights."""

import json
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import GenerationConfig

from tnl.errors import did_you_mean

INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")

# Taken from every config.json besides the fields of the class.
_TRANSFORMERS_KEYS = {"model_type", "torch_dtype", "quantization_config", "output_attentions", "num_labels"}
# Without effect on a TNL model, in released files or in those that older transformers wrote. `auto_map` names the code
# of a checkpoint, which the classes here stand in for.
_DROPPED_KEYS = {
    *("auto_map", "add_bos_token", "linear_use_lrpe"),
    *("name_or_path", "_name_or_path", "_commit_hash", "_attn_implementation_autoset"),
    *("torchscript", "pruned_heads", "use_bfloat16", "tf_legacy_loss", "finetuning_task", "task_specific_params"),
    *("is_decoder", "add_cross_attention", "cross_attention_hidden_size", "tie_encoder_decoder"),
    *("decoder_start_token_id", "sep_token_id", "prefix", "tokenizer_class"),
}
# By these, or by names with an underscore in front, transformers chooses code or files to load.
_CODE_KEYS = {
    *("attn_implementation", "experts_implementation", "trust_remote_code", "custom_pipelines", "custom_generate"),
    *("use_kernels", "kernel_config", "fusion_config", "transformers_weights", "configuration_files"),
}


def screened_config(values: dict, fields: Iterable[str], file: str) -> dict:
    """The content of a config.json without keys that are known and have no effect.

    Args:
        fields: names that the configuration class knows.
        file: its name, for the error.

    Raises:
        ValueError: a key that would choose code to run, or one that nobody knows.
    """
    generation = {key for key in GenerationConfig().to_dict() if not key.startswith("_")}
    known = {*fields, *_TRANSFORMERS_KEYS}
    kept = {key: value for key, value in values.items() if key in known}
    others = values.keys() - known - _DROPPED_KEYS - generation
    code = sorted(key for key in others if key in _CODE_KEYS or key.startswith("_"))
    if code:
        raise ValueError(f"{file}: {', '.join(code)}: would choose code or files to load; delete it from the file")
    if others:
        cures = [f"{key}: unknown key, {did_you_mean(key, sorted(fields))}" for key in sorted(others)]
        raise ValueError(f"{file}: {'; '.join(cures)}; correct it, or delete it if the model does not need it")
    return kept


def check_index_files(
    name: str, subfolder: str = "", cache_dir=None, revision: str | None = None, variant: str | None = None
) -> None:
    """Refuse an index that names shards outside its folder.

    Args:
        name: model folder, or hub name, whose index is looked at when it is in the cache; the hub's own client refuses
            such names when it downloads.
        variant: between the name and the end of the files, such as ``fp16``.

    Raises:
        ValueError: an index file is malformed, or names a shard outside its folder.
    """
    for index_file in INDEX_FILES:
        if variant is not None:
            index_file = f"{index_file.removesuffix('json')}{variant}.json"
        if Path(name).is_dir():
            file = Path(name, subfolder, index_file)
        else:
            relative = str(PurePosixPath(subfolder, index_file))
            try:
                cached = try_to_load_from_cache(name, relative, cache_dir=cache_dir, revision=revision)
            except HFValidationError:
                return  # neither a folder nor a hub name, which transformers will say
            file = Path(cached) if isinstance(cached, str) else None
        if file is not None and file.is_file():
            indexed_shards(file)


def indexed_shards(index_file: Path) -> list[Path]:
    """The shards that an index names, each once, in order.

    Raises:
        ValueError: see `check_index_files`.
    """
    try:
        shards = sorted(set(json.loads(index_file.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{index_file}: not an index of shards; download it again") from None
    found = []
    for shard in shards:
        pure = PurePosixPath(shard) if isinstance(shard, str) else PurePosixPath("/")
        file = index_file.parent / pure
        if pure.is_absolute() or ".." in pure.parts or not stays_in_folder(file, index_file.parent):
            raise ValueError(
                f"{index_file}: names {shard!r}, which is outside its folder; such a checkpoint is refused"
            )
        found.append(file)
    return found


def stays_in_folder(file: Path, folder: Path) -> bool:
    """Whether ``file``, whose links are followed, lies in the model folder ``folder``."""
    folder = folder.absolute()
    roots = [folder.resolve()]
    # The hub's cache keeps the content of all revisions in one folder beside them, and links to it.
    roots += [parent.parent.resolve() / "blobs" for parent in folder.parents if parent.name == "snapshots"]
    return any(file.resolve().is_relative_to(root) for root in roots)


def weight_problems(model, info: dict, allow_other_shapes: bool) -> list[str]:
    """What is wrong with the weights of a model that transformers has just loaded.

    Args:
        info: its loading info.
        allow_other_shapes: the caller wants parameters of another shape left out.
    """
    problems = [
        f"{kind}: {', '.join(sorted(info[key]))}"
        for kind, key in (("missing", "missing_keys"), ("not of this model", "unexpected_keys"))
        if info[key]
    ]
    if info["mismatched_keys"] and not allow_other_shapes:
        shapes = [f"{name} {list(there)} for {list(here)}" for name, there, here in sorted(info["mismatched_keys"])]
        problems.append(f"of another shape: {', '.join(shapes)}")
    # transformers does not tie two weights of a checkpoint that differ.
    untied = model.get_expanded_tied_weights_keys(all_submodels=True).keys() - model.all_tied_weights_keys.keys()
    if untied:
        problems.append(f"tied by tie_word_embeddings, but not equal to the embeddings: {', '.join(sorted(untied))}")
    not_finite = [name for name, parameter in model.named_parameters() if not is_finite(parameter.detach())]
    if not_finite:
        problems.append(f"not finite: {', '.join(not_finite)}")
    return problems


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no value is infinite or NaN. Of tensors without values here (offloaded, partitioned) and of quantised
    ones nothing is known."""
    known = tensor.is_floating_point() and tensor.element_size() > 1 and tensor.numel() > 0
    if not known or tensor.is_meta or is_traceable_wrapper_subclass(tensor):
        return True
    # In one pass without a copy, which isfinite would make; NaN is the least and the greatest of what holds it.
    least, greatest = torch.aminmax(tensor)
    return bool(torch.isfinite(least) & torch.isfinite(greatest))

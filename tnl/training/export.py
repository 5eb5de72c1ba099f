"""From a run's checkpoint to a transformers folder: safetensors, config, tokenizer. No pickle leaves the run folder."""

import os
import shutil
import tempfile
from pathlib import Path

import torch

from tnl.errors import CheckpointError, ConfigError
from tnl.files import new_folder, sha256_of
from tnl.training.commit import MANIFEST, CheckpointStore
from tnl.training.run_folder import CHECKPOINTS, CONFIG, TOKENIZER, load_run_settings
from tnl.training.settings import PretrainSettings

EXPORTS = "exports"


def is_run_folder(path: Path) -> bool:
    """Whether ``path`` is the output folder of a training run."""
    return (path / CONFIG).is_file() and (path / CHECKPOINTS).is_dir()


def export_run(run: Path, destination: Path, step: int | None = None, warn=print) -> Path:
    """Write the fp32 weights of a checkpoint, the model's config and the tokenizer to ``destination``.

    Args:
        step: which checkpoint; default the newest that verifies.

    Raises:
        ConfigError: ``run`` is no run folder, or ``destination`` exists.
        CheckpointError: no such checkpoint, or it is damaged.
        CannotWriteError: the destination cannot be written; nothing is left there.
    """
    if not is_run_folder(run):
        raise ConfigError(
            f"{run}: no run folder ({CONFIG} and {CHECKPOINTS}/ expected); give the output folder of tnl pretrain"
        )
    if destination.exists():
        raise ConfigError(f"{destination}: exists already; choose another folder or remove it")
    store = CheckpointStore(run / CHECKPOINTS)
    if step is None:
        step = store.newest_valid(warn)
    elif step in store.steps():
        store.verify(step)
    else:
        raise CheckpointError(f"{run}: no checkpoint of step {step}; steps there: {store.steps()}")
    if step is None:
        raise CheckpointError(f"{run}: no checkpoint yet; let the run reach checkpoint.every steps")
    settings = load_run_settings(run)
    weights = _consolidate(store.path(step), settings.train.tensor_parallel)
    with new_folder(destination) as scratch:
        _write(run, settings, weights, scratch)
    return destination


def _write(run: Path, settings: PretrainSettings, weights: dict[str, torch.Tensor], folder: Path) -> None:
    from transformers.utils.logging import disable_progress_bar

    from tnl.model.kinds import exported_class, model_config

    disable_progress_bar()
    config = model_config(settings.model, settings.train.sequence_length)
    config.dtype = torch.float32
    with torch.device("meta"):
        model = exported_class(config)(config)
    model.to_empty(device="cpu")
    model.tie_weights()
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected, unexpected
    assert set(missing) <= set(model.all_tied_weights_keys), missing
    model.save_pretrained(folder)
    for file in (run / TOKENIZER).iterdir():
        shutil.copyfile(file, folder / file.name)


def _consolidate(checkpoint: Path, num_parts: int) -> dict[str, torch.Tensor]:
    """fp32 weights of a checkpoint of any ZeRO stage and number of ranks, which shared the blocks by ``num_parts``."""
    from tnl.model.tensor_parallel import merged

    parts = [_consolidated_part(checkpoint, part) for part in range(num_parts)]
    # Rank 0 alone notes the second name of a tied weight, which loading the model restores.
    return {name: merged(name, [part.pop(name) for part in parts]) for name in list(parts[-1])}


def _consolidated_part(checkpoint: Path, part: int) -> dict[str, torch.Tensor]:
    """What the ranks with part number ``part`` of the blocks held."""
    from tnl.training.checkpoint import ENGINE_TAG, safe_globals  # sets DeepSpeed up before the next line imports it

    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint  # isort: skip

    # DeepSpeed's converter unpickles anything; this makes torch refuse all but tensors and the named classes.
    previous = os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    try:
        with torch.serialization.safe_globals(safe_globals()), tempfile.TemporaryDirectory() as view:
            # DeepSpeed's converter takes all files of a folder for those of one part, by the names of part 0.
            names = Path(view) / ENGINE_TAG
            names.mkdir()
            for file in (checkpoint / ENGINE_TAG).glob(f"*mp_rank_{part:02d}_*.pt"):
                (names / file.name.replace(f"mp_rank_{part:02d}_", "mp_rank_00_")).symlink_to(file.resolve())
            if any(names.glob("*_optim_states.pt")):
                return get_fp32_state_dict_from_zero_checkpoint(view, tag=ENGINE_TAG)
            (file,) = names.glob("mp_rank_*_model_states.pt")
            module = torch.load(file, map_location="cpu", weights_only=True)["module"]
            return {name: tensor.float() for name, tensor in module.items()}
    finally:
        del os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"]
        if previous is not None:
            os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = previous


def resolve_model(name: str, warn=print) -> str:
    """What ``from_pretrained`` can load for ``name``: a model folder or hub name as it is, a run folder by its
    newest export.

    Raises:
        ConfigError: a folder that is neither.
        CheckpointError, CannotWriteError: as `export_run`.
    """
    path = Path(name)
    if not path.exists():
        if name.count("/") == 1 and not name.startswith((".", "/", "~")) and not path.parent.exists():
            return name
        raise ConfigError(
            f"{name}: no such folder; give a run folder, a model folder, or a hub name such as "
            "OpenNLPLab/TransNormerLLM-385M"
        )
    if is_run_folder(path):
        store = CheckpointStore(path / CHECKPOINTS)
        step = store.newest_valid(warn)
        if step is None:
            raise CheckpointError(f"{path}: no checkpoint yet; let the run reach checkpoint.every steps")
        # Of a step that was trained again the older export is not taken.
        export = path / EXPORTS / f"{store.path(step).name}-{sha256_of(store.path(step) / MANIFEST)[:8]}"
        return str(export if export.exists() else export_run(path, export, step, warn))
    if (path / "config.json").is_file():
        return name
    raise ConfigError(f"{name}: neither a run folder nor a model folder (config.json expected)")

"""From a run's checkpoint to a transformers folder: safetensors, config, tokenizer; of LoRA the adapter as peft has it,
or merged into the weights. No pickle leaves the run folder."""

import os
import shutil
import tempfile
from pathlib import Path

import torch

from tnl.errors import CheckpointError, ConfigError
from tnl.files import new_folder, sha256_of
from tnl.training.commit import MANIFEST, CheckpointStore
from tnl.training.run_folder import CHECKPOINTS, CONFIG, TOKENIZER, base_record, load_run_settings, network_config
from tnl.training.settings import RunSettings

BEST = "best"
EXPORTS = "exports"


def is_run_folder(path: Path) -> bool:
    """Whether ``path`` is the output folder of a training run."""
    return (path / CONFIG).is_file() and (path / CHECKPOINTS).is_dir()


def export_run(run: Path, destination: Path, step: int | str | None = None, warn=print, *, merge: bool = False) -> Path:
    """Write the fp32 weights of a checkpoint, the model's config and the tokenizer to ``destination``.

    Args:
        step: which checkpoint, or `BEST`, that of the lowest held-out loss; default the newest that verifies.
        merge: of a LoRA run, the model with the adapter in its weights, and not the adapter alone.

    Raises:
        ConfigError: ``run`` is no run folder, or has no adapter to merge, or ``destination`` exists.
        CheckpointError: no such checkpoint, or it is damaged, or what it began from is not there any more.
        CannotWriteError: the destination cannot be written; nothing is left there.
    """
    if not is_run_folder(run):
        raise ConfigError(
            f"{run}: no run folder ({CONFIG} and {CHECKPOINTS}/ expected); give the output folder of tnl pretrain or "
            "tnl finetune"
        )
    if destination.exists():
        raise ConfigError(f"{destination}: exists already; choose another folder or remove it")
    settings = load_run_settings(run)
    if merge and not _is_lora(settings):
        raise ConfigError(f"{run}: --merge is for runs with method.kind lora; leave it out")
    store = CheckpointStore(run / CHECKPOINTS)
    step = _chosen(run, store, step, warn)
    weights = _consolidate(store.path(step), settings.train.tensor_parallel)
    with new_folder(destination) as scratch:
        _write(run, settings, store.manifest(step), weights, scratch, merge=merge)
    return destination


def _chosen(run: Path, store: CheckpointStore, step: int | str | None, warn) -> int:
    """The verified step that ``step`` means."""
    newest = store.newest_valid(warn) if step in (None, BEST) else None
    if step in (None, BEST) and newest is None:
        raise CheckpointError(f"{run}: no checkpoint yet; let the run reach checkpoint.every steps")
    if step is None:
        return newest
    if step == BEST:
        step = store.manifest(newest)["run"]["best_step"]
        if step is None:
            raise CheckpointError(
                f"{run}: no best checkpoint; it is kept with evaluation.keep_best and a held-out split"
            )
    if step not in store.steps():
        raise CheckpointError(f"{run}: no checkpoint of step {step}; steps there: {store.steps()}")
    store.verify(step)
    return step


def _is_lora(settings: RunSettings) -> bool:
    method = getattr(settings, "method", None)
    return method is not None and method.kind == "lora"


def _write(
    run: Path, settings: RunSettings, manifest: dict, weights: dict[str, torch.Tensor], folder: Path, *, merge: bool
) -> None:
    from transformers.utils.logging import disable_progress_bar

    from tnl.model.kinds import exported_class

    disable_progress_bar()
    config = network_config(settings, base_record(run))
    config.dtype = torch.float32
    with torch.device("meta"):
        model = exported_class(config)(config)
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    trained = {name: tensor for name, tensor in weights.items() if name in names}
    frozen = [name for name, _ in model.named_parameters() if name not in trained]
    base = _base(run, settings, manifest) if frozen else None
    if base is not None:
        if base.new_rows and _is_lora(settings) and not merge:
            raise ConfigError(
                f"{run}: {base.new_rows} token ids that the base {base.public_name} has not, so that an adapter alone "
                "could not be loaded on it; add --merge"
            )
        trained |= {name: base.read(name).float() for name in frozen}
    model.to_empty(device="cpu")
    model.tie_weights()
    missing, unexpected = model.load_state_dict(trained, strict=False)
    assert not unexpected, unexpected
    assert set(missing) <= set(model.all_tied_weights_keys), missing
    if _is_lora(settings):
        from tnl.model.adapters import save_adapters
        from tnl.training.methods import lora_of

        adapter = lora_of(settings.method, config)
        model.name_or_path = base.public_name  # for the adapter's own config
        others = {name: tensor for name, tensor in weights.items() if name not in names}
        save_adapters(model, adapter, others, folder, merge=merge)
    else:
        model.save_pretrained(folder)
    for file in (run / TOKENIZER).iterdir():
        shutil.copyfile(file, folder / file.name)


def _base(run: Path, settings: RunSettings, manifest: dict):
    """The checkpoint that the run began from, a `BaseCheckpoint`.

    Raises:
        CheckpointError: it has other weights now.
    """
    from tnl.training.base_checkpoint import open_files

    base = open_files(settings, base_record(run))
    if base.fingerprint != manifest["base_fingerprint"]:
        raise CheckpointError(
            f"{base.folder}: other weights or another config.json than the run began from; put the old ones back"
        )
    return base


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


def local_folder(name: str) -> Path | None:
    """The run folder or model folder that ``name`` is; None where it is a hub name.

    Raises:
        ConfigError: a folder that is neither, or none at all.
    """
    path = Path(name)
    if not path.exists():
        if name.count("/") == 1 and not name.startswith((".", "/", "~")) and not path.parent.exists():
            return None
        raise ConfigError(
            f"{name}: no such folder; give a run folder, a model folder, or a hub name such as "
            "OpenNLPLab/TransNormerLLM-385M"
        )
    if (path / CONFIG).is_file() and not is_run_folder(path):
        raise ConfigError(f"{name}: a run without a checkpoint yet; let it reach checkpoint.every steps")
    if not is_run_folder(path) and not (path / "config.json").is_file():
        raise ConfigError(f"{name}: neither a run folder nor a model folder (config.json expected)")
    return path


def resolve_model(name: str, warn=print) -> str:
    """What ``from_pretrained`` can load for ``name``: a model folder or hub name as it is, a run folder by its
    newest export, where an adapter is merged.

    Raises:
        ConfigError: a folder that is neither.
        CheckpointError, CannotWriteError: as `export_run`.
    """
    path = local_folder(name)
    if path is None:
        return name
    if is_run_folder(path):
        store = CheckpointStore(path / CHECKPOINTS)
        step = store.newest_valid(warn)
        if step is None:
            raise CheckpointError(f"{path}: no checkpoint yet; let the run reach checkpoint.every steps")
        # Of a step that was trained again the older export is not taken.
        export = path / EXPORTS / f"{store.path(step).name}-{sha256_of(store.path(step) / MANIFEST)[:8]}"
        if not export.exists():
            export_run(path, export, step, warn, merge=_is_lora(load_run_settings(path)))
        return str(export)
    return name

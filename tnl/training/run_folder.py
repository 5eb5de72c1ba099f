"""The run folder: what stands in it, and whether it belongs to the configuration that asks for it."""

import hashlib
import importlib.metadata
import json
import time
from pathlib import Path

from tnl import config
from tnl.errors import CannotWriteError, ConfigError, DataError
from tnl.model.configuration import TransnormerConfig
from tnl.model.kinds import ModelConfig, model_config
from tnl.training.commit import CheckpointStore
from tnl.training.finetune_settings import FinetuneSettings
from tnl.training.lock import RunLock
from tnl.training.settings import PretrainSettings, RunSettings
from tnl.training.status import FILE as STATUS

CONFIG = "config.yaml"
CHECKPOINTS = "checkpoints"
TOKENIZER = "tokenizer"
BASE = "base.json"
# Keys that may differ between the starts of one run: they change neither weights nor the order of the data. What
# init_from and data.source.path lead to is compared by its content.
FREE_KEYS = (
    "output",
    "init_from",
    "data.shards",
    "data.source.path",
    "data.num_workers",
    "train.offload_path",
    "checkpoint.",
    "evaluation.",
    "logging.",
)
# What follows from the number of examples where the configuration gives epochs, and a part of the run as warm-up.
KEYS_OF_EPOCHS = ("train.steps", "schedule.warmup_steps")


def _flat(tree: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def flat_settings(settings: RunSettings) -> dict:
    """The effective configuration as dotted keys and JSON values."""
    return _flat(settings.model_dump(mode="json"))


def config_hash(settings: RunSettings) -> str:
    """SHA-256 of the part of the configuration that decides the trajectory of the run."""
    flat = flat_settings(settings)
    bound = {key: value for key, value in flat.items() if not key.startswith(FREE_KEYS)}
    return hashlib.sha256(repr(sorted(bound.items())).encode()).hexdigest()


def check_run_folder(settings: RunSettings, data_fingerprint: str) -> None:
    """Refuse an output folder that is not this run's; nothing is written.

    Raises:
        ConfigError: the folder holds a run of another configuration (the differing keys are listed), or is no run
            folder.
        DataError: its run has another length because its data have changed.
    """
    folder = settings.output
    if any(character in "*?[" for character in str(folder.resolve())):
        raise ConfigError(f"output: {folder}: DeepSpeed reads *, ? and [ in a path as patterns; choose another folder")
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ConfigError(f"output: {folder}: is no folder; choose another")
    if (folder / CONFIG).exists():
        checkpoints = folder / CHECKPOINTS
        if checkpoints.is_dir() and any(checkpoints.iterdir()):  # until then a run may still be corrected
            _check_same_run(settings, folder / CONFIG, data_fingerprint)
    elif any(p.name not in (".lock", "STOP") and not p.name.startswith(STATUS) for p in folder.iterdir()):
        raise ConfigError(f"output: {folder}: exists and is no run folder; choose another, or move it away")


def move_aside(folder: Path) -> None:
    """Rename an existing run folder to ``NAME.old-TIME``.

    Raises:
        RunInUseError: a run is in progress there.
        CannotWriteError: it cannot be renamed.
    """
    if not folder.exists():
        return
    try:
        RunLock(folder).close()
        folder.rename(folder.with_name(f"{folder.name}.old-{time.strftime('%Y%m%d-%H%M%S')}"))
    except OSError as error:
        raise CannotWriteError(f"{folder}: {error.strerror}; choose another output folder") from None


def _check_same_run(settings: RunSettings, effective: Path, data_fingerprint: str) -> None:
    old = _flat(config.read_yaml(effective))
    new = _flat(config.read_yaml_text(config.dump(settings)))
    differing = {
        key: f"  {key}: was {old.get(key, 'not set')}, now {new.get(key, 'not set')}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not key.startswith(FREE_KEYS)
    }
    store = CheckpointStore(effective.parent / CHECKPOINTS)
    steps = store.steps() if differing and differing.keys() <= set(KEYS_OF_EPOCHS) else []
    if steps and store.manifest(steps[-1])["data_fingerprint"] != data_fingerprint:
        path = new.get("data.source.path") or new.get("data.shards") or "data.source"
        raise DataError(
            f"{path}: not the data that the run in {effective.parent} began with; point the data section to those, or "
            "begin a new run in another output folder\n" + "\n".join(differing.values())
        )
    if differing:
        raise ConfigError(
            f"{effective.parent}: holds a run with another configuration; set another output, undo the change, or "
            "begin a new "
            "run here with --fresh (the old folder is kept)\n" + "\n".join(differing.values())
        )


def versions() -> dict[str, str]:
    """Versions of the packages that decide what a run computes."""
    names = ("transnormer-llm", "torch", "triton", "deepspeed", "transformers", "sentencepiece", "numpy")
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed as a package"
    return found


def load_run_settings(folder: Path) -> RunSettings:
    """The effective configuration of a run folder, of pretraining or of fine-tuning.

    Raises:
        ConfigError: there is none, or it is not valid.
    """
    tree = config.read_yaml(folder / CONFIG)
    return config.validate(FinetuneSettings if "method" in tree else PretrainSettings, tree, str(folder / CONFIG))


def base_record(folder: Path) -> dict:
    """What a run folder keeps of the checkpoint that the run began from; empty where there was none.

    Raises:
        ConfigError: it cannot be read.
    """
    file = folder / BASE
    if not file.exists():
        return {}
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise ConfigError(f"{file}: unreadable; restore it, or begin a new run with --fresh") from None


def network_config(settings: RunSettings, record: dict) -> ModelConfig:
    """The model of a run: of one that began from a checkpoint, the configuration that ``record`` of it has."""
    if not record:
        return model_config(settings.model, settings.train.sequence_length)
    return TransnormerConfig.from_dict(record["config"] | {"vocab_size": settings.model.vocab_size})


def run_config(folder: Path) -> ModelConfig:
    """The configuration of the model that the run in ``folder`` trains."""
    return network_config(load_run_settings(folder), base_record(folder))

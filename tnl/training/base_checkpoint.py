"""The checkpoint that a run begins from, ``init_from``: what model it holds, and its weights one by one."""

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from tnl.errors import CheckpointError, ConfigError, UserError
from tnl.generation.load import load_config
from tnl.model.configuration import TransnormerConfig
from tnl.model.fingerprint import architecture, tensors_digest
from tnl.model.loading import is_finite
from tnl.model.modeling import TransnormerForCausalLM
from tnl.model.settings import ModelSettings
from tnl.model.weight_files import read_weights, weight_files
from tnl.training.engine import Ranks
from tnl.training.export import is_run_folder, local_folder, resolve_model
from tnl.training.run_configuration import model_differences
from tnl.training.run_folder import run_config
from tnl.training.settings import RunSettings

EMBEDDINGS = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.jinja"]


def base_config(name: str) -> TransnormerConfig:
    """The configuration of the model that ``init_from: name`` means; of a run without exporting it.

    Raises:
        ConfigError: there is none, or it is of another kind of model.
    """
    try:
        folder = local_folder(name)
    except ConfigError as error:
        raise ConfigError(f"init_from: {error}") from None
    if folder is None or not is_run_folder(folder):
        return load_config(name)
    config = run_config(folder)
    if not isinstance(config, TransnormerConfig):
        raise ConfigError(f"init_from: {name}: a run of a {config.model_type}; give one of model.kind tnl")
    return config


@dataclass(frozen=True)
class BaseCheckpoint:
    """An opened checkpoint.

    Attributes:
        name: as the configuration gives it.
        folder: where its files are.
        public_name: by which others load it from anywhere: its hub name, or the folder.
        config: of the model that is trained: that of the checkpoint, with the run's vocabulary.
        weights: of the checkpoint, memory-mapped.
        fingerprint: of configuration and weights; see `tnl.model.fingerprint`.
    """

    name: str
    folder: Path
    public_name: str
    config: TransnormerConfig
    weights: dict[str, torch.Tensor]
    fingerprint: str
    seed: int

    @property
    def new_rows(self) -> int:
        """Token ids that the checkpoint does not have."""
        return self.config.vocab_size - len(self.weights[EMBEDDINGS])

    def read(self, name: str) -> torch.Tensor:
        """The value of a parameter, in memory of its own; rows of new token ids are drawn."""
        tensor = self.weights[name].clone()
        return self._extended(tensor) if name in (EMBEDDINGS, HEAD) and self.new_rows else tensor

    def _extended(self, rows: torch.Tensor) -> torch.Tensor:
        """New rows have the mean of the old ones and 1e-9 of their covariance, as in transformers; sums of centred
        rows with normal weights have that distribution without the covariance being made."""
        generator = torch.Generator().manual_seed(self.seed)
        mean = rows.float().mean(0)
        weights = torch.randn(self.new_rows, len(rows), generator=generator) * math.sqrt(1e-9 / len(rows))
        new = mean + weights @ (rows.float() - mean)
        return torch.cat([rows, new.to(rows.dtype)])

    def record(self) -> dict:
        """What the run folder keeps of it."""
        return {
            "init_from": self.name,
            "folder": str(self.folder),
            "public_name": self.public_name,
            "fingerprint": self.fingerprint,
            "config": self.config.to_dict(),
        }


def open_base(settings: RunSettings, ranks: Ranks, record: dict) -> BaseCheckpoint:
    """Open the checkpoint of ``init_from``, rank 0 first, which exports it where it is a run, or downloads it.

    Args:
        record: what the folder of a run that goes on keeps of it; empty for a new run.

    Raises:
        ConfigError: there is none, or its model is not that of the model section.
        CheckpointError: its weights are damaged, or not those of its configuration, or not finite, or not the same on
            all ranks.
    """
    base, problem = None, None
    for is_my_turn in (ranks.is_main, not ranks.is_main):
        if is_my_turn:
            try:
                base = open_files(settings, record, checks_values=ranks.is_main)
            except UserError as error:
                problem = error
        ranks.raise_together(problem)
    number = float(int(base.fingerprint[:12], 16))
    (highest,) = ranks.all_reduce([number], op=dist.ReduceOp.MAX)
    (lowest,) = ranks.all_reduce([number], op=dist.ReduceOp.MIN)
    if highest != lowest:
        raise CheckpointError(f"init_from: {base.name}: not the same model on all ranks; give all of them the same")
    return base


def open_files(settings: RunSettings, record: dict, *, checks_values: bool = False) -> BaseCheckpoint:
    """Open the checkpoint of ``init_from`` on this process alone; see `open_base`.

    Args:
        checks_values: read all weights, to see whether they are finite.
    """
    name = settings.init_from
    folder, public_name = _folder(name, record)
    config = load_config(str(folder))
    problems = model_differences(
        settings.model.model_dump(mode="json"), ModelSettings.describing(config).model_dump(mode="json"), name
    )
    if problems:
        raise ConfigError("\n".join(problems))
    try:
        weights = read_weights(weight_files(folder))
    except ConfigError as error:
        raise ConfigError(f"init_from: {error}") from None
    _check_weights(folder, config, weights)
    not_finite = [name for name, tensor in weights.items() if checks_values and not is_finite(tensor)]
    if not_finite:
        raise CheckpointError(
            f"{folder}: not finite: {', '.join(not_finite)}; export or download the model again, or take another"
        )
    computed = json.dumps(architecture(config), sort_keys=True, default=str)
    fingerprint = hashlib.sha256(f"{tensors_digest(weights.items())} {computed}".encode()).hexdigest()
    config.vocab_size = settings.model.vocab_size
    return BaseCheckpoint(name, folder, public_name, config, weights, fingerprint, settings.seed)


def _folder(name: str, record: dict) -> tuple[Path, str]:
    """The folder of ``init_from: name``, the one that the run began with if it still has it, and its public name."""
    if record.get("init_from") == name and Path(record["folder"]).is_dir():
        return Path(record["folder"]), record["public_name"]
    resolved = resolve_model(name)
    if Path(resolved).is_dir():
        folder = Path(resolved).absolute()
        return folder, str(folder)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(name, allow_patterns=HUB_FILES))
        if not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(name, allow_patterns=[*HUB_FILES, "*.bin"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"init_from: {name}: cannot be downloaded: {reason}; give a folder that holds it") from None
    return folder, name


def _check_weights(folder: Path, config: TransnormerConfig, weights: dict[str, torch.Tensor]) -> None:
    """Refuse weights that are not those of ``config``."""
    with torch.device("meta"):
        model = TransnormerForCausalLM(config)
    expected = {name: list(parameter.shape) for name, parameter in model.named_parameters(remove_duplicate=False)}
    tied = {HEAD} if config.tie_word_embeddings else set()
    missing = sorted(expected.keys() - weights.keys() - tied)
    unexpected = sorted(weights.keys() - expected.keys())
    shapes = [
        f"{name} {list(weights[name].shape)} for {shape}"
        for name, shape in expected.items()
        if name in weights and list(weights[name].shape) != shape
    ]
    problems = [f"missing: {', '.join(missing)}"] if missing else []
    problems += [f"not of this model: {', '.join(unexpected)}"] if unexpected else []
    problems += [f"of another shape: {', '.join(shapes)}"] if shapes else []
    if not problems and tied and HEAD in weights and not torch.equal(weights[HEAD], weights[EMBEDDINGS]):
        problems.append(f"tied by tie_word_embeddings, but not equal to the embeddings: {HEAD}")
    if problems:
        raise CheckpointError(
            f"{folder}: weights do not fit its config.json; {'; '.join(problems)}; export or download the model again"
        )

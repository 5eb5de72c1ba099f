"""Saving and loading a DeepSpeed engine through the commit protocol, on all ranks together."""

import json
import math
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save

from tnl.errors import CannotWriteError, CheckpointError, ConfigError
from tnl.training.commit import CheckpointStore, HashingWriter
from tnl.training.deepspeed_import import deepspeed
from tnl.training.engine import Ranks
from tnl.training.faults import fault_point

ENGINE_TAG = "engine"
RECORDS = "records_"


@dataclass
class RunState:
    """All that the loop must know after a restart besides weights, moments and random states."""

    step: int = 0  # optimizer steps done, left-out ones included: the loader's position
    tokens: int = 0  # tokens consumed
    skipped_steps: int = 0  # left out because a gradient was not finite
    consecutive_skipped: int = 0
    first_loss: float | None = None  # held-out loss before the first step, in nats
    best_loss: float | None = None  # lowest held-out loss after some step
    best_step: int | None = None  # where it was found

    def count(self, tokens: int, *, applied: bool) -> None:
        """A step of ``tokens`` is done, and was ``applied`` or left out."""
        self.step += 1
        self.tokens += tokens
        self.skipped_steps += not applied
        self.consecutive_skipped = 0 if applied else self.consecutive_skipped + 1

    def is_best(self, loss: float) -> bool:
        """Note a held-out loss of the present step; whether it is the lowest."""
        found = math.isfinite(loss) and (self.best_loss is None or loss < self.best_loss)
        if found:
            self.best_loss, self.best_step = loss, self.step
        return found


def safe_globals() -> list:
    """Classes besides tensors that DeepSpeed's optimizer files hold; everything else is refused by the unpickler."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]


class CommittedFiles(deepspeed.runtime.checkpoint_engine.TorchCheckpointEngine):
    """The file layer that the DeepSpeed engine saves and loads through.

    Saving hashes and flushes. A failing disk is remembered instead of raised, so that this rank still meets the
    others in DeepSpeed's barriers; `save_checkpoint` then ends the save on all ranks. Loading compares with the
    manifest before it unpickles, and unpickles tensors and the classes of `safe_globals` only.
    """

    def __init__(self, folder: Path, records: dict[str, dict] | None = None):
        super().__init__()
        self.folder = folder
        self.records = {} if records is None else records
        self.error: OSError | None = None

    def save(self, state_dict, path: str):
        """Write one file."""
        try:
            fault_point("ckpt.shard.pre")
            with HashingWriter(Path(path)) as file:
                try:
                    torch.save(state_dict, file)
                except RuntimeError as error:
                    raise file.error or error from None
            self.records[Path(path).relative_to(self.folder).as_posix()] = file.record()
            fault_point("ckpt.shard.post")
        except OSError as error:
            self.error = error

    def load(self, path: str, map_location=None):
        """Read one file."""
        relative = Path(path).relative_to(self.folder).as_posix()
        if relative not in self.records:
            raise CheckpointError(f"{path}: not in the manifest of the checkpoint")
        CheckpointStore.verify_file(self.folder, relative, self.records[relative])
        with torch.serialization.safe_globals(safe_globals()):
            return torch.load(path, map_location=map_location, weights_only=True)


def _random_state(device: torch.device) -> tuple[dict[str, torch.Tensor], dict]:
    tensors = {"torch": torch.get_rng_state()}
    if device.type == "cuda":
        tensors["cuda"] = torch.cuda.get_rng_state(device)
    name, keys, position, has_gauss, gauss = np.random.get_state()
    version, words, gauss_next = random.getstate()
    return tensors, {
        "numpy": [name, keys.tolist(), position, has_gauss, gauss],
        "python": [version, list(words), gauss_next],
    }


def _set_random_state(tensors: dict[str, torch.Tensor], other: dict) -> None:
    torch.set_rng_state(tensors["torch"])
    if "cuda" in tensors:
        torch.cuda.set_rng_state(tensors["cuda"])
    name, keys, *rest = other["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    version, words, gauss_next = other["python"]
    random.setstate((version, tuple(words), gauss_next))


def save_checkpoint(
    engine,
    store: CheckpointStore,
    state: RunState,
    ranks: Ranks,
    fields: dict,
    keep: int,
    warn: Callable[[str], None],
    *,
    is_whole: bool = True,
) -> Path:
    """Save on all ranks and commit on rank 0; every rank returns, or every rank raises.

    Args:
        fields: further JSON values for the manifest.
        keep: newest checkpoints to keep.
        warn: told when an old checkpoint could not be removed.
        is_whole: save the parameters that do not train, too.

    Raises:
        CannotWriteError: some rank could not write; earlier checkpoints are untouched.
    """
    temporary = store.root / (store.path(state.step).name + ".tmp")
    problem = None
    if ranks.is_main:
        try:
            store.begin(state.step)
        except CannotWriteError as error:
            problem = error
    ranks.raise_together(problem)
    files = CommittedFiles(temporary)
    engine.checkpoint_engine = files
    try:
        try:
            engine.save_checkpoint(
                str(temporary), tag=ENGINE_TAG, save_latest=False, exclude_frozen_parameters=not is_whole
            )
            if files.error is None:
                _write_rank_files(temporary, files.records, ranks)
        except OSError as error:
            files.error = error
        ranks.raise_together(None if files.error is None else store.cannot_write(temporary, files.error))
        if ranks.is_main:
            try:
                records = _gather_records(temporary, ranks.world_size)
                store.commit(state.step, fields | {"run": asdict(state), "world_size": ranks.world_size}, records)
            except (CannotWriteError, OSError) as error:
                problem = error if isinstance(error, CannotWriteError) else store.cannot_write(temporary, error)
        ranks.raise_together(problem)
    finally:
        if ranks.is_main:
            store.abandon(state.step)
    if ranks.is_main:
        try:
            store.prune(keep, spared=state.best_step)
        except OSError as error:
            warn(f"{error.filename or store.root}: an old checkpoint could not be removed ({error.strerror})")
    return store.path(state.step)


def _write_rank_files(folder: Path, records: dict[str, dict], ranks: Ranks) -> None:
    """Random states of this rank, and the records of all its files for rank 0, which commits."""
    tensors, other = _random_state(ranks.device)
    for name, content in {
        f"random_{ranks.rank:05d}.safetensors": save(tensors),
        f"random_{ranks.rank:05d}.json": json.dumps(other).encode(),
    }.items():
        with HashingWriter(folder / name) as file:
            file.write(content)
        records[name] = file.record()
    (folder / f"{RECORDS}{ranks.rank:05d}.json").write_text(json.dumps(records))


def _gather_records(folder: Path, world_size: int) -> dict[str, dict]:
    """The records of all ranks; their files are not part of the checkpoint.

    Raises:
        CannotWriteError: those of some ranks are not there.
    """
    files = {rank: folder / f"{RECORDS}{rank:05d}.json" for rank in range(world_size)}
    missing = [str(rank) for rank, file in files.items() if not file.is_file()]
    if missing:
        raise CannotWriteError(
            f"{folder}: the files of rank {', '.join(missing)} are not there; output must be on a file system that all "
            "machines share"
        )
    gathered = {}
    for file in files.values():
        gathered |= json.loads(file.read_text())
        file.unlink()
    return gathered


def choose_checkpoint(store: CheckpointStore, resume: str, ranks: Ranks, warn) -> int | None:
    """Step of the checkpoint to continue from, decided by rank 0 for all; None starts at step 0.

    Args:
        resume: ``auto`` takes the newest that verifies; a step number or ``step_NNNNNNNN`` takes that one.

    Raises:
        CheckpointError: nothing to resume from although there should be, or the chosen one does not verify.
    """
    step, problem = None, None
    if ranks.is_main:
        try:
            if resume == "auto":
                step = store.newest_valid(warn)
            else:
                step = named_step(store, resume)
                store.verify(step)
        except (CheckpointError, ConfigError) as error:
            problem = error
    ranks.raise_together(problem)
    (step,) = ranks.all_reduce([-1.0 if step is None else float(step)], op=dist.ReduceOp.MAX)
    return None if step < 0 else int(step)


def named_step(store: CheckpointStore, resume: str) -> int:
    """The step that ``--resume`` names: a number, or ``step_NNNNNNNN``.

    Raises:
        ConfigError: it names none.
        CheckpointError: there is no such checkpoint.
    """
    digits = resume.removeprefix("step_")
    if not digits.isdigit():
        raise ConfigError(f"--resume {resume}: give auto, or the step of a checkpoint")
    if int(digits) not in store.steps():
        known = ", ".join(map(str, store.steps())) or "none"
        raise CheckpointError(f"--resume {resume}: no such checkpoint in {store.root}; steps there: {known}")
    return int(digits)


def load_checkpoint(engine, store: CheckpointStore, step: int, ranks: Ranks, *, is_whole: bool = True) -> RunState:
    """Load engine and random states of a verified checkpoint; returns the loop's state.

    Args:
        is_whole: whether it holds the parameters that do not train.

    Raises:
        CheckpointError: saved by another number of processes, or a file differs from the manifest.
    """
    manifest = store.manifest(step)
    folder = store.path(step)
    if manifest["world_size"] != ranks.world_size:
        raise CheckpointError(
            f"{folder}: saved by {manifest['world_size']} processes, this run has {ranks.world_size}; start as "
            "many, or "
            "export the run and begin a new one from it"
        )
    engine.checkpoint_engine = CommittedFiles(folder, manifest["files"])
    loaded, _ = engine.load_checkpoint(
        str(folder), tag=ENGINE_TAG, load_lr_scheduler_states=False, load_module_strict=is_whole
    )
    if loaded is None:
        raise CheckpointError(f"{folder}: DeepSpeed found no engine state in it")
    tensors = load_file(str(folder / f"random_{ranks.rank:05d}.safetensors"))
    _set_random_state(tensors, json.loads((folder / f"random_{ranks.rank:05d}.json").read_text()))
    return RunState(**manifest["run"])

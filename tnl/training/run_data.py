"""The data of a run: shards, held-out split, and the micro-batches of this rank."""

from dataclasses import dataclass
from pathlib import Path

from tnl.data.loader import TrainLoader
from tnl.data.shards import ShardSet, check_vocabulary
from tnl.training.mesh import Mesh
from tnl.training.settings import PretrainSettings


@dataclass(frozen=True)
class RunData:
    """What a rank reads."""

    shards: ShardSet
    heldout: ShardSet | None  # None: the shards have no held-out split
    loader: TrainLoader


def open_data(settings: PretrainSettings, mesh: Mesh) -> RunData:
    """Open the shards of ``data.shards``; nothing is written.

    Raises:
        DataError: they cannot be read, or do not fill a window.
        ConfigError: the model's vocabulary is too small for them.
    """
    folder = Path(settings.data.shards)
    shards = ShardSet.open(folder, "train")
    check_vocabulary(shards, settings.model.vocab_size)
    heldout = ShardSet.open(folder, "heldout") if shards.index.splits["heldout"] else None
    loader = TrainLoader(
        shards,
        seq_len=settings.train.sequence_length,
        global_batch=settings.train.global_batch_size,
        micro_batch=settings.train.micro_batch_size,
        seed=settings.seed,
        rank=mesh.data_rank,
        world_size=mesh.data_size,
        sequence_rank=mesh.sequence_rank,
        sequence_size=mesh.sequence_size,
        packing=settings.data.packing,
        num_workers=settings.data.num_workers,
    )
    return RunData(shards, heldout, loader)

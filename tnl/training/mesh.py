"""How the ranks of a run share its tokens: some share the windows of a batch, others share the tokens of a window."""

from dataclasses import dataclass

import torch
import torch.distributed as dist

from tnl.model.sequence_parallel import SequenceShard
from tnl.training.engine import COLLECTIVE_TIMEOUT, Ranks, data_parallel_size
from tnl.training.settings import TrainSettings


@dataclass(frozen=True)
class Mesh:
    """The place of this rank: consecutive ranks share windows, one slice each.

    To DeepSpeed every rank of the world is a data-parallel rank: its gradient is that of the tokens it holds.
    """

    data_rank: int  # which windows
    data_size: int
    sequence_rank: int  # which slice of them
    sequence_size: int
    sequence_group: dist.ProcessGroup | None  # the ranks with the same windows; None when this one has them alone

    def arguments(self, batch: dict[str, torch.Tensor], device: torch.device) -> dict[str, SequenceShard]:
        """Arguments of the model's forward pass that say where ``batch`` stands; none for whole windows."""
        if self.sequence_group is None:
            return {}
        before, after = (batch[name].to(device, non_blocking=True) for name in ("tokens_before", "tokens_after"))
        return {"sequence_shard": SequenceShard(self.sequence_group, before, after)}


def build_mesh(train: TrainSettings, ranks: Ranks) -> Mesh:
    """Arrange the ranks; a collective where windows are shared.

    Raises:
        ConfigError: the number of ranks is no multiple of ``train.sequence_parallel``.
    """
    size = train.sequence_parallel
    data_size = data_parallel_size(train, ranks.world_size)
    group = None
    if size > 1:
        group, _ = dist.new_subgroups(size, timeout=COLLECTIVE_TIMEOUT)
    return Mesh(ranks.rank // size, data_size, ranks.rank % size, size, group)

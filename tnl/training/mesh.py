"""How the ranks of a run share its work: some share the windows of a batch, others the tokens of a window, others the
weights that a token meets."""

from dataclasses import dataclass

import torch
import torch.distributed as dist

from tnl.model.sequence_parallel import SequenceShard
from tnl.training.batch_split import data_parallel_size
from tnl.training.engine import COLLECTIVE_TIMEOUT, Ranks
from tnl.training.settings import TrainSettings
from tnl.training.tensor_groups import TensorGroups


@dataclass(frozen=True)
class Mesh:
    """The place of this rank: consecutive ranks share windows, and among those consecutive ones share the blocks'
    weights.

    To DeepSpeed every rank with tokens of its own is a data-parallel rank: its gradient is that of the tokens it holds.
    """

    data_rank: int  # which windows
    data_size: int
    sequence_rank: int  # which slice of them
    sequence_size: int
    sequence_group: dist.ProcessGroup | None  # the ranks with the other slices; None when this one has windows whole
    token_rank: int  # which tokens: place among the ranks with tokens of their own
    token_size: int
    tensor: TensorGroups | None  # the ranks with the same tokens; None when this one has the model whole

    def arguments(self, batch: dict[str, torch.Tensor], device: torch.device) -> dict[str, SequenceShard]:
        """Arguments of the model's forward pass that say where ``batch`` stands; none for whole windows."""
        if self.sequence_group is None:
            return {}
        before, after = (batch[name].to(device, non_blocking=True) for name in ("tokens_before", "tokens_after"))
        return {"sequence_shard": SequenceShard(self.sequence_group, before, after)}

    def token_sums(self, values: list[float], ranks: Ranks) -> list[float]:
        """Sums of ``values`` that each rank has of its tokens, those of every token once; a collective."""
        is_copy = self.tensor is not None and self.tensor.group.rank() > 0
        return ranks.all_reduce([0.0 for _ in values] if is_copy else values)


def build_mesh(train: TrainSettings, ranks: Ranks) -> Mesh:
    """Arrange the ranks; a collective where windows are shared.

    Raises:
        ConfigError: the number of ranks is no multiple of ``train.ranks_per_window``.
    """
    data_size = data_parallel_size(train, ranks.world_size)
    S, P = train.sequence_parallel, train.tensor_parallel
    grid = torch.arange(ranks.world_size).view(data_size, S, P)
    token_rank = ranks.rank // P
    return Mesh(
        data_rank=token_rank // S,
        data_size=data_size,
        sequence_rank=token_rank % S,
        sequence_size=S,
        sequence_group=_own_group(grid.transpose(1, 2).reshape(-1, S)) if S > 1 else None,
        token_rank=token_rank,
        token_size=data_size * S,
        tensor=TensorGroups(_own_group(grid.view(-1, P)), _own_group(grid.view(-1, P).t())) if P > 1 else None,
    )


def _own_group(members: torch.Tensor) -> dist.ProcessGroup:
    """Of groups of ranks [count, size], that of this rank; made on all ranks together."""
    group, _ = dist.new_subgroups_by_enumeration(members.tolist(), timeout=COLLECTIVE_TIMEOUT)
    return group

"""The process groups of tensor parallelism, as DeepSpeed asks for them, and norms of gradients held in parts."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn


@dataclass(frozen=True)
class TensorGroups:
    """Who shares the blocks with this rank, and who holds the same part of them: DeepSpeed's ``mpu``.

    With it ZeRO divides over ``data_group`` alone, checkpoints have files for each part, and norms count every gradient
    once.

    Attributes:
        group: the ranks that share the blocks.
        data_group: the ranks with other tokens and the same part of the weights.
    """

    group: dist.ProcessGroup
    data_group: dist.ProcessGroup

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        """Over which norms and overflows are summed."""
        return self.group

    def get_model_parallel_rank(self) -> int:
        """Which part; it names the files of a checkpoint."""
        return self.group.rank()

    def get_model_parallel_world_size(self) -> int:
        """Number of parts."""
        return self.group.size()

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        """Over which gradients are averaged and optimizer states divided."""
        return self.data_group

    def get_data_parallel_rank(self) -> int:
        """Place in that group."""
        return self.data_group.rank()

    def get_data_parallel_world_size(self) -> int:
        """Size of that group."""
        return self.data_group.size()


def squared_norm(gradients: Iterable[tuple[nn.Parameter, torch.Tensor]], group: dist.ProcessGroup) -> torch.Tensor:
    """Sum of squares of whole gradients, of which each rank of ``group`` has the parts that belong to its weights.

    Args:
        gradients: each with its parameter, which `tnl.model.tensor_parallel.join_group` has marked.

    Returns:
        fp64 scalar, the same on all ranks of the group.
    """
    sums = None
    for parameter, gradient in gradients:
        if sums is None:
            sums = gradient.new_zeros(2, dtype=torch.float64)
        sums[int(parameter.tensor_model_parallel)] += (
            torch.linalg.vector_norm(gradient, dtype=torch.float32).double() ** 2
        )
    if group.rank() > 0:
        sums[0] = 0  # the first rank has the same copies
    dist.all_reduce(sums, group=group)
    return sums.sum()

"""Requests divided among the ranks of a run, and their results brought together."""

from collections.abc import Callable, Sequence

import numpy as np
import torch.distributed as dist

from tnl.errors import UserError


class RankDivision:
    """The ranks that share an evaluation; all of them are given the same requests and end with all results."""

    def __init__(self, group: dist.ProcessGroup | None = None):
        """``group``: None is the default one, or this process alone where torch.distributed is not initialised."""
        self._group = group
        together = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank(group) if together else 0
        self.size = dist.get_world_size(group) if together else 1

    def share(self, costs: Callable[[], Sequence[int]]) -> slice:
        """This rank's part of items in a row, so that every part costs about the same.

        Neighbours stay together: items that share a beginning stand side by side.

        Args:
            costs: gives the cost of each item; not asked where there is nothing to divide.
        """
        if self.size == 1:
            return slice(None)
        costs = costs()
        ends = np.cumsum(costs, dtype=np.float64)
        middles = ends - np.asarray(costs) / 2
        owners = np.floor(middles * self.size / max(1.0, ends[-1] if len(ends) else 0.0))
        return slice(*np.searchsorted(owners, [self.rank, self.rank + 1]).tolist())

    def gather(self, results: dict[int, object], failure: UserError | None) -> dict[int, object]:
        """The results of all ranks.

        Raises:
            UserError: the failure of the first rank that had one, on every rank.
        """
        parts = [(results, failure)]
        if self.size > 1:
            parts = [None] * self.size
            dist.all_gather_object(parts, (results, failure), group=self._group)
        for _, found in parts:
            if found is not None:
                raise found
        return {index: result for part, _ in parts for index, result in part.items()}

"""Held-out loss of each source, of as many tokens of each."""

import numpy as np

from tnl.data.shards import ShardSet
from tnl.evaluation.heldout import HeldoutLoss, heldout_loss


class ShardRange:
    """Whole documents in a row of a split, as `tnl.evaluation.heldout` reads one."""

    num_bytes = None  # the index does not say

    def __init__(self, shards: ShardSet, start: int, stop: int):
        """``start`` and ``stop``: positions in the split at which documents start, or its end."""
        self._shards, self._start, self.num_tokens = shards, start, stop - start

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """As `ShardSet.tokens`."""
        return self._shards.tokens(self._start + start, self._start + stop)

    def document_starts(self, start: int, stop: int) -> np.ndarray:
        """As `ShardSet.document_starts`."""
        return self._shards.document_starts(self._start + start, self._start + stop) - self._start


def source_ranges(shards: ShardSet) -> dict[str, list[ShardRange]]:
    """By source, the documents that are from it; empty where the shards do not tell sources apart."""
    runs = shards.index.heldout_sources
    if not runs:
        return {}
    starts = [*shards.document_starts(0, shards.num_tokens).tolist(), shards.num_tokens]
    found: dict[str, list[ShardRange]] = {}
    document = 0
    for name, count in runs:
        found.setdefault(name, []).append(ShardRange(shards, starts[document], starts[document + count]))
        document += count
    return found


def source_losses(model, shards: ShardSet, max_tokens: int, **options) -> dict[str, HeldoutLoss]:
    """Loss by source.

    Args:
        shards: the held-out split.
        max_tokens: of all sources together; each gets an equal part of it.
        options: of `heldout_loss`.
    """
    ranges = source_ranges(shards)
    return {name: _loss_of(model, parts, max(2, max_tokens // len(ranges)), options) for name, parts in ranges.items()}


def _loss_of(model, parts: list[ShardRange], max_tokens: int, options: dict) -> HeldoutLoss:
    """Of the first ``max_tokens`` tokens of ``parts``."""
    loss_sum, num_predicted, num_tokens = 0.0, 0, 0
    for part in parts:
        if max_tokens - num_tokens < 2:
            break
        found = heldout_loss(model, part, max_tokens=max_tokens - num_tokens, **options)
        loss_sum += found.loss_sum
        num_predicted += found.num_predicted
        num_tokens += found.num_tokens
    return HeldoutLoss(loss_sum, num_predicted, num_tokens, None)

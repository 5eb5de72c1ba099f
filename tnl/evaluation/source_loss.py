"""Held-out loss of each source, of as many tokens of each."""

import numpy as np

from tnl.data.shards import ShardSet
from tnl.evaluation.heldout import HeldoutLoss, heldout_loss


class SourceDocuments:
    """The documents of one source, one behind the other, as `tnl.evaluation.heldout` reads a split."""

    num_bytes = None  # the index does not say

    def __init__(self, shards: ShardSet):
        self._shards = shards
        self._starts: list[int] = []  # of each run of documents, in the split
        self._ends = [0]  # of each run, here

    @property
    def num_tokens(self) -> int:
        """Of all documents."""
        return self._ends[-1]

    def add(self, start: int, stop: int) -> None:
        """Documents in a row; ``start`` and ``stop`` are positions in the split at which documents start, or its
        end."""
        self._starts.append(start)
        self._ends.append(self._ends[-1] + stop - start)

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """As `ShardSet.tokens`."""
        parts = [self._shards.tokens(start + shift, stop + shift) for start, stop, shift in self._runs(start, stop)]
        return np.concatenate([np.empty(0, self._shards.dtype), *parts])

    def document_starts(self, start: int, stop: int) -> np.ndarray:
        """As `ShardSet.document_starts`."""
        parts = [
            self._shards.document_starts(start + shift, stop + shift) - shift
            for start, stop, shift in self._runs(start, stop)
        ]
        return np.concatenate([np.empty(0, np.int64), *parts])

    def _runs(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """What ``[start, stop)`` has of each run, and how much further back in the split that stands."""
        first = int(np.searchsorted(self._ends, start, side="right")) - 1
        found = []
        for i in range(first, len(self._starts)):
            if self._ends[i] >= stop:
                break
            lower, upper = max(start, self._ends[i]), min(stop, self._ends[i + 1])
            found.append((lower, upper, self._starts[i] - self._ends[i]))
        return found


def documents_by_source(shards: ShardSet) -> dict[str, SourceDocuments]:
    """Empty where the shards do not tell sources apart."""
    starts = [*shards.document_starts(0, shards.num_tokens).tolist(), shards.num_tokens]
    found: dict[str, SourceDocuments] = {}
    document = 0
    for name, count in shards.index.heldout_sources:
        found.setdefault(name, SourceDocuments(shards)).add(starts[document], starts[document + count])
        document += count
    return found


def source_losses(model, shards: ShardSet, max_tokens: int, **options) -> dict[str, HeldoutLoss]:
    """Loss by source.

    Args:
        shards: the held-out split.
        max_tokens: of all sources together; each gets an equal part of it.
        options: of `heldout_loss`.
    """
    sources = documents_by_source(shards)
    share = max(2, max_tokens // max(1, len(sources)))
    return {name: heldout_loss(model, documents, max_tokens=share, **options) for name, documents in sources.items()}

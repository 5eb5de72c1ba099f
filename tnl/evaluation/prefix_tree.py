"""Which beginnings of token sequences are worth reading once, and the tree of reads that follows from it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

# What it costs to continue from a stored state, in tokens: the state of one sequence is written, gathered and read.
# Measured by bytes against a token's arithmetic it is 2 tokens (7B), 4 (1B) and 7 (385M) on an H100.
FORK_TOKENS = 8
# A held state for each level: so many bound the memory.
MAX_LEVELS = 4


@dataclass(eq=False)
class Read:
    """Tokens to read behind those of ``parent``, or from the start.

    Attributes:
        ids: int64 [L], at least one.
        start: number of tokens before them.
        children: what continues from the state after ``ids``; empty for a leaf.
        sequences: indices of the sequences that end in ``ids``, at the last token or before it.
        source: place of the state before ``ids`` among those held, for the reader to set.
    """

    ids: np.ndarray
    start: int
    parent: "Read | None"
    children: list["Read"] = field(default_factory=list)
    sequences: list[int] = field(default_factory=list)
    source: int = -1

    @property
    def end(self) -> int:
        """Number of tokens read after it."""
        return self.start + len(self.ids)

    def parts(self, begin: int, end: int) -> Iterator[tuple["Read", int, int]]:
        """The reads that hold positions ``[begin, end)`` of a sequence that ends in this one, and which of them."""
        read = self
        while begin < end:
            first = max(begin, read.start)
            if first < end:
                yield read, first, end
                end = first
            read = read.parent


@dataclass(eq=False)
class _Branch:
    """A node of the tree of all shared beginnings."""

    end: int
    sample: int  # a sequence that goes through it
    children: list["_Branch"] = field(default_factory=list)
    sequences: list[int] = field(default_factory=list)


def sort_key(ids: np.ndarray) -> bytes:
    """Bytes that order int64 ids [T], each below 2^32, as the sequences themselves."""
    return ids.astype(">u4").tobytes()


def common_length(a: np.ndarray, b: np.ndarray) -> int:
    """Number of tokens at the beginning of both."""
    n = min(len(a), len(b))
    different = a[:n] != b[:n]
    first = int(different.argmax()) if n else 0
    return first if n and different[first] else n


def new_tokens(sequences: Sequence[np.ndarray]) -> np.ndarray:
    """Tokens of each of the sorted ``sequences`` that the one before does not begin with: int64 [N]."""
    shared = [0, *map(common_length, sequences, sequences[1:])][: len(sequences)]
    return np.array([len(ids) for ids in sequences], dtype=np.int64) - shared


def plan_reads(sequences: Sequence[np.ndarray], max_levels: int = MAX_LEVELS) -> tuple[list[Read], int]:
    """Reads that cover ``sequences``, and the number of levels at which states are held.

    A shared beginning is read once where that saves more than its forks cost, on token boundaries: the tokens from the
    root to the end of a sequence are exactly those of the sequence.

    Args:
        sequences: int64 [T] each, not empty, sorted by `sort_key`, all different.
        max_levels: at which states are held, at most.
    """
    return _worth_it(_all_branches(sequences), sequences, max_levels)


def _all_branches(sequences: Sequence[np.ndarray]) -> _Branch:
    """The radix tree of sorted sequences, with every shared beginning in it."""
    root = _Branch(0, 0)
    path = [root]
    for i, ids in enumerate(sequences):
        shared = common_length(sequences[i - 1], ids) if i else 0
        last = None
        while path[-1].end > shared:
            last = path.pop()
        if path[-1].end < shared:
            middle = _Branch(shared, last.sample, [last])
            path[-1].children[-1] = middle
            path.append(middle)
        leaf = _Branch(len(ids), i, sequences=[i])
        path[-1].children.append(leaf)
        path.append(leaf)
    return root


def _worth_it(root: _Branch, sequences: Sequence[np.ndarray], max_levels: int) -> tuple[list[Read], int]:
    """Drop the forks that do not pay: their tokens are then read by each child."""
    tops: list[Read] = []
    levels = 0
    todo = [(root, None, 0, [], 0)]
    while todo:
        branch, parent, start, ending, level = todo.pop()
        ending = ending + branch.sequences
        while len(branch.children) == 1:
            branch = branch.children[0]
            ending = ending + branch.sequences
        forks, length = len(branch.children), branch.end - start
        pays = (forks - 1) * length > FORK_TOKENS * (forks + 1) and level < max_levels
        if forks and not pays:
            # A sequence that ends here is a beginning of every child; the first one reads it.
            for i, child in reversed(list(enumerate(branch.children))):
                todo.append((child, parent, start, [] if i else ending, level))
            continue
        if not length:
            continue  # no sequences at all
        read = Read(sequences[branch.sample][start : branch.end], start, parent, sequences=ending)
        (tops if parent is None else parent.children).append(read)
        if forks:
            levels = max(levels, level + 1)
            todo.extend((child, read, branch.end, [], level + 1) for child in reversed(branch.children))
    return tops, levels

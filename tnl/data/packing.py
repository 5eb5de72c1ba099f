"""Which examples share a sequence: whole examples packed until it is full, or batches padded to their longest."""

import hashlib

import numpy as np

# Examples are drawn in buffers of so many sequences: enough to fill them well, and few enough that examples of one
# length do not meet each other in every epoch.
_BUFFER_SEQUENCES = 64


class EpochPlan:
    """The groups of one epoch, in the order in which they are trained on.

    Every example is in exactly one group. A pure function of (lengths, capacity, batching, key).
    """

    def __init__(self, lengths: np.ndarray, capacity: int, batching: str, key: str) -> None:
        """
        Args:
            lengths: tokens of each example, int64 [n], at most ``capacity``.
            capacity: tokens of a sequence; for a padded batch its rows times its longest example.
            batching: packed, grouped (like lengths together) or padded (as drawn).
            key: what the order is drawn from.
        """
        assert len(lengths)
        assert lengths.max() <= capacity
        # The old generator, whose numbers are promised to stay the same in every version of numpy.
        draw = np.random.RandomState(np.frombuffer(hashlib.sha256(key.encode()).digest(), "<u4"))
        order = draw.permutation(len(lengths))
        self.groups: list[np.ndarray] = []
        for buffer in _buffers(order, lengths, capacity):
            if batching == "packed":
                # What the emptiest sequence holds waits for the next buffer.
                if self.groups:
                    buffer = np.concatenate([self.groups.pop(), buffer])
                found = first_fit_decreasing(buffer, lengths, capacity)
            else:
                by_length = np.argsort(lengths[buffer], kind="stable") if batching == "grouped" else slice(None)
                found = padded_batches(buffer[by_length], lengths, capacity)
            found = [found[i] for i in draw.permutation(len(found))]
            if batching == "packed":
                emptiest = min(range(len(found)), key=lambda i: lengths[found[i]].sum())
                found.append(found.pop(emptiest))
            self.groups += found


def _buffers(order: np.ndarray, lengths: np.ndarray, capacity: int) -> list[np.ndarray]:
    """``order`` cut into parts of about `_BUFFER_SEQUENCES` sequences."""
    ends = np.cumsum(lengths[order])
    targets = np.arange(_BUFFER_SEQUENCES * capacity, ends[-1], _BUFFER_SEQUENCES * capacity)
    return [part for part in np.split(order, np.searchsorted(ends, targets)) if len(part)]


def first_fit_decreasing(examples: np.ndarray, lengths: np.ndarray, capacity: int) -> list[np.ndarray]:
    """``examples`` in sequences of at most ``capacity`` tokens: the longest first, each into the first that has room.

    Needs at most 11/9 of the fewest possible sequences (Johnson, "Near-optimal bin packing algorithms", 1973).
    """
    free = np.full(len(examples), capacity)
    members: list[list[int]] = []
    for i in examples[np.argsort(-lengths[examples], kind="stable")]:
        place = int(np.argmax(free[: len(members) + 1] >= lengths[i]))
        if place == len(members):
            members.append([])
        members[place].append(i)
        free[place] -= lengths[i]
    return [np.array(own) for own in members]


def padded_batches(examples: np.ndarray, lengths: np.ndarray, capacity: int) -> list[np.ndarray]:
    """``examples``, in their order, in batches whose rows times longest example are at most ``capacity``."""
    batches: list[list[int]] = []
    longest = 0
    for i in examples:
        longest = max(longest, lengths[i])
        if not batches or longest * (len(batches[-1]) + 1) > capacity:
            batches.append([])
            longest = lengths[i]
        batches[-1].append(i)
    return [np.array(own) for own in batches]

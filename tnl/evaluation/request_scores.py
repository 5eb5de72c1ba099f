"""Log-likelihoods of continuations: from token ids to sums, shared beginnings read once."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from tnl.errors import NonFiniteError
from tnl.evaluation.prefix_reader import PrefixReader, Span, on_device
from tnl.evaluation.prefix_tree import Read
from tnl.evaluation.token_scores import PendingScores, token_scores

Score = tuple[float, bool]


@dataclass(frozen=True, eq=False)
class Continuation:
    """Tokens to score, behind tokens that the model reads before them.

    Attributes:
        ids: int64 [T], to be scored, at least one.
        sequence: index of the sequence that the model reads: the context and all but the last of ``ids``.
        name: of the request, for errors.
    """

    ids: np.ndarray
    sequence: int
    name: str


class RequestScores:
    """Sums up the scores of continuations while a `PrefixReader` reads.

    Args:
        continuations: what is asked for, by index.
        finished: called after a forward pass with the scores of the continuations that it completed, by index.
    """

    def __init__(
        self, model, continuations: dict[int, Continuation], finished: Callable[[dict[int, Score]], None]
    ) -> None:
        self._model, self._continuations, self._finished = model, continuations, finished
        self._indices = np.array(list(continuations), dtype=np.int64)
        self._places = {index: place for place, index in enumerate(continuations)}
        lengths = [len(continuation.ids) for continuation in continuations.values()]
        self._missing = np.array(lengths, dtype=np.int64)
        self._sums = np.zeros(len(lengths))
        self._greedy = np.ones(len(lengths), dtype=bool)
        # By read: index, its first and last position here, and how many tokens its sequence has.
        self._wanted: dict[Read, list[tuple[int, int, int, int]]] = {}
        self._pending: PendingScores | None = None

    def compute(self, reader: PrefixReader, sequences: Sequence[np.ndarray], asked: Sequence[list[int]]) -> None:
        """Read ``sequences``, as `PrefixReader.run` takes them; ``asked[i]`` are indices of what sequence i is for.

        Raises:
            NonFiniteError: a log-likelihood is NaN or infinite.
        """
        reader.run(sequences, before=lambda tops: self._want(tops, sequences, asked), on_hidden=self._score)
        self._collect()
        assert not self._missing.any(), "every token that is asked for is read"

    def _want(self, tops: Iterable[Read], sequences: Sequence[np.ndarray], asked: Sequence[list[int]]) -> None:
        todo = list(tops)
        while todo:
            read = todo.pop()
            todo.extend(read.children)
            for sequence in read.sequences:
                end = len(sequences[sequence])
                for index in asked[sequence]:
                    begin = end - len(self._continuations[index].ids)
                    for part, first, last in read.parts(begin, end):
                        self._wanted.setdefault(part, []).append((index, first, last, begin))

    def _score(self, spans: list[Span], hidden: torch.Tensor) -> None:
        """Score what is wanted of ``hidden`` [T, D], and take in the scores of the forward pass before."""
        places, targets, owners, offset = [], [], [], 0
        for read, start, stop in spans:
            for index, first, last, begin in self._wanted.get(read, ()):
                a, b = max(first, start), min(last, stop)
                if a < b:
                    places.append(np.arange(a, b) - start + offset)
                    targets.append(self._continuations[index].ids[a - begin : b - begin])
                    owners.append(np.full(b - a, self._places[index]))
            offset += stop - start
        before, self._pending = self._pending, None
        if places:
            rows, labels = (on_device(np.concatenate(x), hidden.device) for x in (places, targets))
            scores, greedy = token_scores(self._model, hidden[rows], labels)
            self._pending = PendingScores(np.concatenate(owners), scores, greedy)
        if before is not None:
            self._take(before)

    def _collect(self) -> None:
        if self._pending is not None:
            self._take(self._pending)
            self._pending = None

    def _take(self, pending: PendingScores) -> None:
        scores, greedy = pending.arrays()
        owners = pending.owners
        np.add.at(self._sums, owners, scores.astype(np.float64))
        np.logical_and.at(self._greedy, owners, greedy)
        np.subtract.at(self._missing, owners, 1)
        touched = np.unique(owners)
        done: dict[int, Score] = {}
        for place in touched[self._missing[touched] == 0].tolist():
            index = int(self._indices[place])
            value = float(self._sums[place])
            if not math.isfinite(value):
                raise NonFiniteError(
                    f"{self._continuations[index].name}: its log-likelihood is {value}; the weights are not finite or "
                    "the dtype is too narrow for them: evaluate in float32, or another checkpoint"
                )
            done[index] = (value, bool(self._greedy[place]))
        self._finished(done)

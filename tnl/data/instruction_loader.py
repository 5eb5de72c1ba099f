"""Micro-batches of instruction data whose order is a pure function of (seed, data fingerprint, step)."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import Dataset

from tnl.data.examples import ExampleSet
from tnl.data.loader import iterate_steps
from tnl.data.packing import EpochPlan, first_fit_decreasing
from tnl.errors import ConfigError
from tnl.model.loss import IGNORE_INDEX

MicroBatch = dict[str, torch.Tensor | None]


@dataclass(frozen=True)
class BatchingStatistics:
    """One epoch: how many sequences (or padded batches) it has, and what they hold."""

    sequences: int
    tokens: int  # of examples
    trained_tokens: int
    positions: int  # that are computed, padding included

    @property
    def waste(self) -> float:
        """The part of the positions that holds no example."""
        return 1 - self.tokens / self.positions


class _Groups:
    """Group i of the endless row of epochs; the plans of the last two epochs asked for are kept."""

    def __init__(self, examples: ExampleSet, sequence_length: int, batching: str, seed: int) -> None:
        self._lengths, self._capacity, self._batching = examples.lengths, sequence_length, batching
        self._key = f"{seed}:{examples.fingerprint}"
        self._plans: dict[int, EpochPlan] = {}
        self.firsts = [0]  # number of the first group of each epoch known so far

    def plan(self, epoch: int) -> EpochPlan:
        """The plan of an epoch counted from 0."""
        if epoch not in self._plans:
            plan = EpochPlan(self._lengths, self._capacity, self._batching, f"{self._key}:{epoch}")
            self._plans = {epoch: plan} | {other: self._plans[other] for other in self._plans if other == epoch - 1}
        return self._plans[epoch]

    def first(self, epoch: int) -> int:
        """Number of the first group of an epoch."""
        while len(self.firsts) <= epoch:
            self.firsts.append(self.firsts[-1] + len(self.plan(len(self.firsts) - 1).groups))
        return self.firsts[epoch]

    def group(self, i: int) -> np.ndarray:
        """Numbers of the examples in group ``i``."""
        while self.firsts[-1] <= i:
            self.first(len(self.firsts))
        epoch = int(np.searchsorted(self.firsts, i, side="right")) - 1
        return self.plan(epoch).groups[i - self.firsts[epoch]]


class _MicroBatches(Dataset):
    """Micro-batch m of one rank, counted from the first step of training."""

    def __init__(self, collate, groups: _Groups, micro_batch: int, per_step: int, rank: int, world_size: int) -> None:
        self._collate, self._groups, self._micro_batch, self._per_step = collate, groups, micro_batch, per_step
        self._rank, self._world_size = rank, world_size

    def __getitem__(self, m: int) -> MicroBatch:
        step, i_micro = divmod(m, self._per_step)
        first = ((step * self._world_size + self._rank) * self._per_step + i_micro) * self._micro_batch
        samples = range(first, first + self._micro_batch)
        return self._collate([self._groups.group(i) for i in samples]) | {"sample_ids": torch.tensor(samples)}


class InstructionLoader:
    """The micro-batches of rank ``rank`` of ``world_size``; has what the training loop uses of `TrainLoader`.

    Step s consumes the groups s * global_batch up to (s + 1) * global_batch of the endless row of epochs, in each of
    which every example comes exactly once; a rank takes a contiguous slice of them. So neither the number of ranks,
    nor the micro-batch, nor the number of workers, nor a restart changes what a step sees.

    A micro-batch is a dict of CPU tensors. ``packed``, L the sequence length and N segments:
      input_ids   int64 [1, micro_batch * L]
      labels      the same where a token is trained on, -100 elsewhere: at the first token of each example, too, which
                  would be predicted from the example before; the model predicts labels[t + 1] at position t
      cu_seqlens  int32 [N + 1], segment bounds from 0: a segment is an example, or what fills up a sequence
      sample_ids  int64 [micro_batch], numbers of the groups
    ``grouped`` and ``padded``: input_ids and labels are [B, T], padded on the right, which a causal model does not see;
    B * T is at most L; cu_seqlens is None.

    Attributes: ``fingerprint`` (hex, of the examples), ``micro_batches_per_step``, ``steps_per_epoch`` (float, of the
    first epoch; others may have a group more or less).
    """

    def __init__(
        self,
        examples: ExampleSet,
        sequence_length: int,
        global_batch: int,
        micro_batch: int,
        *,
        pad_id: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        batching: str = "packed",
        num_workers: int = 0,
    ) -> None:
        """``pad_id`` fills up; any id of the model. Raises `ConfigError`; that the batch sizes divide is the caller's
        promise."""
        assert global_batch > 0
        assert global_batch % (micro_batch * world_size) == 0
        assert 0 <= rank < world_size
        if batching != "packed" and micro_batch > 1:
            raise ConfigError(
                f"data.batching: {batching} takes one batch of at most train.sequence_length tokens a pass; set "
                "train.micro_batch_size: 1 and a larger train.sequence_length"
            )
        self._examples, self._length, self._batching = examples, sequence_length, batching
        self._global_batch, self._num_workers = global_batch, num_workers
        self.fingerprint = examples.fingerprint
        self.micro_batches_per_step = global_batch // (micro_batch * world_size)
        self._groups = _Groups(examples, sequence_length, batching, seed)
        self.steps_per_epoch = self._groups.first(1) / global_batch
        collate = _Packed(examples, sequence_length, pad_id) if batching == "packed" else _Padded(examples, pad_id)
        self._micro_batches = _MicroBatches(
            collate, self._groups, micro_batch, self.micro_batches_per_step, rank, world_size
        )

    def steps(self, start_step: int, end_step: int) -> Iterator[list[MicroBatch]]:
        """The micro-batches of each step in ``[start_step, end_step)``: one list per step."""
        return iterate_steps(
            self._micro_batches, start_step, end_step, self.micro_batches_per_step, num_workers=self._num_workers
        )

    def statistics(self, epoch: int = 0) -> BatchingStatistics:
        """What an epoch, counted from 0, consists of."""
        groups, lengths = self._groups.plan(epoch).groups, self._examples.lengths
        if self._batching == "packed":
            positions = len(groups) * self._length
        else:
            positions = sum(int(len(group) * lengths[group].max()) for group in groups)
        return BatchingStatistics(len(groups), int(lengths.sum()), int(self._examples.trained.sum()), positions)


def heldout_batches(
    examples: ExampleSet,
    sequence_length: int,
    *,
    pad_id: int,
    max_tokens: int | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[MicroBatch]:
    """Rank ``rank``'s share of ``examples``, each once, in packed micro-batches of one sequence as `InstructionLoader`
    gives them.

    Shares have equally many micro-batches, for under ZeRO-3 every pass is one of all ranks: some may be empty, without
    a label. ``max_tokens`` leaves out examples beyond about so many tokens, the same ones each time.
    """
    chosen = np.random.RandomState(0).permutation(len(examples))
    if max_tokens is not None:
        chosen = chosen[: max(1, np.searchsorted(np.cumsum(examples.lengths[chosen]), max_tokens, side="right"))]
    groups = first_fit_decreasing(chosen, examples.lengths, sequence_length)
    groups += [np.empty(0, np.int64)] * (-len(groups) % world_size)
    collate = _Packed(examples, sequence_length, pad_id)
    for group in groups[rank::world_size]:
        yield collate([group])


class _Packed:
    """Makes a micro-batch of groups, one sequence of ``length`` tokens each."""

    def __init__(self, examples: ExampleSet, length: int, pad_id: int) -> None:
        self._examples, self._length, self._pad_id = examples, length, pad_id

    def __call__(self, groups: list[np.ndarray]) -> MicroBatch:
        ids = np.full((len(groups), self._length), self._pad_id, np.int64)
        labels = np.full_like(ids, IGNORE_INDEX)
        bounds = [0]
        for i_row, group in enumerate(groups):
            start = 0
            for example in group:
                own, trained = self._examples[example]
                stop = start + len(own)
                ids[i_row, start:stop] = own
                labels[i_row, start + 1 : stop] = np.where(trained, own, IGNORE_INDEX)[1:]
                bounds.append(i_row * self._length + stop)
                start = stop
            if start < self._length:
                bounds.append((i_row + 1) * self._length)
        return {
            "input_ids": torch.from_numpy(ids.reshape(1, -1)),
            "labels": torch.from_numpy(labels.reshape(1, -1)),
            "cu_seqlens": torch.tensor(bounds, dtype=torch.int32),
        }


class _Padded:
    """Makes a micro-batch of one group, one row an example."""

    def __init__(self, examples: ExampleSet, pad_id: int) -> None:
        self._examples, self._pad_id = examples, pad_id

    def __call__(self, groups: list[np.ndarray]) -> MicroBatch:
        (group,) = groups
        shape = len(group), int(self._examples.lengths[group].max())
        ids, labels = np.full(shape, self._pad_id, np.int64), np.full(shape, IGNORE_INDEX, np.int64)
        for i_row, example in enumerate(group):
            own, trained = self._examples[example]
            ids[i_row, : len(own)] = own
            labels[i_row, 1 : len(own)] = np.where(trained, own, IGNORE_INDEX)[1:]
        return {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(labels), "cu_seqlens": None}

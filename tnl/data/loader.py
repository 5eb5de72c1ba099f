"""Micro-batches whose order is a pure function of (seed, data fingerprint, sample number).

The train stream is read as a ring of T tokens. Epoch e cuts it into W = (T - 1) // (L - 1) windows of L = ``seq_len``
tokens that overlap by one token, since a window predicts all its tokens but the first. The cut begins at another token
and the windows come in another order in each epoch. Global sample i is window i mod W of epoch i // W.
"""

import hashlib
import signal
from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from tnl.data.permutation import permute
from tnl.data.sequence_slices import slice_windows
from tnl.data.shards import ShardSet
from tnl.errors import ConfigError, DataError
from tnl.model.loss import IGNORE_INDEX


class Windows:
    """Global sample i of ``shards``: a window of ``seq_len`` tokens, as a function of (seed, fingerprint, i) alone."""

    def __init__(self, shards: ShardSet, seq_len: int, seed: int) -> None:
        """Raises `ConfigError` for ``seq_len`` < 2 and `DataError` when ``shards`` do not fill one window."""
        if seq_len < 2:
            raise ConfigError(f"train.sequence_length: {seq_len} predicts no token; set it to at least 2")
        if shards.num_tokens < seq_len:
            raise DataError(
                f"{shards.folder}: {shards.num_tokens} tokens in split {shards.split} do not fill one window of "
                f"train.sequence_length {seq_len}; give more text or a smaller train.sequence_length"
            )
        self.shards, self.seq_len = shards, seq_len
        self.num_windows = (shards.num_tokens - 1) // (seq_len - 1)
        self._key = f"{seed}:{shards.fingerprint}"

    def start(self, sample: int) -> int:
        """Stream position of the first token of ``sample``."""
        epoch, i_window = divmod(sample, self.num_windows)
        key = hashlib.sha256(f"{self._key}:{epoch}".encode()).digest()
        offset = int.from_bytes(key, "little") % self.shards.num_tokens
        window = permute(i_window, self.num_windows, key)
        return (offset + window * (self.seq_len - 1)) % self.shards.num_tokens

    def tokens(self, sample: int) -> np.ndarray:
        """Ids of ``sample``, [seq_len] of the shards' dtype."""
        return np.concatenate([self.shards.tokens(*part) for part in self._parts(self.start(sample))])

    def document_starts(self, sample: int) -> np.ndarray:
        """Ascending positions within ``sample`` at which a document starts, int64 [n]."""
        found, before = [], 0
        for start, stop in self._parts(self.start(sample)):
            found.append(self.shards.document_starts(start, stop) - start + before)
            before += stop - start
        return np.concatenate(found)

    def _parts(self, start: int) -> list[tuple[int, int]]:
        """The one or two ranges of the stream that the window at ``start`` covers; its beginning follows its end."""
        stop = start + self.seq_len
        beyond = stop - self.shards.num_tokens
        return [(start, stop)] if beyond <= 0 else [(start, self.shards.num_tokens), (0, beyond)]


class _MicroBatches(Dataset):
    """Micro-batch m of one rank, counted from the first step of training."""

    def __init__(
        self,
        windows: Windows,
        micro_batch: int,
        per_step: int,
        rank: int,
        world_size: int,
        sequence_rank: int,
        sequence_size: int,
        packing: bool,
    ) -> None:
        self._windows, self._micro_batch, self._per_step = windows, micro_batch, per_step
        self._rank, self._world_size, self._packing = rank, world_size, packing
        self._sequence_rank, self._sequence_size = sequence_rank, sequence_size

    def __getitem__(self, m: int) -> dict[str, torch.Tensor | None]:
        step, i_micro = divmod(m, self._per_step)
        first = ((step * self._world_size + self._rank) * self._per_step + i_micro) * self._micro_batch
        samples = range(first, first + self._micro_batch)
        tokens = np.stack([self._windows.tokens(i) for i in samples]).astype(np.int64)  # [micro_batch, seq_len]
        sample_ids = torch.arange(samples.start, samples.stop)
        if self._sequence_size > 1:
            starts = [self._windows.document_starts(i) for i in samples] if self._packing else None
            return slice_windows(tokens, starts, self._sequence_rank, self._sequence_size) | {"sample_ids": sample_ids}
        if not self._packing:
            input_ids = torch.from_numpy(tokens)
            return {"input_ids": input_ids, "labels": input_ids.clone(), "cu_seqlens": None, "sample_ids": sample_ids}
        seq_len = self._windows.seq_len
        bounds = [np.arange(0, tokens.size + 1, seq_len)]
        bounds += [self._windows.document_starts(i) + j * seq_len for j, i in enumerate(samples)]
        cu_seqlens = np.unique(np.concatenate(bounds))
        input_ids = torch.from_numpy(tokens.reshape(1, -1))  # [1, micro_batch * seq_len]
        labels = input_ids.clone()
        labels[0, cu_seqlens[:-1]] = IGNORE_INDEX
        cu_seqlens = torch.from_numpy(cu_seqlens.astype(np.int32))
        return {"input_ids": input_ids, "labels": labels, "cu_seqlens": cu_seqlens, "sample_ids": sample_ids}


class TrainLoader:
    """The micro-batches of rank ``rank`` of ``world_size``, or of one slice of its windows.

    Step s consumes the global samples s * global_batch up to (s + 1) * global_batch; a rank takes a contiguous slice
    of them and cuts it into micro-batches of ``micro_batch`` windows. So neither the number of ranks, nor the
    micro-batch, nor the number of workers, nor a restart changes which tokens a step sees, or their order.

    A micro-batch is a dict of CPU tensors. With N segments (``packing``):
      input_ids   int64 [1, micro_batch * seq_len]
      labels      the same; -100 at the first token of each segment, for the model predicts labels[t + 1] at position t
      cu_seqlens  int32 [N + 1], segment bounds from 0: a segment starts at each window and at each document
      sample_ids  int64 [micro_batch], global samples
    Without ``packing`` input_ids and labels are [micro_batch, seq_len] and equal, cu_seqlens is None, and a window is
    one text. Of ``sequence_size`` ranks that share the windows of one ``rank``, each gets slice ``sequence_rank`` of
    every window, as `tnl.data.sequence_slices.slice_windows` gives it: shift_labels instead of labels.

    Attributes: ``num_windows`` (samples per epoch), ``fingerprint`` (hex, of the data), ``micro_batches_per_step``.
    """

    def __init__(
        self,
        shards: ShardSet,
        seq_len: int,
        global_batch: int,
        micro_batch: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        sequence_rank: int = 0,
        sequence_size: int = 1,
        packing: bool = True,
        num_workers: int = 0,
    ) -> None:
        """Raises as `Windows` does; that the batch sizes divide is the caller's promise."""
        assert global_batch > 0
        assert global_batch % (micro_batch * world_size) == 0
        assert 0 <= rank < world_size
        assert 0 <= sequence_rank < sequence_size
        assert seq_len % sequence_size == 0
        self._windows = Windows(shards, seq_len, seed)
        self._global_batch, self._num_workers = global_batch, num_workers
        self.num_windows, self.fingerprint = self._windows.num_windows, shards.fingerprint
        self.micro_batches_per_step = global_batch // (micro_batch * world_size)
        self._micro_batches = _MicroBatches(
            self._windows,
            micro_batch,
            self.micro_batches_per_step,
            rank,
            world_size,
            sequence_rank,
            sequence_size,
            packing,
        )

    def steps(self, start_step: int, end_step: int) -> Iterator[list[dict[str, torch.Tensor | None]]]:
        """The micro-batches of each step in ``[start_step, end_step)``: one list per step."""
        return iterate_steps(
            self._micro_batches, start_step, end_step, self.micro_batches_per_step, num_workers=self._num_workers
        )

    def windows_consumed(self, start_step: int, end_step: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """What all ranks together consume in steps ``[start_step, end_step)``, in order: one window at a time.

        Yields ids [seq_len] and the positions, int64 [n], at which a document starts in them.
        """
        for sample in range(start_step * self._global_batch, end_step * self._global_batch):
            yield self._windows.tokens(sample), self._windows.document_starts(sample)


def iterate_steps(
    micro_batches: Dataset, start_step: int, end_step: int, per_step: int, *, num_workers: int
) -> Iterator[list[dict[str, torch.Tensor | None]]]:
    """The micro-batches of each step in ``[start_step, end_step)``, of which ``micro_batches[m]`` gives number m."""
    loader = DataLoader(
        micro_batches,
        sampler=range(start_step * per_step, end_step * per_step),
        batch_size=None,
        num_workers=num_workers,
        worker_init_fn=_leave_signals_to_the_loop,
        # The loader draws a seed for its workers; from here, it does not advance torch's global generator.
        generator=torch.Generator(),
    )
    step = []
    for micro_batch in loader:
        step.append(micro_batch)
        if len(step) == per_step:
            yield step
            step = []


def num_labelled(micro_batch: dict[str, torch.Tensor | None]) -> int:
    """How many tokens a micro-batch of `TrainLoader` asks the model to predict."""
    labels = micro_batch["shift_labels"] if "shift_labels" in micro_batch else micro_batch["labels"][:, 1:]
    return (labels >= 0).sum().item()


def _leave_signals_to_the_loop(worker: int) -> None:
    """Ctrl-C and SIGTERM reach the whole process group, but the loop still needs its workers to finish the step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

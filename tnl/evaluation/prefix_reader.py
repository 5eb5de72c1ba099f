"""Reading a tree of shared beginnings: packed forward passes without padding, from forked states, in bounded memory."""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import numpy as np
import torch

from tnl.evaluation.prefix_tree import MAX_LEVELS, Read, plan_reads
from tnl.model.state import TransnormerState, state_bytes

# A read, and the positions of it that a forward pass holds.
Span = tuple[Read, int, int]


def on_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """A tensor of ``array``, without waiting for the device."""
    tensor = torch.from_numpy(array)
    return tensor.to(device) if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


class ForkedState(TransnormerState):
    """Sequences that go on from sequences of another state.

    Each layer is gathered when the model asks for it: unless they are kept, the states of one layer exist at a time.

    Args:
        state: what was read; not changed.
        sources: int64 [N] in host memory: sequence n goes on from sequence ``sources[n]``.
    """

    def __init__(self, state: TransnormerState, sources: torch.Tensor):
        super().__init__()
        self._sources = sources.to(state.positions.device, non_blocking=True)
        self.layers = list(state.layers)
        self.positions = state.positions.index_select(0, self._sources)

    def layer(self, index: int) -> torch.Tensor:
        """State [N, H, K, V] of one layer."""
        state = self.layers[index]
        return state if self._sources is None else state.index_select(0, self._sources.to(state.device))

    def update(self, layers: list[torch.Tensor], positions: torch.Tensor, num_columns: int) -> None:
        """As `TransnormerState.update`; from here on the states are its own."""
        self._sources = None
        super().update(layers, positions, num_columns)


class PrefixReader:
    """Reads token sequences so that a shared beginning is read once.

    Attributes:
        batch_tokens: of a forward pass, at most.
        tokens_read: by the model so far.
    """

    def __init__(self, model: torch.nn.Module, batch_tokens: int, max_state_bytes: int):
        """
        Args:
            model: `TransnormerForCausalLM`.
            batch_tokens: see above.
            max_state_bytes: of all states that are held at a time, at most; one for each level is always held.
        """
        self._model, self.batch_tokens, self._max_state_bytes = model, batch_tokens, max_state_bytes
        self.tokens_read = 0

    @torch.no_grad()
    def run(
        self,
        sequences: Sequence[np.ndarray],
        *,
        before: Callable[[list[Read]], None] = lambda reads: None,
        on_hidden: Callable[[list[Span], torch.Tensor], None] = lambda spans, hidden: None,
        on_leaves: Callable[[list[Read], TransnormerState | None], None] | None = None,
        shares: bool = True,
    ) -> None:
        """Read ``sequences``, as `plan_reads` takes them.

        Args:
            before: called once with the reads at the top of the tree.
            on_hidden: called after each forward pass with what it held, side by side, and its hidden states [T, D].
            on_leaves: called with leaves, which it reads itself, and with the state that they go on from (their
                ``source`` is the place in it), None at the start.
            shares: False reads every sequence by itself.
        """
        tops, levels = plan_reads(sequences, MAX_LEVELS if shares else 0)
        before(tops)
        # Leaves that generate hold states, too.
        levels += on_leaves is not None
        rows = max(1, self._max_state_bytes // (state_bytes(self._model.config) * max(1, levels)))
        self._visit(tops, None, rows, on_hidden, on_leaves)

    def _visit(self, reads: list[Read], state: TransnormerState | None, rows: int, on_hidden, on_leaves) -> None:
        for batch in self._batches([read for read in reads if read.children], rows):
            after = self._forward(batch, state, True, on_hidden)
            for i, read in enumerate(batch):
                for child in read.children:
                    child.source = i
            self._visit([child for read in batch for child in read.children], after, rows, on_hidden, on_leaves)
            del after  # before the next batch makes its own
        leaves = [read for read in reads if not read.children]
        if on_leaves is not None:
            rows = min(rows, self.batch_tokens)  # each of them reads a token in every step
            for i in range(0, len(leaves), rows):
                batch = leaves[i : i + rows]
                self.tokens_read += sum(len(read.ids) for read in batch)
                on_leaves(batch, state)
            return
        # Of states that are not kept, those of one layer exist at a time.
        for batch in self._batches(leaves, rows * self._model.config.decoder_layers // 2 if state else None):
            self._forward(batch, state, False, on_hidden)

    def _batches(self, reads: list[Read], max_rows: int | None) -> Iterator[list[Read]]:
        """Cut ``reads`` into batches of ``batch_tokens``; a longer read stands alone."""
        batch, tokens = [], 0
        for read in reads:
            if batch and (tokens + len(read.ids) > self.batch_tokens or len(batch) == max_rows):
                yield batch
                batch, tokens = [], 0
            batch.append(read)
            tokens += len(read.ids)
        if batch:
            yield batch

    def _forward(
        self, batch: list[Read], state: TransnormerState | None, keep: bool, on_hidden
    ) -> TransnormerState | None:
        """Read ``batch`` behind ``state``; the state after it, if that is to be kept."""
        current = None if state is None else ForkedState(state, torch.tensor([read.source for read in batch]))
        passes = [[(read, read.start, read.end) for read in batch]]
        if len(batch) == 1:
            (read,) = batch
            edges = [*range(read.start, read.end, self.batch_tokens), read.end]
            passes = [[(read, a, b)] for a, b in pairwise(edges)]
        for i, spans in enumerate(passes):
            holds = keep or i < len(passes) - 1
            if holds and current is None:
                current = TransnormerState()
            ids = np.concatenate([read.ids[a - read.start : b - read.start] for read, a, b in spans])
            offsets = np.cumsum([0, *(b - a for _, a, b in spans)])
            self.tokens_read += len(ids)
            output = self._model.model(
                on_device(ids.astype(np.int64), self._model.device)[None],
                cu_seqlens=on_device(offsets.astype(np.int32), self._model.device),
                past_key_values=current,
                use_cache=holds,
            )
            on_hidden(spans, output.last_hidden_state[0])
        return current if keep else None

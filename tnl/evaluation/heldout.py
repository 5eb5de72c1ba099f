"""Held-out loss of a model: nats and bits per token, bits per byte of text."""

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import numpy as np
import torch

from tnl.data.shard_format import TOKENIZER_FILE
from tnl.data.shards import ShardSet
from tnl.data.tokenizer import Tokenizer
from tnl.model.loss import IGNORE_INDEX
from tnl.model.state import TransnormerState


@dataclass(frozen=True)
class HeldoutLoss:
    """Sum of the loss over the predicted tokens; every token but the first of each document is predicted."""

    loss_sum: float  # nats
    num_predicted: int
    num_tokens: int
    num_bytes: int | None  # UTF-8 bytes that the predicted tokens stand for; None when only part of the split was read

    @property
    def loss(self) -> float:
        """Mean nats per predicted token."""
        return self.loss_sum / max(1, self.num_predicted)

    @property
    def bits_per_token(self) -> float:
        """The same in bits."""
        return self.loss / math.log(2)

    @property
    def bits_per_byte(self) -> float | None:
        """All bits over all bytes that were predicted: independent of the tokenizer."""
        return self.loss_sum / math.log(2) / self.num_bytes if self.num_bytes else None

    def row(self) -> dict:
        """Figures as JSON values."""
        return asdict(self) | {
            "loss": self.loss,
            "bits_per_token": self.bits_per_token,
            "bits_per_byte": self.bits_per_byte,
        }


@dataclass(frozen=True)
class Segment:
    """Consecutive tokens of the held-out stream, for one forward pass."""

    input_ids: torch.Tensor  # int64 [1, L]
    shift_labels: torch.Tensor  # int64 [1, L]
    cu_seqlens: torch.Tensor  # int32 [N + 1]
    continues: bool  # whether the first sequence goes on from the segment before


def segments(shards: ShardSet, num_tokens: int, length: int, window: int | None) -> Iterator[Segment]:
    """Cut the first ``num_tokens`` tokens of a split into segments of ``length`` tokens.

    Args:
        window: restart the context every so many tokens, as training windows do; None carries the state through each
            document. ``length`` must be a multiple or a divisor of it.
    """
    for start in range(0, num_tokens, length):
        stop = min(start + length, num_tokens)
        ids = torch.from_numpy(shards.tokens(start, min(stop + 1, num_tokens)).astype(np.int64))
        begins = torch.from_numpy(np.asarray(shards.document_starts(start, stop), dtype=np.int64)) - start
        after = shards.document_starts(stop, min(stop + 1, shards.num_tokens))
        labels = torch.full((stop - start,), IGNORE_INDEX, dtype=torch.int64)
        labels[: len(ids) - 1] = ids[1 : len(labels) + 1]
        labels[begins[begins > 0] - 1] = IGNORE_INDEX  # nothing is predicted across a document's end
        if len(after):
            labels[-1] = IGNORE_INDEX
        edges = [torch.tensor([0, stop - start]), begins]
        if window is not None:
            edges.append(torch.arange(0, stop - start, window))
        cu_seqlens = torch.cat(edges).unique().int()
        goes_on = start > 0 if window is None else start % window > 0
        continues = goes_on and not (len(begins) and begins[0] == 0)
        yield Segment(ids[: stop - start].unsqueeze(0), labels.unsqueeze(0), cu_seqlens, continues)


def _carried(state: TransnormerState | None, segment: Segment) -> TransnormerState:
    """Initial state of a segment: the last document of the one before goes on, all others start empty."""
    if state is None or not segment.continues:
        return TransnormerState()
    sources = torch.full((len(segment.cu_seqlens) - 1,), -1)
    sources[0] = len(state.positions) - 1
    return state.continued(sources)


def _predicted_bytes(shards: ShardSet) -> int:
    """UTF-8 bytes of a split but those of each document's first token, which nothing predicts; bos has none."""
    if shards.index.add_bos:
        return shards.num_bytes
    tokenizer = Tokenizer.load(shards.folder / TOKENIZER_FILE)
    starts = shards.document_starts(0, shards.num_tokens).tolist()
    return shards.num_bytes - sum(tokenizer.num_bytes(int(shards.tokens(i, i + 1)[0])) for i in starts)


@torch.no_grad()
def heldout_loss(
    model: torch.nn.Module,
    shards: ShardSet,
    *,
    device: torch.device,
    max_tokens: int | None = None,
    length: int = 4096,
    window: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    all_reduce: Callable[[list[float]], list[float]] = lambda values: values,
) -> HeldoutLoss:
    """Loss of ``model`` on a held-out split.

    Args:
        shards: a split, or a `tnl.evaluation.source_loss.SourceDocuments` of one.
        model: `TransnormerForCausalLM`, or a DeepSpeed engine around one; a `LlamaBaseline` with a ``window`` only.
        max_tokens: read the first so many tokens only.
        window: restart the context every so many tokens; None gives every document its full context, in constant
            memory.
        length: tokens of a forward pass; a multiple or a divisor of ``window``.
        rank, world_size: read every ``world_size``-th segment, or window where that is longer; needs ``window``. All
            ranks make equally many forward passes, because under ZeRO-3 each of them is a collective.
        all_reduce: sums a list over the ranks.
    """
    assert world_size == 1 or window is not None
    total = min(shards.num_tokens, max_tokens or shards.num_tokens)
    was_training = model.training
    model.eval()
    loss_sum, predicted, state = 0.0, 0, None
    carries = window is None or length < window
    per_turn = 1 if window is None else max(1, window // length)  # segments that one rank must read in a row
    rounds = per_turn * math.ceil(total / (length * per_turn) / world_size)
    mine = (s for i, s in enumerate(segments(shards, total, length, window)) if i // per_turn % world_size == rank)
    for _ in range(rounds):
        segment = next(mine, None)
        counts = segment is not None
        if not counts:
            ids = torch.zeros(1, 1, dtype=torch.int64)
            segment = Segment(ids, torch.full_like(ids, IGNORE_INDEX), torch.tensor([0, 1], dtype=torch.int32), False)
        state = _carried(state, segment) if carries else None
        output = model(
            input_ids=segment.input_ids.to(device),
            shift_labels=segment.shift_labels.to(device),
            cu_seqlens=segment.cu_seqlens.to(device),
            past_key_values=state,
            use_cache=state is not None,
        )
        loss_sum += output.loss_sum.item()
        predicted += output.num_tokens.item()
    model.train(was_training)
    loss_sum, predicted = all_reduce([loss_sum, float(predicted)])
    knows_bytes = total == shards.num_tokens and shards.num_bytes is not None
    num_bytes = _predicted_bytes(shards) if knows_bytes else None
    return HeldoutLoss(loss_sum, int(predicted), total, num_bytes)

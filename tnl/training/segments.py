"""Training windows longer than memory: run segment by segment, with the recurrent state carried from each to the next.

The loss is that of the whole window. ``truncated`` lets no gradient pass from a segment to the one before: one forward
and backward pass per segment. ``exact`` gives the gradient of the whole window at the memory of one segment and one
state per segment: a first pass without gradients leaves the state at each segment's start, then the segments are run
again from the last to the first, and each hands the gradient of its initial state to the segment before (checkpointing
over time, arXiv 1606.03401; state passing as in LASP, arXiv 2404.02882).
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.autograd.function import once_differentiable

from tnl.model.configuration import TransnormerConfig
from tnl.model.loss import IGNORE_INDEX
from tnl.model.state import TransnormerState, state_shapes
from tnl.training.settings import TrainSettings
from tnl.training.transfer import to_device


@dataclass(frozen=True)
class Segment:
    """The same columns of B windows, in host memory, with N sequences: documents when packed, otherwise the windows."""

    input_ids: torch.Tensor  # int64 [B, length], packed [1, B * length]
    shift_labels: torch.Tensor  # the same; the next token of the window, also where it is in the next segment
    cu_seqlens: torch.Tensor | None  # int32 [N + 1] when packed
    taken: torch.Tensor  # int64 [M], which sequences of the segment before go on in this one
    sources: torch.Tensor  # int64 [N], which of those M each sequence goes on from; -1 where it begins here

    def inputs(self, device: torch.device) -> dict[str, torch.Tensor | None]:
        """Arguments of the model but labels and state."""
        tensors = {"input_ids": self.input_ids, "cu_seqlens": self.cu_seqlens}
        return {name: None if t is None else to_device(t, device) for name, t in tensors.items()}


def cut(batch: dict[str, torch.Tensor | None], sequence_length: int, length: int) -> list[Segment]:
    """Cut a micro-batch of `TrainLoader` into ``sequence_length / length`` segments of its windows."""
    cu_seqlens, count = batch["cu_seqlens"], sequence_length // length
    labels = torch.full_like(batch["labels"], IGNORE_INDEX)
    labels[:, :-1] = batch["labels"][:, 1:]
    # [B, count, length]
    ids, labels = (x.reshape(-1, count, length) for x in (batch["input_ids"], labels))
    B = len(ids)
    windows = torch.arange(B)
    if cu_seqlens is None:
        nothing, beginning = torch.empty(0, dtype=torch.int64), torch.full((B,), -1)
        return [
            Segment(ids[:, i], labels[:, i], None, windows if i else nothing, windows if i else beginning)
            for i in range(count)
        ]
    begins = cu_seqlens[:-1].long()
    i_window, column = begins // sequence_length, begins % sequence_length
    i_segment, local = column // length, i_window * length + column % length
    segments, last = [], torch.full((B,), -1)
    for i in range(count):
        here = local[i_segment == i]  # documents that begin in this segment
        bounds = torch.cat([torch.arange(0, B * length + 1, length), here]).unique()
        num_sequences = len(bounds) - 1
        first = torch.searchsorted(bounds, windows * length)  # each window's first sequence
        goes_on = ~torch.isin(windows * length, here)
        sources = torch.full((num_sequences,), -1)
        sources[first[goes_on]] = torch.arange(int(goes_on.sum()))
        shape = (1, B * length)
        segments.append(
            Segment(ids[:, i].reshape(shape), labels[:, i].reshape(shape), bounds.int(), last[goes_on], sources)
        )
        last = torch.cat([first[1:], torch.tensor([num_sequences])]) - 1
    return segments


class _StateGradient(torch.autograd.Function):
    """The identity of ``loss``, whose backward pass also gives ``states`` the gradients ``dstates``.

    They are handed on as they came out of a backward pass of the same step, so whatever scales the loss (world size,
    labelled tokens, loss scale of fp16) is in them once.
    """

    @staticmethod
    def forward(ctx, loss, num_states, *tensors):
        ctx.save_for_backward(*tensors[num_states:])
        return loss.view_as(loss)

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        dstates = ctx.saved_tensors
        return dloss, None, *dstates, *(None,) * len(dstates)


def segment_losses(
    engine, batch: dict[str, torch.Tensor | None], train: TrainSettings, device: torch.device
) -> Iterator[torch.Tensor]:
    """Loss sums in nats of the segments of a micro-batch, fp32 scalars.

    Before asking for the next one, the caller must run the backward pass of this one, scaled as it likes but alike for
    all of them. ``exact`` gives them from the last segment to the first.

    Args:
        engine: a DeepSpeed engine around a `TransnormerForCausalLM`.
        batch: of `TrainLoader`, in host memory.
    """
    segments = cut(batch, train.sequence_length, train.segment_length)
    # A state of no sequences and not None: so every segment runs the same graph.
    state = _no_sequences(engine.module.config, device)
    if train.segment_gradient == "truncated":
        yield from _truncated(engine, segments, state, device)
    else:
        yield from _exact(engine, segments, state, device)


def _no_sequences(config: TransnormerConfig, device: torch.device) -> TransnormerState:
    state = TransnormerState()
    layers = [torch.zeros(0, *shape, device=device) for shape in state_shapes(config)]
    state.update(layers, torch.zeros(0, dtype=torch.int64, device=device), 0)
    return state


def _loss_sum(engine, segment: Segment, state: TransnormerState, device: torch.device) -> torch.Tensor:
    """Loss sum of a segment from ``state``, which afterwards is that at its end."""
    labels = to_device(segment.shift_labels, device)
    return engine(**segment.inputs(device), shift_labels=labels, past_key_values=state).loss_sum


def _truncated(engine, segments: list[Segment], state: TransnormerState, device) -> Iterator[torch.Tensor]:
    for segment in segments:
        state = state.continued(segment.taken).continued(segment.sources)
        yield _loss_sum(engine, segment, state, device)
        state = state.detach()


def _exact(engine, segments: list[Segment], state: TransnormerState, device) -> Iterator[torch.Tensor]:
    starts = [state]  # before each segment: the states of the sequences that go on in it
    with torch.no_grad():
        for segment, following in itertools.pairwise(segments):
            state = starts[-1].continued(segment.sources)
            engine(**segment.inputs(device), past_key_values=state, logits_to_keep=1)
            starts.append(state.continued(following.taken))
    taken = torch.empty(0, dtype=torch.int64)  # nothing goes on after the last segment
    dstates = [layer.new_zeros(0, *layer.shape[1:]) for layer in starts[0].layers]
    while segments:
        segment, start = segments.pop(), starts.pop()
        for layer in start.layers:
            layer.requires_grad_()
        state = start.continued(segment.sources)
        loss_sum = _loss_sum(engine, segment, state, device)
        ends = state.continued(taken).layers
        yield _StateGradient.apply(loss_sum, len(ends), *ends, *dstates)
        taken, dstates = segment.taken, [layer.grad for layer in start.layers]

"""Lightning attention over a sequence whose slices lie on several ranks (LASP, arXiv 2404.02882), without a ring.

Slice r of a window begins with the state that the slices before it leave behind, and what they leave depends on their
own keys and values alone: ``I_r = sum_{j < r} lambda^((r-1-j) T) C_j`` with ``C_j`` the state of slice j started from
zero. So one all-gather of the ``C_j`` serves all ranks at once. The gradient runs the same way from the other end: the
state after slice r receives ``sum_{j > r} lambda^((j-1-r) T) D_j``, where ``D_j``, the gradient of slice j's initial
state, depends on its own queries and output gradients alone. Handed to the op as the gradient of its final state, it
makes the op's own backward pass exact: no second pass over k and v, and nothing more is kept for it.

States are [H, K, V] fp32: the traffic does not depend on T. Nothing large is left to do while they travel: the output
without the initial state could be made meanwhile, but adding that state's part to it later reads and writes more memory
than the gather costs time. The decays and the places for the states are made in that time.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tnl_kernels import lightning_attention_state
from torch.autograd.function import once_differentiable

from tnl.model.configuration import TransnormerConfig


@dataclass(frozen=True)
class SequenceShard:
    """Where the tokens of a forward pass stand: one of ``group``'s equal slices of B windows.

    Rank r of the group holds slice r of every window. A window is a row of the batch, or, with ``cu_seqlens``, every
    T / B tokens of the packed row, and documents end where it ends.

    Attributes:
        group: the ranks that share the windows; each must make the same forward and backward passes.
        tokens_before: int64 [B], tokens that the first document of the slice has on earlier ranks; 0 where it starts
            here.
        tokens_after: int64 [B], tokens that the last document of the slice has on later ranks.
    """

    group: dist.ProcessGroup
    tokens_before: torch.Tensor
    tokens_after: torch.Tensor

    def exchange(self, B: int, T: int, cu_seqlens: torch.Tensor | None) -> "StateExchange":
        """What the layers need for tokens [B, T], made once for all of them.

        Raises:
            ValueError: the number of windows is not B, or does not divide the packed tokens.
        """
        num_windows = len(self.tokens_before)
        if (cu_seqlens is None and num_windows != B) or T % num_windows:
            raise ValueError(
                f"sequence_shard: {num_windows} windows do not fit an input of [B, T] = {(B, T)}; give one entry of "
                "tokens_before and tokens_after for each row, or for each equal part of the packed row"
            )
        length = T if cu_seqlens is None else T // num_windows
        rank, size = self.group.rank(), self.group.size()
        slices = torch.arange(size, device=self.tokens_before.device).unsqueeze(1)  # [size, 1]
        before, after = (rank - 1 - slices) * length, (slices - rank - 1) * length
        documents, starts = None, self.tokens_before
        if cu_seqlens is not None:
            documents = _EdgeDocuments.of(cu_seqlens, num_windows, T)
            starts = starts.new_zeros(len(cu_seqlens) - 1).index_copy(0, documents.first, starts)
        return StateExchange(
            self.group,
            starts,
            cu_seqlens,
            _Reach(before, (before >= 0) & (self.tokens_before > before)),
            _Reach(after, (after >= 0) & (self.tokens_after > after)),
            documents,
        )


@dataclass(frozen=True)
class _EdgeDocuments:
    """The first and the last document in the slice of each window, found on the device of ``cu_seqlens``."""

    first: torch.Tensor  # int64 [B]
    last: torch.Tensor  # int64 [B]
    heads: torch.Tensor  # int32 [2B + 1], bounds of each window's first document and of the rest of the slice
    tails: torch.Tensor  # int32 [2B + 1], bounds of the rest of the slice and of each window's last document

    @classmethod
    def of(cls, cu_seqlens: torch.Tensor, num_windows: int, T: int) -> "_EdgeDocuments":
        length = T // num_windows
        begins = torch.arange(0, T, length, dtype=torch.int32, device=cu_seqlens.device)
        # Of several documents with this bound, the one that is not empty.
        first = torch.searchsorted(cu_seqlens, begins, right=True) - 1
        last = torch.searchsorted(cu_seqlens, begins + length) - 1
        end = begins[:1] + T
        heads = torch.cat([torch.stack([begins, cu_seqlens[first + 1]], 1).flatten(), end])
        tails = torch.cat([torch.stack([begins, cu_seqlens[last]], 1).flatten(), end])
        return cls(first, last, heads, tails)


@dataclass(frozen=True)
class _Reach:
    """Which slices' states arrive here, and across how many tokens: both [size, B]."""

    distance: torch.Tensor  # int64
    arrives: torch.Tensor  # bool

    def weights(self, slopes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The decay of each slice's state on the way, 0 for those that do not arrive: [size, B, H, 1, 1]."""
        distance, arrives = self.distance.unsqueeze(-1), self.arrives.unsqueeze(-1)
        # Slices that do not arrive may have a negative distance, whose exponential could overflow.
        decay = torch.exp(-slopes.to(dtype) * distance.clamp(min=0))
        return (decay * arrives)[..., None, None]


@dataclass(frozen=True)
class StateExchange:
    """The exchange of states between the ranks of one forward pass; see the top of this file.

    Attributes:
        starts: int64 [N], position of the first token of each document (or row of the batch).
    """

    group: dist.ProcessGroup
    starts: torch.Tensor
    cu_seqlens: torch.Tensor | None
    before: _Reach
    after: _Reach
    documents: _EdgeDocuments | None

    def attention(
        self,
        attend: Callable[..., tuple],
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        slopes: torch.Tensor,
        activation: str | None,
    ) -> tuple:
        """Run ``attend`` as a part of the attention over all slices.

        Args:
            attend: takes ``initial_state``, ``output_final_state`` and ``cu_seqlens``, and returns (o, ..., final
                state), with gradients to q, k and v.
            q, k: [B, T, H, K]; ``activation`` ("silu" or None) is applied to them here as inside ``attend``.
            v: [B, T, H, V].
            slopes: fp32 [H].

        Returns:
            What ``attend`` returns, None in place of the final state.
        """
        with torch.no_grad():
            initial_state = self._state_before(_activated(k, activation), v, slopes)
        o, *others, final_state = attend(
            initial_state=initial_state, output_final_state=True, cu_seqlens=self.cu_seqlens
        )
        return _LaterGradients.apply(o, final_state, q.detach(), slopes, activation, self), *others, None

    def _state_before(self, k: torch.Tensor, v: torch.Tensor, slopes: torch.Tensor) -> torch.Tensor:
        """k, v of this slice -> the state in which each of its documents begins, [N, H, K, V]."""
        documents = self.documents
        if documents is None:
            own = lightning_attention_state(k, v, slopes)  # [B, H, K, V]
            return self._combined(own, self.before, slopes, None)
        own = lightning_attention_state(k, v, slopes, cu_seqlens=documents.tails)[1::2]
        return self._combined(own, self.before, slopes, documents.first)

    def _gradient_after(self, q: torch.Tensor, do: torch.Tensor, slopes: torch.Tensor) -> torch.Tensor:
        """q, do of this slice -> the gradient of each document's final state from later slices, [N, H, K, V]."""
        # D = sum_t lambda^(t+1) q_t^T do_t over a first document: its state in reversed time, one step on.
        q, do, documents = q.flip(1), do.flip(1), self.documents
        one_step = torch.exp(-slopes)[:, None, None]
        if documents is None:
            own = lightning_attention_state(q, do, slopes) * one_step
            return self._combined(own, self.after, slopes, None)
        reversed_heads = documents.heads[-1] - documents.heads.flip(0)
        own = lightning_attention_state(q, do, slopes, cu_seqlens=reversed_heads)[1::2].flip(0) * one_step
        return self._combined(own, self.after, slopes, documents.last)

    def _combined(
        self, own: torch.Tensor, reach: _Reach, slopes: torch.Tensor, documents: torch.Tensor | None
    ) -> torch.Tensor:
        """The states [B, H, K, V] of all ranks, decayed and summed; placed at ``documents`` among N of zeros."""
        gathered = own.new_empty(self.group.size(), *own.shape)
        work = dist.all_gather(list(gathered), own.contiguous(), group=self.group, async_op=True)
        weights = reach.weights(slopes, own.dtype)
        if documents is not None:
            placed = own.new_zeros(len(self.cu_seqlens) - 1, *own.shape[1:])
        work.wait()  # the device waits, not the host
        combined = (gathered * weights).sum(0)
        return combined if documents is None else placed.index_copy_(0, documents, combined)


class _LaterGradients(torch.autograd.Function):
    """The identity of ``o``; its backward pass gives ``final_state`` the gradient that arrives from later slices."""

    @staticmethod
    def forward(ctx, o, final_state, q, slopes, activation, exchange):
        ctx.save_for_backward(q, slopes)
        ctx.activation, ctx.exchange = activation, exchange
        return o.view_as(o)

    @staticmethod
    @once_differentiable
    def backward(ctx, do):
        q, slopes = ctx.saved_tensors
        dfinal = ctx.exchange._gradient_after(_activated(q, ctx.activation), do, slopes)
        return do, dfinal, None, None, None, None


def _activated(x: torch.Tensor, activation: str | None) -> torch.Tensor:
    return x if activation is None else F.silu(x)


def exchanged_bytes(config: TransnormerConfig, num_windows: int, size: int) -> list[int]:
    """Bytes that each of ``size`` ranks receives in each layer, in each direction, for ``num_windows`` windows."""
    state = 4 * config.decoder_attention_heads * config.head_dim**2  # fp32 [H, K, V]
    doubled = [2 if config.uses_lrpe(layer) else 1 for layer in range(config.decoder_layers)]  # LRPE doubles K
    return [(size - 1) * num_windows * state * factor for factor in doubled]

"""Linear-time attention with torch's matmuls: the chunk form, one head at a time, with its own backward pass.

One head at a time keeps the temporaries within the caches (measured faster than all heads in one batched matmul). A
block is the [NC, C, K] (or V) rows of one head: NC chunks of C rows.
"""

from itertools import pairwise

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tnl_kernels.chunks import Chunks, Decay, cut, decays, document_offsets
from tnl_kernels.dtypes import compute_dtype, without_autocast


def carry(added: Tensor, initial_state: Tensor | None, decay: Decay, chunks: Chunks) -> Tensor:
    """The state before each chunk, [NC, K, V], from what each chunk adds and the initial states [N, K, V]."""
    before = torch.empty_like(added)
    if chunks.steps:
        before[chunks.steps[0]] = 0 if initial_state is None else initial_state[chunks.documents]
    for step, following in pairwise(chunks.steps):
        going_on = slice(step.start, step.start + following.stop - following.start)
        torch.addcmul(added[going_on], before[going_on], decay.across[going_on], out=before[following])
    return before


def carry_back(added: Tensor, dfinal: Tensor | None, decay: Decay, chunks: Chunks) -> Tensor:
    """The gradient of the state after each chunk, [NC, K, V]: `carry` in reversed time."""
    after = torch.empty_like(added)
    after[chunks.last_chunks] = 0 if dfinal is None else dfinal[chunks.documents]
    for following, step in pairwise(reversed(chunks.steps)):
        going_on = slice(step.start, step.start + following.stop - following.start)
        torch.addcmul(added[following], after[following], decay.across[following], out=after[going_on])
    return after


def store_final_state(
    before: Tensor, added: Tensor, initial_state: Tensor | None, decay: Decay, chunks: Chunks, out: Tensor
) -> None:
    """Write the state after each document's last token to ``out`` [N, K, V]; an empty one keeps its initial state."""
    out.copy_(torch.zeros_like(out) if initial_state is None else initial_state)
    last = chunks.last_chunks
    out[chunks.documents] = torch.addcmul(added[last], before[last], decay.across[last])


def store_dinitial(
    after: Tensor, added: Tensor, dfinal: Tensor | None, decay: Decay, chunks: Chunks, out: Tensor
) -> None:
    """Write the gradient of each document's initial state to ``out`` [N, K, V]."""
    out.copy_(torch.zeros_like(out) if dfinal is None else dfinal)
    if chunks.steps:
        first = chunks.steps[0]
        out[chunks.documents] = torch.addcmul(added[first], after[first], decay.across[first])


@without_autocast
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    initial_state: Tensor | None,
    decay: Decay,
    chunks: Chunks,
    final_state: Tensor | None,
) -> Tensor:
    """Blocks q, k, v of one head (overwritten) -> block o; writes ``final_state`` [N, K, V] where it is given."""
    scores = torch.bmm(q, k.mT).mul_(decay.within)  # [NC, C, C]
    o = torch.bmm(scores, v)  # [NC, C, V]
    added = torch.bmm(k.mul_(decay.out_of).mT, v)  # [NC, K, V]
    before = carry(added, initial_state, decay, chunks)
    if final_state is not None:
        store_final_state(before, added, initial_state, decay, chunks, final_state)
    return o.baddbmm_(q.mul_(decay.into), before)


@without_autocast
def attend_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    dfinal: Tensor | None,
    initial_state: Tensor | None,
    decay: Decay,
    chunks: Chunks,
    dinitial: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Blocks q, k, v, do of one head (overwritten) -> blocks dq, dk, dv; writes ``dinitial`` [N, K, V] where given."""
    scores = torch.bmm(q, k.mT).mul_(decay.within)  # [NC, C, C]
    dv = torch.bmm(scores.mT, do)
    dscores = torch.bmm(do, v.mT, out=scores).mul_(decay.within)
    dq = torch.bmm(dscores, k)
    dk = torch.bmm(dscores.mT, q)

    before = carry(torch.bmm(k.mul_(decay.out_of).mT, v), initial_state, decay, chunks)  # [NC, K, V]
    added = torch.bmm(q.mT, do.mul_(decay.into))  # [NC, K, V]
    after = carry_back(added, dfinal, decay, chunks)
    if dinitial is not None:
        store_dinitial(after, added, dfinal, decay, chunks, dinitial)
    dq.baddbmm_(do, before.mT)
    dk.baddbmm_(v.mul_(decay.out_of), after.mT)
    dv.baddbmm_(k, after)
    return dq, dk, dv


@without_autocast
def accumulate(
    k: Tensor, v: Tensor, initial_state: Tensor | None, decay: Decay, chunks: Chunks, final_state: Tensor
) -> None:
    """Blocks k, v of one head (overwritten) -> ``final_state`` [N, K, V]."""
    added = torch.bmm(k.mul_(decay.out_of).mT, v)  # [NC, K, V]
    before = carry(added, initial_state, decay, chunks)
    store_final_state(before, added, initial_state, decay, chunks, final_state)


@without_autocast
def accumulate_backward(
    k: Tensor, v: Tensor, dfinal: Tensor, decay: Decay, chunks: Chunks, dinitial: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Blocks k, v of one head (overwritten) -> blocks dk, dv; writes ``dinitial`` [N, K, V] where it is given."""
    added = dfinal.new_zeros(len(k), *dfinal.shape[1:])  # no output adds to the gradient of the state
    after = carry_back(added, dfinal, decay, chunks)
    if dinitial is not None:
        store_dinitial(after, added, dfinal, decay, chunks, dinitial)
    return torch.bmm(v.mul_(decay.out_of), after.mT), torch.bmm(k.mul_(decay.out_of), after)


def head_of(state: Tensor | None, i_h: int) -> Tensor | None:
    """One head of states [N, H, K, V], or None for None."""
    return None if state is None else state[:, i_h]


class LightningAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, slopes, initial_state, output_final_state, cu_seqlens):
        B, T, H, K = q.shape
        V = v.shape[-1]
        dtype = compute_dtype(q.dtype)
        offsets = document_offsets(B, T, cu_seqlens)
        chunks = cut(offsets, q.device)
        o = q.new_empty(B, T, H, V)
        final_state = q.new_empty(len(offsets) - 1, H, K, V, dtype=dtype) if output_final_state else None
        for i_h, decay in enumerate(decays(slopes, chunks, dtype)):
            blocks = (chunks.gather(x[:, :, i_h], dtype) for x in (q, k, v))
            b_o = attend(*blocks, head_of(initial_state, i_h), decay, chunks, head_of(final_state, i_h))
            chunks.scatter(b_o, o[:, :, i_h])
        ctx.save_for_backward(q, k, v, slopes, initial_state)
        ctx.offsets = offsets
        ctx.set_materialize_grads(False)
        return o, final_state

    @staticmethod
    @once_differentiable
    def backward(ctx, do, dfinal):
        q, k, v, slopes, initial_state = ctx.saved_tensors
        dtype = compute_dtype(q.dtype)
        chunks = cut(ctx.offsets, q.device)
        do = v.new_zeros(v.shape) if do is None else do
        # Contiguous whatever the inputs' strides: an input may be an expanded view.
        dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
        dinitial = torch.empty_like(initial_state) if ctx.needs_input_grad[4] else None
        for i_h, decay in enumerate(decays(slopes, chunks, dtype)):
            blocks = (chunks.gather(x[:, :, i_h], dtype) for x in (q, k, v, do))
            states = (head_of(dfinal, i_h), head_of(initial_state, i_h))
            gradients = attend_backward(*blocks, *states, decay, chunks, head_of(dinitial, i_h))
            for b_dx, dx in zip(gradients, (dq, dk, dv), strict=True):
                chunks.scatter(b_dx, dx[:, :, i_h])
        return dq, dk, dv, None, dinitial, None, None


class LightningAttentionState(torch.autograd.Function):
    @staticmethod
    def forward(ctx, k, v, slopes, initial_state, cu_seqlens):
        B, T, H, K = k.shape
        dtype = compute_dtype(k.dtype)
        offsets = document_offsets(B, T, cu_seqlens)
        chunks = cut(offsets, k.device)
        state = k.new_empty(len(offsets) - 1, H, K, v.shape[-1], dtype=dtype)
        for i_h, decay in enumerate(decays(slopes, chunks, dtype)):
            blocks = (chunks.gather(x[:, :, i_h], dtype) for x in (k, v))
            accumulate(*blocks, head_of(initial_state, i_h), decay, chunks, state[:, i_h])
        ctx.save_for_backward(k, v, slopes)
        ctx.offsets = offsets
        return state

    @staticmethod
    @once_differentiable
    def backward(ctx, dstate):
        k, v, slopes = ctx.saved_tensors
        dtype = compute_dtype(k.dtype)
        chunks = cut(ctx.offsets, k.device)
        dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (k, v))
        dinitial = torch.empty_like(dstate) if ctx.needs_input_grad[3] else None
        for i_h, decay in enumerate(decays(slopes, chunks, dtype)):
            blocks = (chunks.gather(x[:, :, i_h], dtype) for x in (k, v))
            b_dk, b_dv = accumulate_backward(*blocks, dstate[:, i_h], decay, chunks, head_of(dinitial, i_h))
            chunks.scatter(b_dk, dk[:, :, i_h])
            chunks.scatter(b_dv, dv[:, :, i_h])
        return dk, dv, None, dinitial, None


def torch_lightning_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    *,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The chunk form of `tnl_kernels.lightning_attention`."""
    return LightningAttention.apply(q, k, v, slopes, initial_state, output_final_state, cu_seqlens)


def torch_lightning_attention_state(
    k: Tensor, v: Tensor, slopes: Tensor, *, initial_state: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> Tensor:
    """The chunk form of `tnl_kernels.lightning_attention_state`."""
    return LightningAttentionState.apply(k, v, slopes, initial_state, cu_seqlens)

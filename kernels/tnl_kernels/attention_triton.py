"""The Triton forms of attention over a sequence: custom ops with their fake and backward forms.

Kept for the backward pass: the inputs as they came (views stay views) and the initial state, nothing else. Opaque to
the compiler, so that one op can be saved by name in selective activation checkpointing.
"""

import torch
from torch import Tensor

from tnl_kernels.attention_launch import backward, forward, state_forward, zeros
from tnl_kernels.operators import operator


def num_states(k: Tensor, cu_seqlens: Tensor | None) -> int:
    """N: documents, or rows of the batch."""
    # And not len(): where the compiler asks for shapes, that would make a constant of their number.
    return k.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def new_state(k: Tensor, V: int, cu_seqlens: Tensor | None, wanted: bool) -> Tensor:
    """An fp32 state [N, H, K, V] for k [B, T, H, K]; of no elements when it is not wanted."""
    _, _, H, K = k.shape
    return k.new_empty((num_states(k, cu_seqlens), H, K, V) if wanted else 0, dtype=torch.float32)


def or_none(x: Tensor) -> Tensor | None:
    """An op cannot return None: an output of one dimension stands for it."""
    return None if x.dim() == 1 else x


@operator("tnl_kernels::lightning_attention_fwd")
def attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    output_final_state: bool,
) -> tuple[Tensor, Tensor]:
    """o [B, T, H, V] and the final state [N, H, K, V], or [0]."""
    o = q.new_empty(v.shape)
    final = new_state(k, v.shape[-1], cu_seqlens, output_final_state)
    forward(q, k, v, o, slopes, initial_state, or_none(final), cu_seqlens, False)
    return o, final


@attention_fwd.register_fake
def _(q, k, v, slopes, initial_state, cu_seqlens, output_final_state):
    return q.new_empty(v.shape), new_state(k, v.shape[-1], cu_seqlens, output_final_state)


@operator("tnl_kernels::lightning_attention_bwd")
def attention_bwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor | None,
    slopes: Tensor,
    initial_state: Tensor | None,
    dfinal: Tensor | None,
    cu_seqlens: Tensor | None,
    need_dinitial: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, and the gradient of the initial state or [0]."""
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    dinitial = new_state(k, v.shape[-1], cu_seqlens, need_dinitial)
    do = zeros(v) if do is None else do
    backward(
        q, k, v, do, dq, dk, dv, slopes, initial_state, dfinal, or_none(dinitial), cu_seqlens, False
    )  # fmt: skip
    return dq, dk, dv, dinitial


@attention_bwd.register_fake
def _(q, k, v, do, slopes, initial_state, dfinal, cu_seqlens, need_dinitial):
    return *(x.new_empty(x.shape) for x in (q, k, v)), new_state(k, v.shape[-1], cu_seqlens, need_dinitial)


def _keep(ctx, inputs, output):
    q, k, v, slopes, initial_state, cu_seqlens, _ = inputs
    ctx.save_for_backward(q, k, v, slopes, initial_state, cu_seqlens)
    ctx.set_materialize_grads(False)


def _attention_backward(ctx, do, dfinal):
    q, k, v, slopes, initial_state, cu_seqlens = ctx.saved_tensors
    need_dinitial = ctx.needs_input_grad[4]
    dfinal = None if dfinal is None else or_none(dfinal)
    dq, dk, dv, dinitial = torch.ops.tnl_kernels.lightning_attention_bwd(
        q, k, v, do, slopes, initial_state, dfinal, cu_seqlens, need_dinitial
    )
    return dq, dk, dv, None, dinitial if need_dinitial else None, None, None


attention_fwd.register_autograd(_attention_backward, setup_context=_keep)


@operator("tnl_kernels::lightning_attention_state_fwd")
def state_fwd(k: Tensor, v: Tensor, slopes: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """The final state [N, H, K, V]."""
    final = new_state(k, v.shape[-1], cu_seqlens, True)
    state_forward(k, v, slopes, initial_state, final, cu_seqlens)
    return final


@state_fwd.register_fake
def _(k, v, slopes, initial_state, cu_seqlens):
    return new_state(k, v.shape[-1], cu_seqlens, True)


@operator("tnl_kernels::lightning_attention_state_bwd")
def state_bwd(
    k: Tensor, v: Tensor, dfinal: Tensor, slopes: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """dk, dv and the gradient of the initial state: the backward pass of attention without a query."""
    dk, dv = k.new_empty(k.shape), v.new_empty(v.shape)
    dinitial = torch.empty_like(dfinal, memory_format=torch.contiguous_format)
    backward(
        zeros(k), k, v, zeros(v), None, dk, dv, slopes, None, dfinal, dinitial, cu_seqlens, False
    )  # fmt: skip
    return dk, dv, dinitial


@state_bwd.register_fake
def _(k, v, dfinal, slopes, cu_seqlens):
    return k.new_empty(k.shape), v.new_empty(v.shape), dfinal.new_empty(dfinal.shape)


def _keep_state(ctx, inputs, output):
    k, v, slopes, _, cu_seqlens = inputs
    ctx.save_for_backward(k, v, slopes, cu_seqlens)


def _state_backward(ctx, dfinal):
    k, v, slopes, cu_seqlens = ctx.saved_tensors
    dk, dv, dinitial = torch.ops.tnl_kernels.lightning_attention_state_bwd(k, v, dfinal, slopes, cu_seqlens)
    return dk, dv, None, dinitial if ctx.needs_input_grad[3] else None, None


state_fwd.register_autograd(_state_backward, setup_context=_keep_state)


def triton_lightning_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    *,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The Triton form of `tnl_kernels.lightning_attention`."""
    o, final = torch.ops.tnl_kernels.lightning_attention_fwd(
        q, k, v, slopes, initial_state, cu_seqlens, output_final_state
    )
    return o, or_none(final)


def triton_lightning_attention_state(
    k: Tensor, v: Tensor, slopes: Tensor, *, initial_state: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> Tensor:
    """The Triton form of `tnl_kernels.lightning_attention_state`."""
    return torch.ops.tnl_kernels.lightning_attention_state_fwd(k, v, slopes, initial_state, cu_seqlens)

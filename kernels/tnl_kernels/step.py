"""One token of decoding: the recurrence itself on a table of states that is updated in place."""

import torch
import torch.nn.functional as F
from torch import Tensor

from tnl_kernels.checks import (
    check_activation,
    check_devices,
    check_dtype,
    check_num_dims,
    check_shape,
    check_slopes,
    check_state,
    may_look_at,
)
from tnl_kernels.dispatch import HAS_TRITON, dispatch
from tnl_kernels.dtypes import FLOATS, without_autocast

if HAS_TRITON:
    from tnl_kernels.step_triton import triton_lightning_attention_step
else:
    triton_lightning_attention_step = None


@torch.no_grad()
@without_autocast
def torch_lightning_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    state: Tensor,
    *,
    slots: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """The torch form of `tnl_kernels.lightning_attention_step`."""
    if slots is not None:
        rows = (slots >= 0).nonzero().flatten()
        places = slots[rows].long()
        picked = state[places]  # [rows, H, K, V]
        o = torch.zeros_like(v)
        o[rows] = torch_lightning_attention_step(q[rows], k[rows], v[rows], slopes, picked, activation=activation)
        state[places] = picked
        return o
    dtype = state.dtype
    b_q, b_k, b_v = q.to(dtype), k.to(dtype), v.to(dtype)
    if activation == "silu":
        b_q, b_k = F.silu(b_q), F.silu(b_k)
    state.mul_(torch.exp(-slopes.to(dtype))[:, None, None])  # [B, H, K, V]
    state.addcmul_(b_k[..., None], b_v[..., None, :])
    return torch.matmul(b_q[..., None, :], state)[..., 0, :].to(v.dtype)  # [B, H, V]


def lightning_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    state: Tensor,
    *,
    slots: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """S = exp(-slope) S + k^T v; o = q S, for one token of each row; ``state`` is updated in place. Gives no gradients.

    Args:
        q, k: [B, H, K], fp32, bf16, fp16 or fp64; any strides, as of every tensor here.
        v: [B, H, V], dtype of k.
        slopes: [H] fp32, >= 0.
        state: [slots, H, K, V] fp32 (fp64 with fp64 inputs), updated in place.
        slots: [B] int32 or int64, the state of each row, no slot twice; a negative slot is padding: its output is 0 and
            no state changes. None: row b has slot b, and state has B slots. On a GPU, where no value is checked, a slot
            beyond the table gives NaN and changes no state.
        activation: "silu" on q and k, computed in fp32, or None.

    Returns:
        o [B, H, V] in the dtype of v.

    Raises:
        ValueError: a shape, dtype or value does not fit; values (slopes, slots) are checked in host memory only.

    Source: TransNormerLLM (arXiv 2307.14995), robust inference: the recurrence without a growing cache.
    """
    check_num_dims("k", k, "[B, H, K]")
    check_dtype("k", k, FLOATS)
    B, H, K = k.shape
    check_shape("q", q, (B, H, K), "[B, H, K], the shape of k")
    check_num_dims("v", v, "[B, H, V]")
    V = v.shape[-1]
    check_shape("v", v, (B, H, V), "[B, H, V]")
    check_dtype("q", q, (k.dtype,))
    check_dtype("v", v, (k.dtype,))
    check_devices(k.device, q=q, v=v, slopes=slopes, state=state, slots=slots)
    check_slopes(slopes, H)
    check_activation(activation)
    check_num_dims("state", state, "[slots, H, K, V]")
    num_slots = B if slots is None else len(state)
    check_state("state", state, (num_slots, H, K, V), "[slots, H, K, V]", k.dtype)
    if any(stride == 0 and size > 1 for stride, size in zip(state.stride(), state.shape, strict=True)):
        raise ValueError(f"state: got strides {state.stride()}, expected elements of their own: it is updated in place")
    if slots is not None:
        check_slots(slots, B, num_slots)
    form = dispatch(q, torch=torch_lightning_attention_step, triton=triton_lightning_attention_step)
    return form(q, k, v, slopes, state, slots=slots, activation=activation)


def check_slots(slots: Tensor, B: int, num_slots: int) -> None:
    """slots int32 or int64 [B], below ``num_slots``, no slot twice; negative ones are padding."""
    check_shape("slots", slots, (B,), "[B]")
    check_dtype("slots", slots, (torch.int32, torch.int64))
    if may_look_at(slots):
        used = [slot for slot in slots.tolist() if slot >= 0]
        if any(slot >= num_slots for slot in used):
            raise ValueError(f"slots: got {max(used)}, expected less than the {num_slots} slots of state")
        if len(set(used)) != len(used):
            raise ValueError(f"slots: got a slot twice in {slots.tolist()}, expected each at most once")

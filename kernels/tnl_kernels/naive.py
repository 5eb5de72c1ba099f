"""The definitions: each op as its recurrence or formula, in fp64 for fp64 inputs and fp32 otherwise.

Differentiable by autograd. Written to be read, not to be fast; every other form is judged by these.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from tnl_kernels.dtypes import compute_dtype


def naive_lightning_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    *,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """S_t = exp(-slope) S_{t-1} + k_t^T v_t, o_t = q_t S_t. Arguments as `tnl_kernels.lightning_attention`."""
    dtype = compute_dtype(q.dtype)
    if cu_seqlens is not None:
        outputs, states = [q.new_empty(1, 0, q.shape[2], v.shape[3])], []
        for n, (start, end) in enumerate(pairwise(cu_seqlens.tolist())):
            document = (x[:, start:end] for x in (q, k, v))
            state = None if initial_state is None else initial_state[n : n + 1]
            o, state = naive_lightning_attention(*document, slopes, initial_state=state, output_final_state=True)
            outputs.append(o)
            states.append(state)
        return torch.cat(outputs, 1), torch.cat(states) if output_final_state else None

    B, _, H, K = q.shape
    V = v.shape[-1]
    decay = torch.exp(-slopes.to(dtype))[:, None, None]  # [H, 1, 1]
    state = q.new_zeros(B, H, K, V, dtype=dtype) if initial_state is None else initial_state.to(dtype)
    outputs = [q.new_empty(B, 0, H, V, dtype=dtype)]
    for q_t, k_t, v_t in zip(*(x.to(dtype).unbind(1) for x in (q, k, v)), strict=True):  # [B, H, K], [B, H, V]
        state = decay * state + k_t[:, :, :, None] * v_t[:, :, None, :]  # [B, H, K, V]
        outputs.append((q_t[:, None, :, :, None] * state[:, None]).sum(-2))  # [B, 1, H, V]
    return torch.cat(outputs, 1).to(q.dtype), state if output_final_state else None


def naive_lightning_attention_state(
    k: Tensor, v: Tensor, slopes: Tensor, *, initial_state: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> Tensor:
    """The state after the last token. Arguments as `tnl_kernels.lightning_attention_state`."""
    _, state = naive_lightning_attention(
        k, k, v, slopes, initial_state=initial_state, output_final_state=True, cu_seqlens=cu_seqlens
    )
    return state


def naive_activation(x: Tensor, activation: str | None) -> Tensor:
    """``x`` in the dtype of computation, after the activation."""
    x = x.to(compute_dtype(x.dtype))
    return F.silu(x) if activation == "silu" else x


def naive_lightning_attention_packed(
    qkvu: Tensor,
    slopes: Tensor,
    *,
    num_heads: int,
    activation: str | None = "silu",
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Split, activate q and k, attend. Arguments as `tnl_kernels.lightning_attention_packed`."""
    q, k, v, u = qkvu.chunk(4, dim=-1)  # [B, T, H * K]
    q, k = naive_activation(q, activation), naive_activation(k, activation)
    q, k, v = (x.to(q.dtype).unflatten(-1, (num_heads, -1)) for x in (q, k, v))  # [B, T, H, K]
    o, state = naive_lightning_attention(
        q, k, v, slopes, initial_state=initial_state, output_final_state=output_final_state, cu_seqlens=cu_seqlens
    )
    return o.to(qkvu.dtype), u, state


def naive_lightning_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    state: Tensor,
    *,
    slots: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """One step of the recurrence for each row. Arguments as `tnl_kernels.lightning_attention_step`."""
    o = torch.zeros_like(v)
    decay = torch.exp(-slopes.to(state.dtype))[:, None, None]  # [H, 1, 1]
    for row, slot in enumerate(range(len(q)) if slots is None else slots.tolist()):
        if slot >= 0:
            q_t, k_t = (naive_activation(x[row], activation).to(state.dtype) for x in (q, k))
            state[slot] = decay * state[slot] + k_t[:, :, None] * v[row].to(state.dtype)[:, None, :]  # [H, K, V]
            o[row] = (q_t[:, :, None] * state[slot]).sum(1).to(v.dtype)  # [H, V]
    return o


def naive_srmsnorm(x: Tensor, *, eps: float = 1e-6) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last dimension."""
    wide = x.to(compute_dtype(x.dtype))
    return (wide / torch.sqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def naive_fork_srmsnorm(x: Tensor, *, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """srmsnorm(x), and x."""
    return naive_srmsnorm(x, eps=eps), x


def naive_add_srmsnorm(x: Tensor, residual: Tensor, *, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """residual = residual + x; y = srmsnorm(residual)."""
    residual = residual + x.to(residual.dtype)
    return naive_srmsnorm(residual, eps=eps).to(x.dtype), residual


def naive_gated_srmsnorm(o: Tensor, u: Tensor, *, eps: float = 1e-6) -> Tensor:
    """u * srmsnorm(o), rounded once."""
    dtype = compute_dtype(o.dtype)
    return (u.to(dtype) * naive_srmsnorm(o.to(dtype), eps=eps)).to(o.dtype)


def naive_split_gated_srmsnorm(
    o: Tensor, u: Tensor, *, width: int, total: Callable[[Tensor], object], eps: float = 1e-6
) -> Tensor:
    """u * o / sqrt(squares / width + eps) with the sum of squares that ``total`` completes, rounded once."""
    wide = o.to(compute_dtype(o.dtype))
    squares = wide.square().sum(-1, keepdim=True)
    total(squares)
    return (u.to(wide.dtype) * (wide / torch.sqrt(squares / width + eps))).to(o.dtype)


def naive_sglu(a: Tensor, b: Tensor) -> Tensor:
    """a * b."""
    return a * b


def naive_lrpe(x: Tensor, theta: Tensor, positions: Tensor) -> Tensor:
    """[x cos(theta p), x sin(theta p)], the phase and its cosine and sine in fp64."""
    theta = theta[:, 0].to(compute_dtype(x.dtype)).double()  # [H, K]
    phase = positions[..., None, None].double() * theta  # [T, H, K] or [B, T, H, K]
    wide = x.double()
    return torch.cat((wide * phase.cos(), wide * phase.sin()), -1).to(x.dtype)  # [B, T, H, 2K]


def naive_cross_entropy_(logits: Tensor, labels: Tensor, *, ignore_index: int = -100, gradient: bool = True) -> Tensor:
    """logsumexp(x) - x[label] of each row, and softmax(x) - onehot(label) in its place; 0 for rows without a label."""
    wide = logits.to(compute_dtype(logits.dtype))
    keep = labels != ignore_index
    index = torch.where(keep, labels, 0)
    losses = torch.where(keep, torch.logsumexp(wide, 1) - wide.gather(1, index[:, None])[:, 0], 0.0)  # [N]
    if gradient:
        onehot = F.one_hot(index, wide.shape[1])  # [N, vocabulary]
        logits.copy_(torch.where(keep[:, None], torch.softmax(wide, 1) - onehot, 0.0))
    return losses

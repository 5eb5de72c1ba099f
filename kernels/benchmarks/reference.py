"""The gradients of linear attention in fp64 and linear time: four scans with the roles of q, k, v and do exchanged.

    o = scan(q, k, v)    dq = scan(do, v, k)    dv = reverse(k, q, do)    dk = reverse(v, do, q)

Autograd over the recurrence keeps a state for every token, 17 GB a head at T = 131072; these keep one state.
"""

from itertools import pairwise

import torch
from torch import Tensor


def scan(
    q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, state: Tensor | None = None, *, reverse: bool = False, C: int = 256
) -> tuple[Tensor, Tensor]:
    """o_t = sum_{s <= t} exp(-slope (t - s)) (q_t . k_s) v_s + what the state adds, in chunks of C tokens.

    With ``reverse``, over s >= t. A state handed to the forward scan decays before the first token uses it (S_{-1});
    one handed to the reverse scan does not (the gradient of S_{T-1}) and comes out decayed by all T tokens.

    Args:
        q, k: [B, T, H, K] and v: [B, T, H, V], any float dtype.
        slopes: [H].
        state: [B, H, K, V], zero when None.
        C: tokens in a chunk.

    Returns:
        o [B, T, H, V] and the state [B, H, K, V], fp64.
    """
    B, T, H, K = q.shape
    V = v.shape[-1]
    rate = -slopes.double()  # [H]
    row = torch.arange(C, device=q.device)
    within = torch.exp(rate[:, None, None] * (row[:, None] - row).clamp(min=0)).tril()  # [H, C, C]
    shift = 0 if reverse else 1
    state = q.new_zeros(B, H, K, V, dtype=torch.float64) if state is None else state.double()
    o = q.new_empty(B, T, H, V, dtype=torch.float64)
    for start in range(0, T, C):
        n = min(C, T - start)
        tokens = slice(T - start - n, T - start) if reverse else slice(start, start + n)
        blocks = (x[:, tokens].double().transpose(1, 2) for x in (q, k, v))  # [B, H, n, K]
        b_q, b_k, b_v = (x.flip(2) for x in blocks) if reverse else blocks
        up = torch.exp(rate[:, None] * (row[:n] + shift))[..., None]  # [H, n, 1]
        dn = torch.exp(rate[:, None] * (n - row[:n] - shift))[..., None]
        b_o = (b_q @ b_k.mT * within[:, :n, :n]) @ b_v + (up * b_q) @ state
        state = torch.exp(rate * n)[:, None, None] * state + (dn * b_k).mT @ b_v
        o[:, tokens] = (b_o.flip(2) if reverse else b_o).transpose(1, 2)
    return o, state


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    do: Tensor,
    *,
    initial_state: Tensor | None = None,
    dstate: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> dict[str, Tensor]:
    """Outputs and gradients of `tnl_kernels.lightning_attention` in fp64.

    Args:
        q, k, v, slopes, initial_state, cu_seqlens: as the op's.
        do: [B, T, H, V], the gradient of o.
        dstate: [N, H, K, V], the gradient of the final state; zero when None.

    Returns:
        o, dq, dk, dv as q, k, v; state (the final one) and dinitial, [N, H, K, V].
    """
    if cu_seqlens is not None:
        parts = []
        for n, (start, end) in enumerate(pairwise(cu_seqlens.tolist())):
            tokens = (x[:, start:end] for x in (q, k, v))
            states = {
                name: None if x is None else x[n : n + 1]
                for name, x in {"initial_state": initial_state, "dstate": dstate}.items()
            }
            parts.append(attention_reference(*tokens, slopes, do[:, start:end], **states))
        return {
            name: torch.cat([part[name] for part in parts], 0 if name in ("state", "dinitial") else 1)
            for name in parts[0]
        }
    initial_mt, dstate_mt = (None if x is None else x.mT for x in (initial_state, dstate))
    o, state = scan(q, k, v, slopes, initial_state)
    dq, _ = scan(do, v, k, slopes, initial_mt)
    dk, _ = scan(v, do, q, slopes, dstate_mt, reverse=True)
    dv, dinitial = scan(k, q, do, slopes, dstate, reverse=True)
    return {"o": o, "dq": dq, "dk": dk, "dv": dv, "state": state, "dinitial": dinitial}


def relative_error(actual: Tensor, expected: Tensor, head_dim: int) -> float:
    """Largest over the heads of rms(actual - expected) / rms(expected); infinite when a value is not finite.

    A head whose expected values are below 1e-6 of all heads' (a state behind a steep decay) is measured at that level.
    """
    if not expected.numel():
        return 0.0
    axes = [axis for axis in range(expected.dim()) if axis != head_dim]
    expected = expected.double()
    error = torch.linalg.vector_norm(actual.double() - expected, dim=axes)  # [H]
    scale = torch.linalg.vector_norm(expected, dim=axes)
    ratio = error / scale.clamp(min=1e-6 * scale.max().item() + 1e-300)
    return ratio.max().item() if torch.isfinite(actual).all() else float("inf")

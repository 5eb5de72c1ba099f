"""The public attention ops over a sequence: their contract, the checks of their arguments, the choice of the form."""

from torch import Tensor

from tnl_kernels.attention_torch import torch_lightning_attention, torch_lightning_attention_state
from tnl_kernels.checks import (
    check_activation,
    check_cu_seqlens,
    check_devices,
    check_dtype,
    check_key_value,
    check_num_dims,
    check_shape,
    check_slopes,
    check_state,
)
from tnl_kernels.dispatch import HAS_TRITON, dispatch
from tnl_kernels.dtypes import FLOATS
from tnl_kernels.packed_torch import torch_lightning_attention_packed

if HAS_TRITON:
    from tnl_kernels.attention_triton import triton_lightning_attention, triton_lightning_attention_state
    from tnl_kernels.packed_triton import triton_lightning_attention_packed
else:
    triton_lightning_attention = triton_lightning_attention_state = triton_lightning_attention_packed = None


def lightning_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    *,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """o_t = sum_{s <= t} exp(-slope (t - s)) (q_t . k_s) v_s, in time linear in T; no scale and no denominator.

    Args:
        q, k: [B, T, H, K], fp32, bf16, fp16 or fp64; any strides.
        v: [B, T, H, V], dtype of k.
        slopes: [H] fp32, >= 0; gets no gradient.
        initial_state: [N, H, K, V] fp32 (fp64 with fp64 inputs), N = B or the number of documents; zero when None.
        output_final_state: also return the state after the last token.
        cu_seqlens: [N + 1] int32 with B = 1: document n is tokens [cu_seqlens[n], cu_seqlens[n + 1]), starting from its
            own state. A document may be empty; its final state is its initial state.

    Returns:
        o [B, T, H, V] in the dtype of q, and the final state [N, H, K, V] fp32 (fp64 with fp64 inputs) or None. Both
        carry gradients to q, k, v and initial_state.

    Raises:
        ValueError: a shape, dtype or value does not fit; values (slopes, cu_seqlens) are checked in host memory only.

    Source: TransNormerLLM (arXiv 2307.14995); Lightning Attention-2 (arXiv 2401.04658), algorithms 1 and 2.
    """
    B, T, H, K, V = check_key_value(k, v)
    check_devices(k.device, q=q, v=v, slopes=slopes, initial_state=initial_state, cu_seqlens=cu_seqlens)
    check_shape("q", q, tuple(k.shape), "[B, T, H, K], the shape of k")
    check_dtype("q", q, (k.dtype,))
    check_slopes(slopes, H)
    N = check_cu_seqlens(cu_seqlens, B, T)
    check_state("initial_state", initial_state, (N, H, K, V), "[N, H, K, V]", q.dtype)
    form = dispatch(q, torch=torch_lightning_attention, triton=triton_lightning_attention)
    return form(
        q, k, v, slopes, initial_state=initial_state, output_final_state=output_final_state, cu_seqlens=cu_seqlens
    )


def lightning_attention_state(
    k: Tensor, v: Tensor, slopes: Tensor, *, initial_state: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> Tensor:
    """S = exp(-slope T) S_0 + sum_s exp(-slope (T - 1 - s)) k_s^T v_s: the state after the last token.

    Args:
        k: [B, T, H, K], fp32, bf16, fp16 or fp64; any strides.
        v: [B, T, H, V], dtype of k.
        slopes: [H] fp32, >= 0; gets no gradient.
        initial_state: [N, H, K, V] fp32 (fp64 with fp64 inputs); zero when None.
        cu_seqlens: [N + 1] int32 with B = 1, as in `lightning_attention`.

    Returns:
        [N, H, K, V] fp32 (fp64 with fp64 inputs), with gradients to k, v and initial_state.

    Raises:
        ValueError: as `lightning_attention`.

    Source: Linear Attention Sequence Parallelism (arXiv 2404.02882): what one rank passes to the next.
    """
    B, T, H, K, V = check_key_value(k, v)
    check_devices(k.device, v=v, slopes=slopes, initial_state=initial_state, cu_seqlens=cu_seqlens)
    check_slopes(slopes, H)
    N = check_cu_seqlens(cu_seqlens, B, T)
    check_state("initial_state", initial_state, (N, H, K, V), "[N, H, K, V]", k.dtype)
    form = dispatch(k, torch=torch_lightning_attention_state, triton=triton_lightning_attention_state)
    return form(k, v, slopes, initial_state=initial_state, cu_seqlens=cu_seqlens)


def lightning_attention_packed(
    qkvu: Tensor,
    slopes: Tensor,
    *,
    num_heads: int,
    activation: str | None = "silu",
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """q, k, v, u = split(qkvu); o = lightning_attention(act(q), act(k), v): one packed input, one packed gradient.

    Args:
        qkvu: [B, T, 4 * H * K], the projection's output in the order q, k, v, u, each head-major; fp32,
            bf16, fp16 or fp64.
        slopes: [H] fp32, >= 0; gets no gradient.
        num_heads: H.
        activation: "silu" on q and k, computed in fp32, or None. Rounded to the dtype of qkvu on a GPU, for its dots;
            not rounded before the attention elsewhere.
        initial_state, output_final_state, cu_seqlens: as in `lightning_attention`, with V = K.

    Returns:
        o [B, T, H, K]; u [B, T, H * K], a view into ``qkvu`` that must not be written to, whose gradient goes into the
        packed gradient; the final state [N, H, K, K] or None.

    Raises:
        ValueError: as `lightning_attention`, and for an unknown activation.

    Source: TransNormerLLM (arXiv 2307.14995), gated linear attention.
    """
    check_num_dims("qkvu", qkvu, "[B, T, 4 * H * K]")
    check_dtype("qkvu", qkvu, FLOATS)
    check_activation(activation)
    check_devices(qkvu.device, slopes=slopes, initial_state=initial_state, cu_seqlens=cu_seqlens)
    B, T, width = qkvu.shape
    if num_heads < 1 or width % (4 * num_heads):
        raise ValueError(
            f"qkvu: got a last dimension of {width}, expected a multiple of 4 * num_heads = {4 * num_heads}"
        )
    K = width // (4 * num_heads)
    check_slopes(slopes, num_heads)
    N = check_cu_seqlens(cu_seqlens, B, T)
    check_state("initial_state", initial_state, (N, num_heads, K, K), "[N, H, K, K]", qkvu.dtype)
    form = dispatch(qkvu, torch=torch_lightning_attention_packed, triton=triton_lightning_attention_packed)
    return form(
        qkvu,
        slopes,
        num_heads=num_heads,
        activation=activation,
        initial_state=initial_state,
        output_final_state=output_final_state,
        cu_seqlens=cu_seqlens,
    )

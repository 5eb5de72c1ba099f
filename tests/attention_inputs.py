"""What the tests of the attention ops share: random inputs, gradients, the comparison with the definition in fp64."""

import torch
from tnl_kernels.naive import (
    naive_lightning_attention,
    naive_lightning_attention_packed,
    naive_lightning_attention_state,
)

from tests.closeness import assert_close

ALIBI = (2.0**-4, 2.0**-8)


def int32(*values, device="cpu"):
    """cu_seqlens of these offsets."""
    return torch.tensor(values, dtype=torch.int32, device=device)


def random_inputs(T, K, V, *, B=1, H=2, N=None, dtype=torch.float32, seed=0, device="cpu"):
    """q, k, v, an initial state and gradients of both outputs, all in ``dtype`` but the states."""
    generator = torch.Generator().manual_seed(seed)
    state_dtype = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*shape, dtype=dtype):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

    N = B if N is None else N
    q, k, v, do = normal(B, T, H, K), normal(B, T, H, K), normal(B, T, H, V), normal(B, T, H, V)
    return q, k, v, normal(N, H, K, V, dtype=state_dtype), do, normal(N, H, K, V, dtype=state_dtype)


def random_packed(T, K, *, B=1, H=2, dtype=torch.float32, seed=1, device="cpu"):
    """qkvu [B, T, 4 * H * K] and the gradient of u."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(B, T, width * H * K, generator=generator).to(device, dtype) for width in (4, 1)]


def with_gradients(op, inputs, doutputs):
    """Outputs of ``op(*inputs)``, and the gradients of the inputs for the given gradients of the outputs.

    The inputs go in as they lie in memory. What does not depend on an input gives it a gradient of zero.
    """
    leaves = [x.detach().requires_grad_() for x in inputs]
    outputs = op(*leaves)
    pairs = zip(outputs, doutputs, strict=True) if isinstance(outputs, tuple) else [(outputs, doutputs)]
    used = [(x, dx) for x, dx in pairs if x.requires_grad]
    if not used:
        return outputs, tuple(torch.zeros_like(x) for x in leaves)
    return outputs, torch.autograd.grad(
        [x for x, _ in used], leaves, [dx for _, dx in used], allow_unused=True, materialize_grads=True
    )


def check_attention(op, q, k, v, state, do, dfinal, slopes, cu_seqlens=None, *, use_state=True, ratio=None):
    """Outputs and gradients of ``op``, a form of lightning_attention, within the bound of their dtype from the
    definition in fp64, or within ``ratio``, head by head. Without ``use_state`` there is no initial state. Returns what
    was compared."""

    def of(op, slopes):
        return lambda *inputs: op(
            *inputs[:3],
            slopes,
            initial_state=inputs[3] if use_state else None,
            output_final_state=True,
            cu_seqlens=cu_seqlens,
        )

    inputs = (q, k, v, state) if use_state else (q, k, v)
    outputs, gradients = with_gradients(of(op, slopes), inputs, (do, dfinal))
    wide = [x.double() for x in (*inputs, do, dfinal)]
    expected = with_gradients(of(naive_lightning_attention, slopes.double()), wide[:-2], wide[-2:])
    names = ("o", "final_state", "dq", "dk", "dv", "dinitial")
    for name, a, e in zip(names, (*outputs, *gradients), (*expected[0], *expected[1]), strict=False):
        close_by_head(name, a, e, slopes, 1 if name in ("final_state", "dinitial") else 2, ratio)
    for x, gradient in zip(inputs, gradients, strict=True):
        assert gradient.dtype == x.dtype
    return (*outputs, *gradients)


def close_by_head(name, actual, expected, slopes, head_dim, ratio=None):
    """Each head within the bound: one with a large state would hide another's error."""
    for i_h, slope in enumerate(slopes.tolist()):
        assert_close(f"{name}, slope {slope}", actual.select(head_dim, i_h), expected.select(head_dim, i_h), ratio)


def check_attention_state(op, k, v, state, dfinal, slopes, cu_seqlens=None, *, use_state=True):
    """As `check_attention`, for a form of lightning_attention_state."""

    def of(op, slopes):
        return lambda *inputs: op(
            *inputs[:2], slopes, initial_state=inputs[2] if use_state else None, cu_seqlens=cu_seqlens
        )

    inputs = (k, v, state) if use_state else (k, v)
    output, gradients = with_gradients(of(op, slopes), inputs, dfinal)
    wide = [x.double() for x in inputs]
    expected, wide_gradients = with_gradients(
        of(naive_lightning_attention_state, slopes.double()), wide, dfinal.double()
    )
    close_by_head("state", output, expected, slopes, 1)
    for name, a, e in zip(("dk", "dv", "dinitial"), gradients, wide_gradients, strict=False):
        close_by_head(name, a, e, slopes, 1 if name == "dinitial" else 2)
    return output, *gradients


def check_attention_packed(
    op, qkvu, du, state, do, dfinal, slopes, cu_seqlens=None, *, activation="silu", use_state=True
):
    """As `check_attention`, for a form of lightning_attention_packed; the packed gradient part by part."""
    H = len(slopes)

    def of(op, slopes):
        return lambda qkvu, *states: op(
            qkvu,
            slopes,
            num_heads=H,
            activation=activation,
            initial_state=states[0] if states else None,
            output_final_state=True,
            cu_seqlens=cu_seqlens,
        )

    inputs = (qkvu, state) if use_state else (qkvu,)
    (o, u, final), gradients = with_gradients(of(op, slopes), inputs, (do, du, dfinal))
    wide = [x.double() for x in (*inputs, do, du, dfinal)]
    expected, wide_gradients = with_gradients(
        of(naive_lightning_attention_packed, slopes.double()), wide[:-3], wide[-3:]
    )
    close_by_head("o", o, expected[0], slopes, 2)
    assert torch.equal(u, qkvu[..., 3 * (qkvu.shape[-1] // 4) :])
    close_by_head("final_state", final, expected[2], slopes, 1)
    parts = (x[0].unflatten(-1, (4, H, -1)).unbind(2) for x in (gradients, wide_gradients))
    for name, a, e in zip(("dq", "dk", "dv", "du"), *parts, strict=True):
        close_by_head(name, a, e, slopes, 2)
    if use_state:
        close_by_head("dinitial", gradients[1], wide_gradients[1], slopes, 1)
    return o, final, *gradients

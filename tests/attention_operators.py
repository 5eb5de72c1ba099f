"""Attention as one operator on a CPU, as it is on a GPU: the operators of the Triton forms around torch's arithmetic.

The interpreter of Triton would run the kernels themselves, a thousand times slower.
"""

from concurrent.futures import ThreadPoolExecutor

import tnl_kernels.attention
import tnl_kernels.attention_triton
import tnl_kernels.packed_triton
import torch
from tnl_kernels.attention_torch import torch_lightning_attention

CALLS: list[str] = []
# Inside an operator autograd is out of reach, but for another thread.
THREAD = ThreadPoolExecutor(1)


def _forward(q, k, v, o, slopes, initial, final, cu_seqlens, silu) -> None:
    CALLS.append("forward")
    if silu:
        q, k = torch.nn.functional.silu(q), torch.nn.functional.silu(k)
    found, state = torch_lightning_attention(
        q, k, v, slopes, initial_state=initial, output_final_state=final is not None, cu_seqlens=cu_seqlens
    )
    o.copy_(found)
    if final is not None:
        final.copy_(state)


def _backward(*arguments) -> None:
    CALLS.append("backward")
    THREAD.submit(_differentiate, *arguments).result()


def _differentiate(q, k, v, do, dq, dk, dv, slopes, initial, dfinal, dinitial, cu_seqlens, silu) -> None:
    inputs = [None if x is None else x.detach().clone().requires_grad_() for x in (q, k, v, initial)]
    q, k, v, initial = inputs
    if silu:
        q, k = torch.nn.functional.silu(q), torch.nn.functional.silu(k)
    outputs = torch_lightning_attention(
        q, k, v, slopes, initial_state=initial, output_final_state=dfinal is not None, cu_seqlens=cu_seqlens
    )
    given = [(x, dx) for x, dx in zip(outputs, (do, dfinal), strict=True) if x is not None]
    wanted = [(x, into) for x, into in zip(inputs, (dq, dk, dv, dinitial), strict=True) if into is not None]
    outputs, grad_outputs = zip(*given, strict=True)
    gradients = torch.autograd.grad(outputs, [x for x, _ in wanted], grad_outputs)
    for (_, into), gradient in zip(wanted, gradients, strict=True):
        into.copy_(gradient)


def use_operators(monkeypatch) -> list[str]:
    """Route attention on CPU tensors through the operators; returns the list that their runs are noted in."""
    operators, packed = tnl_kernels.attention_triton, tnl_kernels.packed_triton
    for module in (operators, packed):
        monkeypatch.setattr(module, "forward", _forward)
        monkeypatch.setattr(module, "backward", _backward)
    monkeypatch.setattr(tnl_kernels.attention, "torch_lightning_attention", operators.triton_lightning_attention)
    monkeypatch.setattr(
        tnl_kernels.attention, "torch_lightning_attention_packed", packed.triton_lightning_attention_packed
    )
    CALLS.clear()
    return CALLS

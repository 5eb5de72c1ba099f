"""Checks of the attention ops' arguments: each names the argument, what it got and what it expects.

Values are read only from host memory: on an accelerator a look at them would make the host wait for the device at every
call.
"""

import torch
from torch import Tensor

from tnl_kernels.dtypes import FLOATS, compute_dtype

ACTIVATIONS = ("silu", None)


def names(values) -> str:
    """The values as a comma-separated list, for an error message."""
    return ", ".join(str(value).removeprefix("torch.") for value in values)


def may_look_at(tensor: Tensor) -> bool:
    """Its values are in host memory, and there are values: not so while a compiler traces."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def check_devices(device: torch.device, **tensors: Tensor | None) -> None:
    """The named tensors are on ``device``, that of the op's first argument."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{name}: got a tensor on {tensor.device}, expected {device} like the other arguments")


def check_shape(name: str, tensor: Tensor, expected: tuple[int, ...], dims: str) -> None:
    """``tensor`` has the shape ``expected``, called ``dims`` in the message."""
    if tuple(tensor.shape) != expected:
        raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, expected {dims} = {expected}")


def check_dtype(name: str, tensor: Tensor, expected: tuple[torch.dtype, ...]) -> None:
    """``tensor`` has one of the dtypes ``expected``."""
    if tensor.dtype not in expected:
        raise ValueError(f"{name}: got dtype {names([tensor.dtype])}, expected {names(expected)}")


def check_num_dims(name: str, tensor: Tensor, dims: str) -> None:
    """``tensor`` has as many dims as ``dims`` names."""
    if tensor.dim() != dims.count(",") + 1:
        raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, expected {dims}")


def check_activation(activation: str | None) -> None:
    """``activation`` is one of `ACTIVATIONS`."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: got {activation!r}, expected one of {names(map(repr, ACTIVATIONS))}")


def check_slopes(slopes: Tensor, H: int) -> None:
    """slopes [H], fp32 (or fp64), finite and not negative."""
    check_shape("slopes", slopes, (H,), "[H]")
    check_dtype("slopes", slopes, (torch.float32, torch.float64))
    if may_look_at(slopes):
        values = slopes.tolist()
        if not all(0 <= value < float("inf") for value in values):
            raise ValueError(f"slopes: got {values}, expected finite values >= 0 (the decay is exp(-slope))")


def check_cu_seqlens(cu_seqlens: Tensor | None, B: int, T: int) -> int:
    """cu_seqlens int32 [N + 1], from 0 to T, never decreasing, with B = 1. Returns the number of states N."""
    if cu_seqlens is None:
        return B
    check_dtype("cu_seqlens", cu_seqlens, (torch.int32,))
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2:
        raise ValueError(f"cu_seqlens: got shape {tuple(cu_seqlens.shape)}, expected [N + 1] with N >= 1")
    if B != 1:
        raise ValueError(f"cu_seqlens: got a batch of B = {B}, expected B = 1 (documents are packed along T)")
    if may_look_at(cu_seqlens):
        offsets = cu_seqlens.tolist()
        if offsets[0] != 0:
            raise ValueError(f"cu_seqlens: got {offsets[0]} as the first offset, expected 0")
        if offsets[-1] != T:
            raise ValueError(f"cu_seqlens: got {offsets[-1]} as the last offset, expected T = {T}")
        if offsets != sorted(offsets):
            raise ValueError(f"cu_seqlens: got decreasing offsets {offsets}, expected offsets that never decrease")
    return len(cu_seqlens) - 1


def check_state(name: str, state: Tensor | None, expected: tuple[int, ...], dims: str, dtype: torch.dtype) -> None:
    """A state of the dtype in which tensors of ``dtype`` are computed."""
    if state is not None:
        check_shape(name, state, expected, dims)
        check_dtype(name, state, (compute_dtype(dtype),))


def check_key_value(k: Tensor, v: Tensor) -> tuple[int, int, int, int, int]:
    """k [B, T, H, K] and v [B, T, H, V] of one dtype. Returns B, T, H, K, V."""
    check_num_dims("k", k, "[B, T, H, K]")
    check_num_dims("v", v, "[B, T, H, V]")
    check_dtype("k", k, FLOATS)
    check_dtype("v", v, (k.dtype,))
    B, T, H, K = k.shape
    check_shape("v", v, (B, T, H, v.shape[-1]), "[B, T, H, V]")
    return B, T, H, K, v.shape[-1]

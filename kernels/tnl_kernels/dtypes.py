"""Which dtypes the ops take, in which one they compute, and how autocast is kept from changing it."""

import functools
from collections.abc import Callable

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64 tensors, fp32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def without_autocast(function: Callable) -> Callable:
    """``function`` with autocast off on the device of its first argument: autocast would round fp32 matmuls to bf16."""

    @functools.wraps(function)
    def wrapper(tensor, *args, **kwargs):
        device_type = tensor.device.type
        if not torch.is_autocast_enabled(device_type):
            return function(tensor, *args, **kwargs)
        with torch.autocast(device_type, enabled=False):
            return function(tensor, *args, **kwargs)

    return wrapper

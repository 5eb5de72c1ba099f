"""The one place where a tensor's device and dtype choose the form of an op."""

import functools
import importlib.util
import logging
from collections.abc import Callable

import torch

logger = logging.getLogger(__name__)

# Triton comes with every torch that has CUDA; where it is missing (CPU-only machines), so are its forms.
HAS_TRITON = importlib.util.find_spec("triton") is not None
FORM_OF_DEVICE = {"cpu": "torch", "cuda": "triton", "meta": "torch"}


def form_of(device: torch.device | str, dtype: torch.dtype = torch.float32) -> str:
    """Name of the form (``torch`` or ``triton``) that the ops take for tensors on ``device``; logged on first use.

    fp64 tensors take the torch forms on every device: the kernels compute in fp32.

    Raises:
        ValueError: a type of device for which no form is known.
    """
    device_type = torch.device(device).type
    if device_type not in FORM_OF_DEVICE:
        raise ValueError(
            f"no op of tnl_kernels is known to work on {device_type} tensors: move them to one of "
            f"{', '.join(FORM_OF_DEVICE)}"
        )
    name = "torch" if dtype == torch.float64 else FORM_OF_DEVICE[device_type]
    if not torch.compiler.is_compiling():
        _log(device_type, dtype == torch.float64, name)
    return name


@functools.cache
def _log(device_type: str, is_fp64: bool, name: str) -> None:
    logger.info("ops on %s%s tensors use the %s forms", device_type, " fp64" if is_fp64 else "", name)


def dispatch(*tensors: torch.Tensor, **forms: Callable) -> Callable:
    """The one of ``forms`` (form name -> function) that the tensors' device and widest dtype choose."""
    is_fp64 = any(tensor.dtype == torch.float64 for tensor in tensors)
    return forms[form_of(tensors[0].device.type, torch.float64 if is_fp64 else tensors[0].dtype)]

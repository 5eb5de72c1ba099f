"""The one place where a tensor's device chooses the form of an op."""

import functools
import logging
from collections.abc import Callable

import torch

logger = logging.getLogger(__name__)

FORM_OF_DEVICE = {"cpu": "torch", "cuda": "torch", "meta": "torch"}


@functools.cache
def form_of(device: torch.device | str) -> str:
    """Name of the forms (``torch``) that the ops take for tensors on ``device``; logged on its first use only.

    Raises:
        ValueError: a type of device for which no form is known.
    """
    device_type = torch.device(device).type
    if device_type not in FORM_OF_DEVICE:
        raise ValueError(
            f"no op of tnl_kernels is known to work on {device_type} tensors: move them to one of "
            f"{', '.join(FORM_OF_DEVICE)}"
        )
    name = FORM_OF_DEVICE[device_type]
    logger.info("ops on %s tensors use the %s forms", device_type, name)
    return name


def dispatch(tensor: torch.Tensor, **forms: Callable) -> Callable:
    """The one of ``forms`` (form name -> function) that ``tensor``'s device chooses."""
    return forms[form_of(tensor.device.type)]

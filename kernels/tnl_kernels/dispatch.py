"""The one place where a tensor's device chooses the form of an op."""

import functools
import logging
from collections.abc import Callable

import torch

logger = logging.getLogger(__name__)

FORM_OF_DEVICE = {"cpu": "torch", "cuda": "torch"}


@functools.cache
def form_name(device_type: str) -> str:
    """Name of the forms that tensors on ``device_type`` use; logged on its first use only."""
    name = FORM_OF_DEVICE.get(device_type, "torch")
    logger.info("ops on %s tensors use the %s forms", device_type, name)
    return name


def dispatch(tensor: torch.Tensor, **forms: Callable) -> Callable:
    """The one of ``forms`` (form name -> function) that ``tensor``'s device chooses."""
    return forms[form_name(tensor.device.type)]

"""Batches on their way from host memory to a GPU."""

import torch


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """``tensor`` of host memory on ``device``; the host does not wait for the work that the device still has.

    From memory that is not pinned, CUDA copies only after all work before it.
    """
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)

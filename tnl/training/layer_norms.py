"""Norms of each block's gradients, of the whole model at every ZeRO stage."""

from torch import nn

from tnl.training.deepspeed_import import deepspeed
from tnl.training.tensor_groups import TensorGroups, squared_norm


def gradient_norms(model: nn.Module, tensor: TensorGroups | None = None, *, loss_scale: float = 1.0) -> list[float]:
    """L2 norm of the gradient of each block, before clipping; on all ranks, between backward pass and update.

    ZeRO's pieces are gathered parameter by parameter.

    Args:
        loss_scale: which the gradients still carry: that of fp16.
    """
    squares = []
    for layer in model.model.layers:
        gradients = ((p, deepspeed.utils.safe_get_full_grad(p)) for p in layer.parameters() if p.requires_grad)
        known = [(p, g) for p, g in gradients if g is not None]
        if tensor is None:
            squares.append(sum(g.double().square().sum() for _, g in known))
        else:
            squares.append(squared_norm(known, tensor.group))
    return [float(square) ** 0.5 / loss_scale for square in squares]

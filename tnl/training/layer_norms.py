"""Norms of each block's gradients, of the whole model at every ZeRO stage."""

from torch import nn

from tnl.training.deepspeed_import import deepspeed


def gradient_norms(model: nn.Module) -> list[float]:
    """L2 norm of the gradient of each block, before clipping; on all ranks, between backward pass and update.

    ZeRO's pieces are gathered parameter by parameter.
    """
    norms = []
    for layer in model.model.layers:
        gradients = (deepspeed.utils.safe_get_full_grad(p) for p in layer.parameters())
        norms.append(sum(g.double().square().sum() for g in gradients if g is not None) ** 0.5)
    return [float(norm) for norm in norms]

"""Norms of each block's gradients and state, of the whole model at every ZeRO stage."""

import torch
import torch.distributed as dist
from torch import nn

from tnl.model.state import TransnormerState
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


@torch.no_grad()
def state_norms(engine, input_ids: torch.Tensor, tensor: TensorGroups | None = None) -> list[float]:
    """Frobenius norm of each block's recurrent state behind a text, all heads together; on all ranks, between steps.

    Args:
        engine: a DeepSpeed engine around a `TransnormerForCausalLM`, which stays in training mode.
        input_ids: int64 [1, T] on the engine's device; the same on ranks that share the weights.
    """
    state = TransnormerState()
    engine.eval()
    engine(input_ids=input_ids, past_key_values=state, use_cache=True, logits_to_keep=1)
    engine.train()
    squares = torch.stack([layer.double().square().sum() for layer in state.layers])
    if tensor is not None:
        dist.all_reduce(squares, group=tensor.group)
    return squares.sqrt().tolist()

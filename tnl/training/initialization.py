"""Initial weights under ZeRO-3: those that one process draws for the whole model, made and split one by one.

The model's constructor runs on tensors without memory while its random draws are noted. Then each parameter is filled
from its note and partitioned before the next: no process ever holds more than one of them whole.
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from tnl.training.deepspeed_import import deepspeed

ATEN = torch.ops.aten
DRAWS = (ATEN.uniform_.default, ATEN.normal_.default)


class _Draws(TorchDispatchMode):
    """Gives new parameters no memory, and notes the last draw into each: the random state before it, and its values.

    The draw is repeated into a tensor that is dropped, so that the random states are those of a real construction.
    """

    def __init__(self):
        super().__init__()
        self.notes: dict[torch.Tensor, tuple] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is ATEN.empty.memory_format:
            kwargs = kwargs | {"device": "meta", "pin_memory": False}
        if func in DRAWS and args[0].is_meta:
            self.notes[args[0]] = (torch.get_rng_state(), func, args[1:])
            func(torch.empty(args[0].shape, dtype=args[0].dtype), *args[1:])
            return args[0]
        return func(*args, **kwargs)


def partitioned_model(make: Callable[[], PreTrainedModel], dtype: torch.dtype, config: dict) -> PreTrainedModel:
    """``make()`` with its parameters in ``dtype``, partitioned over the ranks.

    Args:
        make: builds the model on the CPU; the weights are those of this call, bit for bit, before the cast.
        config: the DeepSpeed configuration of the run.
    """
    draws = _Draws()
    with draws:
        model = make()
    after = torch.get_rng_state()
    made: dict[torch.Tensor, nn.Parameter] = {}  # a tied parameter stands in two modules
    for module in model.modules():
        own = dict(module.named_parameters(recurse=False))
        for name, old in own.items():
            if old not in made:
                made[old] = nn.Parameter(_value(old, draws.notes), requires_grad=old.requires_grad)
            setattr(module, name, made[old])
        if any(old.is_meta and old not in draws.notes for old in own.values()):
            model._init_weights(module)  # what is no draw is a formula
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.to(dtype)
        if own:
            deepspeed.zero.Init(module=module, config_dict_or_path=config, dtype=dtype)
    torch.set_rng_state(after)
    return model


def _value(old: nn.Parameter, notes: dict[torch.Tensor, tuple]) -> torch.Tensor:
    if not old.is_meta:
        return old.detach()
    value = torch.empty(old.shape, dtype=old.dtype)
    if old in notes and torch.distributed.get_rank() == 0:  # partitioning sends the values of rank 0 to all
        state, draw, values = notes[old]
        torch.set_rng_state(state)
        draw(value, *values)
    return value

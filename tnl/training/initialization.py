"""Initial weights that ranks hold parts of: those that one process draws for the whole model, made and cut one by one.

The model's constructor runs on tensors without memory while its random draws are noted. Then each parameter is filled
from its note and cut before the next: no process ever holds more than one of them whole.
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from tnl.model.modeling import TransnormerForCausalLM
from tnl.model.tensor_parallel import join_group, slice_of, sliced_config
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


def _make_one_by_one(
    make: Callable[[], PreTrainedModel], finish: Callable[[str, nn.Module], None], *, draws_here: bool
) -> PreTrainedModel:
    """``make()``, module by module; the weights are those of that call, bit for bit.

    Args:
        make: builds the model on the CPU.
        finish: called with the name of each module and the module, once its own parameters are made; the next module's
            are made after that.
        draws_here: whether this process makes the values of random weights, or leaves them undefined.
    """
    draws = _Draws()
    with draws:
        model = make()
    after = torch.get_rng_state()
    made: dict[torch.Tensor, nn.Parameter] = {}  # a tied parameter stands in two modules
    for module_name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        for name, old in own.items():
            if old not in made:
                made[old] = nn.Parameter(_value(old, draws.notes, draws_here), requires_grad=old.requires_grad)
            setattr(module, name, made[old])
        if any(old.is_meta and old not in draws.notes for old in own.values()):
            model._init_weights(module)  # what is no draw is a formula
        if own:
            finish(module_name, module)
    torch.set_rng_state(after)
    return model


def partitioned_model(make: Callable[[], PreTrainedModel], dtype: torch.dtype, config: dict) -> PreTrainedModel:
    """``make()`` with its parameters in ``dtype``, partitioned over the ranks.

    Args:
        make: builds the model on the CPU; the weights are those of this call, bit for bit, before the cast.
        config: the DeepSpeed configuration of the run.
    """

    def partition(_, module: nn.Module) -> None:
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.to(dtype)
        deepspeed.zero.Init(module=module, config_dict_or_path=config, dtype=dtype)

    # Partitioning sends the values of rank 0 to all.
    return _make_one_by_one(make, partition, draws_here=torch.distributed.get_rank() == 0)


def sliced_model(
    make: Callable[[], TransnormerForCausalLM], group: torch.distributed.ProcessGroup
) -> TransnormerForCausalLM:
    """This rank's part of ``make()``, whose blocks the ranks of ``group`` share; see `tnl.model.tensor_parallel`.

    Args:
        make: builds the whole model on the CPU; the weights are slices of those of this call, bit for bit.
    """

    def cut(module_name: str, module: nn.Module) -> None:
        for name, parameter in module.named_parameters(recurse=False):
            parameter.data = slice_of(f"{module_name}.{name}", parameter.data, group.rank(), group.size())

    model = _make_one_by_one(make, cut, draws_here=True)
    with torch.device("meta"):
        part = type(model)(sliced_config(model.config, group.size()))
    part.load_state_dict(model.state_dict(keep_vars=True), assign=True)
    part.tie_weights()
    join_group(part, model.config, group)
    return part


def _value(old: nn.Parameter, notes: dict[torch.Tensor, tuple], draws_here: bool) -> torch.Tensor:
    if not old.is_meta:
        return old.detach()
    value = torch.empty(old.shape, dtype=old.dtype)
    if old in notes and draws_here:
        state, draw, values = notes[old]
        torch.set_rng_state(state)
        draw(value, *values)
    return value

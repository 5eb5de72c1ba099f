"""Initial weights that ranks hold parts of: those that one process draws for the whole model, made and cut one by one.

The model's constructor runs on tensors without memory while its random draws are noted. Then each parameter is filled
from its note, or from a checkpoint, and cut before the next: no process ever holds more than one of them whole.
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
# The value of a parameter by its name, in memory of its own.
Read = Callable[[str], torch.Tensor]
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
    make: Callable[[], PreTrainedModel],
    finish: Callable[[str, nn.Module], None],
    *,
    makes_values: bool,
    read: Read | None = None,
) -> PreTrainedModel:
    """``make()``, module by module; the weights are those of that call, bit for bit, or those that ``read`` returns.

    Args:
        make: builds the model on the CPU.
        finish: called with the name of each module and the module, once its own parameters are made; the next module's
            are made after that.
        makes_values: whether this process makes the values of the weights, or leaves them undefined.
    """
    if read is not None:
        with torch.device("meta"):
            model = make()
        _fill(model, lambda name, old: read(name) if makes_values else torch.empty(old.shape, dtype=old.dtype), finish)
        return model
    draws = _Draws()
    with draws:
        model = make()
    after = torch.get_rng_state()
    is_formula = {name for name, old in model.named_parameters() if old.is_meta and old not in draws.notes}

    def finish_formulas(module_name: str, module: nn.Module) -> None:
        if any(f"{module_name}.{name}" in is_formula for name, _ in module.named_parameters(recurse=False)):
            model._init_weights(module)
        finish(module_name, module)

    _fill(model, lambda _, old: _value(old, draws.notes, makes_values), finish_formulas)
    torch.set_rng_state(after)
    return model


def _fill(
    model: PreTrainedModel,
    value: Callable[[str, nn.Parameter], torch.Tensor],
    finish: Callable[[str, nn.Module], None],
) -> None:
    """Put ``value(name, parameter)`` in the place of each parameter, and finish each module that has some."""
    made: dict[torch.Tensor, nn.Parameter] = {}  # a tied parameter stands in two modules
    for module_name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        for name, old in own.items():
            if old not in made:
                made[old] = nn.Parameter(value(f"{module_name}.{name}", old), requires_grad=old.requires_grad)
            setattr(module, name, made[old])
        if own:
            finish(module_name, module)


def read_model(make: Callable[[], PreTrainedModel], dtype: torch.dtype, read: Read) -> PreTrainedModel:
    """``make()`` with the weights that ``read`` returns, in ``dtype``."""
    return _make_one_by_one(make, lambda *_: None, makes_values=True, read=lambda name: read(name).to(dtype))


def partitioned_model(
    make: Callable[[], PreTrainedModel], dtype: torch.dtype, config: dict, read: Read | None = None
) -> PreTrainedModel:
    """``make()`` with its parameters in ``dtype``, partitioned over the ranks.

    Args:
        make: builds the model on the CPU; the weights are those of this call, bit for bit, before the cast.
        config: the DeepSpeed configuration of the run.
        read: the weights, instead.
    """

    def partition(_, module: nn.Module) -> None:
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.to(dtype)
        deepspeed.zero.Init(module=module, config_dict_or_path=config, dtype=dtype)

    # Partitioning sends the values of rank 0 to all.
    return _make_one_by_one(make, partition, makes_values=torch.distributed.get_rank() == 0, read=read)


def sliced_model(
    make: Callable[[], TransnormerForCausalLM], group: torch.distributed.ProcessGroup, read: Read | None = None
) -> TransnormerForCausalLM:
    """This rank's part of ``make()``, whose blocks the ranks of ``group`` share; see `tnl.model.tensor_parallel`.

    Args:
        make: builds the whole model on the CPU; the weights are slices of those of this call, bit for bit.
        read: the whole weights, instead.
    """

    def cut(module_name: str, module: nn.Module) -> None:
        for name, parameter in module.named_parameters(recurse=False):
            parameter.data = slice_of(f"{module_name}.{name}", parameter.data, group.rank(), group.size())

    model = _make_one_by_one(make, cut, makes_values=True, read=read)
    with torch.device("meta"):
        part = type(model)(sliced_config(model.config, group.size()))
    part.load_state_dict(model.state_dict(keep_vars=True), assign=True)
    part.tie_weights()
    join_group(part, model.config, group)
    return part


def _value(old: nn.Parameter, notes: dict[torch.Tensor, tuple], makes_values: bool) -> torch.Tensor:
    if not old.is_meta:
        return old.detach()
    value = torch.empty(old.shape, dtype=old.dtype)
    if old in notes and makes_values:
        state, draw, values = notes[old]
        torch.set_rng_state(state)
        draw(value, *values)
    return value

"""Tensor parallelism: a group of ranks shares every block's heads and channels, and each holds the rows and columns of
the weights that belong to its own (arXiv 2307.14995, model parallelism; Megatron-LM, arXiv 1909.08053).

Of a packed projection every rank holds its heads in each of the blocks q, k, v and u. Embedding and head are whole on
every rank, so is the residual stream. A mixer begins with projections of the same x and ends with one whose partial
results are summed over the group; in the backward pass the gradient of x is summed. The norm over all heads takes one
scalar of each token more, in each direction. `sliced_config` describes what one rank holds as a model of its own: what
is counted or shaped by a configuration needs nothing else.
"""

import copy

import torch
import torch.distributed as dist
from tnl_kernels.dtypes import compute_dtype
from torch import nn
from torch.autograd.function import once_differentiable

from tnl.model.configuration import TransnormerConfig
from tnl.model.decay import decay_slopes

# Name of a parameter in its block: the dimension that is sliced, and how many blocks stand side by side in it.
SLICED = {
    "token_mixer.qkvu_proj.weight": (0, 4),
    "token_mixer.qkv_proj.weight": (0, 3),
    "token_mixer.output_gate.1.weight": (0, 1),
    "token_mixer.lrpe.theta": (0, 1),
    "token_mixer.out_proj.weight": (1, 1),
    "channel_mixer.l1.weight": (0, 1),
    "channel_mixer.l2.weight": (0, 1),
    "channel_mixer.l3.weight": (1, 1),
}


def slicing_problems(num_heads: int, glu_dim: int, mixer_norm: str, size: int) -> list[str]:
    """What keeps ``size`` ranks from sharing the blocks of a model; each names its key of a run's configuration."""
    problems = [
        f"{size} does not divide {key} {number}; set a divisor of both model.num_heads and model.glu_dim"
        for key, number in (("model.num_heads", num_heads), ("model.glu_dim", glu_dim))
        if number % size
    ]
    if size > 1 and mixer_norm != "simplermsnorm":
        problems.append(
            f"model.mixer_norm {mixer_norm} is not computed over split heads; set simplermsnorm, or tensor_parallel: 1"
        )
    return problems


def sliced_config(config: TransnormerConfig, size: int) -> TransnormerConfig:
    """The model that one of ``size`` ranks holds.

    Raises:
        ValueError: heads or channels do not divide, or the norm is none that splits.
    """
    problems = slicing_problems(config.decoder_attention_heads, config.glu_dim, config.mixer_norm_type, size)
    if problems:
        raise ValueError("; ".join(problems))
    own = copy.deepcopy(config)
    own.decoder_attention_heads //= size
    own.hidden_dim //= size
    own.glu_dim //= size
    return own


def _slicing(name: str) -> tuple[int, int] | None:
    return SLICED.get(name.split(".", 3)[-1]) if name.startswith("model.layers.") else None


def is_sliced(name: str) -> bool:
    """Whether each rank holds a part of the parameter ``name`` of a `TransnormerForCausalLM`; others are whole."""
    return _slicing(name) is not None


def slice_of(name: str, whole: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    """The part of a parameter that ``rank`` of ``size`` holds, in memory of its own."""
    slicing = _slicing(name)
    if slicing is None:
        return whole
    dim, blocks = slicing
    parts = whole.unflatten(dim, (blocks, size, -1)).select(dim + 1, rank)
    return parts.flatten(dim, dim + 1).clone(memory_format=torch.contiguous_format)


def merged(name: str, parts: list[torch.Tensor]) -> torch.Tensor:
    """The whole parameter, from what the ranks hold: the inverse of `slice_of`."""
    slicing = _slicing(name)
    if slicing is None:
        return parts[0]
    dim, blocks = slicing
    return torch.stack([part.unflatten(dim, (blocks, -1)) for part in parts], dim + 1).flatten(dim, dim + 2)


def join_group(model: nn.Module, config: TransnormerConfig, group: dist.ProcessGroup) -> None:
    """Make ``model``, of `sliced_config` and with sliced weights, this rank's part of the model of ``config``."""
    for name, parameter in model.named_parameters():
        parameter.tensor_model_parallel = is_sliced(name)  # DeepSpeed's mark: whose gradients are no copies
    for i, layer in enumerate(model.model.layers):
        mixer = layer.token_mixer
        slopes = decay_slopes(config.decay, config.decoder_attention_heads, i, config.decoder_layers)
        assert len(slopes) == mixer.num_heads * group.size()
        mixer.slopes = slopes[group.rank() * mixer.num_heads :][: mixer.num_heads]
        mixer.tensor_group = layer.channel_mixer.tensor_group = group


class _SharedInput(torch.autograd.Function):
    """``x W^T`` for each weight. The gradient of x is summed over the group while those of the weights are made."""

    @staticmethod
    def forward(ctx, x, group, num_sliced, *weights):
        ctx.save_for_backward(x, *weights)
        ctx.group, ctx.num_sliced = group, num_sliced
        return tuple(nn.functional.linear(x, weight) for weight in weights)

    @staticmethod
    @once_differentiable
    def backward(ctx, *douts):
        x, *weights = ctx.saved_tensors
        douts = [dout.flatten(0, -2) for dout in douts]
        dx = douts[0] @ weights[0]
        for dout, weight in zip(douts[1:], weights[1:], strict=True):
            dx.addmm_(dout, weight)
        works = [dist.all_reduce(dx, group=ctx.group, async_op=True)]
        rows = x.flatten(0, -2)
        dweights = [dout.t() @ rows for dout in douts]
        # A weight that is whole on every rank has seen the gradient of this rank's heads only.
        works += [dist.all_reduce(dw, group=ctx.group, async_op=True) for dw in dweights[ctx.num_sliced :]]
        for work in works:
            work.wait()  # the device waits, not the host
        return dx.view_as(x), None, None, *dweights


class _SummedOutput(torch.autograd.Function):
    """``x W^T`` summed over the group; its gradient is the same on every rank."""

    @staticmethod
    def forward(ctx, x, weight, group):
        ctx.save_for_backward(x, weight)
        rows = x.flatten(0, -2)
        # Not a result of aten::mm, which selective checkpointing would keep and the next line change.
        out = torch.mm(rows, weight.t(), out=rows.new_empty(len(rows), len(weight)))
        dist.all_reduce(out, group=group)
        return out.view(*x.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        x, weight = ctx.saved_tensors
        dout = dout.flatten(0, -2)
        return (dout @ weight).view_as(x), dout.t() @ x.flatten(0, -2), None


def project(
    x: torch.Tensor, group: dist.ProcessGroup | None, *sliced: nn.Linear, whole: tuple[nn.Linear, ...] = ()
) -> tuple[torch.Tensor, ...]:
    """The first linear layers of a mixer, all on x [..., D]; ``whole`` are those whose weight is not sliced, followed
    by sliced ones. Without a group, what the layers return."""
    layers = (*sliced, *whole)
    if group is None:
        return tuple(layer(x) for layer in layers)
    return _SharedInput.apply(x, group, len(sliced), *(layer.weight for layer in layers))


def project_back(x: torch.Tensor, group: dist.ProcessGroup | None, layer: nn.Linear) -> torch.Tensor:
    """The last linear layer of a mixer, of the columns that belong to this rank's heads or channels: [..., D]."""
    return layer(x) if group is None else _SummedOutput.apply(x, layer.weight, group)


def reduced_bytes(config: TransnormerConfig, tokens: int, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes of what the group sums for one block and ``tokens`` tokens, in the forward and in the backward pass."""
    stream = 2 * tokens * config.decoder_embed_dim * dtype.itemsize
    norm = tokens * compute_dtype(dtype).itemsize
    gate = 0 if config.gate_dim is None else config.gate_dim * config.decoder_embed_dim * dtype.itemsize
    return stream + norm, stream + norm + gate

"""How the blocks of a model run in training: which are computed again in the backward pass, and compiled or not.

Evaluation and generation, which need no gradient, run the blocks as they are.
"""

import inspect
from collections.abc import Callable
from functools import partial

import torch
from tnl_kernels.dispatch import form_of
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from tnl.errors import ConfigError
from tnl.model.modeling import TransnormerDecoderLayer
from tnl.training.settings import TrainSettings

# Operators whose outputs selective checkpointing keeps. On a CPU, attention is made of many small operators: there it
# is computed again.
ATTENTION = frozenset(
    {
        "tnl_kernels::lightning_attention_fwd",
        "tnl_kernels::lightning_attention_packed_fwd",
        "tnl_kernels::lightning_attention_state_fwd",
        "aten::_scaled_dot_product_flash_attention",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_efficient_attention",
        "aten::_scaled_dot_product_cudnn_attention",
        "torch_attn::_varlen_attn",
    }
)
KEPT = {"selective": ATTENTION, "selective_matmuls": ATTENTION | {"aten::mm"}}


def _kept(kept: frozenset[str], ctx, operator, *args, **kwargs) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator.name() in kept else CheckpointPolicy.PREFER_RECOMPUTE


def _selective_contexts(mode: str):
    return create_selective_checkpoint_contexts(partial(_kept, KEPT[mode]))


def _run(layer: nn.Module, mode: str, args: tuple, kwargs: dict):
    """The forward of the block's class, which holds no hooks: those of ZeRO run outside."""
    forward = partial(inspect.unwrap(type(layer).forward), layer)
    if mode == "none":
        return forward(*args, **kwargs)
    selective = {} if mode == "full" else {"context_fn": partial(_selective_contexts, mode)}
    return checkpoint(forward, *args, use_reentrant=False, **selective, **kwargs)


def _forward(layer: nn.Module, mode: str, run: Callable, *args, **kwargs):
    if torch.is_grad_enabled():
        return run(layer, mode, args, kwargs)
    return _run(layer, "none", args, kwargs)


def _run_marked(run: Callable, layer: nn.Module, mode: str, args: tuple, kwargs: dict):
    """``run``, compiled, of a TNL's block: the number of documents differs from batch to batch, and asks for no other
    code. One document with a state does, once: torch.compile takes a size of 1 for a constant."""
    cu_seqlens, initial_state = args[3:5]
    for tensor in (cu_seqlens, initial_state):
        if cu_seqlens is not None and tensor is not None:
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
    return run(layer, mode, args, kwargs)


def check_compile(train: TrainSettings, device: torch.device) -> None:
    """Refuse ``train.compile`` where it cannot be.

    Raises:
        ConfigError: the form of the operators that ``device`` uses cannot be compiled.
    """
    if train.compile and form_of(device) != "triton":
        raise ConfigError(
            f"train.compile: the operators' {form_of(device)} form, used on {device.type}, reads document bounds on "
            "the host and cannot be compiled; set train.compile: false, or train on a GPU"
        )


def prepare_blocks(model: nn.Module, train: TrainSettings, device: torch.device, backend: str = "inductor") -> None:
    """Give every block of ``model`` the forward that ``train`` asks for; before the model is handed to DeepSpeed.

    Equal blocks share one compilation: what differs between them (weights, slopes) is an argument of the code.

    Args:
        model: a causal language model whose blocks are ``model.model.layers``; of a TNL to be compiled.
        backend: of torch.compile.

    Raises:
        ConfigError: as `check_compile`.
    """
    if not train.compile and train.activation_checkpointing == "none":
        return
    run = _run
    if train.compile:
        check_compile(train, device)
        assert isinstance(model.model.layers[0], TransnormerDecoderLayer), "refused by PretrainSettings"
        run = partial(_run_marked, torch.compile(_run, fullgraph=True, backend=backend))
    for index, layer in enumerate(model.model.layers):
        layer.forward = partial(_forward, layer, train.recomputation(index), run)

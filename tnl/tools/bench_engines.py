"""What makes a training step for `tnl bench train`: the run's own DeepSpeed engine, or the same arithmetic in PyTorch.

Both take a forward pass by being called, and have ``backward(loss, scale_wrt_gas=False)`` and ``step()``, which
updates after the last micro-batch of a step.
"""

import contextlib
import importlib.metadata
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from tnl.training.blocks import prepare_blocks
from tnl.training.optimizer import parameter_groups
from tnl.training.settings import PretrainSettings

EngineName = Literal["deepspeed", "torch"]


@dataclass(frozen=True)
class Place:
    """This process among those of the benchmark, and its device."""

    rank: int
    world_size: int
    device: torch.device


def default_engine() -> EngineName:
    """The loop's own engine where DeepSpeed is installed."""
    return "deepspeed" if importlib.util.find_spec("deepspeed") else "torch"


def engine_version(name: EngineName) -> str:
    """What a table says of it."""
    return f"deepspeed {importlib.metadata.version('deepspeed')}" if name == "deepspeed" else "torch"


def join(name: EngineName) -> Place:
    """Join the processes that torchrun started, or be the only one."""
    if name == "deepspeed":
        from tnl.training.engine import init_ranks

        ranks = init_ranks()
        return Place(ranks.rank, ranks.world_size, ranks.device)
    world_size, local_rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    if world_size > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return Place(dist.get_rank() if world_size > 1 else 0, world_size, device)


@lru_cache
def sequence_group(place: Place, size: int) -> dist.ProcessGroup:
    """The ``size`` consecutive processes that share windows with this one; a collective."""
    group, _ = dist.new_subgroups(size)
    return group


class TorchEngine:
    """Mixed-precision AdamW in plain PyTorch: fp32 master weights, fp32 sums of gradients, clipping, a fused update.

    Each gradient is added to its fp32 sum, and let go, as soon as the backward pass has made it. The sums of several
    processes are averaged while the last backward pass of a step goes on. Weights in fp32 are their own masters.
    """

    def __init__(self, model: torch.nn.Module, settings: PretrainSettings, place: Place):
        self.module, self.place = model, place
        self.max_norm = settings.train.gradient_clipping
        train = settings.train
        data_size = place.world_size // train.sequence_parallel
        self.num_passes = train.global_batch_size // train.micro_batch_size // data_size * train.num_segments
        self._passes, self._pending = 0, []
        self._masters = {
            p: p if p.dtype == torch.float32 else p.detach().float() for p in model.parameters() if p.requires_grad
        }
        for p, master in self._masters.items():
            master.grad = torch.zeros_like(master)
            p.register_post_accumulate_grad_hook(self._gather)
        groups = parameter_groups(model, settings.optimizer.weight_decay)
        for group in groups:
            group["params"] = [self._masters[p] for p in group["params"]]
        optimizer = settings.optimizer
        self.optimizer = torch.optim.AdamW(
            groups, lr=optimizer.lr, betas=optimizer.betas, eps=optimizer.eps, fused=True
        )

    def __call__(self, **inputs):
        """The model's forward pass."""
        return self.module(**inputs)

    def _gather(self, p: torch.nn.Parameter) -> None:
        master = self._masters[p]
        if master is not p:
            master.grad.add_(p.grad)
            p.grad = None
        if self.place.world_size > 1 and self._passes == self.num_passes - 1:
            self._pending.append(dist.all_reduce(master.grad, async_op=True))

    def backward(self, loss: torch.Tensor, scale_wrt_gas: bool = False) -> None:
        """Add the gradients of ``loss``; the mean over processes is what the update sees."""
        assert not scale_wrt_gas
        (loss / self.place.world_size).backward()

    def is_gradient_accumulation_boundary(self) -> bool:
        """Whether the pass just made is the last of its step."""
        return self._passes == self.num_passes - 1

    @torch.no_grad()
    def step(self) -> None:
        """Update the weights after the last backward pass of a step; nothing before."""
        self._passes += 1
        if self._passes < self.num_passes:
            return
        for work in self._pending:
            work.wait()
        self._passes, self._pending = 0, []
        masters = list(self._masters.values())
        if self.max_norm > 0:
            norm = torch.nn.utils.get_total_norm([master.grad for master in masters])
            torch.nn.utils.clip_grads_with_norm_(masters, self.max_norm, norm)
        self.optimizer.step()
        pairs = [(p, master) for p, master in self._masters.items() if p is not master]
        if pairs:
            torch._foreach_copy_(*map(list, zip(*pairs, strict=True)))
        torch._foreach_zero_([master.grad for master in masters])

    def destroy(self) -> None:
        """Let all tensors go."""
        self._masters.clear()
        del self.module, self.optimizer


def build(name: EngineName, make: Callable[[], PreTrainedModel], settings: PretrainSettings, place: Place):
    """The engine of ``settings`` around the model that ``make()`` gives."""
    if name == "deepspeed":
        from tnl.training.engine import Ranks, build_engine, build_model

        ranks = Ranks(place.rank, place.world_size, place.device)
        with torch.device(place.device) if settings.train.zero_stage < 3 else contextlib.nullcontext():
            model = build_model(make, settings, ranks)
        engine = build_engine(settings, model, ranks)
    else:
        with torch.device(place.device):
            model = make()
        model.to(device=place.device, dtype={"bf16": torch.bfloat16, "fp32": torch.float32}[settings.train.precision])
        prepare_blocks(model, settings.train, place.device)
        engine = TorchEngine(model, settings, place)
    model.train()
    return engine

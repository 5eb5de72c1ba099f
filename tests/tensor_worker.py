"""Started once by the tests: four ranks that share the blocks' weights, forked after the slow imports.

usage: tensor_worker.py CONFIG.yaml FOLDER; rank r writes FOLDER/r.json: errors of loss and gradients against one rank,
the bytes of collectives, and the losses of a run before and after it was resumed. The training runs leave their run
folders in FOLDER.
"""

import copy
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from tests.rank_worker import start_ranks
from tests.sequence_worker import worst_error
from tests.tiny_model import random_ids, tiny_model
from tests.tiny_run import trajectory
from tnl import config
from tnl.model import TransnormerForCausalLM
from tnl.model.tensor_parallel import join_group, slice_of, sliced_config
from tnl.training.engine import init_ranks
from tnl.training.pretrain import pretrain
from tnl.training.settings import PretrainSettings

SIZES = (2, 4)
LENGTH = 24
NO_LRPE = {"linear_use_lrpe_list": [0, 0]}
LOW_RANK = {"gate_dim": 4}

# Name: configuration of the model.
CASES = {
    "lrpe in layer 0": {},
    "without lrpe": NO_LRPE,
    "low-rank gate": LOW_RANK,
    "low-rank gate without lrpe": LOW_RANK | NO_LRPE,
    "decay of the paper, untied head": {"decay": "paper", "tie_word_embeddings": False},
}

# Overrides of training runs on four ranks; the same global batch in each.
RUNS = {
    "ZeRO 0": ["train.tensor_parallel=2", "train.zero_stage=0", "logging.layer_norms_every=1"],
    "on all ranks, low-rank gate, checkpointing": [
        "train.tensor_parallel=4",
        "model.gate_dim=4",
        "train.zero_stage=1",
        "train.activation_checkpointing=full",
    ],
    "with slices of windows": [
        "train.tensor_parallel=2",
        "train.sequence_parallel=2",
        "train.zero_stage=2",
        "train.activation_checkpointing=selective",
    ],
    "segments": ["train.tensor_parallel=2", "train.segment_length=16", "train.segment_gradient=exact"],
    "ZeRO 2, selective checkpointing": [
        "train.tensor_parallel=2",
        "train.zero_stage=2",
        "train.activation_checkpointing=selective_matmuls",
        "logging.layer_norms_every=1",
    ],
}

# A run whose weights stay as they were drawn.
STILL = ["train.steps=1", "schedule.warmup_steps=0", "optimizer.lr=1e-30"]


def part_of(whole: TransnormerForCausalLM, group: dist.ProcessGroup) -> TransnormerForCausalLM:
    """This rank's part of a model that exists."""
    part = TransnormerForCausalLM(sliced_config(whole.config, group.size())).to(whole.device, whole.dtype)
    for name, parameter in part.named_parameters():
        parameter.data = slice_of(name, whole.get_parameter(name).data, group.rank(), group.size())
    join_group(part, whole.config, group)
    return part


def run(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Sum of the loss and gradients by name; two documents in a packed row."""
    ids, labels = (random_ids(1, LENGTH, seed=seed).to(model.device) for seed in range(2))
    bounds = torch.tensor([0, 7, LENGTH], dtype=torch.int32, device=model.device)
    loss_sum = model(ids, shift_labels=labels, cu_seqlens=bounds).loss_sum
    loss_sum.backward()
    return {name: p.grad for name, p in model.named_parameters()} | {"loss": loss_sum.detach()}


def gradients_of_all_cases(device: torch.device) -> dict[str, tuple[float, str]]:
    """Errors of "case on size" for groups of each size, in fp64: theta's gradients of heads that decay fast are what is
    left of a difference."""
    errors = {}
    groups = {size: dist.new_subgroups(size)[0] for size in SIZES}
    for name, values in CASES.items():
        whole = tiny_model(**values).train().to(device, torch.float64)
        expected = run(copy.deepcopy(whole))
        for size, group in groups.items():
            actual = run(part_of(whole, group))
            own = {key: slice_of(key, value, group.rank(), size) for key, value in expected.items()}
            errors[f"{name} on {size}"] = worst_error(actual, own)
    return errors


class Traffic(TorchDispatchMode):
    """Counts the bytes that are summed over ranks."""

    def __init__(self):
        super().__init__()
        self.summed = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            assert func is torch.ops.c10d.allreduce_.default, func
            self.summed.append(sum(tensor.nbytes for tensor in args[0]))
        return func(*args, **(kwargs or {}))


def traffic(device: torch.device, **values) -> list[int]:
    """Bytes that each collective of a forward and backward pass on four ranks sums."""
    model = part_of(tiny_model(**values).train().to(device), dist.group.WORLD)
    with Traffic() as mode:
        run(model)
    return mode.summed


def rank_main(rank: int, path: str, folder: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    device = init_ranks().device
    found = {"errors": gradients_of_all_cases(device), "traffic": [traffic(device), traffic(device, **LOW_RANK)]}
    pretrain(config.load(PretrainSettings, path, [f"output={folder}/still", *STILL, *RUNS["with slices of windows"]]))
    for name, overrides in RUNS.items():
        settings = config.load(PretrainSettings, path, [f"output={folder}/{name}", *overrides])
        pretrain(settings)
    found["straight"] = trajectory(settings.output)
    pretrain(settings, resume="3")
    found["resumed"] = trajectory(settings.output)
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    start_ranks(rank_main, sys.argv[1:])

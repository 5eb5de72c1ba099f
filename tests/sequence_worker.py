"""Started once by the tests: four ranks that share the tokens of windows, forked after the slow imports.

usage: sequence_worker.py CONFIG.yaml FOLDER; rank r writes FOLDER/r.json: errors of loss and gradients against one
rank, the bytes of collectives, and the losses of a run before and after it was resumed. The training runs leave their
run folders in FOLDER.
"""

import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from tests.rank_worker import start_ranks
from tests.tiny_model import random_ids, tiny_model
from tests.tiny_run import trajectory
from tnl import config
from tnl.data.sequence_slices import slice_windows
from tnl.errors import ConfigError
from tnl.model.sequence_parallel import SequenceShard
from tnl.training.engine import init_ranks
from tnl.training.pretrain import pretrain
from tnl.training.settings import PretrainSettings
from tnl.training.train_step import TrainStep

SIZES = (2, 4)
LENGTH = 48
NO_LRPE = {"linear_use_lrpe_list": [0, 0]}
FIFTEEN = {"gate_dim": 4, "mixer_norm_type": "layernorm"}

# Name: configuration of the model, where documents start in each window (None: one text), what else.
CASES = {
    "one text": ({}, [None, None], ""),
    "one text, without lrpe": (NO_LRPE, [None, None], ""),
    "one text, without decay": ({"decay": "none"} | NO_LRPE, [None], ""),
    "decay of the paper": ({"decay": "paper"}, [None], ""),
    "one text, 15B": (FIFTEEN, [None, None], ""),
    "one packed document": ({}, [[0]], ""),
    "starts at the edges": ({}, [[0, 12, 24, 36]], ""),
    "starts at one edge": (NO_LRPE, [[24]], ""),
    "starts inside": ({}, [[3, 5, 20, 47]], ""),
    "across three ranks": (NO_LRPE, [[0, 4, 40]], ""),
    "across three ranks to an edge": ({}, [[11, 36]], ""),
    "many short": ({}, [list(range(0, 48, 2))], ""),
    "empty documents": (NO_LRPE, [[5, 12, 30]], "empty"),
    "several windows": ({}, [[7, 30], [], [12, 13, 14], [47], [1]], ""),
    "several windows, 15B": (FIFTEEN, [[7, 30], [], [24]], ""),
    "without decay": ({"decay": "none"}, [[7, 30], [24]], ""),
    "without activation": ({"linear_act_fun": "none"} | NO_LRPE, [[7, 30], [24]], ""),
    "checkpointing": ({}, [[7, 30], []], "checkpoint"),
    "reentrant checkpointing": (NO_LRPE, [[7, 30], []], "reentrant"),
}

TRAFFIC_STARTS = [[3], [5]]

# Overrides of training runs on four ranks; the same global batch in each.
RUNS = {
    "2 x 2, ZeRO 0": ["train.sequence_parallel=2", "train.zero_stage=0", "train.micro_batch_size=1"],
    "2 x 2, ZeRO 2, selective checkpointing": [
        "train.sequence_parallel=2",
        "train.zero_stage=2",
        "train.activation_checkpointing=selective_matmuls",
    ],
    "1 x 4, ZeRO 3, checkpointing": [
        "train.sequence_parallel=4",
        "train.zero_stage=3",
        "train.activation_checkpointing=full",
    ],
}


def run(values, starts, options, length, shard_of):
    """Sum of the loss and gradients by name; ``shard_of`` (batch -> forward's arguments) picks this rank's slice."""
    model = tiny_model(**values).train()
    if options in ("checkpoint", "reentrant"):
        model.gradient_checkpointing_enable({"use_reentrant": options == "reentrant"})
    tokens = random_ids(len(starts), length, seed=len(starts)).numpy()
    arguments = shard_of(tokens, None if starts[0] is None else [np.array(own, dtype=np.int64) for own in starts])
    if options == "empty":
        bounds = arguments["cu_seqlens"]
        arguments["cu_seqlens"] = torch.cat([bounds[:1], bounds, bounds[1:]]).sort().values
    output = model(**arguments)
    output.loss_sum.backward()
    return output.loss_sum.detach(), {name: p.grad for name, p in model.named_parameters()}


def whole(tokens, starts):
    batch = slice_windows(tokens, starts, 0, 1)
    return {name: batch[name] for name in ("input_ids", "shift_labels", "cu_seqlens")}


def slice_on(group):
    def arguments(tokens, starts):
        batch = slice_windows(tokens, starts, group.rank(), group.size())
        shard = SequenceShard(group, batch.pop("tokens_before"), batch.pop("tokens_after"))
        return batch | {"sequence_shard": shard}

    return arguments


class Traffic(TorchDispatchMode):
    """Counts the bytes that collectives bring to this rank."""

    def __init__(self):
        super().__init__()
        self.received = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            assert func is torch.ops.c10d.allgather_.default, func
            ((outputs,), (own,)) = args[:2]
            self.received.append(sum(output.nbytes for output in outputs) - own.nbytes)
        return func(*args, **(kwargs or {}))


def worst_error(actual, expected):
    """(largest relative RMS error, whose) over the loss and all gradients."""
    errors = {
        name: ((actual[name] - value).norm() / value.norm().clamp(min=1e-30)).item() for name, value in expected.items()
    }
    worst = max(errors, key=errors.get)
    return errors[worst], worst


def summed(tensors, group):
    """Sums over the ranks of ``group``, by one collective."""
    flat = torch.cat([tensor.flatten() for tensor in tensors.values()])
    dist.all_reduce(flat, group=group)
    parts = flat.split([tensor.numel() for tensor in tensors.values()])
    return {name: part.view_as(tensors[name]) for name, part in zip(tensors, parts, strict=True)}


def gradients_of_all_cases() -> dict[str, tuple[float, str]]:
    """Errors of "case on size" for groups of each size."""
    errors = {}
    groups = {size: dist.new_subgroups(size)[0] for size in SIZES}
    for name, (values, starts, options) in CASES.items():
        loss, expected = run(values, starts, options if options == "empty" else "", LENGTH, whole)
        for size, group in groups.items():
            own_loss, gradients = run(values, starts, options, LENGTH, slice_on(group))
            found = summed(gradients | {"loss": own_loss}, group)
            errors[f"{name} on {size}"] = worst_error(found, expected | {"loss": loss})
    return errors


def traffic(length: int) -> list[int]:
    """Bytes that each collective of a forward and backward pass on four ranks brings, for windows of ``length``."""
    with Traffic() as mode:
        run({}, TRAFFIC_STARTS, "", length, slice_on(dist.group.WORLD))
    return mode.received


def run_out_of_memory(rank: int, path: str, output: str) -> None:
    """On rank 2 alone; the others wait for it in a collective until it is gone."""

    def full(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    if rank == 2:
        TrainStep._forward_passes = full  # after all ranks have met
    try:
        pretrain(config.load(PretrainSettings, path, [f"output={output}", "train.micro_batch_size=1"]))
    except (ConfigError, RuntimeError) as error:  # gloo's is a RuntimeError
        assert rank == 2 or not isinstance(error, ConfigError)  # noqa: PT017 - which error depends on the rank
    sys.stdout.flush()
    os._exit(0)  # the group is not whole any more


def rank_main(rank: int, path: str, folder: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    init_ranks()
    found = {"errors": gradients_of_all_cases(), "traffic": {length: traffic(length) for length in (16, 160)}}
    for name, overrides in RUNS.items():
        settings = config.load(PretrainSettings, path, [f"output={folder}/{name}", *overrides])
        pretrain(settings)
    found["straight"] = trajectory(settings.output)
    pretrain(settings, resume="3")
    found["resumed"] = trajectory(settings.output)
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
    run_out_of_memory(rank, path, f"{folder}/failed")


if __name__ == "__main__":
    start_ranks(rank_main, sys.argv[1:])

"""What a run that is out of GPU memory says: what was planned, and what each cure would take."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from tnl.errors import ConfigError
from tnl.training.memory import memory_plan
from tnl.training.methods import trains_all
from tnl.training.settings import RunSettings

GIB = 2**30


def cures(settings: RunSettings, world_size: int) -> Iterator[str]:
    """Changes of the configuration that take less memory, the one that costs least speed first, each with its GiB."""
    train = settings.train
    changes = []
    if train.micro_batch_size > 1:
        changes.append({"micro_batch_size": train.micro_batch_size // 2 if train.micro_batch_size % 2 == 0 else 1})
    if train.reduce_gradients == "every_step":
        changes.append({"reduce_gradients": "every_pass"})
    if train.zero_stage < 2:
        changes.append({"zero_stage": 2})
    if train.activation_checkpointing != "full":
        changes.append({"activation_checkpointing": "full", "activation_checkpointing_k": None})
    if train.zero_stage < 3 and world_size > 1 and train.tensor_parallel == 1:
        changes.append({"zero_stage": 3, "reduce_gradients": "every_pass"})
    planned = memory_plan(settings, world_size).peak
    for change in changes:
        changed = settings.model_copy(update={"train": train.model_copy(update=change)})
        peak = memory_plan(changed, world_size).peak
        if peak < planned:
            new = {key: value for key, value in change.items() if value != getattr(train, key)}
            named = " ".join(f"train.{key}={'null' if value is None else value}" for key, value in new.items())
            yield f"{named} ({peak / GIB:.1f} GiB)"


def advice(settings: RunSettings, world_size: int) -> str:
    """One sentence: the planned peak, and the cures."""
    if getattr(settings, "method", None) is not None and not trains_all(settings.method):
        return (  # which tnl plan does not know
            "lower train.micro_batch_size or train.sequence_length, set train.activation_checkpointing=full or, of "
            "LoRA, method.base_bits=4, or use more GPUs with train.zero_stage=3"
        )
    plan = memory_plan(settings, world_size)
    largest = sorted(plan.parts.items(), key=lambda part: part[1], reverse=True)[:3]
    parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in largest)
    shorter = "a shorter train.sequence_length" + (" or train.segment_length" if settings.model.kind == "tnl" else "")
    listed = "; ".join(cures(settings, world_size)) or shorter
    return (
        f"tnl plan expects tensors of {plan.peak / GIB:.1f} GiB ({parts}) and {plan.allowance / GIB:.1f} GiB for CUDA; "
        f"what would take less: {listed}, or more GPUs; another program on the GPU takes memory, too"
    )


@contextmanager
def out_of_memory_advice(settings: RunSettings, rank: int, world_size: int) -> Iterator[None]:
    """Turn PyTorch's error in the block into one for the user.

    Raises:
        ConfigError: the GPU has no more memory; its text says what would take less.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        text = " ".join(str(error).split()).partition(" If reserved but unallocated")[0]
        raise ConfigError(f"rank {rank} is out of GPU memory: {text} {advice(settings, world_size)}") from error

"""How ranks and backward passes divide the global batch: the one place that says when they do not."""

from tnl.errors import ConfigError
from tnl.training.settings import TrainSettings


def data_parallel_size(train: TrainSettings, world_size: int) -> int:
    """How many groups of ranks have windows of their own.

    Raises:
        ConfigError: the ranks do not divide into groups of ``train.ranks_per_window``.
    """
    size = train.ranks_per_window
    if world_size % size:
        raise ConfigError(
            f"{train.keys_of_sharing}: {world_size} process(es) do not divide into groups of {size}; start a multiple "
            f"of {size}, or set a divisor of {world_size}"
        )
    return world_size // size


def passes_per_step(train: TrainSettings, world_size: int) -> int:
    """Backward passes that a rank takes in one optimizer step.

    Raises:
        ConfigError: as `data_parallel_size`, or the global batch is no multiple of what all take in one micro-batch.
    """
    groups = data_parallel_size(train, world_size)
    per_pass = train.micro_batch_size * groups
    if train.global_batch_size % per_pass:
        kind = "processes" if groups == world_size else "groups of processes that share windows"
        raise ConfigError(
            f"train.global_batch_size: {train.global_batch_size} is no multiple of train.micro_batch_size "
            f"{train.micro_batch_size} x {groups} {kind} = {per_pass}; set a multiple of {per_pass}, or change one of "
            "them"
        )
    return train.global_batch_size // per_pass * train.num_segments

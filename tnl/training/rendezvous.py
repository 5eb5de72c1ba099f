"""Where the processes of a run meet for the first time."""

import time
from datetime import timedelta

import torch.distributed as dist

from tnl.errors import ConfigError

# Machines of a job may start minutes apart; a rank that was refused never comes.
ARRIVAL_TIMEOUT = timedelta(minutes=10)
PAUSE_S = 0.1


def meet() -> tuple[dist.Store, int, int]:
    """The store that torchrun's variables describe, this process' rank and the number of ranks, when all have come.

    Raises:
        ConfigError: some did not within `ARRIVAL_TIMEOUT`.
    """
    try:
        store, rank, world_size = next(dist.rendezvous("env://", timeout=ARRIVAL_TIMEOUT))
        until = time.monotonic() + ARRIVAL_TIMEOUT.total_seconds()
        # The store of torchrun is there before the ranks.
        arrived = store.add("arrived", 1)
        while arrived < world_size and time.monotonic() < until:
            time.sleep(PAUSE_S)
            arrived = store.add("arrived", 0)
        if arrived >= world_size:
            return store, rank, world_size
        reason = f"{arrived} of {world_size} came"
    except dist.DistError as error:
        reason = str(error)
    minutes = ARRIVAL_TIMEOUT.total_seconds() / 60
    raise ConfigError(f"not all ranks came within {minutes:g} minutes; see the messages of the others ({reason})")

"""Commands of tnl in processes of their own that have its slow imports behind them."""

import multiprocessing
import os
import sys
from pathlib import Path

from tests.checkout import ROOT

# Forks of one process that has imported these, started with the first command.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tnl.training.pretrain"])
RANK = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def warm_tnl(folder: Path, *arguments: str, **variables: str) -> tuple[int, str]:
    """Run ``tnl`` with ``arguments`` to its end.

    Args:
        folder: where what it prints is kept meanwhile.
        variables: of its environment, beside this one's.

    Returns:
        Its exit code, negative for a signal, and what it printed.
    """
    printed = folder / "printed"
    process = CONTEXT.Process(target=_main, args=(printed, arguments, variables))
    process.start()
    process.join()
    return process.exitcode, printed.read_text(encoding="utf-8")


def _main(printed: Path, arguments: tuple[str, ...], variables: dict[str, str]) -> None:
    import torch

    from tnl.cli import main

    for name in RANK:
        os.environ.pop(name, None)
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo"} | variables
    torch.set_num_threads(1)
    os.chdir(ROOT)
    with open(printed, "wb") as target:
        os.dup2(target.fileno(), 1)
        os.dup2(target.fileno(), 2)
    sys.argv = ["tnl", *arguments]
    main()

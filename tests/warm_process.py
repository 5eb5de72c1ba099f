"""Commands of tnl in processes of their own that have its slow imports behind them."""

import multiprocessing
import os
import sys
from pathlib import Path

from tests.checkout import ROOT

# Forks of one process that has imported these, started with the first command.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tnl.training.pretrain", "tnl.evaluation.harness_model"])
RANK = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def start_tnl(printed: Path, *arguments: str, folder: Path = ROOT, **variables: str) -> multiprocessing.Process:
    """Begin ``tnl`` with ``arguments`` in ``folder``; its ``exitcode`` is negative for a signal.

    Args:
        printed: file for all that it prints.
        variables: of its environment, beside this one's.
    """
    process = CONTEXT.Process(target=_main, args=(printed, arguments, folder, variables))
    process.start()
    return process


def warm_tnl(folder: Path, *arguments: str, **variables: str) -> tuple[int, str]:
    """Exit code and output of `start_tnl`, whose file is in ``folder``."""
    printed = folder / "printed"
    process = start_tnl(printed, *arguments, **variables)
    process.join()
    return process.exitcode, printed.read_text(encoding="utf-8")


def _main(printed: Path, arguments: tuple[str, ...], folder: Path, variables: dict[str, str]) -> None:
    import torch

    from tnl.cli import main

    for name in RANK:
        os.environ.pop(name, None)
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo"} | variables
    torch.set_num_threads(1)
    os.chdir(folder)
    with open(printed, "wb") as target:
        os.dup2(target.fileno(), 1)
        os.dup2(target.fileno(), 2)
    sys.argv = ["tnl", *arguments]
    main()

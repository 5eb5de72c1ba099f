"""Runs the workers of tests: scripts whose ranks train, and leave what each of them found."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import yaml

from tests.checkout import ROOT, python_path

WORLD = 4


def run_worker(script: str, tree: dict, folder: Path) -> None:
    """Run ``tests/<script>`` on the configuration ``tree``; what it prints ends in ``folder / "printed"``."""
    (folder / "tiny.yaml").write_text(yaml.safe_dump(tree))
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / script), str(folder / "tiny.yaml"), str(folder)],
        env=os.environ | {"PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    (folder / "printed").write_text(done.stdout)


def found_by_ranks(folder: Path) -> list[dict]:
    """What each rank found, in the order of the ranks."""
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(WORLD)]


def start_ranks(rank_main: Callable[..., None], arguments: list[str]) -> None:
    """In a worker: call ``rank_main(rank, *arguments)`` in each rank, forked after the slow imports."""
    torch.set_num_threads(1)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ |= {"WORLD_SIZE": str(WORLD), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.multiprocessing.start_processes(rank_main, tuple(arguments), nprocs=WORLD, start_method="fork")

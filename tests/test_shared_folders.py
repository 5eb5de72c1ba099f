"""Machines that do not share the run folder, or have not the data: every rank ends at once, one with the reason."""

import os
import socket
import subprocess
import sys

import pytest
import yaml

from tests.test_processes import environment
from tests.tiny_corpus import tiny_settings, tiny_shards, tiny_texts
from tests.tiny_run import tiny_tree
from tests.warm_process import start_tnl
from tnl.data.prepare import prepare
from tnl.errors import EXIT_DATA, EXIT_USAGE


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return tiny_shards(tmp_path_factory.mktemp("shards"))


def run_on_two_machines(folder, tree: dict) -> list[tuple[int, str]]:
    """Exit code and output of two ranks, each with a working directory of its own."""
    (folder / "tiny.yaml").write_text(yaml.safe_dump(tree))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = []
    for rank in range(2):
        machine = folder / f"machine{rank}"
        machine.mkdir(exist_ok=True)
        arguments = ("pretrain", str(folder / "tiny.yaml"))
        processes.append(start_tnl(folder / f"printed{rank}", *arguments, folder=machine, RANK=str(rank), **common))
    for process in processes:
        process.join(120)
    return [(process.exitcode, (folder / f"printed{rank}").read_text()) for rank, process in enumerate(processes)]


def test_a_run_folder_that_is_not_shared_is_refused_before_the_first_step(shards, tmp_path):
    tree = tiny_tree(shards, "out")
    (first, _), (second, message) = run_on_two_machines(tmp_path, tree)
    assert (first, second) == (EXIT_USAGE, EXIT_USAGE)
    assert "rank 1 does not see what rank 0 writes there" in message
    assert sorted(os.listdir(tmp_path / "machine0" / "out")) == [".lock", "run_status.json"]


def test_data_that_one_machine_has_not_end_all_ranks(shards, tmp_path):
    tree = tiny_tree("shards", tmp_path / "out")
    (tmp_path / "machine0").mkdir()
    (tmp_path / "machine0" / "shards").symlink_to(shards)
    (first, elsewhere), (second, message) = run_on_two_machines(tmp_path, tree)
    assert (first, second) == (EXIT_DATA, EXIT_DATA)
    assert "another rank ended with an error" in elsewhere
    assert "shards" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_rank_that_never_comes_is_not_waited_for_as_long_as_a_collective(shards, tmp_path, rank):
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tiny_tree(shards, tmp_path / "out")))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    launched = {"WORLD_SIZE": "2", "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    program = (
        "import sys; from datetime import timedelta; from tnl import cli; from tnl.training import rendezvous\n"
        "rendezvous.ARRIVAL_TIMEOUT = timedelta(seconds=2)\n"
        f"sys.argv = ['tnl', 'pretrain', {str(tmp_path / 'tiny.yaml')!r}]; cli.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment(RANK=rank, **launched),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == EXIT_USAGE
    assert "not all ranks came within" in done.stderr
    assert "Traceback" not in done.stderr


def test_ranks_that_read_other_data_are_refused(tmp_path):
    for rank in range(2):
        (tmp_path / f"machine{rank}").mkdir()
        prepare(tiny_settings(tmp_path / f"machine{rank}", texts=tiny_texts(seed=rank)))
    (first, message), (second, other) = run_on_two_machines(tmp_path, tiny_tree("shards", tmp_path / "out"))
    assert (first, second) == (EXIT_DATA, EXIT_DATA)
    assert "rank 1 read other data" in message + other

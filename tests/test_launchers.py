"""The launchers: two nodes on one machine equal one, a request to stop reaches the run, exit codes are the run's."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import yaml

from tests.checkout import ROOT, python_path
from tests.tiny_corpus import tiny_shards
from tests.tiny_run import rows, tiny_tree
from tnl.training.commit import CheckpointStore
from tnl.training.lock import RunLock
from tnl.training.status import read_status, write_status

SCRIPTS = sorted([*ROOT.glob("scripts/*.sh"), *ROOT.glob("scripts/*.sbatch")])
LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def environment(**more: str) -> dict[str, str]:
    """Of a launcher: this checkout and interpreter, one process, loopback."""
    kept = {name: value for name, value in os.environ.items() if name not in LAUNCHED}
    own = {"PYTHON": sys.executable, "PYTHONPATH": python_path(), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    return kept | own | {"GPUS": "1"} | more


def launch(script: str, *arguments, **variables: str) -> subprocess.Popen:
    return subprocess.Popen(
        ["bash", str(ROOT / "scripts" / script), *map(str, arguments)],
        env=environment(**variables),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with shards and the YAML of a tiny run that two processes share."""
    folder = tmp_path_factory.mktemp("launchers")
    tree = tiny_tree(tiny_shards(folder), folder / "run")
    tree["train"] |= {"micro_batch_size": 1, "zero_stage": 1}
    tree["checkpoint"] = {"every": 100000}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(tree))
    return folder


def test_two_nodes_equal_one_and_save_when_asked(folder):
    config, one, two = folder / "tiny.yaml", folder / "one", folder / "two"
    # What is pretrain's alone must not reach tnl status and tnl stop.
    node = launch("launch_node.sh", config, f"output={one}", "train.steps=6", "--fresh")
    text = node.communicate(timeout=200)[0]
    assert node.returncode == 0, text
    assert read_status(one)["state"] == "finished"

    place = f"127.0.0.1:{free_port()}"
    endless = ["--resume", "auto", config, f"output={two}", "train.steps=100000"]
    # A constant rate: how long a run is meant to be does not change its first steps.
    nodes = [launch("launch_nodes.sh", 2, rank, place, *endless, "schedule.name=constant") for rank in (0, 1)]
    end = time.monotonic() + 200
    while not ((two / "metrics.jsonl").exists() and len(rows(two)) >= 6):
        assert all(node.poll() is None for node in nodes), nodes[0].communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.2)
    # The other launcher's signal would come a moment later; one is enough for all nodes.
    nodes[0].send_signal(signal.SIGTERM)
    texts = [node.communicate(timeout=200)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [75, 75], texts
    assert read_status(two)["state"] == "preempted"
    assert CheckpointStore(two / "checkpoints").steps() == [read_status(two)["step"]]
    assert not (two / "STOP").exists()
    # Until the warm-up ends, the rates are equal.
    expected, found = rows(one), rows(two)
    assert [row["loss"] for row in found[:2]] == pytest.approx([row["loss"] for row in expected[:2]], rel=1e-5)


@pytest.mark.parametrize(
    ("state", "code"),
    [({"exit_code": 0}, 0), ({"exit_code": 75}, 75), ({"exit_code": 2, "error": "no"}, 2), ({}, 70)],
    ids=["finished", "preempted", "failed", "killed"],
)
def test_status_ends_with_the_code_of_the_run(tmp_path, tnl_command, state, code):
    write_status(tmp_path, "running", 3, 12, **state)
    found, out, err = tnl_command("status", tmp_path)
    assert (found, err) == (code, "")
    assert "running at step 3 of 12" in out
    assert tnl_command("status", tmp_path, "--since", time.time() + 60)[0] == 2


def test_a_run_whose_process_is_gone_was_killed(tmp_path, tnl_command):
    lock = RunLock(tmp_path)
    write_status(tmp_path, "running", 3, 12)
    assert "running at step 3 of 12" in tnl_command("status", tmp_path)[1]
    lock.close()
    code, out, _ = tnl_command("status", tmp_path)
    assert code == 70
    assert "killed at step 3 of 12" in out
    assert tnl_command("stop", tmp_path)[2] == f"error: {tmp_path}: killed, nothing to stop\n"
    # Whether one of another machine is gone cannot be known here.
    (tmp_path / ".lock").write_text(json.dumps({"host": "elsewhere"}))
    assert "running at step 3 of 12" in tnl_command("status", tmp_path)[1]


def test_status_and_stop_find_the_run_of_a_configuration(folder, tmp_path, tnl_command):
    named = (folder / "tiny.yaml", f"output={tmp_path}")
    for command in ("status", "stop"):
        code, _, err = tnl_command(command, *named)
        assert code == 2
        assert f"{tmp_path / 'run_status.json'}: not there" in err
    write_status(tmp_path, "finished", 12, 12, exit_code=0)
    assert tnl_command("stop", *named)[2] == f"error: {tmp_path}: finished, nothing to stop\n"
    write_status(tmp_path, "running", 3, 12)
    assert tnl_command("stop", *named)[0] == 0
    assert (tmp_path / "STOP").exists()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_strict_and_parse(script):
    text = script.read_text()
    sourced = not text.startswith("#!")
    assert sourced or "\nset -euo pipefail\n" in text
    assert max(map(len, text.splitlines())) <= 160
    subprocess.run(["bash", "-n", script], check=True)


def test_launchers_without_arguments_say_how_they_are_used():
    for script in ("launch_node.sh", "launch_nodes.sh", "launch_hostfile.sh", "slurm.sbatch"):
        node = launch(script)
        assert "usage: " in node.communicate(timeout=30)[0]
        assert node.returncode == 2


@pytest.mark.parametrize(
    ("code", "restarts", "expected", "is_queued"),
    [
        (0, 0, 0, False),
        (75, 9, 75, True),
        (70, 0, 70, True),
        (70, 3, 70, False),
        (2, 0, 2, False),
        # A start that was refused before it touched the run folder: the 75 there is of the start before.
        (None, 0, 2, False),
    ],
)
def test_a_slurm_job_goes_back_into_the_queue_when_its_run_can_go_on(
    folder, tmp_path, code, restarts, expected, is_queued
):
    """With an srun that writes what a run leaves in its folder, and a scontrol that notes what it is asked."""
    output = tmp_path / "run"
    output.mkdir()
    write_status(output, "preempted", 5, 12, exit_code=75)
    given = tmp_path / "given"
    stubs = {"srun": f'echo "$*" >"{given}"; exit 1', "scontrol": f'echo "$*" >>"{tmp_path}/asked"; echo localhost'}
    if code is not None:
        ended = json.dumps(
            {"state": "failed", "step": 6, "total_steps": 12, "time": time.time() + 60, "exit_code": code}
        )
        stubs["srun"] = f"echo '{ended}' >'{output}/run_status.json'; {stubs['srun']}"
    (tmp_path / "bin").mkdir()
    for name, text in stubs.items():
        (tmp_path / "bin" / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    variables = {
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_GPUS_ON_NODE": "1",
        "SLURM_CPUS_PER_TASK": "1",
        "SLURM_RESTART_COUNT": str(restarts),
        "PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}",
    }
    named = [str(folder / "tiny.yaml"), f"output={output}"]
    job = launch("slurm.sbatch", "--fresh", *named, "--resume=3", "--resume", "5", **variables)
    text = job.communicate(timeout=100)[0]
    assert job.returncode == expected, text
    asked = (tmp_path / "asked").read_text().splitlines()
    assert asked == ["show hostnames localhost", *["requeue 7"] * is_queued]
    # What comes back from the queue goes on where it stopped.
    command = " ".join(["tnl pretrain", *(named if restarts else ["--fresh", *named, "--resume=3", "--resume 5"])])
    assert given.read_text().strip().endswith(command)

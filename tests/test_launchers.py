"""The launchers: two nodes on one machine equal one, a request to stop reaches the run, exit codes are the run's."""

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
import yaml

from tests.checkout import ROOT, python_path
from tests.tiny_corpus import tiny_shards
from tests.tiny_run import rows, tiny_tree
from tnl.errors import DataError
from tnl.training.commit import CheckpointStore
from tnl.training.lock import RunLock
from tnl.training.start import noted_end, start_id
from tnl.training.status import read_status, write_status

SCRIPTS = sorted([*ROOT.glob("scripts/*.sh"), *ROOT.glob("scripts/*.sbatch")])
LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def environment(**more: str) -> dict[str, str]:
    """Of a launcher: this checkout and interpreter, one process, loopback."""
    kept = {name: value for name, value in os.environ.items() if name not in LAUNCHED}
    own = {"PYTHON": sys.executable, "PYTHONPATH": python_path(), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    return kept | own | {"GPUS": "1"} | more


def launch(script: str, *arguments, terminal: int | None = None, **variables: str) -> subprocess.Popen:
    """A launcher; in the foreground of ``terminal``, the file of a pseudo-terminal, where one is given."""

    def take_terminal() -> None:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        # Where the tests run in the background of a script, what they start would ignore Ctrl-C.
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    in_terminal = {"stdin": terminal, "start_new_session": True, "preexec_fn": take_terminal}
    return subprocess.Popen(
        ["bash", str(ROOT / "scripts" / script), *map(str, arguments)],
        env=environment(**variables),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **({} if terminal is None else in_terminal),
    )


def supervised(tmp_path, output: Path, program: str) -> subprocess.Popen:
    """A launcher of the run in ``output`` that starts a Python program, with the file of the start as its argument."""
    (tmp_path / "program.py").write_text(program)
    script = tmp_path / "launcher.sh"
    lines = ["set -euo pipefail", f'source "{ROOT}/scripts/supervise.sh"', 'name_run "$@"']
    script.write_text("\n".join([*lines, f'supervise "$PYTHON" "{tmp_path}/program.py" "$start"\n']))
    return launch(script, output)


def wait_for(is_so, *nodes: subprocess.Popen) -> None:
    end = time.monotonic() + 200
    while not is_so():
        assert all(node.poll() is None for node in nodes), nodes[0].communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.1)


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
    endless.append("schedule.name=constant")
    keyboard, terminal = os.openpty()
    nodes = [
        launch("launch_nodes.sh", 2, 0, place, *endless, terminal=terminal),
        launch("launch_nodes.sh", 2, 1, place, *endless),
    ]
    wait_for(lambda: (two / "metrics.jsonl").exists() and len(rows(two)) >= 6, *nodes)
    # One launcher that is asked is enough for all nodes. Ctrl-C goes to whatever is in the terminal's foreground.
    os.write(keyboard, b"\x03")
    texts = [node.communicate(timeout=200)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [75, 75], texts
    # torchrun would kill a save that takes longer than 30 seconds.
    assert "death signal" not in texts[0]
    assert read_status(two)["state"] == "preempted"
    assert CheckpointStore(two / "checkpoints").steps() == [read_status(two)["step"]]
    assert not (two / "STOP").exists()
    assert len(read_status(two)["starts"]) == 2
    os.close(keyboard)
    os.close(terminal)
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


def test_status_and_stop_of_a_start_are_not_those_of_another(tmp_path, tnl_command):
    own, other = tmp_path / "own", tmp_path / "other"
    write_status(tmp_path, "running", 3, 12, starts=[start_id(own)])
    assert tnl_command("stop", "--start-file", other, tmp_path)[0] == 2
    assert not (tmp_path / "STOP").exists()
    text = f"{tmp_path}: this start ended before the run began; its message stands above\n"
    assert tnl_command("status", "--start-file", other, tmp_path) == (70, text, "")
    # The first rank to fail knows why; what others meet follows from it.
    for error in (DataError("no"), ValueError("the connection is lost")):
        with pytest.raises(ValueError, match=str(error)), noted_end(other):
            raise error
    assert tnl_command("status", "--start-file", other, tmp_path) == (65, text, "")
    # Later news of the run are of the same starts.
    write_status(tmp_path, "running", 4, 12)
    assert "running at step 4 of 12" in tnl_command("status", "--start-file", own, tmp_path)[1]
    assert tnl_command("stop", "--start-file", own, tmp_path)[0] == 0
    assert (tmp_path / "STOP").exists()


def test_a_signal_before_the_run_began_ends_this_start_and_no_other(tmp_path):
    output = tmp_path / "run"
    lock = RunLock(output)
    write_status(output, "running", 3, 12, starts=["another"])
    before = read_status(output)
    node = supervised(tmp_path, output, f"open({str(tmp_path / 'up')!r}, 'w'); import time; time.sleep(100)")
    wait_for((tmp_path / "up").exists, node)
    began = time.monotonic()
    node.send_signal(signal.SIGTERM)
    text = node.communicate(timeout=60)[0]
    assert node.returncode == 143, text
    assert text.splitlines()[-1] == f"{output}: this start ended before the run began; its message stands above"
    assert time.monotonic() - began < 50
    assert not (output / "STOP").exists()
    assert read_status(output) == before
    lock.close()


def test_a_launcher_that_ends_takes_what_it_started_along(tmp_path):
    """Also what the command itself leaves behind, and after a signal that does not ask for a checkpoint."""
    program = f"""
import os, signal, subprocess, sys
inner = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
open({str(tmp_path / "pids")!r}, "w").write(f"{{os.getpid()}} {{inner.pid}}\\n")
signal.pause()
"""
    node = supervised(tmp_path, tmp_path, program)
    pids = tmp_path / "pids"
    wait_for(lambda: pids.exists() and pids.read_text().endswith("\n"), node)
    node.send_signal(signal.SIGUSR1)
    node.communicate(timeout=60)
    wait_for(lambda: not any(is_alive(int(pid)) for pid in pids.read_text().split()))


def is_alive(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_folder_that_another_run_uses_is_refused_with_its_code(folder):
    output = folder / "used"
    lock = RunLock(output)
    write_status(output, "running", 3, 12, starts=["another"])
    node = launch("launch_node.sh", folder / "tiny.yaml", f"output={output}")
    text = node.communicate(timeout=100)[0]
    assert node.returncode == 78, text
    assert f"error: {output}: in use by another process" in text
    assert text.splitlines()[-1] == f"{output}: this start ended before the run began; its message stands above"
    lock.close()


def test_a_hostfile_starts_its_machines(folder, tmp_path):
    """With a mistake that `tnl finetune` finds at once. DeepSpeed's launcher asks the first host for its address, even
    where it then starts all ranks itself."""
    (tmp_path / "ssh").write_text("#!/usr/bin/env bash\necho 127.0.0.1\n")
    (tmp_path / "ssh").chmod(0o755)
    (tmp_path / "hosts").write_text("localhost slots=1\n")
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    node = launch("launch_hostfile.sh", tmp_path / "hosts", "finetune", folder / "tiny.yaml", PATH=path)
    text = node.communicate(timeout=100)[0]
    assert "init_from: missing, this key must be given" in text
    assert node.returncode == 2


def test_a_hostfile_that_is_not_there_is_refused(folder, tmp_path):
    node = launch("launch_hostfile.sh", tmp_path / "hots", folder / "tiny.yaml")
    assert node.communicate(timeout=30)[0] == f"error: {tmp_path / 'hots'}: no such hostfile\n"
    assert node.returncode == 2


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
        # A start that ended before it touched the run folder: the 75 there is of the start before.
        (None, 0, 1, False),
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
        program = (
            "import sys; from pathlib import Path; from tnl.training.start import start_id; "
            "from tnl.training.status import write_status; start = Path(sys.argv[sys.argv.index('--start-file') + 1]); "
            f"write_status(Path('{output}'), 'failed', 6, 12, exit_code={code}, starts=[start_id(start)])"
        )
        stubs["srun"] = f'"$PYTHON" -c "{program}" "$@"; {stubs["srun"]}'
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
    _, _, command = given.read_text().strip().partition(" -m tnl pretrain --start-file ")
    expected = named if restarts else ["--fresh", *named, "--resume=3", "--resume 5"]
    assert command.partition(" ")[2] == " ".join(expected)

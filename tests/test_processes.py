"""Whole processes: torchrun with two ranks at every ZeRO stage, and runs that are killed."""

import os
import signal
import socket
import subprocess
import sys

import pytest
import yaml

from tests.checkout import ROOT, python_path
from tests.tiny_corpus import tiny_shards
from tests.tiny_run import rows, tiny_tree, trajectory
from tests.warm_process import warm_tnl
from tnl import config
from tnl.training.commit import CheckpointStore
from tnl.training.export import export_run
from tnl.training.pretrain import pretrain
from tnl.training.settings import PretrainSettings
from tnl.training.status import read_status

STEPS = 200
STAGES = (0, 1, 2, 3)
SUITE = "evaluation.suite=quick evaluation.limit=5 evaluation.every=6"


def environment(**more) -> dict[str, str]:
    """Environment of a child: this checkout, one thread, loopback only, no rank of our own."""
    own = {
        k: v
        for k, v in os.environ.items()
        if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    }
    paths = {"PYTHONPATH": python_path(), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return own | paths | more


def tnl(*arguments: str, **variables) -> subprocess.Popen:
    """A ``python -m tnl`` process."""
    command = [sys.executable, "-m", "tnl", *arguments]
    return subprocess.Popen(
        command, env=environment(**variables), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def torchrun(*arguments: str, **variables) -> subprocess.CompletedProcess:
    """A torchrun of two ranks on this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", f"--master-port={port}"]
    return subprocess.run(
        [*command, "--master-addr=127.0.0.1", *arguments],
        env=environment(**variables),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with shards and the YAML of a tiny run."""
    folder = tmp_path_factory.mktemp("processes")
    tree = tiny_tree(tiny_shards(folder, heldout_fraction=0.1), folder / "run")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(tree))
    return folder


@pytest.fixture(scope="module")
def one_process(folder):
    """The losses of one process, ZeRO 0."""
    code, text = warm_tnl(folder, "pretrain", str(folder / "tiny.yaml"), f"output={folder / 'one'}")
    assert code == 0, text
    return rows(folder / "one")


@pytest.fixture(scope="module")
def two_processes(folder):
    """The losses of two processes at every ZeRO stage, from one start of torchrun."""
    runs = [f"stage{s} train.zero_stage={s} train.micro_batch_size=1" for s in STAGES]
    segments = "train.segment_length=16 train.segment_gradient=exact"
    runs.append(f"segments train.zero_stage=3 train.micro_batch_size=1 {segments}")
    runs.append(f"suite train.zero_stage=2 train.micro_batch_size=1 {SUITE}")
    worker = str(ROOT / "tests/train_worker.py")
    done = torchrun(worker, str(folder / "tiny.yaml"), str(folder), *" -- ".join(runs).split())
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return {stage: rows(folder / f"stage{stage}") for stage in STAGES}


@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_equal_one_at_the_same_global_batch(one_process, two_processes, stage):
    found = two_processes[stage]
    assert [row["step"] for row in found] == [row["step"] for row in one_process]
    assert [row["loss"] for row in found] == pytest.approx([row["loss"] for row in one_process], abs=1e-4)
    assert [row["grad_norm"] for row in found] == pytest.approx([row["grad_norm"] for row in one_process], rel=1e-4)


def test_two_processes_by_exact_segments_equal_one_of_whole_windows(folder, one_process, two_processes):
    found = rows(folder / "segments")
    assert [row["loss"] for row in found] == pytest.approx([row["loss"] for row in one_process], abs=1e-4)
    assert [row["grad_norm"] for row in found] == pytest.approx([row["grad_norm"] for row in one_process], rel=1e-4)


def test_two_processes_share_the_benchmarks_of_a_run_and_have_the_scores_of_one(folder, two_processes):
    assert trajectory(folder / "suite") == trajectory(folder / "stage2")
    pretrain(config.load(PretrainSettings, folder / "tiny.yaml", [f"output={folder / 'one-suite'}", *SUITE.split()]))
    expected, found = rows(folder / "one-suite", "scores"), rows(folder / "suite", "scores")
    assert [row["step"] for row in found] == [6, 12]
    for ours, alone in zip(found, expected, strict=True):
        assert ours.keys() == alone.keys()
        assert ours["Python byte ppl"] == pytest.approx(alone["Python byte ppl"], rel=1e-3)
        assert [ours[name] for name in ("Copy", "Recall", "Next line")] == [
            alone[name] for name in ("Copy", "Recall", "Next line")
        ]


@pytest.mark.parametrize("stage", STAGES)
def test_export_consolidates_the_shards_of_two_processes(folder, one_process, two_processes, stage):
    from safetensors.torch import load_file

    reference = folder / "one-export"
    if not reference.exists():
        export_run(folder / "one", reference)
    expected = load_file(reference / "model.safetensors")
    export_run(folder / f"stage{stage}", folder / f"export{stage}")
    found = load_file(folder / f"export{stage}/model.safetensors")
    assert found.keys() == expected.keys()
    for name, weight in found.items():
        # Adam divides by the root of tiny moments: rounding of the summation order grows to 1e-4 in single weights.
        assert (weight - expected[name]).abs().max() < 2e-3, name
        assert weight.shape == expected[name].shape


def test_another_number_of_processes_is_refused_with_the_cure(folder, two_processes):
    same = [str(folder / "tiny.yaml"), f"output={folder / 'stage2'}", "train.zero_stage=2", "train.micro_batch_size=1"]
    code, text = warm_tnl(folder, "pretrain", *same, "--resume", "10")
    assert code == 77, text
    assert "saved by 2 processes, this run has 1" in text


def test_torchrun_of_the_module_fails_on_all_ranks_together(folder):
    config = str(folder / "tiny.yaml")
    bad = torchrun("-m", "tnl", "pretrain", config, f"output={folder / 'bad'}", "train.micro_batch_size=4")
    assert bad.returncode != 0
    assert "train.global_batch_size: 4 is no multiple of train.micro_batch_size 4 x 2 processes = 8" in bad.stderr
    assert not (folder / "bad").exists()


@pytest.fixture(scope="module")
def straight(folder):
    """200 steps without interruption."""
    output = folder / "straight"
    code, text = warm_tnl(folder, "pretrain", str(folder / "tiny.yaml"), f"output={output}", *long_run())
    assert code == 0, text
    return output


def long_run() -> list[str]:
    return [f"train.steps={STEPS}", "checkpoint.every=50"]


@pytest.mark.parametrize(
    "kills",
    [
        ["step:step=100:action=kill9"],
        # In the middle of a file, before and after the rename, and while an old checkpoint is deleted.
        ["ckpt.shard.mid:action=kill9", "ckpt.pre_rename:action=kill9", "ckpt.post_rename:action=kill9"],
        ["step:step=149:action=kill9", "ckpt.prune.mid:action=kill9"],
    ],
    ids=["step 100", "inside the first save", "while pruning"],
)
def test_killed_runs_go_on_bit_for_bit(folder, straight, kills):
    output = folder / f"killed-{kills[0].partition(':')[0]}-{len(kills)}"
    command = ["pretrain", str(folder / "tiny.yaml"), f"output={output}", *long_run()]
    for plan in kills:
        code, text = warm_tnl(folder, *command, TNL_TESTING="1", TNL_FAULT=plan)
        assert code == -signal.SIGKILL, text
    code, text = warm_tnl(folder, *command)
    assert code == 0, text
    assert len(trajectory(output)) == STEPS
    assert trajectory(output) == trajectory(straight)
    assert read_status(output)["state"] == "finished"


def test_a_signal_ends_the_process_with_75(folder):
    output = folder / "signalled"
    command = [
        "pretrain",
        str(folder / "tiny.yaml"),
        f"output={output}",
        "train.steps=100000",
        "checkpoint.every=100000",
    ]
    child = tnl(*command, "logging.print_every=1")
    for line in child.stdout:
        if line.startswith("step 5/"):
            child.send_signal(signal.SIGTERM)
            break
    text = child.stdout.read()
    assert child.wait() == 75, text
    assert read_status(output)["state"] == "preempted"
    assert len(CheckpointStore(output / "checkpoints").steps()) == 1


def test_a_disk_that_takes_no_more_ends_with_73_and_a_message(folder):
    output = folder / "full"
    command = f'ulimit -f 200; exec "{sys.executable}" -m tnl pretrain "{folder / "tiny.yaml"}" output="{output}"'
    done = subprocess.run(
        ["bash", "-c", command], env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 73, done.stdout + done.stderr
    assert "step_00000005.tmp" in done.stderr
    assert "free some space" in done.stderr
    assert not list((output / "checkpoints").iterdir())
    assert read_status(output)["exit_code"] == 73
    code, text = warm_tnl(folder, "pretrain", str(folder / "tiny.yaml"), f"output={output}")
    assert code == 0, text

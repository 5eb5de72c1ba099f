"""The commit protocol: what is left after a kill at every point, a full disk, and damage to every file."""

import json
import os
import resource
import signal
from pathlib import Path

import pytest

from tnl.errors import CannotWriteError, CheckpointError, RunInUseError
from tnl.files import write_atomically
from tnl.training.commit import MANIFEST, CheckpointStore, HashingWriter
from tnl.training.lock import RunLock

FILES = {"engine/weights.pt": b"weights" * 1000, "engine/moments.pt": b"moments" * 500, "random.json": b"[1, 2]"}


def save(store: CheckpointStore, step: int, keep: int = 2) -> None:
    """One checkpoint as the training loop makes it."""
    folder = store.begin(step)
    (folder / "engine").mkdir()
    records = {}
    for name, content in FILES.items():
        if name.endswith(".pt"):
            with HashingWriter(folder / name) as file:
                file.write(content)
                file.write(str(step).encode())
            records[name] = file.record()
        else:
            (folder / name).write_bytes(content)
    store.commit(step, {"run": {"step": step}}, records)
    store.prune(keep)


def in_child(action, **environment) -> int:
    """Run ``action`` in a forked process with these variables and return its wait status."""
    child = os.fork()
    if child == 0:
        os.environ.update(environment)
        try:
            action()
        except CannotWriteError:
            os._exit(73)
        finally:
            os._exit(1)
    return os.waitpid(child, 0)[1]


def fail(text):
    raise AssertionError(f"unexpected warning: {text}")


@pytest.fixture
def store(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints")
    save(store, 10)
    save(store, 20)
    return store


@pytest.mark.parametrize(
    ("point", "expected"),
    [
        ("ckpt.begin", 20),
        ("ckpt.shard.mid", 20),
        ("ckpt.manifest.pre", 20),
        ("ckpt.pre_rename", 20),
        ("ckpt.post_rename", 30),
        ("ckpt.latest.post", 30),
        ("ckpt.prune.mid", 30),
    ],
)
def test_kill_at_any_point_leaves_a_valid_checkpoint(store, point, expected):
    status = in_child(lambda: save(store, 30), TNL_TESTING="1", TNL_FAULT=f"{point}:action=kill9")
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert store.newest_valid(fail) == expected
    save(store, 30)  # what the restarted run does
    save(store, 40)
    assert store.newest_valid(fail) == 40
    names = sorted(p.name for p in store.root.iterdir())
    assert names == ["latest", "step_00000030", "step_00000040"]


def test_latest_names_the_newest_and_old_ones_are_pruned(store):
    save(store, 30)
    assert store.steps() == [20, 30]
    assert (store.root / "latest").read_text() == "step_00000030\n"


def damages(size: int):
    """Ways to spoil the bytes of a file of ``size`` bytes."""
    for position in (0, size // 2, size - 1):
        yield f"flip {position}", lambda b, p=position: b[:p] + bytes([b[p] ^ 1]) + b[p + 1 :]
    for length in (0, 1, size // 2, size - 1):
        yield f"cut to {length}", lambda b, n=length: b[:n]
    yield "longer", lambda b: b + b"x"


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_every_damage_to_every_file_is_found_and_named(store, name):
    file = store.path(20) / name
    intact = file.read_bytes()
    for how, spoil in damages(len(intact)):
        file.write_bytes(spoil(intact))
        with pytest.raises(CheckpointError, match=Path(name).name):
            store.verify(20)
        told = []
        assert store.newest_valid(told.append) == 10, how
        assert len(told) == 1, how
        file.write_bytes(intact)
    assert store.verify(20)["step"] == 20


def test_missing_swapped_and_replaced_files_are_found(store):
    folder = store.path(20)
    first, second = folder / "engine/weights.pt", folder / "engine/moments.pt"
    first.rename(folder / "x")
    second.rename(first)
    (folder / "x").rename(second)
    with pytest.raises(CheckpointError, match=r"moments\.pt"):
        store.verify(20)
    first.unlink()
    first.mkdir()
    second.unlink()
    with pytest.raises(CheckpointError, match="missing"):
        store.verify(20)


def test_manifest_of_another_step_or_with_foreign_paths_is_refused(store):
    (store.path(20) / MANIFEST).write_bytes((store.path(10) / MANIFEST).read_bytes())
    with pytest.raises(CheckpointError, match=MANIFEST):
        store.verify(20)
    with pytest.raises(CheckpointError, match="outside"):
        store.verify_file(store.path(10), "../../secret", {"bytes": 1, "sha256": ""})


@pytest.mark.parametrize("content", [None, "", "garbage", "step_00000099", "../../x\n", "step_00000020\r\n"])
def test_latest_is_for_people_only(store, content):
    latest = store.root / "latest"
    latest.unlink()
    if content is not None:
        latest.write_text(content)
    assert store.newest_valid(fail) == 20


def test_losing_every_manifest_never_means_starting_over(store):
    for step in (10, 20):
        (store.path(step) / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match="--fresh"):
        store.newest_valid(fail)


def test_nothing_intact_is_an_error_that_names_the_cure(store):
    for step in (10, 20):
        (store.path(step) / "random.json").write_bytes(b"")
    with pytest.raises(CheckpointError, match="--fresh"):
        store.newest_valid([].append)


def test_new_run_has_no_checkpoint(tmp_path):
    assert CheckpointStore(tmp_path / "none").newest_valid(fail) is None


@pytest.mark.parametrize("point", ["ckpt.begin", "ckpt.manifest.pre", "ckpt.pre_rename"])
def test_full_disk_leaves_the_older_checkpoints(store, point, monkeypatch):
    monkeypatch.setenv("TNL_TESTING", "1")
    monkeypatch.setenv("TNL_FAULT", f"{point}:action=enospc")
    with pytest.raises(CannotWriteError, match="No space left"):
        save(store, 30)
    monkeypatch.delenv("TNL_FAULT")
    assert store.newest_valid(fail) == 20
    assert not list(store.root.glob("*.tmp"))


def test_a_real_file_size_limit_is_reported_as_cannot_write(store):
    def limited():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        folder = store.begin(30)
        (folder / "small.json").write_bytes(b"{}")
        store.commit(30, {"padding": "x" * 1000}, {})

    assert os.waitstatus_to_exitcode(in_child(limited)) == 73
    assert store.newest_valid(fail) == 20


def test_too_little_space_is_refused_before_anything_is_written(store, monkeypatch):
    usage = type("Usage", (), {"free": 100})
    monkeypatch.setattr("tnl.training.commit.shutil.disk_usage", lambda path: usage)
    with pytest.raises(CannotWriteError, match="100 bytes free"):
        store.begin(30)
    assert not list(store.root.glob("*.tmp"))


def test_faults_need_the_test_switch(store, monkeypatch):
    monkeypatch.delenv("TNL_TESTING", raising=False)
    monkeypatch.setenv("TNL_FAULT", "ckpt.begin:action=kill9")
    save(store, 30)
    assert store.newest_valid(fail) == 30


def test_atomic_write_replaces_and_leaves_no_temporary(tmp_path):
    write_atomically(tmp_path / "a.json", json.dumps([1]))
    write_atomically(tmp_path / "a.json", json.dumps([2]))
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    assert json.loads((tmp_path / "a.json").read_text()) == [2]


def test_second_run_in_a_folder_is_refused_and_a_dead_holder_is_not_in_the_way(tmp_path):
    lock = RunLock(tmp_path)

    def second():
        try:
            RunLock(tmp_path)
        except RunInUseError as error:
            os._exit(error.exit_code if str(os.getppid()) in str(error) else 1)

    assert os.waitstatus_to_exitcode(in_child(second)) == 78
    lock.close()

    def holder():
        RunLock(tmp_path)
        os.kill(os.getpid(), signal.SIGKILL)

    assert os.WTERMSIG(in_child(holder)) == signal.SIGKILL
    RunLock(tmp_path).close()

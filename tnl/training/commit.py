"""The commit protocol of checkpoints: what a kill at any moment, a full disk or a flipped byte cannot break.

A checkpoint is a folder ``step_NNNNNNNN``. It is written under the name ``step_NNNNNNNN.tmp``, every file flushed to
disk and hashed while it is written; the manifest with sizes and SHA-256 hashes comes last; one rename makes the
checkpoint exist. A folder without a manifest that verifies is not a checkpoint. Nothing here knows about DeepSpeed.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import time
from pathlib import Path

from tnl.errors import CannotWriteError, CheckpointError
from tnl.files import fsync_folder, sha256_of, write_atomically
from tnl.training.faults import fault_point

MANIFEST = "MANIFEST.json"
FORMAT_VERSION = 1
TAG = re.compile(r"step_(\d{8,})$")


def tag_of(step: int) -> str:
    """Folder name of the checkpoint after ``step`` optimizer steps."""
    return f"step_{step:08d}"


class HashingWriter:
    """A file opened for writing that counts and hashes its bytes, and is on disk once closed without an error.

    Attributes:
        error: what the disk answered to a failed write; `torch.save` raises a RuntimeError of its own in its place.
    """

    def __init__(self, path: Path):
        self.path = path
        self._file = open(path, "wb")  # noqa: SIM115 - closed by close()
        self._hash = hashlib.sha256()
        self.num_bytes = 0
        self.error: OSError | None = None

    def write(self, data) -> int:
        """Append ``data``."""
        try:
            if self.num_bytes:
                fault_point("ckpt.shard.mid")
            view = memoryview(data).cast("B")
            self._hash.update(view)
            self.num_bytes += len(view)
            return self._file.write(view)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        """Hand buffered bytes to the system."""
        self._file.flush()

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        try:
            if kind is None:
                self._file.flush()
                os.fsync(self._file.fileno())
        finally:
            self._file.close()

    def record(self) -> dict:
        """``{"bytes": ..., "sha256": ...}`` of what was written."""
        return {"bytes": self.num_bytes, "sha256": self._hash.hexdigest()}


def _manifest_hash(manifest: dict) -> str:
    body = {key: value for key, value in manifest.items() if key != "manifest_sha256"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        root: folder that holds them; made when the first one is begun.
    """

    def __init__(self, root: Path):
        self.root = Path(root)

    def path(self, step: int) -> Path:
        """Folder of the checkpoint of ``step``."""
        return self.root / tag_of(step)

    def steps(self) -> list[int]:
        """Steps of all folders that carry a checkpoint's name and a manifest, ascending, verified or not."""
        if not self.root.is_dir():
            return []
        found = [(TAG.match(p.name), p) for p in self.root.iterdir()]
        return sorted(int(match.group(1)) for match, p in found if match and (p / MANIFEST).is_file())

    def begin(self, step: int) -> Path:
        """An empty temporary folder for the checkpoint of ``step``.

        Raises:
            CannotWriteError: the folder cannot be made, or free space is below 1.2 times the newest checkpoint.
        """
        temporary = self.root / (tag_of(step) + ".tmp")
        try:
            fault_point("ckpt.begin")
            self.root.mkdir(parents=True, exist_ok=True)
            for leftover in self.root.glob("step_*.tmp"):
                shutil.rmtree(leftover)
            steps = self.steps()
            needed = int(1.2 * self._size(steps[-1])) if steps else 0
            free = shutil.disk_usage(self.root).free
            if free < needed:
                raise CannotWriteError(
                    f"{temporary}: {free:,} bytes free, {needed:,} needed for a checkpoint; free some space, lower "
                    "checkpoint.keep, or move the run folder"
                )
            temporary.mkdir()
        except OSError as error:
            raise self.cannot_write(temporary, error) from None
        return temporary

    def commit(self, step: int, fields: dict, records: dict[str, dict]) -> Path:
        """Turn the temporary folder of ``step`` into a checkpoint.

        Args:
            fields: what the manifest says of the run; JSON values.
            records: ``{relative path: record}`` of files hashed while they were written; all others are read and
                hashed now.

        Raises:
            CannotWriteError: the disk refused; the temporary folder is gone, older checkpoints are untouched.
        """
        temporary, final = self.root / (tag_of(step) + ".tmp"), self.path(step)
        try:
            files = {}
            for file in sorted(p for p in temporary.rglob("*") if p.is_file()):
                relative = file.relative_to(temporary).as_posix()
                files[relative] = records.get(relative) or {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
                if relative not in records:
                    with open(file, "rb") as written:
                        os.fsync(written.fileno())
            manifest = {"format": FORMAT_VERSION, "step": step, **fields, "files": files}
            manifest["manifest_sha256"] = _manifest_hash(manifest)
            fault_point("ckpt.manifest.pre")
            write_atomically(temporary / MANIFEST, json.dumps(manifest, indent=1, sort_keys=True))
            for folder in {p.parent for p in temporary.rglob("*") if p.is_file()}:
                fsync_folder(folder)
            fault_point("ckpt.pre_rename")
            if final.exists():  # an invalid folder of that name: resuming went back behind it
                shutil.rmtree(final)
            os.rename(temporary, final)
            fsync_folder(self.root)
            fault_point("ckpt.post_rename")
        except OSError as error:
            self.abandon(step)
            raise self.cannot_write(temporary, error) from None
        with contextlib.suppress(OSError):  # for people only: the checkpoint is complete without it
            write_atomically(self.root / "latest", tag_of(step) + "\n")
            fault_point("ckpt.latest.post")
        return final

    def set_aside_after(self, step: int) -> list[Path]:
        """Rename the checkpoints newer than ``step``: a run that goes on from there writes those steps again.

        Returns:
            Their new names, which no command reads.
        """
        renamed = []
        for newer in self.steps():
            if newer > step:
                folder = self.path(newer)
                renamed.append(
                    folder.rename(folder.with_name(f"{folder.name}.set-aside-{time.strftime('%Y%m%d-%H%M%S')}"))
                )
        if renamed:
            fsync_folder(self.root)
        return renamed

    def abandon(self, step: int) -> None:
        """Remove the temporary folder of a checkpoint that could not be completed."""
        shutil.rmtree(self.root / (tag_of(step) + ".tmp"), ignore_errors=True)

    def verify(self, step: int) -> dict:
        """The manifest of a checkpoint whose files all have their recorded size and hash.

        Raises:
            CheckpointError: a file is missing, truncated or changed; the message names it.
        """
        folder = self.path(step)
        manifest = self.manifest(step)
        for relative, record in manifest["files"].items():
            self.verify_file(folder, relative, record)
        return manifest

    @staticmethod
    def verify_file(folder: Path, relative: str, record: dict) -> None:
        """Compare one file with its record.

        Raises:
            CheckpointError: it differs, is missing, or lies outside the folder.
        """
        file = folder / relative
        if not file.resolve().is_relative_to(folder.resolve()):
            raise CheckpointError(f"{folder / MANIFEST}: names {relative}, outside the checkpoint")
        if not file.is_file():
            raise CheckpointError(f"{file}: missing from the checkpoint")
        size = file.stat().st_size
        if size != record["bytes"]:
            raise CheckpointError(f"{file}: {size:,} bytes, the checkpoint was saved with {record['bytes']:,}")
        if sha256_of(file) != record["sha256"]:
            raise CheckpointError(f"{file}: its content is not what was saved (SHA-256 differs)")

    def manifest(self, step: int) -> dict:
        """The manifest itself, its own hash checked.

        Raises:
            CheckpointError: missing, unreadable, changed, or of a newer format.
        """
        path = self.path(step) / MANIFEST
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            intact = manifest.pop("manifest_sha256") == _manifest_hash(manifest) and manifest["step"] == step
        except (OSError, ValueError, KeyError, AttributeError, TypeError):
            raise CheckpointError(f"{path}: missing or unreadable, this is not a complete checkpoint") from None
        if not intact:
            raise CheckpointError(f"{path}: its content is not what was saved (SHA-256 differs)")
        if manifest["format"] != FORMAT_VERSION:
            raise CheckpointError(f"{path}: format {manifest['format']}, this version reads {FORMAT_VERSION}")
        return manifest

    def newest_valid(self, warn) -> int | None:
        """Step of the newest checkpoint that verifies; ``warn(text)`` is told of every newer one that does not.

        Raises:
            CheckpointError: there are checkpoints and none verifies.
        """
        failures = []
        for step in reversed(self.steps()):
            try:
                self.verify(step)
            except CheckpointError as error:
                failures.append(str(error))
                warn(f"{error}; this checkpoint is passed over")
                continue
            return step
        if failures:
            raise CheckpointError(
                f"{self.root}: no checkpoint is intact ({failures[0]}); start again with --fresh, which keeps the "
                "old folder"
            )
        if (self.root / "latest").exists():
            raise CheckpointError(
                f"{self.root}: 'latest' names {(self.root / 'latest').read_text(errors='replace').strip()!r:.80}, "
                "and no folder there "
                "is a complete checkpoint; restore it, or start again with --fresh, which keeps the old folder"
            )
        return None

    def prune(self, keep: int, spared: int | None = None) -> None:
        """Delete all but the newest ``keep`` checkpoints and that of step ``spared``, each made invalid before its
        files go."""
        for step in self.steps()[:-keep]:
            if step == spared:
                continue
            folder = self.path(step)
            (folder / MANIFEST).unlink()
            fsync_folder(folder)
            fault_point("ckpt.prune.mid")
            shutil.rmtree(folder)
        for folder in self.root.glob("step_*"):  # what a kill in the middle of a deletion left behind
            if TAG.match(folder.name) and not (folder / MANIFEST).exists():
                shutil.rmtree(folder)

    def _size(self, step: int) -> int:
        return sum(p.stat().st_size for p in self.path(step).rglob("*") if p.is_file())

    @staticmethod
    def cannot_write(path: Path, error: OSError) -> CannotWriteError:
        """The error to raise where the disk refused ``path``."""
        return CannotWriteError(
            f"{path}: the checkpoint could not be written ({error.strerror or error}); free some space or make the "
            "folder "
            "writable, then start the same command again: earlier checkpoints are intact"
        )

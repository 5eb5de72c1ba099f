"""Writing files so that they are whole and on disk, and hashing them."""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from tnl.errors import CannotWriteError


def fsync_folder(path: Path) -> None:
    """Make renames and new files inside ``path`` durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write ``content`` so that ``path`` holds either the old or the new content, whatever happens.

    Raises:
        OSError: the disk refused; it names ``path``, and no temporary file is left.
    """
    # Each process has its own: several ranks of a run may write what went wrong.
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode("utf-8") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        fsync_folder(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextmanager
def new_folder(destination: Path) -> Iterator[Path]:
    """A folder to fill, which becomes ``destination`` at the end of the block; after an error nothing is left.

    Raises:
        CannotWriteError: the disk refused.
    """
    scratch = None
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{destination.name}.tmp-", dir=destination.parent))
        scratch.chmod(0o755)
        yield scratch
        for path in scratch.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)  # safetensors lets only the owner read its files
        os.rename(scratch, destination)
    # What safetensors says when the disk is full is no OSError.
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CannotWriteError(f"{destination}: {reason}; free some space or choose another folder") from None
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

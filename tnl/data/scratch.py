"""A folder that appears complete or not at all: written under another name, then renamed."""

import fcntl
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from tnl.files import fsync_folder

_LOCK, _CONTENT, _REPLACED = "lock", "content", "replaced"


class ScratchFolder:
    """A folder ``OUTPUT.tmp-*`` of this process; its ``content`` becomes ``OUTPUT`` by `publish`."""

    def __init__(self, folder: Path, output: Path) -> None:
        """Use `scratch_folder`."""
        self._folder, self._output = folder, output
        self.content = folder / _CONTENT
        self.content.mkdir()

    def publish(self, replace: bool) -> bool:
        """Rename ``content`` to the output; False when a folder with files is there and is not to be replaced."""
        fsync_folder(self.content)
        replaced = self._folder / _REPLACED
        if replace and self._output.exists():
            # Should the process be killed between the two renames, the next run finds no output and prepares it again.
            os.rename(self._output, replaced)
        try:
            os.rename(self.content, self._output)
        except OSError:
            if self._output.is_dir() and any(self._output.iterdir()):
                return False
            if replaced.exists():
                os.rename(replaced, self._output)
            raise
        fsync_folder(self._output.parent)
        return True


@contextmanager
def scratch_folder(output: Path) -> Iterator[ScratchFolder]:
    """A `ScratchFolder` for ``output``, removed at the end in any case; first those of killed processes are removed.

    A living process holds the lock of its folder, which the system takes back when the process ends in any way. Raises
    OSError.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    prefix = f"{output.name}.tmp-"
    for stale in [path for path in output.parent.iterdir() if path.name.startswith(prefix)]:
        if lock := _lock(stale):
            with lock:
                shutil.rmtree(stale)
    lock = None
    # Another process may take a folder for stale between its creation and its lock.
    while lock is None:
        folder = output.parent / f"{prefix}{uuid.uuid4().hex}"
        folder.mkdir()
        lock = _lock(folder)
    try:
        with lock:
            yield ScratchFolder(folder, output)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _lock(folder: Path) -> TextIO | None:
    """The lock of ``folder``, held until it is closed; None when another process has it or removed the folder."""
    file = folder / _LOCK
    with suppress(FileNotFoundError, NotADirectoryError):
        stream = file.open("a")
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            stream.close()
            return None
        if file.exists():
            return stream
        stream.close()
    return None

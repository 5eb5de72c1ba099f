"""One process at a time in a run folder."""

import fcntl
import json
import os
import socket
import time
from pathlib import Path

from tnl.errors import CannotWriteError, RunInUseError

FILE = ".lock"


def is_abandoned(folder: Path) -> bool:
    """Whether the process that last held ``folder`` is gone; False where this machine cannot know.

    The lock of a process on another machine may not be seen here, so only one of this machine is asked for.
    """
    try:
        with open(folder / FILE, encoding="utf-8") as file:
            if json.load(file).get("host") != socket.gethostname():
                return False
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return True
    except (OSError, ValueError):
        return False


class RunLock:
    """Holds ``.lock`` in the run folder until closed or until the process ends; a killed run leaves nothing to clean
    up.

    The file says who holds it. The lock is the system's own (flock), released by the kernel with the process.
    """

    def __init__(self, folder: Path):
        path = folder / FILE
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 - held open: the lock lives as long as it
        except OSError as error:
            raise CannotWriteError(f"{path}: {error.strerror}; choose another output folder") from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.seek(0)
            holder = self._file.read().strip() or "{}"
            self._file.close()
            raise RunInUseError(
                f"{folder}: in use by another process {holder}; wait for it, stop it, or set another output folder"
            ) from None
        # A forked data worker would hold the lock for as long as it outlives a killed run.
        os.register_at_fork(after_in_child=self._file.close)
        self._file.seek(0)
        self._file.truncate()
        started = time.strftime("%Y-%m-%dT%H:%M:%S")
        self._file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": started}))
        self._file.flush()

    def close(self) -> None:
        """Let the folder go."""
        self._file.close()

"""``run_status.json``: how the run stands, for people and for launchers that lose exit codes (torchrun turns every
code into 1)."""

import contextlib
import json
import time
from pathlib import Path

from tnl.errors import CannotWriteError, exit_code
from tnl.files import write_atomically

FILE = "run_status.json"
IN_PROGRESS = ("starting", "running")


def write_status(folder: Path, state: str, step: int, total_steps: int, **more) -> None:
    """Record ``state`` (starting, running, finished, preempted or failed) atomically, with an ``exit_code`` where the
    process ends. The ``starts`` that `record_start` wrote stay."""
    starts = {"starts": read_status(folder).get("starts", [])}
    status = {"state": state, "step": step, "total_steps": total_steps, "time": time.time()} | starts | more
    write_atomically(folder / FILE, json.dumps(status, indent=1) + "\n")


def read_status(folder: Path) -> dict:
    """What `write_status` last recorded; empty when there is nothing readable."""
    try:
        return json.loads((folder / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def record_start(folder: Path, total_steps: int, starts: list[str]) -> None:
    """Record that a run has taken ``folder`` and is getting ready.

    Args:
        starts: which starts became this run; see `tnl.training.start`.

    Raises:
        CannotWriteError: the disk refused.
    """
    try:
        write_status(folder, "starting", read_status(folder).get("step", 0), total_steps, starts=starts)
    except OSError as error:
        raise CannotWriteError(f"{error.filename}: {error.strerror}; free some space and start again") from None


def record_failure(folder: Path, error: BaseException) -> None:
    """Record why the run ended. The rank that fails first does, whichever it is: what others then meet follows from
    it."""
    found = read_status(folder)
    if found.get("state") not in IN_PROGRESS:
        return
    with contextlib.suppress(OSError):  # on a full disk the first error is the one to report
        write_status(
            folder, "failed", found["step"], found["total_steps"], exit_code=exit_code(error), error=str(error)
        )

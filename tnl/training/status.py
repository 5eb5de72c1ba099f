"""``run_status.json``: how the run stands, for people and for launchers that lose exit codes (torchrun turns every
code into 1)."""

import json
import time
from pathlib import Path

from tnl.files import write_atomically

FILE = "run_status.json"


def write_status(folder: Path, state: str, step: int, total_steps: int, **more) -> None:
    """Record ``state`` (running, finished, preempted or failed) atomically, with an ``exit_code`` where the process
    ends."""
    status = {"state": state, "step": step, "total_steps": total_steps, "time": time.time(), **more}
    write_atomically(folder / FILE, json.dumps(status, indent=1) + "\n")


def read_status(folder: Path) -> dict:
    """What `write_status` last recorded; empty when there is nothing readable."""
    try:
        return json.loads((folder / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}

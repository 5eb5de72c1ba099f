"""Planned faults for the tests: what happens when a run is killed, or its disk fails, at a named point.

Nothing happens unless both ``TNL_TESTING=1`` and ``TNL_FAULT=point[:step=N][:rank=R]:action=A`` are set. Actions:
``kill9``, ``enospc``, ``nan`` (for points that return a value to spoil).
"""

import errno
import os
import signal


def fault_point(name: str, *, step: int | None = None) -> str | None:
    """Carry out the planned fault of this point, if any; returns ``"nan"`` where the caller must spoil its value."""
    plan = os.environ.get("TNL_FAULT") if os.environ.get("TNL_TESTING") == "1" else None
    if not plan:
        return None
    point, *fields = plan.split(":")
    wanted = dict(field.split("=", 1) for field in fields)
    if point != name or ("step" in wanted and step is not None and int(wanted["step"]) != step):
        return None
    if "rank" in wanted and wanted["rank"] != os.environ.get("RANK", "0"):
        return None
    action = wanted["action"]
    if action == "kill9":
        os.kill(os.getpid(), signal.SIGKILL)
    if action == "enospc":
        raise OSError(errno.ENOSPC, f"No space left on device (planned at {name})")
    assert action == "nan", f"TNL_FAULT: unknown action {action}"
    return action

"""How a run stands, and asking it to stop: for people, and for launchers that lose exit codes and signals."""

import time
from pathlib import Path

from tnl import config
from tnl.errors import EXIT_INTERNAL, ConfigError
from tnl.training.lock import is_abandoned
from tnl.training.start import read_end, start_id
from tnl.training.status import FILE, IN_PROGRESS, read_status
from tnl.training.stop import STOP_FILE


def run_folder(name: str, overrides: list[str]) -> Path:
    """The folder of a run: ``name`` itself, or ``output`` of the configuration that ``name`` and ``overrides`` give.

    Raises:
        ConfigError: the configuration cannot be read, or names no output. The rest of it is not checked: a launcher
            asks while the run is there.
    """
    folder = Path(name).expanduser()
    if folder.is_dir() and not overrides:
        return folder
    found = config.find_config(name)
    output = config.merge(config.read_yaml(found), config.parse_overrides(overrides)).get("output")
    if not isinstance(output, str):
        raise ConfigError(f"{found}: output: missing, the run folder must be given as text")
    return Path(output)


def _recorded(run: Path) -> dict:
    found = read_status(run)
    if not found:
        raise ConfigError(f"{run / FILE}: not there or not readable; give the run folder, or what tnl pretrain got")
    if found["state"] in IN_PROGRESS and is_abandoned(run):
        found["state"] = "killed"  # and could not say so
    return found


def _is_of(run: Path, start: Path) -> bool:
    """Whether what is recorded is of the run that ``start`` became."""
    return start_id(start) in read_status(run).get("starts", [])


def status(run: Path, start: Path | None = None, report=print) -> int:
    """Print the state of a run folder in a line.

    Args:
        start: the file of a start (see `tnl.training.start`), whose run alone is meant.

    Returns:
        The exit code of the run. `EXIT_INTERNAL` where it has none: it is in progress, or was killed.

    Raises:
        ConfigError: nothing was recorded.
    """
    if start is not None and not _is_of(run, start):
        report(f"{run}: this start ended before the run began; its message stands above")
        return read_end(start)
    found = _recorded(run)
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(found["time"]))
    error = f": {found['error']}" if found.get("error") else ""
    report(f"{run}: {found['state']} at step {found['step']} of {found['total_steps']}, {when}{error}")
    code = found.get("exit_code")
    return EXIT_INTERNAL if code is None else int(code)


def stop(run: Path, start: Path | None = None, report=print) -> None:
    """Ask a run, on whatever machines it is, to save a checkpoint after its step and to end.

    Args:
        start: the file of a start (see `tnl.training.start`), whose run alone is meant.

    Raises:
        ConfigError: no run is in progress there.
    """
    if start is not None and not _is_of(run, start):
        raise ConfigError(f"{run}: this start has not begun to train there, nothing to stop")
    state = _recorded(run)["state"]
    if state != "running":
        raise ConfigError(f"{run}: {state}, nothing to stop")
    (run / STOP_FILE).touch()
    report(f"{run}: asked to save a checkpoint and stop")

"""Asking a run to stop: signals, and a file for where signals do not reach."""

import os
import signal
from pathlib import Path

STOP_FILE = "STOP"


class StopRequest:
    """Notes SIGTERM and SIGINT, and a file named STOP in the run folder; the loop looks at each step boundary.

    A second signal ends the process at once with 128 + its number: the last committed checkpoint stays as it is.
    """

    def __init__(self, folder: Path):
        self.file = folder / STOP_FILE
        self.reason: str | None = None
        self._previous = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}

    def _handle(self, number, frame):
        if self.reason is not None:
            os._exit(128 + number)
        self.reason = signal.Signals(number).name

    def requested(self) -> bool:
        """Whether this process was asked to stop."""
        if self.reason is None and self.file.exists():
            self.reason = f"the file {self.file}"
        return self.reason is not None

    def consume(self) -> None:
        """Remove the file: the next start goes on."""
        self.file.unlink(missing_ok=True)

    def close(self) -> None:
        """Give the signals back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

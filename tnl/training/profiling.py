"""A trace of some steps by torch's profiler, for chrome://tracing or Perfetto."""

from pathlib import Path

import torch

from tnl.errors import CannotWriteError

FOLDER = "profile"


class StepProfiler:
    """Traces steps ``first`` to ``last`` (1-based, both included) of this rank into the run folder; each rank has one.

    Without steps it does nothing.
    """

    def __init__(self, folder: Path, steps: tuple[int, int] | None, rank: int):
        self._folder, self._steps, self._rank = folder / FOLDER, steps, rank
        self._profile = None

    def begin(self, step: int) -> None:
        """Before step ``step``."""
        if self._steps is not None and self._profile is None and self._steps[0] <= step <= self._steps[1]:
            self._profile = torch.profiler.profile()
            self._profile.start()

    def end(self, step: int) -> Path | None:
        """After step ``step``; returns the trace where it was the last one to trace.

        Raises:
            CannotWriteError: the folder cannot be written.
        """
        if self._profile is None or step < self._steps[1]:
            return None
        self._profile.stop()
        path = self._folder / f"steps_{self._steps[0]}_{self._steps[1]}_rank{self._rank}.json"
        try:
            path.parent.mkdir(exist_ok=True)
            self._profile.export_chrome_trace(str(path))
        except OSError as error:
            raise CannotWriteError(f"{path}: {error.strerror}; free some space and start again") from None
        self._profile = None
        return path

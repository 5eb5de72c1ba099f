"""Where the time of a step goes: CUDA events on a GPU, the clock elsewhere.

Reading the events waits for nothing: the loop has read the step's loss before, which comes after them on the stream.
"""

import time

import torch

PHASES = ("data", "forward", "backward", "optimizer", "reduce")


class StepTimer:
    """Sums the time of each phase of a step. ``data`` is the wait for the batch, ``reduce`` that for the other ranks.

    What ZeRO communicates overlaps the backward pass and counts there, unless gradients are reduced once a step; a
    trace (`logging.profile_steps`) shows it alone. What comes between two steps (evaluation, checkpoints) counts
    nowhere.
    """

    def __init__(self, device: torch.device):
        self._on_gpu = device.type == "cuda"
        self._marks: list[tuple[str | None, object]] = []
        self._begun = 0.0

    def begin(self) -> None:
        """A step begins, with the wait for its batch."""
        self._marks.clear()
        self._begun = time.perf_counter()
        self.mark("data")

    def mark(self, phase: str) -> None:
        """What comes from here on is ``phase``."""
        self._marks.append((phase, self._now()))

    def end(self) -> None:
        """The step ends here on the device; before the host reads the step's last result."""
        self._marks.append((None, self._now()))

    def _now(self):
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def split(self) -> dict[str, float]:
        """Seconds from begin to now as ``step_time_s``, and of each phase; after the host read the last result."""
        step_time = time.perf_counter() - self._begun
        totals = dict.fromkeys(PHASES, 0.0)
        for (phase, start), (_, end) in zip(self._marks, self._marks[1:], strict=False):
            totals[phase] += start.elapsed_time(end) / 1000 if self._on_gpu else end - start
        return {"step_time_s": step_time, **{f"{phase}_s": seconds for phase, seconds in totals.items()}}


def peak_memory(device: torch.device) -> int | None:
    """Most bytes that tensors have held on ``device`` since the start; not known on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None

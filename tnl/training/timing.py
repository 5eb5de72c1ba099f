"""Where the time of a step goes: CUDA events on a GPU, the clock elsewhere.

Reading the events waits for nothing: the loop has read the step's loss before, which comes after them on the stream.
"""

import time

import torch

PHASES = ("data", "forward", "backward", "optimizer", "reduce")


class StepTimer:
    """Sums the time of each phase of a step. ``data`` is the wait for the batch, ``reduce`` that for the other ranks.

    What ZeRO communicates overlaps the backward pass and counts there; a trace (`logging.profile_steps`) shows it
    alone.
    """

    def __init__(self, device: torch.device):
        self._on_gpu = device.type == "cuda"
        self._marks: list[tuple[str, object]] = []

    def mark(self, phase: str) -> None:
        """What comes from here on is ``phase``."""
        if not self._on_gpu:
            self._marks.append((phase, time.perf_counter()))
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append((phase, event))

    def split(self) -> dict[str, float]:
        """Seconds of each phase up to the last mark, which begins the next step's first phase."""
        totals = dict.fromkeys(PHASES, 0.0)
        for (phase, start), (_, end) in zip(self._marks, self._marks[1:], strict=False):
            totals[phase] += start.elapsed_time(end) / 1000 if self._on_gpu else end - start
        self._marks.clear()
        return {f"{phase}_s": seconds for phase, seconds in totals.items()}


def peak_memory(device: torch.device) -> int | None:
    """Most bytes that tensors have held on ``device`` since the start; not known on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None

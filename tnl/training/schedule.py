"""Learning rate as a pure function of the step: nothing to save, nothing to restore."""

import math

from tnl.training.settings import ScheduleSettings


def learning_rate(schedule: ScheduleSettings, peak: float, step: int, total_steps: int) -> float:
    """Learning rate of optimizer step ``step`` (0-based) of ``total_steps``.

    Warm-up rises linearly and reaches the peak at its last step. After it: ``cosine`` falls to ``min_lr_ratio`` at
    the last step; ``wsd`` stays, then falls linearly to ``min_lr_ratio`` over the last ``decay_steps``; ``constant``
    stays; ``inverse_sqrt`` falls as ``sqrt(warmup / (step + 1))``.
    """
    warmup = schedule.warmup_steps
    if step < warmup:
        return peak * (step + 1) / warmup
    floor = schedule.min_lr_ratio
    if schedule.name == "cosine":
        progress = (step - warmup) / max(1, total_steps - 1 - warmup)
        return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))
    if schedule.name == "wsd":
        decay = schedule.decay_steps or max(1, min(total_steps // 5, total_steps - warmup))
        remaining = max(0, total_steps - 1 - step) / decay
        return peak * (floor + (1 - floor) * min(1.0, remaining))
    if schedule.name == "inverse_sqrt":
        return peak * math.sqrt(max(1, warmup) / max(1, step + 1, warmup))
    assert schedule.name == "constant", schedule.name
    return peak

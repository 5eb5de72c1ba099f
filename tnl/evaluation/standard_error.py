"""How far a mean may be from what it stands for."""

import math
from collections.abc import Sequence

import numpy as np


def standard_error(values: Sequence[float] | np.ndarray) -> float | None:
    """Standard deviation of the mean of independent ``values`` [N]; None for fewer than two."""
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None


def ratio(sums: Sequence[float] | np.ndarray, counts: Sequence[float] | np.ndarray) -> tuple[float, float | None]:
    """The sum of ``sums`` [N] over that of ``counts`` [N], and its standard error over independent samples
    (linearised); None for fewer than two."""
    a, n = np.asarray(sums, dtype=np.float64), np.asarray(counts, dtype=np.float64)
    value = float(a.sum() / n.sum())
    error = standard_error(a - value * n)
    return value, None if error is None else error / float(n.mean())

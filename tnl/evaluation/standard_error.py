"""How far a mean may be from what it stands for."""

import math
from collections.abc import Sequence

import numpy as np


def standard_error(values: Sequence[float] | np.ndarray) -> float | None:
    """Standard deviation of the mean of independent ``values`` [N]; None for fewer than two."""
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None

"""Curves over the steps of a run: the smoothing that pictures and pages share."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def exponential_mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """An exponential mean over about a twentieth of the run, without a bias towards its first value."""
    keep = 1 - 1 / max(3.0, len(values) / 20)
    total = weight = 0.0
    smooth = np.empty_like(values)
    for i, value in enumerate(values):
        total, weight = keep * total + value, keep * weight + 1
        smooth[i] = total / weight
    return smooth

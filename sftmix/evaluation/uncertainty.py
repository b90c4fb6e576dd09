"""How sure held-out figures are: standard errors over examples, not over tokens.

The tokens of one answer depend on each other, so the example is what is drawn. The mean over tokens is then a ratio
of two sums over examples, R = sum s_i / sum n_i, and its variance that of the residuals s_i - R n_i (Cochran, Sampling
Techniques, chapter 6; the sandwich of a regression through the origin with a cluster per example):

    se(R) = sqrt(n / (n - 1) * sum (s_i - R n_i)^2) / sum n_i
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

Z95 = 1.959963984540054  # of the normal distribution, two-sided 95 %


def ratio_stderr(sums: ArrayLike, counts: ArrayLike) -> float | None:
    """Standard error of sum(sums) / sum(counts), both [E], over E examples; None for fewer than two.

    Raises ``ValueError`` for shapes that differ, and counts that are not positive.
    """
    s, n = np.asarray(sums, dtype=np.float64), np.asarray(counts, dtype=np.float64)
    if s.ndim != 1 or s.shape != n.shape:
        raise ValueError(f"sums, counts: expected the same shape [E], got {s.shape} and {n.shape}")
    if not (n > 0).all():
        raise ValueError(f"counts: expected positive numbers, got {n.min() if n.size else 'none'}")
    size = len(s)
    if size < 2:
        return None
    residual = s - s.sum() / n.sum() * n
    return float(math.sqrt(size / (size - 1) * float(residual @ residual)) / n.sum())


def wilson(successes: int, size: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share; it keeps a width at 0 and 1, where the standard error is 0.

    Raises ``ValueError`` for ``successes`` outside 0 to ``size``, and no ``size``.
    """
    if not 0 <= successes <= size or size < 1:
        raise ValueError(
            f"successes: expected 0 to size, and a size of at least 1, got {successes} of {size}"
        )
    share, square = successes / size, Z95 * Z95 / size
    middle = (share + square / 2) / (1 + square)
    half = Z95 * math.sqrt(share * (1 - share) / size + square / (4 * size)) / (1 + square)
    return (middle - half if successes else 0.0), (middle + half if successes < size else 1.0)


def share(metric: Mapping[str, Any], *, short: bool = False) -> str:
    """A benchmark's metric in words: ``12.50% ± 1.20%``, short ``12.5±1.2%``; what is no share of rows as it is.

    Where all rows are right or wrong the standard error says 0 whatever their number, so the 95 % interval's end is
    told in its place: ``0% (≤ 3.1%)``.
    """
    value, error, interval = metric["value"], metric["stderr"], metric.get("interval95")
    if value is None:
        return "–"
    if interval is None:
        return f"{value:.4g}" + (f" ± {error:.2g}" if error is not None else "")
    if value in (0, 1):
        end = f"≤ {interval[1]:.1%}" if value == 0 else f"≥ {interval[0]:.1%}"
        return f"{value:.0%} ({end})".replace(" ", "" if short else " ")
    if error is None:
        return f"{value:.2%}"
    return f"{100 * value:.1f}±{error:.1%}" if short else f"{value:.2%} ± {error:.2%}"

"""Whether a model's probabilities are what they say: the most likely token's, over the tokens of held-out answers.

Confidence is the probability of the most likely next token, exp(max logit - log-sum-exp), and a token is right where
that was the answer's. The expected calibration error (Guo et al., arXiv 1706.04599) is the mean distance of confidence
and accuracy over bins, weighted by their tokens: with bins of equal width, and with bins of equally many tokens
(adaptive; Nguyen and O'Connor, arXiv 1508.05154), which the many tokens near 1 cannot hide in one bin.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

NUM_BINS = 15


def calibration(confidence: ArrayLike, correct: ArrayLike) -> dict[str, Any]:
    """Calibration errors, the top-1 Brier score (mean of (confidence - correct)^2) and the reliability tables.

    ``confidence`` [N] in [0, 1], ``correct`` [N] bool. A bin (``equal_width``: its ``from`` excluded, its ``to``
    included) has ``count``, mean ``confidence`` and ``accuracy``; an empty one None for both. Raises ``ValueError``
    for shapes that differ, no tokens, and confidences outside [0, 1].
    """
    p, hit = np.asarray(confidence, dtype=np.float64), np.asarray(correct, dtype=np.float64)
    if p.ndim != 1 or p.shape != hit.shape or not p.size:
        raise ValueError(f"confidence, correct: expected the same shape [N], got {p.shape} and {hit.shape}")
    if not ((p >= 0) & (p <= 1 + 1e-5)).all():  # NaN too
        raise ValueError(f"confidence: expected values in [0, 1], got {p.min()} to {p.max()}")
    p = np.minimum(p, 1.0)  # of rounding
    at = np.clip(np.ceil(p * NUM_BINS).astype(np.int64) - 1, 0, NUM_BINS - 1)  # bins (k / 15, (k + 1) / 15]
    edges = np.arange(NUM_BINS + 1) / NUM_BINS
    equal = [
        {"from": float(edges[k]), "to": float(edges[k + 1]), **_bin(p[at == k], hit[at == k])}
        for k in range(NUM_BINS)
    ]
    order = np.argsort(p, kind="stable")
    parts = [part for part in np.array_split(order, NUM_BINS) if part.size]
    adaptive = [
        {"from": float(p[part].min()), "to": float(p[part].max()), **_bin(p[part], hit[part])}
        for part in parts
    ]
    return {
        "num_tokens": int(p.size), "num_bins": NUM_BINS, "confidence": float(p.mean()),
        "ece": _error(equal), "ece_adaptive": _error(adaptive), "brier": float(np.square(p - hit).mean()),
        "equal_width": equal, "adaptive": adaptive,
    }  # fmt: skip


def _bin(p: NDArray[np.float64], hit: NDArray[np.float64]) -> dict[str, Any]:
    if not p.size:
        return {"count": 0, "confidence": None, "accuracy": None}
    return {"count": int(p.size), "confidence": float(p.mean()), "accuracy": float(hit.mean())}


def _error(bins: list[dict[str, Any]]) -> float:
    filled = [b for b in bins if b["count"]]
    total = sum(b["count"] for b in filled)
    return sum(b["count"] / total * abs(b["accuracy"] - b["confidence"]) for b in filled)

"""The split at the median: a confident and an unconfident half."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Split:
    """The two halves of the examples, and the scores behind them.

    ``confident`` and ``unconfident`` are lists of example ids; ``confidence`` (the negative mean perplexity)
    and ``variability`` (the standard deviation of the perplexity over checkpoints) are by id and may be
    empty for a split made by hand.
    """

    confident: list[str]
    unconfident: list[str]
    confidence: dict[str, float] = field(default_factory=dict)
    variability: dict[str, float] = field(default_factory=dict)


def median_split(confidence: Mapping[str, float]) -> tuple[list[str], list[str]]:
    """Split ids at the median confidence into (confident, unconfident), each ordered by confidence.

    Ties are broken by id; of an odd number the confident half gets the extra one. Raises ``ValueError``
    for fewer than two examples and for a confidence that is NaN.
    """
    if len(confidence) < 2:
        raise ValueError(f"confidence: expected at least two examples, got {len(confidence)}")
    for name, value in confidence.items():
        if math.isnan(value):
            raise ValueError(f"confidence: expected a number for example {name}, got nan")
    ranked = sorted(confidence, key=lambda name: (-confidence[name], name))
    middle = (len(ranked) + 1) // 2
    return ranked[:middle], ranked[middle:]


def split_digest(halves: Split) -> str:
    """A short hash of which example is in which half."""
    members = repr((sorted(halves.confident), sorted(halves.unconfident)))
    return hashlib.sha256(members.encode()).hexdigest()[:16]

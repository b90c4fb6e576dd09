"""The split into a confident and an unconfident half: at the median, at a quantile, or at random."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np


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
    return quantile_split(confidence, 0.5)


def quantile_split(confidence: Mapping[str, float], share: float) -> tuple[list[str], list[str]]:
    """Split ids so that ``share`` of them, the most confident ones, are confident; rounded up, one at least in each.

    As ``median_split`` in order, ties and errors; raises ``ValueError`` for a share that is not between 0 and 1.
    """
    if not 0 < share < 1:
        raise ValueError(f"share: expected a number between 0 and 1, got {share}")
    if len(confidence) < 2:
        raise ValueError(f"confidence: expected at least two examples, got {len(confidence)}")
    for name, value in confidence.items():
        if math.isnan(value):
            raise ValueError(f"confidence: expected a number for example {name}, got nan")
    ranked = sorted(confidence, key=lambda name: (-confidence[name], name))
    exact = share * len(ranked)
    cut = round(exact) if abs(exact - round(exact)) < 1e-9 * len(ranked) else math.ceil(exact)
    cut = min(max(cut, 1), len(ranked) - 1)
    return ranked[:cut], ranked[cut:]


def random_split(ids: Iterable[str], *, seed: int) -> tuple[list[str], list[str]]:
    """Two halves at random, a pure function of ids and ``seed``; of an odd number the first gets the extra one.

    Raises ``ValueError`` for fewer than two ids.
    """
    names = sorted(ids)
    if len(names) < 2:
        raise ValueError(f"ids: expected at least two examples, got {len(names)}")
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence(seed, spawn_key=(100,))))
    order = [names[i] for i in generator.permutation(len(names)).tolist()]
    middle = (len(order) + 1) // 2
    return order[:middle], order[middle:]


def used_halves(split: Split, use: str, *, seed: int) -> Split:
    """The halves that are trained on: the split itself (both), or one of its halves cut in two at random.

    The second is a control: Mixup, or the same batches without it, where confidence decides nothing. Raises
    ``ValueError`` for another ``use`` and for a half of fewer than two examples.
    """
    if use == "both":
        return split
    if use not in ("confident", "unconfident"):
        raise ValueError(f"use: expected both, confident or unconfident, got {use!r}")
    half = split.confident if use == "confident" else split.unconfident
    if len(half) < 2:
        raise ValueError(f"use: expected at least two examples in the {use} half, got {len(half)}")
    return Split(*random_split(half, seed=seed), split.confidence, split.variability)


def border(split: Split) -> tuple[float, str] | None:
    """The confidence between the halves, and what it is: their ``median``, or a ``cut`` elsewhere.

    None where the halves overlap in confidence, as given or random ones do, or have none.
    """
    if not split.confidence:
        return None
    low = min(split.confidence[name] for name in split.confident)
    high = max(split.confidence[name] for name in split.unconfident)
    if low < high:
        return None
    even = len(split.confident) - len(split.unconfident) in (0, 1)
    return (low + high) / 2, "median" if even else "cut"


def split_digest(halves: Split) -> str:
    """A short hash of which example is in which half."""
    members = repr((sorted(halves.confident), sorted(halves.unconfident)))
    return hashlib.sha256(members.encode()).hexdigest()[:16]

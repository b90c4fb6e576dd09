"""The lambdas that a run mixed with, drawn again from what its training recorded."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sftmix.scores.halves import Split
from sftmix.training.pairs import Pair, draw_lam, epoch_pairs
from sftmix.training.plan import in_steps

UNITS = {"pair": "pairs", "token": "mixed positions", "batch": "optimizer steps"}
_BINS = 40


def lambdas(
    split: Split, settings: Mapping[str, Any], *, steps: int, num_supervised: Mapping[str, int] | None
) -> NDArray[np.float32]:
    """Every lambda that the first ``steps`` optimizer steps of a training run drew, in float32 as the loss had them.

    ``settings`` are those recorded when training began (``stages.json``): seed, mixup.alpha, mixup.lam and
    train.batch_size. One value a pair, a mixed position or a step, as ``mixup.lam`` says; for positions
    ``num_supervised`` (tokens that bear loss, by id) is needed. Raises ``ValueError`` where something is missing.
    """
    names = ("seed", "mixup.alpha", "mixup.lam", "train.batch_size")
    missing = [name for name in names if name not in settings]
    if missing:
        raise ValueError(f"settings: expected {', '.join(names)}, got none of {', '.join(missing)}")
    seed, alpha, lam = settings["seed"], settings["mixup.alpha"], settings["mixup.lam"]
    if lam == "token" and num_supervised is None:
        raise ValueError("num_supervised: expected the tokens that bear loss of every example, got none")
    found: list[NDArray[np.float32]] = []
    epoch, left = 0, steps
    while left > 0:
        groups = in_steps(
            epoch_pairs(split, seed=seed, epoch=epoch, alpha=alpha), settings["train.batch_size"]
        )
        for index, group in enumerate(groups[:left]):
            mixed = [pair for pair in group if pair.unconfident is not None]
            if lam == "batch" and mixed:
                found.append(
                    np.array([draw_lam(seed=seed, epoch=epoch, index=index, alpha=alpha)], np.float32)
                )
            elif lam == "pair":
                found.append(np.array([pair.lam for pair in mixed], np.float32))
            elif lam == "token":
                found += [_of_tokens(pair, seed, epoch, alpha, num_supervised or {}) for pair in mixed]
        left -= len(groups)
        epoch += 1
    return np.concatenate([np.empty(0, np.float32), *found])


def _of_tokens(
    pair: Pair, seed: int, epoch: int, alpha: float, sizes: Mapping[str, int]
) -> NDArray[np.float32]:
    size = min(sizes[pair.confident], sizes[pair.unconfident or ""])
    return draw_lam(seed=seed, epoch=epoch, index=pair.index, alpha=alpha, size=size)


def histogram(values: NDArray[np.float32]) -> dict[str, Any]:
    """Counts of lambdas in equal parts of [0, 1], their number, mean and the share below 0.1 or above 0.9."""
    counts = np.histogram(values, bins=_BINS, range=(0.0, 1.0))[0]
    outer = int(((values < 0.1) | (values > 0.9)).sum())
    mean = float(values.mean(dtype=np.float64)) if len(values) else math.nan
    return {
        "counts": counts.tolist(), "total": len(values), "mean": mean,
        "outer": outer / len(values) if len(values) else math.nan,
    }  # fmt: skip

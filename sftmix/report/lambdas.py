"""The lambdas that a run mixed with, drawn again from what its training recorded."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sftmix.scores.halves import Split, used_halves
from sftmix.training.pairs import Pair, draw_lam, epoch_pairs
from sftmix.training.plan import in_steps

UNITS = {"pair": "pairs", "token": "mixed positions", "batch": "optimizer steps"}
_BINS = 40


def lambdas(
    split: Split, settings: Mapping[str, Any], *, steps: int, num_supervised: Mapping[str, int] | None
) -> Iterator[NDArray[np.float32]]:
    """Every lambda that the first ``steps`` optimizer steps of a training run drew, in float32 as the loss had them.

    ``settings`` are those recorded when training began (``stages.json``): seed, mixup.alpha, mixup.lam and
    train.batch_size, and split.use and mixup.pairing where they are not the usual ones. By parts, one value a pair, a
    mixed position or a step, as ``mixup.lam`` says; for positions, and for pairs by length, ``num_supervised`` (tokens
    that bear loss, by id) is needed. Raises ``ValueError`` where something is missing.
    """
    names = ("seed", "mixup.alpha", "mixup.lam", "train.batch_size")
    missing = [name for name in names if name not in settings]
    if missing:
        raise ValueError(f"settings: expected {', '.join(names)}, got none of {', '.join(missing)}")
    if settings["mixup.lam"] not in UNITS:
        raise ValueError(
            f"settings: expected mixup.lam to be one of {', '.join(UNITS)}, got {settings['mixup.lam']}"
        )
    by_length = settings.get("mixup.pairing", "random") == "length"
    if (settings["mixup.lam"] == "token" or by_length) and num_supervised is None:
        raise ValueError("num_supervised: expected the tokens that bear loss of every example, got none")
    return _drawn(split, settings, steps, num_supervised or {})


def _drawn(
    split: Split, settings: Mapping[str, Any], steps: int, sizes: Mapping[str, int]
) -> Iterator[NDArray[np.float32]]:
    seed, alpha, lam = settings["seed"], settings["mixup.alpha"], settings["mixup.lam"]
    pairing = settings.get("mixup.pairing", "random")
    halves = used_halves(split, settings.get("split.use", "both"), seed=seed)
    epoch, left = 0, steps
    while left > 0:
        pairs = epoch_pairs(
            halves, seed=seed, epoch=epoch, alpha=alpha, pairing=pairing, length=sizes.__getitem__
        )
        groups = in_steps(pairs, settings["train.batch_size"])
        for index, group in enumerate(groups[:left]):
            mixed = [pair for pair in group if pair.unconfident is not None]
            if lam == "batch" and mixed:
                yield np.array([draw_lam(seed=seed, epoch=epoch, index=index, alpha=alpha)], np.float32)
            elif lam == "pair":
                yield np.array([pair.lam for pair in mixed], np.float32)
            elif lam == "token":
                yield from (_of_tokens(pair, seed, epoch, alpha, sizes) for pair in mixed)
        left -= len(groups)
        epoch += 1


def _of_tokens(
    pair: Pair, seed: int, epoch: int, alpha: float, sizes: Mapping[str, int]
) -> NDArray[np.float32]:
    size = min(sizes[pair.confident], sizes[pair.unconfident or ""])
    return draw_lam(seed=seed, epoch=epoch, index=pair.index, alpha=alpha, size=size)


def histogram(parts: Iterable[NDArray[np.float32]]) -> dict[str, Any]:
    """Counts of lambdas in equal parts of [0, 1], their number, mean and the share below 0.1 or above 0.9."""
    counts = np.zeros(_BINS, np.int64)
    total = outer = 0
    added = 0.0
    for values in parts:
        counts += np.histogram(values, bins=_BINS, range=(0.0, 1.0))[0]
        total += len(values)
        outer += int(((values < 0.1) | (values > 0.9)).sum())
        added += float(values.sum(dtype=np.float64))
    mean, share = (added / total, outer / total) if total else (math.nan, math.nan)
    return {"counts": counts.tolist(), "total": total, "mean": mean, "outer": share}

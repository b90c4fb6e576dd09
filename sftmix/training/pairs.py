"""The pairs and lambdas of each epoch.

Everything here is a pure function of its arguments: ids are sorted first, and every draw comes from a
counter-based generator keyed by (seed, epoch) or (seed, epoch, index). The order of the input file, the
number of processes and a resumed run therefore change nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import overload

import numpy as np
from numpy.typing import NDArray

from sftmix.scores.halves import Split

# One name per kind of draw, so that no two kinds share a random stream.
_ORDER, _CONFIDENT, _UNCONFIDENT, _ODD, _LAM = range(5)


@dataclass(frozen=True)
class Pair:
    """Two examples that are mixed with weight ``lam`` on the confident one.

    ``unconfident`` is ``None`` for the odd one out, which trains with next-token prediction alone.
    ``index`` is the pair's place in its epoch, the third key of its lambda.
    """

    confident: str
    unconfident: str | None
    lam: float
    index: int


def epoch_pairs(split: Split, *, seed: int, epoch: int, alpha: float) -> list[Pair]:
    """Pair the halves at random for one epoch (from 0), each pair with its lambda ~ Beta(alpha, alpha).

    Every example appears exactly once. With an odd number of examples the last entry has no partner;
    which example that is moves on every epoch. Raises ``ValueError`` for fewer than two examples, halves
    that overlap or whose sizes differ by more than one, and ``alpha`` <= 0.
    """
    confident, unconfident = sorted(split.confident), sorted(split.unconfident)
    _check_halves(confident, unconfident)
    odd: str | None = None
    if len(confident) > len(unconfident):
        # A fixed order walked one step an epoch: the same example is not left out twice in a row.
        order = _generator(_ODD, seed).permutation(len(confident))
        odd = confident.pop(int(order[epoch % len(order)]))
    left = _generator(_CONFIDENT, seed, epoch).permutation(len(confident))
    right = _generator(_UNCONFIDENT, seed, epoch).permutation(len(unconfident))
    pairs = [
        Pair(confident[c], unconfident[u], draw_lam(seed=seed, epoch=epoch, index=i, alpha=alpha), i)
        for i, (c, u) in enumerate(zip(left.tolist(), right.tolist(), strict=True))
    ]
    if odd is not None:
        pairs.append(Pair(odd, None, 1.0, len(pairs)))
    return pairs


def epoch_order(ids: Iterable[str], *, seed: int, epoch: int) -> list[str]:
    """The ids in the random order of one epoch of the plain (reference) run."""
    names = sorted(ids)
    if not names:
        raise ValueError("ids: expected at least one example, got none")
    return [names[i] for i in _generator(_ORDER, seed, epoch).permutation(len(names)).tolist()]


@overload
def draw_lam(*, seed: int, epoch: int, index: int, alpha: float, size: None = None) -> float: ...
@overload
def draw_lam(*, seed: int, epoch: int, index: int, alpha: float, size: int) -> NDArray[np.float32]: ...


def draw_lam(
    *, seed: int, epoch: int, index: int, alpha: float, size: int | None = None
) -> float | NDArray[np.float32]:
    """Draw lambda ~ Beta(alpha, alpha) in [0, 1], the weight of the confident member.

    ``mixup.lam: pair`` uses ``Pair.lam``, which is this function at the pair's index; ``token`` calls it
    with ``size`` = the number of mixed tokens of the pair and gets one draw per token; ``batch`` calls it
    with ``index`` = the optimizer step within the epoch. A float, or float32 ``[size]``.
    """
    if not (alpha > 0 and math.isfinite(alpha)):
        raise ValueError(f"alpha: expected a finite number above 0, got {alpha}")
    generator = _generator(_LAM, seed, epoch, index)
    if size is None:
        return float(np.float32(generator.beta(alpha, alpha)))  # rounded as the loss will hold it
    return generator.beta(alpha, alpha, size=size).astype(np.float32)


def _generator(kind: int, seed: int, *key: int) -> np.random.Generator:
    """A counter-based generator of its own for each (kind, seed, key)."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(seed, spawn_key=(kind, *key))))


def _check_halves(confident: list[str], unconfident: list[str]) -> None:
    total = len(confident) + len(unconfident)
    if total < 2:
        raise ValueError(f"split: expected at least two examples, got {total}")
    if len(confident) - len(unconfident) not in (0, 1):
        raise ValueError(
            "split: expected halves of equal size, or one more confident example, got "
            f"{len(confident)} confident and {len(unconfident)} unconfident"
        )
    if len({*confident, *unconfident}) != total:
        raise ValueError("split: expected every example once, got an id that is repeated")

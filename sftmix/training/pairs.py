"""The pairs and lambdas of each epoch.

Everything here is a pure function of its arguments: ids are sorted first, and every draw comes from a
counter-based generator keyed by (seed, epoch) or (seed, epoch, index). The order of the input file, the
number of processes and a resumed run therefore change nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
from numpy.typing import NDArray

from sftmix.scores.halves import Split

# One name per kind of draw, so that no two kinds share a random stream.
_ORDER, _CONFIDENT, _UNCONFIDENT, _ODD, _LAM, _MIX = range(6)
_BLOCK = 64  # pairs among which partners of similar length are looked for
PAIRINGS = ("random", "length")


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


def epoch_pairs(
    split: Split, *, seed: int, epoch: int, alpha: float, pairing: str = "random",
    length: Callable[[str], int] | None = None,
) -> list[Pair]:  # fmt: skip
    """Pair the halves for one epoch (from 0), each pair with its lambda ~ Beta(alpha, alpha).

    Every example appears exactly once. Where the halves differ in size, examples of the larger one have no partner;
    which ones moves on every epoch, and they stand in twos among the pairs, the odd one last. ``pairing``: at random,
    or by ``length`` (of an example, in tokens that bear loss): the halves are cut at random into blocks of 64 and
    paired within a block from the longest to the shortest. Raises ``ValueError`` for fewer than two examples, an empty
    half, halves that overlap, ``alpha`` <= 0, another pairing, and one by length without lengths.
    """
    confident, unconfident = sorted(split.confident), sorted(split.unconfident)
    _check_halves(confident, unconfident)
    larger = confident if len(confident) >= len(unconfident) else unconfident
    alone = _take_alone(larger, abs(len(confident) - len(unconfident)), seed=seed, epoch=epoch)
    left = [confident[i] for i in _generator(_CONFIDENT, seed, epoch).permutation(len(confident)).tolist()]
    right = [
        unconfident[i] for i in _generator(_UNCONFIDENT, seed, epoch).permutation(len(unconfident)).tolist()
    ]
    entries: list[tuple[str, str | None]]
    if pairing == "length" and length is not None:
        entries = list(_by_length(left, right, length))
    elif pairing == "random":
        entries = list(zip(left, right, strict=True))
    else:
        raise ValueError(f"pairing: expected random, or length with the examples' lengths, got {pairing!r}")
    units: list[list[tuple[str, str | None]]] = [[entry] for entry in entries]
    units += [[(name, None) for name in alone[at : at + 2]] for at in range(0, len(alone) - 1, 2)]
    if pairing == "length" or len(alone) > 1:
        units = [units[i] for i in _generator(_MIX, seed, epoch).permutation(len(units)).tolist()]
    entries = [entry for unit in units for entry in unit]
    entries += [(name, None) for name in alone[len(alone) - len(alone) % 2 :]]
    return [
        Pair(one, other, 1.0 if other is None else draw_lam(seed=seed, epoch=epoch, index=i, alpha=alpha), i)
        for i, (one, other) in enumerate(entries)
    ]


def _take_alone(half: list[str], count: int, *, seed: int, epoch: int) -> list[str]:
    """Take ``count`` members out of ``half``: those that have no partner in this epoch."""
    # A fixed order walked on every epoch: the same example is not left alone twice in a row where that can be.
    order = _generator(_ODD, seed).permutation(len(half)) if count else np.empty(0, int)
    places = [int(order[(epoch * count + k) % len(order)]) for k in range(count)]
    names = [half[place] for place in places]
    for place in sorted(places, reverse=True):
        half.pop(place)
    return names


def _by_length(
    left: Sequence[str], right: Sequence[str], length: Callable[[str], int]
) -> Iterable[tuple[str, str]]:
    for start in range(0, len(left), _BLOCK):
        blocks = (sorted(half[start : start + _BLOCK], key=length, reverse=True) for half in (left, right))
        yield from zip(*blocks, strict=True)


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
    if not confident or not unconfident:
        raise ValueError(
            f"split: expected an example in each half, got {len(confident)} confident and {len(unconfident)} "
            "unconfident"
        )
    if len({*confident, *unconfident}) != total:
        raise ValueError("split: expected every example once, got an id that is repeated")

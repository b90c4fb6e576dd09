"""One conversation as tokens: its ids, which of them bear loss, and how much each weighs in it.

This is all that training reads of an example, whatever file, form or template it came from.
"""

from __future__ import annotations

import math
from array import array
from dataclasses import dataclass


@dataclass(frozen=True)
class TokenizedExample:
    """T tokens; ``supervised[t]`` says that token t bears loss (never token 0: nothing predicts it).

    ``weights[t]`` is the weight of token t's loss, relative to 1: positive where the token is supervised and
    0 elsewhere; None where every supervised token weighs 1. ``cut`` says that tokens beyond the longest
    length were left out; nothing reads it but reports. ``replaced`` holds (token, target): what is trained at that
    place is the target, not the token that the model is shown (a template may close earlier answers otherwise than
    the last one).
    """

    id: str
    input_ids: tuple[int, ...]  # [T]
    supervised: tuple[bool, ...]  # [T]
    weights: tuple[float, ...] | None = None  # [T]
    cut: bool = False
    replaced: tuple[tuple[int, int], ...] = ()

    @property
    def num_supervised(self) -> int:
        """The number of tokens that bear loss."""
        return sum(self.supervised)

    @property
    def weight_sum(self) -> float:
        """The sum of all weights, each in float32, as the loss multiplies by it."""
        return float(self.num_supervised) if self.weights is None else math.fsum(array("f", self.weights))

    def without(self, first: int, last: int, *, cut: bool | None = None) -> TokenizedExample:
        """The example without tokens [first, last); ``cut`` says so, None leaves it as it is."""
        gone = last - first
        weights = None if self.weights is None else self.weights[:first] + self.weights[last:]
        replaced = tuple(
            (token if token < first else token - gone, target)
            for token, target in self.replaced
            if not first <= token < last
        )
        return TokenizedExample(
            self.id,
            self.input_ids[:first] + self.input_ids[last:],
            self.supervised[:first] + self.supervised[last:],
            weights,
            self.cut if cut is None else cut,
            replaced,
        )

    def check(self) -> None:
        """Raise ``ValueError`` naming the example where the fields do not fit together.

        A weight must be positive and finite in float32 too: one that rounds to 0 would drop its token.
        """
        size = len(self.input_ids)
        if len(self.supervised) != size:
            raise ValueError(f"supervised: expected [T={size}] for {self.id}, got [{len(self.supervised)}]")
        if self.supervised and self.supervised[0]:
            raise ValueError(f"supervised: expected the first token of {self.id} unsupervised, got True")
        for token, _ in self.replaced:
            if not (0 <= token < size and self.supervised[token]):
                raise ValueError(f"replaced: expected supervised tokens of {self.id} only, got token {token}")
        if self.weights is None:
            return
        if len(self.weights) != size:
            raise ValueError(f"weights: expected [T={size}] for {self.id}, got [{len(self.weights)}]")
        for token, (weight, marked) in enumerate(zip(array("f", self.weights), self.supervised, strict=True)):
            if 0 < weight < math.inf if marked else self.weights[token] == 0:
                continue
            want = "a positive finite float32" if marked else "0, for it is not supervised,"
            raise ValueError(
                f"weights: expected {want} at token {token} of {self.id}, got {self.weights[token]}"
            )

"""An example as tokens: its counts, the sum of its weights, and what ``check`` refuses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from sftmix.data.tokenized import TokenizedExample

PLAIN = TokenizedExample("a", (5, 6, 7, 8), (False, True, False, True))
WEIGHTED = replace(PLAIN, weights=(0.0, 0.5, 0.0, 3.0))


def test_counts_and_sums() -> None:
    assert (PLAIN.num_supervised, PLAIN.weight_sum, PLAIN.cut) == (2, 2.0, False)
    assert (WEIGHTED.num_supervised, WEIGHTED.weight_sum) == (2, 3.5)
    # As the loss multiplies: float32's 0.1 and 1e-9, and no rounding of their sum.
    tenths = replace(PLAIN, weights=(0.0, 0.1, 0.0, 1e-9))
    assert tenths.weight_sum == float(np.float32(0.1)) + float(np.float32(1e-9))
    assert tenths.weight_sum != 0.1 + 1e-9


def test_good_examples_pass() -> None:
    for example in (
        PLAIN,
        WEIGHTED,
        TokenizedExample("none", (1, 2), (False, False)),
        replace(PLAIN, cut=True),
    ):
        example.check()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"supervised": (False, True)}, r"supervised: expected \[T=4\] for a, got \[2\]"),
        ({"supervised": (True,) * 4}, "supervised: expected the first token of a unsupervised, got True"),
        ({"weights": (0.0, 0.5)}, r"weights: expected \[T=4\] for a, got \[2\]"),
        ({"weights": (0.0, 0.0, 0.0, 1.0)}, "a positive finite float32 at token 1 of a, got 0.0"),
        ({"weights": (0.0, -1.0, 0.0, 1.0)}, "a positive finite float32 at token 1 of a, got -1.0"),
        ({"weights": (0.0, 1.0, 0.0, float("nan"))}, "a positive finite float32 at token 3 of a, got nan"),
        ({"weights": (0.0, 1.0, 0.0, 1e39)}, r"a positive finite float32 at token 3 of a, got 1e\+39"),
        ({"weights": (0.0, 1e-50, 0.0, 1.0)}, "a positive finite float32 at token 1 of a, got 1e-50"),
        (
            {"weights": (0.0, 1.0, 1e-50, 1.0)},
            "expected 0, for it is not supervised, at token 2 of a, got 1e-50",
        ),
        ({"weights": (1.0, 1.0, 0.0, 1.0)}, "expected 0, for it is not supervised, at token 0 of a, got 1.0"),
    ],
)
def test_fields_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(PLAIN, **changes).check()


def test_tokens_taken_out() -> None:
    whole = TokenizedExample(
        "a",
        (1, 2, 3, 4, 5),
        (False, False, True, True, True),
        (0.0, 0.0, 1.0, 2.0, 3.0),
        replaced=((2, 8), (4, 9)),
    )
    assert whole.without(1, 2) == TokenizedExample(
        "a", (1, 3, 4, 5), (False, True, True, True), (0.0, 1.0, 2.0, 3.0), replaced=((1, 8), (3, 9))
    )
    cut = whole.without(4, 5, cut=True)
    assert (cut.input_ids, cut.replaced, cut.cut) == ((1, 2, 3, 4), ((2, 8),), True)
    for token in (0, 5):
        with pytest.raises(
            ValueError, match=f"replaced: expected supervised tokens of a only, got token {token}"
        ):
            replace(whole, replaced=((token, 7),)).check()

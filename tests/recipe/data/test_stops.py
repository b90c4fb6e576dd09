"""Which tokens end the trained answers."""

from __future__ import annotations

import numpy as np

from sftmix.data.chat import TokenizedExample
from sftmix.data.identity import examples_digest
from sftmix.data.stops import stop_ids


def tokens(ids: list[int], marks: str) -> TokenizedExample:
    return TokenizedExample("e", tuple(ids), tuple(mark == "1" for mark in marks))


def test_the_last_token_of_every_answer_the_most_frequent_first() -> None:
    examples = [tokens([5, 6, 2, 5, 7, 9], "011011"), tokens([5, 6, 2, 4], "0110"), tokens([5, 2], "01")]
    assert stop_ids(examples) == (2, 9)


def test_an_answer_that_was_cut_has_no_end() -> None:
    examples = [tokens([5, 6, 7, 8], "0111"), tokens([5, 6, 2], "011")]
    assert stop_ids(examples, max_length=4) == (2,)
    assert stop_ids(examples, max_length=5) == (8, 2)
    assert stop_ids([]) == ()


def test_a_word_that_ends_an_answer_is_no_stop() -> None:
    examples = [tokens([5, 6, 7], "011"), tokens([5, 6, 7], "011"), tokens([5, 6, 2], "011")]
    assert stop_ids(examples, among={2, 3}) == (2,)
    assert stop_ids(examples[:2], among={2, 3}) == ()


def test_examples_are_told_apart_by_all_that_is_trained_on_and_by_nothing_else() -> None:
    one = {"a": tokens([1, 2, 3], "011"), "b": tokens([4, 5], "01")}
    same = {"b": one["b"], "a": one["a"]}
    assert examples_digest(one) == examples_digest(same)
    others = [
        {"a": tokens([1, 2, 4], "011"), "b": one["b"]}, {"a": tokens([1, 2, 3], "001"), "b": one["b"]},
        {"a": one["a"]}, {"a": one["b"], "b": one["a"]}, {"a": one["a"], "c": one["b"]},
        {"a": tokens([1, 2], "01"), "b": tokens([3, 4, 5], "101")},
    ]  # fmt: skip
    assert len({examples_digest(found) for found in (one, *others)}) == 7


def test_weights_count_where_a_token_bears_loss() -> None:
    class Weighted:
        def __init__(self, weights: list[float] | None) -> None:
            self.id, self.input_ids, self.supervised, self.weights = (
                "a",
                np.array([1, 2, 3]),
                (False, True, True),
                weights,
            )

    digests = {
        name: examples_digest({"a": Weighted(weights)})  # type: ignore[dict-item]
        for name, weights in {
            "none": None,
            "ones": [0, 1, 1],
            "prompt": [9, 1, 1],
            "half": [0, 1, 0.5],
        }.items()
    }
    assert digests["none"] == digests["ones"] == digests["prompt"] != digests["half"]
    assert digests["none"] == examples_digest({"a": tokens([1, 2, 3], "011")})

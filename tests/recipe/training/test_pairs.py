"""The split at the median, and pairs and lambdas as pure functions of (seed, epoch, index)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sftmix.scores.halves import Split, median_split
from sftmix.training.pairs import PAIRINGS, draw_lam, epoch_order, epoch_pairs


def make_split(size: int) -> Split:
    confident, unconfident = median_split({f"e{i}": float(-i) for i in range(size)})
    return Split(confident, unconfident)


def test_median_split_by_hand() -> None:
    assert median_split({"a": -3.0, "b": -1.0, "c": -2.0, "d": -9.0}) == (["b", "c"], ["a", "d"])


def test_odd_sizes_give_the_confident_half_the_extra_one() -> None:
    assert median_split({"a": -3.0, "b": -1.0, "c": -2.0}) == (["b", "c"], ["a"])


def test_ties_are_broken_by_id_and_not_by_order() -> None:
    scores = {"d": -1.0, "b": -1.0, "c": -1.0, "a": -1.0}
    assert median_split(scores) == (["a", "b"], ["c", "d"])
    assert median_split(dict(reversed(list(scores.items())))) == median_split(scores)


def test_an_infinite_perplexity_is_merely_last() -> None:
    assert median_split({"a": float("-inf"), "b": -5.0}) == (["b"], ["a"])


@pytest.mark.parametrize("scores", [{}, {"a": -1.0}])
def test_fewer_than_two_examples_are_refused(scores: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"expected at least two examples, got {len(scores)}"):
        median_split(scores)
    with pytest.raises(ValueError, match="expected at least two examples"):
        epoch_pairs(Split(list(scores), []), seed=0, epoch=0, alpha=0.5)


def test_nan_confidence_is_refused_by_example() -> None:
    with pytest.raises(ValueError, match="example bad, got nan"):
        median_split({"a": -1.0, "bad": float("nan")})


@settings(max_examples=60, deadline=None)
@given(size=st.integers(2, 41), seed=st.integers(0, 2**40), epoch=st.integers(0, 50))
def test_every_example_appears_once_an_epoch(size: int, seed: int, epoch: int) -> None:
    split = make_split(size)
    pairs = epoch_pairs(split, seed=seed, epoch=epoch, alpha=0.5)
    assert sorted(p.confident for p in pairs) == sorted(split.confident)
    assert sorted(p.unconfident for p in pairs if p.unconfident is not None) == sorted(split.unconfident)
    assert [p.index for p in pairs] == list(range(len(pairs)))
    assert [p.unconfident is None for p in pairs[:-1]] == [False] * (len(pairs) - 1)
    assert (pairs[-1].unconfident is None) == bool(size % 2)
    assert all(0 <= p.lam <= 1 for p in pairs)


def test_pairs_do_not_depend_on_the_order_of_the_ids() -> None:
    split = make_split(20)
    shuffled = Split(split.confident[::-1], split.unconfident[5:] + split.unconfident[:5])
    assert epoch_pairs(split, seed=3, epoch=1, alpha=0.5) == epoch_pairs(shuffled, seed=3, epoch=1, alpha=0.5)


def test_pairs_change_with_seed_and_epoch_only() -> None:
    split = make_split(64)
    first = epoch_pairs(split, seed=0, epoch=0, alpha=0.5)
    np.random.seed(1)  # the global generator must not matter
    np.random.rand(3)
    assert epoch_pairs(split, seed=0, epoch=0, alpha=0.5) == first
    for seed, epoch in [(0, 1), (1, 0), (1, 1)]:
        other = epoch_pairs(split, seed=seed, epoch=epoch, alpha=0.5)
        couples = {(p.confident, p.unconfident) for p in first} & {
            (p.confident, p.unconfident) for p in other
        }
        assert len(couples) < 10
        assert [p.confident for p in other] != [p.confident for p in first]
        assert [p.lam for p in other] != [p.lam for p in first]


def test_the_two_halves_are_shuffled_independently() -> None:
    split = make_split(400)
    pairs = epoch_pairs(split, seed=0, epoch=0, alpha=0.5)
    ranks = np.array(
        [
            (sorted(split.confident).index(p.confident), sorted(split.unconfident).index(p.unconfident or ""))
            for p in pairs
        ]
    )
    assert abs(np.corrcoef(ranks.T)[0, 1]) < 0.2


def test_the_odd_one_out_moves_through_all_confident_examples() -> None:
    split = make_split(9)
    left_out = [epoch_pairs(split, seed=5, epoch=e, alpha=0.5)[-1] for e in range(5)]
    assert {p.confident for p in left_out} == set(split.confident)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.tuples(st.integers(1, 30), st.integers(1, 30)), epoch=st.integers(0, 9),
    pairing=st.sampled_from(PAIRINGS),
)  # fmt: skip
def test_halves_of_any_sizes_meet_every_example_once(
    sizes: tuple[int, int], epoch: int, pairing: str
) -> None:
    split = Split([f"c{i}" for i in range(sizes[0])], [f"u{i}" for i in range(sizes[1])])
    options: dict[str, Any] = {"seed": 1, "alpha": 0.5, "pairing": pairing, "length": lambda name: len(name)}
    entries = epoch_pairs(split, epoch=epoch, **options)
    met = [name for p in entries for name in (p.confident, p.unconfident) if name is not None]
    assert sorted(met) == sorted(split.confident + split.unconfident)
    pairs = [p for p in entries if p.unconfident is not None]
    assert len(pairs) == min(sizes)
    assert all(p.confident.startswith("c") and (p.unconfident or "").startswith("u") for p in pairs)
    assert [p.index for p in entries] == list(range(len(entries)))
    # those without a partner stand in twos, so that a batch of an even size holds whole pairs
    places = [p.unconfident is None for p in entries for _ in range(1 if p.unconfident is None else 2)]
    assert all(places[at] == places[at + 1] for at in range(0, len(places) - 1, 2))
    widths = [[p.unconfident is None for p in epoch_pairs(split, epoch=e, **options)] for e in range(3)]
    assert len({sum(found) for found in widths}) == 1


def test_every_example_of_a_larger_half_gets_a_partner_in_turn() -> None:
    split = Split([f"c{i}" for i in range(3)], [f"u{i}" for i in range(9)])
    for epochs in (range(3), range(6, 9)):
        alone = [
            p.confident for e in epochs for p in epoch_pairs(split, seed=5, epoch=e, alpha=0.5)
            if p.unconfident is None
        ]  # fmt: skip
        assert {name: alone.count(name) for name in split.unconfident} == dict.fromkeys(split.unconfident, 2)


def test_pairs_by_length_lose_less_and_still_change() -> None:
    split = make_split(512)
    draw = np.random.default_rng(0)
    length = {
        name: int(n)
        for name, n in zip(
            sorted(split.confident + split.unconfident), draw.integers(1, 500, 512), strict=True
        )
    }

    def unmixed(pairing: str, epoch: int) -> float:
        pairs = epoch_pairs(split, seed=0, epoch=epoch, alpha=0.5, pairing=pairing, length=length.__getitem__)
        return sum(abs(length[p.confident] - length[p.unconfident or ""]) for p in pairs) / sum(
            length.values()
        )

    # two uniform lengths differ by a third of their range on average: 1/3 over a mean of 1/2 each
    assert unmixed("random", 0) == pytest.approx(1 / 3, abs=0.04)
    assert unmixed("length", 0) < 0.06
    by_epoch = [
        {
            (p.confident, p.unconfident)
            for p in epoch_pairs(
                split, seed=0, epoch=e, alpha=0.5, pairing="length", length=length.__getitem__
            )
        }
        for e in range(2)
    ]
    assert len(by_epoch[0] & by_epoch[1]) < 20
    pairs = epoch_pairs(split, seed=0, epoch=0, alpha=0.5, pairing="length", length=length.__getitem__)
    order = [length[p.confident] for p in pairs]
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.2  # a batch holds lengths of every kind


def test_pairings_that_cannot_be_are_refused() -> None:
    with pytest.raises(
        ValueError, match="pairing: expected random, or length with the examples' lengths, got 'length'"
    ):
        epoch_pairs(make_split(4), seed=0, epoch=0, alpha=0.5, pairing="length")
    with pytest.raises(ValueError, match="got 'near'"):
        epoch_pairs(make_split(4), seed=0, epoch=0, alpha=0.5, pairing="near")


def test_halves_that_do_not_fit_are_refused() -> None:
    with pytest.raises(
        ValueError, match="expected an example in each half, got 3 confident and 0 unconfident"
    ):
        epoch_pairs(Split(["a", "b", "c"], []), seed=0, epoch=0, alpha=0.5)
    with pytest.raises(ValueError, match="repeated"):
        epoch_pairs(Split(["a", "b"], ["b", "c"]), seed=0, epoch=0, alpha=0.5)


def test_lam_is_the_draw_at_the_pairs_index() -> None:
    for pair in epoch_pairs(make_split(10), seed=2, epoch=4, alpha=0.3):
        assert pair.lam == draw_lam(seed=2, epoch=4, index=pair.index, alpha=0.3)


@pytest.mark.parametrize("alpha", [0.1, 0.5, 1.0, 4.0])
def test_lam_is_beta_distributed(alpha: float) -> None:
    draws = np.array([draw_lam(seed=0, epoch=0, index=i, alpha=alpha) for i in range(4000)])
    variance = 1 / (4 * (2 * alpha + 1))  # of Beta(alpha, alpha)
    assert abs(draws.mean() - 0.5) < 4 * np.sqrt(variance / len(draws))
    assert draws.var() == pytest.approx(variance, rel=0.1)


def test_token_lams_are_float32_and_keyed_like_the_others() -> None:
    draws = draw_lam(seed=1, epoch=2, index=3, alpha=0.5, size=50)
    assert draws.dtype == np.float32
    assert draws.shape == (50,)
    assert len(np.unique(draws)) == 50
    np.testing.assert_array_equal(draws, draw_lam(seed=1, epoch=2, index=3, alpha=0.5, size=50))
    others = [
        draw_lam(seed=s, epoch=e, index=i, alpha=0.5, size=50)
        for s, e, i in [(0, 2, 3), (1, 3, 3), (1, 2, 4)]
    ]
    assert all(not np.array_equal(draws, other) for other in others)


@pytest.mark.parametrize("alpha", [1e-300, 1e-4, 1e6])
def test_extreme_alphas_stay_in_range(alpha: float) -> None:
    draws = draw_lam(seed=0, epoch=0, index=0, alpha=alpha, size=200)
    assert ((draws >= 0) & (draws <= 1)).all()


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_alpha_is_refused(alpha: float) -> None:
    with pytest.raises(ValueError, match="alpha: expected a finite number above 0"):
        draw_lam(seed=0, epoch=0, index=0, alpha=alpha)


def test_epoch_order_is_a_permutation_by_seed_and_epoch() -> None:
    ids = [f"x{i}" for i in range(30)]
    order = epoch_order(ids, seed=0, epoch=0)
    assert sorted(order) == sorted(ids)
    assert order == epoch_order(reversed(ids), seed=0, epoch=0)
    assert len({tuple(epoch_order(ids, seed=s, epoch=e)) for s in range(3) for e in range(3)}) == 9
    with pytest.raises(ValueError, match="at least one"):
        epoch_order([], seed=0, epoch=0)

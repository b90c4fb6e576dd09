"""Standard errors against simulation and formulas of their own; the paired difference; intervals at the edges."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sftmix.evaluation.paired import difference, read_rows, write_rows
from sftmix.evaluation.uncertainty import ratio_stderr, share, wilson


def test_the_error_of_a_ratio_is_what_repeated_draws_show() -> None:
    """Tokens of one example share its difficulty: the spread over draws of examples, against the mean estimate."""
    draw = np.random.default_rng(0)
    means, errors, naive = [], [], []
    for _ in range(4000):
        counts = draw.integers(1, 40, 60)
        level = draw.gamma(2.0, 1.0, 60)  # of an example
        tokens = [draw.normal(mean, 0.5, count) for mean, count in zip(level, counts, strict=True)]
        sums = np.array([t.sum() for t in tokens])
        means.append(sums.sum() / counts.sum())
        errors.append(ratio_stderr(sums, counts))
        naive.append(np.concatenate(tokens).std(ddof=1) / np.sqrt(counts.sum()))
    spread = float(np.std(means, ddof=1))
    assert float(np.mean(errors)) == pytest.approx(spread, rel=0.05)
    assert float(np.mean(naive)) < spread / 3  # as if tokens were independent


def test_the_error_is_that_of_a_mean_for_equal_counts_and_near_the_jackknife_for_others() -> None:
    draw = np.random.default_rng(1)
    sums = draw.normal(5, 2, 30)
    expected = float(np.std(sums / 4, ddof=1) / np.sqrt(30))
    assert ratio_stderr(sums, np.full(30, 4)) == pytest.approx(expected, rel=1e-12)
    counts = draw.integers(1, 9, 400)
    sums = counts * draw.gamma(2.0, 1.0, 400)
    left_out = (sums.sum() - sums) / (counts.sum() - counts)
    jackknife = float(np.sqrt(399 / 400 * np.square(left_out - left_out.mean()).sum()))
    assert ratio_stderr(sums, counts) == pytest.approx(jackknife, rel=0.02)


def test_one_example_has_no_error_and_bad_input_is_refused() -> None:
    assert ratio_stderr([3.0], [2]) is None
    with pytest.raises(
        ValueError, match=r"sums, counts: expected the same shape \[E\], got \(2,\) and \(1,\)"
    ):
        ratio_stderr([1.0, 2.0], [1])
    with pytest.raises(ValueError, match="counts: expected positive numbers, got 0"):
        ratio_stderr([1.0, 2.0], [1, 0])
    with pytest.raises(ValueError, match="successes: expected 0 to size"):
        wilson(3, 2)


@pytest.mark.parametrize("successes, size", [(0, 25), (25, 25), (7, 20), (1, 1)])
def test_the_ends_of_wilsons_interval_solve_its_equation(successes: int, size: int) -> None:
    low, high = wilson(successes, size)
    share = successes / size
    assert 0 <= low <= share <= high <= 1 and high - low > 0
    for end in (low, high):
        if 0 < end < 1:
            z = abs(share - end) / np.sqrt(end * (1 - end) / size)
            assert z == pytest.approx(1.959964, rel=1e-5)


def rows(nll: list[float], tokens: list[int]) -> list[dict[str, Any]]:
    pairs = enumerate(zip(nll, tokens, strict=True))
    return [{"example": f"e{i}", "nll_sum": n, "num_tokens": t, "num_top1": 0} for i, (n, t) in pairs]


def test_a_paired_difference_is_sharper_than_two_figures_and_right(tmp_path: Path) -> None:
    draw = np.random.default_rng(2)
    tokens = draw.integers(1, 30, 200).tolist()
    hard = draw.gamma(2.0, 1.0, 200) * tokens  # of both models
    ours = rows((hard + draw.normal(0.2, 0.1, 200) * tokens).tolist(), tokens)
    theirs = rows(hard.tolist(), tokens)
    found = difference(ours, list(reversed(theirs)))
    a, b = (sum(r["nll_sum"] for r in each) / sum(tokens) for each in (ours, theirs))
    assert found["nll"] == pytest.approx(a - b, rel=1e-9)
    single = ratio_stderr([r["nll_sum"] for r in ours], tokens)
    assert single is not None and found["nll_stderr"] < single / 5
    assert abs(found["nll"] - 0.2) < 4 * found["nll_stderr"]
    with pytest.raises(ValueError, match="theirs: expected the 200 examples of ours"):
        difference(ours, theirs[:-1])
    with pytest.raises(ValueError, match="others among them"):
        difference(ours, [{**row, "num_tokens": row["num_tokens"] + 1} for row in theirs])
    write_rows(tmp_path / "heldout.parquet", {"base": theirs, "ntp": ours})
    assert read_rows(tmp_path / "heldout.parquet") == {"base": theirs, "ntp": ours}
    assert read_rows(tmp_path / "none.parquet") == {}


def test_shares_are_told_with_what_is_known_of_them() -> None:
    half: dict[str, Any] = {"value": 0.125, "stderr": 0.012, "interval95": [0.1, 0.15]}
    assert share(half) == "12.50% ± 1.20%" and share(half, short=True) == "12.5±1.2%"
    none = {"value": 0.0, "stderr": 0.0, "interval95": [0.0, 0.031]}
    assert share(none) == "0% (≤ 3.1%)" and share(none, short=True) == "0%(≤3.1%)"
    assert share({"value": 1.0, "stderr": 0.0, "interval95": [0.9, 1.0]}) == "100% (≥ 90.0%)"
    assert share({"value": 0.0, "stderr": None, "interval95": [0.0, 0.79]}) == "0% (≤ 79.0%)"
    assert share({"value": 12.5, "stderr": None}) == "12.5" and share({"value": None, "stderr": None}) == "–"

"""From perplexities to the split: the paper's formula by hand, and split.parquet."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sftmix.scores.confidence import Split, confidence, make_split, read_split, variability, write_split
from sftmix.scores.dynamics import Dynamics, read_dynamics, write_dynamics
from sftmix.training.pairs import epoch_pairs

# Perplexity of each example at each of two checkpoints, and the number of tokens it is over.
PERPLEXITY = {"a": (2.0, 4.0), "b": (9.0, 1.0), "c": (1.5, 1.5), "d": (30.0, 10.0)}


def score(folder: Path, perplexity: dict[str, tuple[float, ...]]) -> Dynamics:
    rows = [
        {
            "example": name,
            "checkpoint": c,
            "step": c,
            "nll_sum": 7 * math.log(value),
            "num_tokens": 7,
            "top1_share": 0.5,
            "source": "checkpoint",
        }
        for name, values in perplexity.items()
        for c, value in enumerate(values)
    ]
    write_dynamics(folder / "dynamics.parquet", rows)
    return read_dynamics(folder / "dynamics.parquet")


def test_confidence_is_minus_the_mean_perplexity(tmp_path: Path) -> None:
    found = confidence(score(tmp_path, PERPLEXITY))
    assert found == pytest.approx({"a": -3.0, "b": -5.0, "c": -1.5, "d": -20.0})
    # The mean of perplexities, not the perplexity of the mean NLL, which would put b (3) level with a (2.83).
    assert found["b"] < found["a"] - 1


def test_variability_is_the_standard_deviation_of_perplexity(tmp_path: Path) -> None:
    found = variability(score(tmp_path, PERPLEXITY))
    assert found == pytest.approx({"a": 1.0, "b": 4.0, "c": 0.0, "d": 10.0})


def test_one_scoring_point_has_no_variability(tmp_path: Path) -> None:
    split = make_split(score(tmp_path, {name: values[:1] for name, values in PERPLEXITY.items()}))
    assert split.variability == {}
    assert (split.confident, split.unconfident) == (["c", "a"], ["b", "d"])


def test_split_at_the_median(tmp_path: Path) -> None:
    split = make_split(score(tmp_path, PERPLEXITY))
    assert (split.confident, split.unconfident) == (["c", "a"], ["b", "d"])
    odd = make_split(score(tmp_path, {**PERPLEXITY, "e": (2.5, 2.5)}))
    assert (odd.confident, odd.unconfident) == (["c", "e", "a"], ["b", "d"])
    with pytest.raises(ValueError, match="at least two examples, got 1"):
        make_split(score(tmp_path, {"a": (1.0,)}))


def test_round_trip_keeps_everything(tmp_path: Path) -> None:
    file = tmp_path / "split.parquet"
    for perplexity in (PERPLEXITY, {name: values[:1] for name, values in PERPLEXITY.items()}):
        split = make_split(score(tmp_path, perplexity))
        write_split(file, split)
        assert read_split(file) == split
        assert epoch_pairs(read_split(file), seed=0, epoch=0, alpha=0.5) == epoch_pairs(
            split, seed=0, epoch=0, alpha=0.5
        )
    by_hand = Split(["x"], ["y"])
    write_split(file, by_hand)
    assert read_split(file) == by_hand
    assert sorted(os.listdir(tmp_path)) == ["dynamics.parquet", "split.parquet"]


GOOD = Split(["a", "b"], ["c", "d"], dict.fromkeys("abcd", -1.0), dict.fromkeys("abcd", 0.0))


@pytest.mark.parametrize(
    "bad, message",
    [
        (Split(["a"], []), "expected at least two examples, got 1"),
        (Split([], []), "expected at least two examples, got 0"),
        (Split(["a", "b", "c"], []), "expected an example in each half, got 3 confident and 0 unconfident"),
        (Split([], ["b", "c"]), "expected an example in each half, got 0 confident and 2 unconfident"),
        (Split(["a", "b"], ["b", "c"]), "expected every example once, got b again"),
        (replace(GOOD, confidence={"a": -1.0}), "expected confidence for all 4 examples or none, got 1"),
        (replace(GOOD, variability={"a": 1.0}), "expected variability for all 4 examples or none, got 1"),
        (
            replace(GOOD, confidence=dict.fromkeys("abcd", math.nan)),
            "expected confidence to be numbers, got nan",
        ),
    ],
)
def test_a_bad_split_is_not_written(tmp_path: Path, bad: Split, message: str) -> None:
    write_split(tmp_path / "split.parquet", GOOD)
    with pytest.raises(ValueError, match=message):
        write_split(tmp_path / "split.parquet", bad)
    assert read_split(tmp_path / "split.parquet") == GOOD


DAMAGE: list[tuple[Callable[[pa.Table], Any], str]] = [
    (lambda t: t.drop_columns("half"), "expected a column half, got example, confidence, variability"),
    (
        lambda t: t.set_column(1, "half", pa.array(["top"] * 4)),
        "expected half to be confident or unconfident, got 'top'",
    ),
    (
        lambda t: t.set_column(1, "half", pa.array([None] * 4, pa.string())),
        "expected a value for half in every row",
    ),
    (lambda t: t.slice(0, 2), "expected an example in each half, got 2 confident and 0"),
    (lambda t: t.slice(0, 0), "expected at least two examples, got 0"),
    (
        lambda t: t.set_column(2, "confidence", pa.array([1.0, None, 1.0, 1.0])),
        "confidence for all 4 examples or none",
    ),
]


@pytest.mark.parametrize("damage, message", DAMAGE)
def test_a_damaged_split_is_refused(
    tmp_path: Path, damage: Callable[[pa.Table], pa.Table], message: str
) -> None:
    file = tmp_path / "split.parquet"
    write_split(file, GOOD)
    pq.write_table(damage(pq.read_table(file)), file)
    with pytest.raises(ValueError, match=message):
        read_split(file)


def test_a_missing_or_truncated_split_names_its_stage(tmp_path: Path) -> None:
    file = tmp_path / "split.parquet"
    with pytest.raises(
        ValueError, match=r"split\.parquet: expected a file, got none; `sftmix split` writes it anew"
    ):
        read_split(file)
    write_split(file, GOOD)
    file.write_bytes(file.read_bytes()[:-30])
    with pytest.raises(
        ValueError, match=r"split\.parquet: expected a whole Parquet file.*`sftmix split` writes it anew"
    ):
        read_split(file)

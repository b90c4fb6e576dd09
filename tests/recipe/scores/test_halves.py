"""Halves by quantile, at random, from a file, and one half alone as a control."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sftmix.scores.given import read_halves, read_ids
from sftmix.scores.halves import Split, border, median_split, quantile_split, random_split, used_halves

SCORES = {f"e{i}": float(-i) for i in range(10)}


@pytest.mark.parametrize(
    "share,count", [(0.5, 5), (0.3, 3), (0.7, 7), (0.25, 3), (0.01, 1), (0.999, 9), (0.1, 1)]
)
def test_a_quantile_keeps_the_most_confident(share: float, count: int) -> None:
    confident, unconfident = quantile_split(SCORES, share)
    assert confident == [f"e{i}" for i in range(count)]
    assert unconfident == [f"e{i}" for i in range(count, 10)]


def test_the_median_is_the_quantile_at_one_half() -> None:
    odd = {name: SCORES[name] for name in list(SCORES)[:7]}
    assert quantile_split(odd, 0.5) == median_split(odd)


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, float("nan")])
def test_a_share_that_leaves_a_half_empty_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match="share: expected a number between 0 and 1"):
        quantile_split(SCORES, share)


def test_random_halves_depend_on_ids_and_seed_alone() -> None:
    first = random_split(SCORES, seed=1)
    assert first == random_split(reversed(list(SCORES)), seed=1) != random_split(SCORES, seed=2)
    assert sorted(first[0] + first[1]) == sorted(SCORES) and len(first[0]) == 5
    firsts = [set(random_split(SCORES, seed=s)[0]) for s in range(200)]
    counts = [sum(name in found for found in firsts) for name in SCORES]
    assert all(70 < count < 130 for count in counts)  # 100, and four standard deviations of sqrt(50)


def test_one_half_alone_is_cut_in_two() -> None:
    split = Split(*median_split(SCORES), confidence=SCORES)
    assert used_halves(split, "both", seed=0) is split
    for use, half in (("confident", split.confident), ("unconfident", split.unconfident)):
        found = used_halves(split, use, seed=0)
        assert sorted(found.confident + found.unconfident) == sorted(half)
        assert len(found.confident) - len(found.unconfident) == 1
    with pytest.raises(ValueError, match="use: expected both, confident or unconfident, got 'neither'"):
        used_halves(split, "neither", seed=0)
    with pytest.raises(
        ValueError, match="use: expected at least two examples in the unconfident half, got 1"
    ):
        used_halves(Split(["a", "b"], ["c"]), "unconfident", seed=0)


def test_the_border_is_a_median_a_cut_or_nowhere() -> None:
    assert border(Split(*median_split(SCORES), confidence=SCORES)) == (-4.5, "median")
    assert border(Split(*quantile_split(SCORES, 0.3), confidence=SCORES)) == (-2.5, "cut")
    assert border(Split(*random_split(SCORES, seed=0), confidence=SCORES)) is None
    assert border(Split(["e0"], ["e1"])) is None


def write(folder: Path, rows: list[dict[str, Any]], name: str = "h.jsonl") -> str:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_halves_are_read_from_a_file(tmp_path: Path) -> None:
    rows = [
        {"id": "a", "half": "confident"},
        {"guid": 7, "half": "unconfident"},
        {"example": "c", "half": "confident"},
    ]
    assert read_halves(write(tmp_path, rows)) == Split(["a", "c"], ["7"])
    csv = tmp_path / "h.csv"
    csv.write_text("id,half\na,unconfident\nb,confident\n")
    assert read_halves(str(csv)) == Split(["b"], ["a"])


def test_a_confidence_is_cut_at_its_median(tmp_path: Path) -> None:
    rows = [{"guid": i, "confidence": 0.1 * i, "variability": 0.5} for i in range(4)]
    found = read_halves(write(tmp_path, rows))
    assert (found.confident, found.unconfident) == (["3", "2"], ["1", "0"])
    assert found.confidence["2"] == pytest.approx(0.2) and found.variability == dict.fromkeys("0123", 0.5)


@pytest.mark.parametrize(
    "rows,message",
    [
        ([{"id": "a", "half": "confident"}, {"id": "a", "half": "confident"}], "line 2: expected every example once"),
        ([{"id": "a", "half": "sure"}], "line 1: expected half to be confident or unconfident, got 'sure'"),
        ([{"id": "a"}], "line 1: expected half or confidence, got id"),
        ([{"half": "confident"}], "line 1: expected one of example, id, guid, got half"),
        ([{"id": "a", "half": "confident"}, {"id": "b", "confidence": 1}], "in every row or none, got it in 1 of 2"),
        ([{"id": "a", "confidence": "high"}], "expected confidence to be a number, got 'high'"),
        ([{"id": "a", "confidence": True}], "expected confidence to be a number, got True"),
        ([{"id": "a", "confidence": 1.0}], "expected at least two examples"),
    ],
)  # fmt: skip
def test_bad_halves_are_refused_by_row(tmp_path: Path, rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_halves(write(tmp_path, rows))


def test_ids_are_read_from_lines_or_rows(tmp_path: Path) -> None:
    (tmp_path / "ids.txt").write_text("a\n\n b \n")
    assert read_ids(str(tmp_path / "ids.txt")) == ["a", "b"]
    assert read_ids(write(tmp_path, [{"guid": 1}, {"id": "x"}])) == ["1", "x"]
    (tmp_path / "ids.json").write_text('["a", "b-2"]')  # what "Save ids" of a report writes
    assert read_ids(str(tmp_path / "ids.json")) == ["a", "b-2"]
    (tmp_path / "rows.json").write_text('[{"id": "c"}]')
    assert read_ids(str(tmp_path / "rows.json")) == ["c"]
    (tmp_path / "bad.json").write_text('["a", 7]')
    with pytest.raises(ValueError, match=r"bad\.json"):
        read_ids(str(tmp_path / "bad.json"))
    (tmp_path / "twice.txt").write_text("a\nb\na\n")
    with pytest.raises(ValueError, match="expected every id once, got a again"):
        read_ids(str(tmp_path / "twice.txt"))
    (tmp_path / "none.txt").write_text("\n")
    with pytest.raises(ValueError, match="expected ids, got none"):
        read_ids(str(tmp_path / "none.txt"))

"""dynamics.parquet: sums per example, the round trip, and every way the file can be wrong."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from sftmix.scores.dynamics import accumulate, rank_correlation, read_dynamics, read_rows, write_dynamics

Row = dict[str, Any]


def make_rows(examples: int = 4, checkpoints: int = 3, source: str = "checkpoint") -> list[Row]:
    return [
        {
            "example": f"e{e}",
            "checkpoint": c,
            "step": 10 * (c + 1),
            "nll_sum": 1.5 + e + c / 4,
            "num_tokens": 2 + e,
            "top1_share": (e + c) / 10,
            "source": source,
        }
        for c in range(checkpoints)
        for e in range(examples)
    ]


def test_accumulate_by_hand() -> None:
    sums = accumulate(
        torch.tensor([1.0, 2.0, 4.0, 8.0]),
        torch.tensor([True, False, True, True]),
        torch.tensor([0, 2, 0, 2]),
        3,
    )
    assert sums.nll_sum.tolist() == [5.0, 0.0, 10.0]
    assert sums.num_tokens.tolist() == [2, 0, 2]
    assert sums.num_top1.tolist() == [2, 0, 1]
    assert sums.nll_sum.dtype == torch.float64


def test_accumulate_against_a_loop() -> None:
    nll, top1, example = torch.rand(500) * 20, torch.rand(500) > 0.5, torch.randint(7, (500,))
    sums = accumulate(nll, top1, example, 7)
    for e in range(7):
        mine = [i for i in range(500) if example[i] == e]
        assert float(sums.nll_sum[e]) == pytest.approx(sum(float(nll[i]) for i in mine), rel=1e-12)
        assert int(sums.num_top1[e]) == sum(bool(top1[i]) for i in mine)
        assert int(sums.num_tokens[e]) == len(mine)


def test_accumulate_of_nothing_and_of_bad_arguments() -> None:
    none = torch.empty(0)
    assert accumulate(none, none.bool(), none.long(), 2).num_tokens.tolist() == [0, 0]
    nll, top1 = torch.rand(2), torch.ones(2, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"example: expected values in \[0, 2\), got up to 2"):
        accumulate(nll, top1, torch.tensor([0, 2]), 2)
    with pytest.raises(ValueError, match=r"expected the same shape \[N\], got \[2\], \[2\], \[3\]"):
        accumulate(nll, top1, torch.tensor([0, 1, 1]), 2)


def test_round_trip_in_any_order(tmp_path: Path) -> None:
    rows = make_rows()
    write_dynamics(tmp_path / "d.parquet", rows[::-1])
    found = read_dynamics(tmp_path / "d.parquet")
    assert found.examples == ["e0", "e1", "e2", "e3"]
    assert (found.num_checkpoints, found.source) == (3, "checkpoint")
    for row in rows:
        c, e = row["checkpoint"], found.examples.index(row["example"])
        assert found.nll_sum[c, e] == row["nll_sum"]
        assert found.num_tokens[c, e] == row["num_tokens"]
        assert found.top1_share[c, e] == row["top1_share"]
        assert found.step[c, e] == row["step"]
        assert found.perplexity[c, e] == pytest.approx(np.exp(row["nll_sum"] / row["num_tokens"]))
    assert sorted(map(str, read_rows(tmp_path / "d.parquet"))) == sorted(map(str, rows))
    assert os.listdir(tmp_path) == ["d.parquet"]


def test_both_sources_live_in_one_file(tmp_path: Path) -> None:
    online = [{**row, "nll_sum": 7.0} for row in make_rows(checkpoints=2, source="online")]
    write_dynamics(tmp_path / "d.parquet", online)
    assert read_dynamics(tmp_path / "d.parquet").source == "online"
    write_dynamics(tmp_path / "d.parquet", read_rows(tmp_path / "d.parquet") + make_rows())
    assert read_dynamics(tmp_path / "d.parquet").source == "checkpoint"
    assert read_dynamics(tmp_path / "d.parquet", source="checkpoint").num_checkpoints == 3
    assert (read_dynamics(tmp_path / "d.parquet", source="online").nll_sum == 7.0).all()


def test_a_source_that_is_not_there_is_refused(tmp_path: Path) -> None:
    write_dynamics(tmp_path / "d.parquet", make_rows())
    with pytest.raises(ValueError, match=r"expected scores of source online, got \['checkpoint'\]"):
        read_dynamics(tmp_path / "d.parquet", source="online")


def change(i: int, **values: Any) -> Callable[[list[Row]], list[Row]]:
    return lambda rows: [*rows[:i], {**rows[i], **values}, *rows[i + 1 :]]


BAD_ROWS: list[tuple[Callable[[list[Row]], list[Row]], str]] = [
    (lambda rows: [], "expected at least one row, got none"),
    (lambda rows: rows[:-1], "expected example e3 once at checkpoint 2 .*, got it 0 times"),
    (lambda rows: [*rows, rows[0]], "expected example e0 once at checkpoint 0 .*, got it 2 times"),
    (lambda rows: [r for r in rows if r["checkpoint"] != 1], "once at checkpoint 1 .*, got it 0 times"),
    (change(3, nll_sum=float("nan")), "expected nll_sum to be a finite number .*, got nan for e3"),
    (change(3, nll_sum=float("inf")), "expected nll_sum to be a finite number .*, got inf for e3"),
    (change(3, nll_sum=-1.0), "expected nll_sum .*, got -1.0 for e3"),
    (change(3, num_tokens=0), "expected num_tokens of at least 1, got 0 for e3"),
    (change(3, top1_share=1.5), "expected top1_share between 0 and 1, got 1.5 for e3"),
    (change(3, top1_share=float("nan")), "expected top1_share between 0 and 1, got nan"),
    (change(3, checkpoint=-1), "expected checkpoint to count from 0, got -1"),
    (change(3, checkpoint=10**12), "expected checkpoint to count from 0, got 1000000000000"),
    (change(3, step=-5), "expected step of at least 0, got -5"),
    (change(3, source="dream"), "expected source to be one of checkpoint, online, got 'dream'"),
    (change(3, example=None), "expected a value for example, got none in row 3"),
    (change(3, nll_sum="much"), "expected values of the types"),
    (
        lambda rows: [{k: v for k, v in r.items() if k != "step"} for r in rows],
        "expected columns .* in row 0",
    ),
    (change(2, mood="good"), "expected columns .* in row 2"),
]


@pytest.mark.parametrize("spoil, message", BAD_ROWS)
def test_bad_rows_are_not_written(
    tmp_path: Path, spoil: Callable[[list[Row]], list[Row]], message: str
) -> None:
    write_dynamics(tmp_path / "d.parquet", make_rows(examples=2))
    before = (tmp_path / "d.parquet").read_bytes()
    with pytest.raises(ValueError, match=message):
        write_dynamics(tmp_path / "d.parquet", spoil(make_rows()))
    assert (tmp_path / "d.parquet").read_bytes() == before
    assert os.listdir(tmp_path) == ["d.parquet"]


def test_rounding_below_zero_is_no_error(tmp_path: Path) -> None:
    write_dynamics(tmp_path / "d.parquet", [{**row, "nll_sum": -1e-7} for row in make_rows()])
    assert (read_dynamics(tmp_path / "d.parquet").nll_sum == -1e-7).all()


@pytest.mark.parametrize("part", [0.0, 0.3, 0.99])
def test_a_half_written_file_names_itself_and_its_stage(tmp_path: Path, part: float) -> None:
    write_dynamics(tmp_path / "d.parquet", make_rows())
    whole = (tmp_path / "d.parquet").read_bytes()
    (tmp_path / "d.parquet").write_bytes(whole[: int(part * len(whole))])
    with pytest.raises(
        ValueError, match=r"d\.parquet: expected a whole Parquet file.*`sftmix score` writes it anew"
    ):
        read_dynamics(tmp_path / "d.parquet")


def test_a_missing_file_names_its_stage(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"d\.parquet: expected a file, got none; `sftmix score` writes it anew"
    ):
        read_dynamics(tmp_path / "d.parquet")


def test_wrong_columns_on_disk_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "d.parquet"
    table = pa.Table.from_pylist(make_rows())
    for broken, message in (
        (table.drop_columns("nll_sum"), "expected a column nll_sum, got example, checkpoint"),
        (table.set_column(3, "nll_sum", pa.array(["x"] * 12)), "expected columns of"),
        (
            table.set_column(3, "nll_sum", pa.array([None] * 12, pa.float64())),
            "expected a value for nll_sum in every row",
        ),
        (table.slice(0, 0), "expected scores of source checkpoint, got none"),
        (table.slice(0, 11), "expected example e3 once at checkpoint 2"),
    ):
        pq.write_table(broken, file)
        with pytest.raises(ValueError, match=message):
            read_dynamics(file)
    pq.write_table(table.append_column("note", pa.array(["x"] * 12)), file)
    assert read_dynamics(file).num_checkpoints == 3


def test_rank_correlation_by_hand() -> None:
    a = {"w": 1.0, "x": 2.0, "y": 3.0, "z": 4.0}
    assert rank_correlation(a, {"w": -9.0, "x": 0.0, "y": 1.0, "z": 500.0}) == pytest.approx(1.0)
    assert rank_correlation(a, {name: -value for name, value in a.items()}) == pytest.approx(-1.0)
    # Ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4: 4.5 / sqrt(4.5 * 5).
    assert rank_correlation(a, {"z": 9.0, "y": 5.0, "x": 5.0, "w": 1.0}) == pytest.approx(4.5 / 22.5**0.5)


def test_rank_correlation_against_pandas() -> None:
    pandas = pytest.importorskip("pandas")
    random = np.random.default_rng(0)
    x, y = random.integers(0, 9, 200), random.integers(0, 9, 200) + np.arange(200) // 40
    expected = pandas.Series(x).rank().corr(pandas.Series(y).rank())
    a = {str(i): float(v) for i, v in enumerate(x)}
    b = {str(i): float(v) for i, v in enumerate(y)}
    assert rank_correlation(a, b) == pytest.approx(expected, rel=1e-12)


def test_rank_correlation_refuses_what_has_none() -> None:
    assert np.isnan(rank_correlation({"a": 1.0, "b": 1.0}, {"a": 1.0, "b": 2.0}))
    with pytest.raises(ValueError, match=r"got 2 in only one of them, e\.g\. b"):
        rank_correlation({"a": 1.0, "b": 1.0}, {"a": 1.0, "c": 2.0})
    with pytest.raises(ValueError, match="at least two examples, got 1"):
        rank_correlation({"a": 1.0}, {"a": 1.0})
    with pytest.raises(ValueError, match="got nan"):
        rank_correlation({"a": 1.0, "b": float("nan")}, {"a": 1.0, "b": 2.0})

"""The comparison of two revisions of the portable loss: both sides answer, by turns, and the figures are kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import compare


def test_both_sides_are_timed_and_the_ratio_is_theirs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compare, "CASES", ((8, 33, 16, "float32", 2),))
    monkeypatch.setattr(compare, "OUT", tmp_path / "compare.json")
    answers = iter([9.0, 9.0, 2.0, 4.0, 3.0, 4.0, 5.0, 4.0])  # a round that is not kept, then three
    asked: list[list[object]] = []

    def answer(process: object, request: list[object]) -> float:
        compare_one = real(process, request)  # type: ignore[arg-type]  # a subprocess, here an object
        assert compare_one > 0
        asked.append(request)
        return next(answers)

    real = compare.ask
    monkeypatch.setattr(compare, "ask", answer)
    monkeypatch.setattr(compare, "TASKS", ("sftmix",))
    assert compare.main(["HEAD", "--rounds", "3"]) == 0
    record = json.loads((tmp_path / "compare.json").read_text())
    (row,) = record["rows"]
    assert (row["ratio"], row["ms"], row["ms_before"]) == (0.75, 3.0, 4.0)
    assert record["before"] == "HEAD" and "bench.compare HEAD" in record["command"] and len(asked) == 8
    assert "ratio 0.750" in capsys.readouterr().out

"""The benchmark of tokenising: its rows, its record and its section, and what it says of a target that is missed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import data
from tests.recipe import tiny

RECORD = {
    "rows": 1000, "file_bytes": 2**21, "alone": {"tokens": 5000, "seconds": 2.0},
    "recipe": {"tokens": 5000, "seconds": 3.0, "examples": 1000, "memory_bytes": 2**20}, "speed": 2 / 3, "memory": 0.5,
    "device": "a CPU", "versions": {"tokenizers": "1"}, "commit": "abc", "command": "python -m bench.data",
}  # fmt: skip


def test_rows_are_short_conversations_and_always_the_same(tmp_path: Path) -> None:
    data.write_rows(tmp_path / "a", 5)
    data.write_rows(tmp_path / "b", 9)
    lines = (tmp_path / "b").read_text().splitlines()
    assert (tmp_path / "a").read_text().splitlines() == lines[:5] and len(set(lines)) == 9
    for line in lines:
        question, answer = json.loads(line)["messages"]
        assert 8 <= len(question["content"].split()) < 12 and 10 <= len(answer["content"].split()) <= 25


def test_the_section_says_what_was_met_and_missed() -> None:
    told = data.section(RECORD)
    assert (
        "| 0.67 | 0.50 |" in told
        and "at most 2: met." in told
        and "1,000 short conversations** (2 MiB" in told
    )
    assert "a CPU; tokenizers 1; commit abc: `python -m bench.data`" in told
    for missed in ({"speed": 0.49}, {"memory": 2.1}):
        assert "at most 2: missed." in data.section({**RECORD, **missed})


@pytest.mark.slow
def test_a_small_measurement(tmp_path: Path) -> None:
    tiny.tokenizer().save_pretrained(tmp_path / "tokenizer")
    record = data.measure(str(tmp_path / "tokenizer"), 300, "command")
    assert record["rows"] == record["recipe"]["examples"] == 300
    assert record["alone"]["tokens"] == record["recipe"]["tokens"] > 300 * 20
    assert record["speed"] == record["alone"]["seconds"] / record["recipe"]["seconds"] > 0
    assert record["file_bytes"] > 300 * 100 and json.loads(json.dumps(record)) == record

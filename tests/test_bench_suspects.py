"""The benchmark of swapped answers: what it swaps, its record and its section."""

from __future__ import annotations

import json
import lzma
from collections import Counter

import pytest

from bench import report, suspects
from bench.suspects import DATA, swapped_pairs

AREAS = {"ifd": 0.9, "nll": 0.7, "epoch": 0.6, "confidence": 0.65, "mean_nll": 0.64, "variability": 0.5}


def record(*areas: dict[str, float]) -> dict[str, object]:
    seeds = [{"seed": n, "swapped": 20, "auroc": each, "seconds": 1.0} for n, each in enumerate(areas)]
    return {
        "examples": 200, "seeds": seeds, "device": "a CPU", "versions": {"torch": "2"}, "commit": "abc",
        "command": "python -m bench.suspects",
    }  # fmt: skip


@pytest.mark.skipif(not DATA.exists(), reason=f"{DATA} is not there")
def test_a_tenth_of_the_answers_is_anothers() -> None:
    texts: dict[str, str] = {}
    with lzma.open(DATA, "rt", encoding="utf-8") as file:
        for line in file:
            question, answer = (message["content"] for message in json.loads(line)["messages"][:2])
            if len(answer) <= suspects.LONGEST:
                texts.setdefault(question, answer)
    for seed in range(3):
        rows, marks = swapped_pairs(seed, 100)
        assert rows == swapped_pairs(seed, 100)[0]  # a pure function of the seed
        assert marks == [row["completion"] != texts[row["prompt"]] for row in rows]
        assert 8 <= sum(marks) <= 10
        # they go round among themselves: no answer is lost and none comes twice as often
        assert Counter(row["completion"] for row in rows) == Counter(texts[row["prompt"]] for row in rows)


def test_the_section_tells_mean_spread_and_range() -> None:
    told = suspects.section(record(AREAS, {**AREAS, "ifd": 0.8}))
    assert "| IFD before training | 0.850 ± 0.071 | 0.800 | 0.900 |" in told
    assert "| loss of the first epoch | 0.600 ± 0.000 | 0.600 | 0.600 |" in told
    assert "of which 20 are another's" in told and told.endswith("commit abc: `python -m bench.suspects`")


@pytest.mark.skipif(not suspects.RECORD.exists(), reason="no record yet")
def test_the_record_is_on_the_page() -> None:
    found = json.loads(suspects.RECORD.read_text(encoding="utf-8"))
    assert suspects.section(found) in report.PAGE.read_text(encoding="utf-8")
    assert len(found["seeds"]) == suspects.SEEDS

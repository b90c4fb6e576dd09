"""The loop's record in words: ratios of the same step, verdicts of what was asked, and a round of every way."""

from __future__ import annotations

from typing import Any

import pytest

from bench import loop_words as loop

RECORD: dict[str, Any] = {
    "seconds": {"bare": [1.0, 2.0], "ntp": [1.02, 2.04], "sftmix": [1.03, 2.06], "trl": [1.5, 3.0]},
    "tokens": [[100, 400], [120, 500]], "data_share": {"ntp": 0.001, "sftmix": 0.04}, "dtype": "float32",
    "saving": {"at once": 2.0, "beside": 0.4, "bytes": 2**30, "reading": 1.0},
    "stages": {"reference": 10.0, "score": 1.0, "split": 1.0, "train-ntp": 10.0, "train-sftmix": 12.0},
    "device": "a CPU", "threads": 2, "versions": {"torch": "2"}, "commit": "abc", "command": "python -m bench.loop",
}  # fmt: skip


def test_ratios_are_of_the_same_step() -> None:
    assert loop.ratio(RECORD, "ntp", "bare") == pytest.approx(1.02)
    assert loop.ratio(RECORD, "trl", "sftmix") == pytest.approx((1.5 / 1.03 + 3.0 / 2.06) / 2)


def test_the_section_judges_what_was_asked() -> None:
    told = loop.section(RECORD)
    assert "our loop over the bare one 1.020 (asked: at most 1.03; met)" in told
    assert "SFTMix's over TRL's next-token loss's 1.456 (asked: at least 1.4; met)" in told
    # 4 % of SFTMix's 1.545 s
    assert "making the batches takes 61.8 ms, of a step of 100 ms 0.618 (asked: at most 0.02; missed)" in told
    assert "took 2.40 times as long as next-token training" in told
    assert "1,024 MiB stops the training for 2.00 s, written beside it for 0.40 s" in told
    assert "| trl | 2,250 | 200 | 0.680 |" in told
    assert told.endswith("a CPU, 2 threads; torch 2; commit abc: `python -m bench.loop`")


def test_a_record_without_trl_says_nothing_of_it() -> None:
    without = {**RECORD, "seconds": {key: value for key, value in RECORD["seconds"].items() if key != "trl"}}
    assert "TRL" not in loop.section(without)

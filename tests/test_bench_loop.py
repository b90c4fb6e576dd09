"""The loop's record in words, the turns that its ways take, and the clocks of its host work."""

from __future__ import annotations

import sys
import time
import types
from typing import Any

import pytest

from bench import loop_profile, loop_ways
from bench import loop_words as loop

RECORD: dict[str, Any] = {
    "sessions": [
        {"bare": [1.0, 2.0], "ntp": [1.02, 2.04]},
        {"ntp": [1.02, 2.04], "sftmix": [1.03, 2.06], "padded": [1.53, 3.06]},
        {"sftmix": [1.03, 2.06], "trl": [1.5, 3.0]},
    ],
    "tokens": [[100, 400], [120, 500]], "dtype": "float32", "longest": False,
    "host": {"host": 1.9, "batches": 0.5},
    "memory": dict.fromkeys(("bare", "ntp", "sftmix", "trl"), 3 * 2 ** 30),
    "profile": {"ntp": {"step": 10.0, "products": 6.0}, "trl": {"step": 20.0, "products": 7.0, "attention": 5.4}},
    "saving": {"at once": 2.0, "beside": 0.4, "bytes": 2**30, "reading": 1.0},
    "stages": {"reference": 10.0, "score": 1.0, "split": 1.0, "train-ntp": 10.0, "train-sftmix": 12.0},
    "device": "a CPU", "threads": 2, "versions": {"torch": "2"}, "commit": "abc", "command": "python -m bench.loop",
}  # fmt: skip


def test_ratios_are_of_the_same_step() -> None:
    assert loop.ratios(RECORD, "ntp", "bare") == pytest.approx([1.02, 1.02])
    assert loop.ratios(RECORD, "trl", "sftmix") == pytest.approx([1.5 / 1.03, 3.0 / 2.06])


def test_a_verdict_needs_the_whole_interval() -> None:
    assert loop.verdict([1.01] * 9, 1.03, at_most=True) == "1.010 (1.010 to 1.010; asked: at most 1.03; met)"
    assert loop.verdict([1.05] * 9, 1.03, at_most=True).endswith("missed)")
    assert loop.verdict([0.9, 1.0, 1.1] * 3, 1.03, at_most=True).endswith("not decided by so few steps)")
    assert loop.verdict([1.5] * 9, 1.4, at_most=False).endswith("met)")
    assert loop.verdict([1.3] * 9, 1.4, at_most=False).endswith("missed)")


def test_the_interval_is_that_of_the_median() -> None:
    values = [float(n) for n in range(101)]
    middle, low, high = loop.interval(values)
    # The median of 101 uniform values has a standard error of about 100 * 0.5 / sqrt(101) = 5.
    assert middle == 50 and 50 - 14 < low < 50 - 6 and 50 + 6 < high < 50 + 14


def test_the_section_judges_what_was_asked() -> None:
    told = loop.section(RECORD)
    assert "our loop's time over the bare one's 1.020 (1.020 to 1.020; asked: at most 1.03; met)" in told
    assert "SFTMix's over TRL's next-token loss's 1.456 (1.456 to 1.456; asked: at least 1.4; met)" in told
    assert (
        "1.9 ms a step (0.5 ms of it the batches), 0.019 of a step of 100 ms (asked: at most 0.02; met)"
        in told
    )
    assert "took 2.40 times as long as next-token training" in told
    assert "1,024 MiB stops the training for 2.00 s, written beside it for 0.40 s" in told
    assert "| trl | 2,250 | 200 | 3.00 |" in told
    assert "(450 tokens a step)" in told
    assert "packed over padded 1.500 (1.500 to 1.500)" in told
    assert "a CPU, 2 threads; torch 2; commit abc: `python -m bench.loop`" in told
    assert "| products | 6 | 7 |\n| attention | 0 | 5 |" in told


def test_a_record_without_trl_says_nothing_of_it() -> None:
    without = {**RECORD, "sessions": RECORD["sessions"][:2]}
    assert "TRL" not in loop.section(without | {"memory": {"ntp": 2**30}})


CHILD = """
import sys, time
from bench.loop_ways import Pace
pace = Pace(sys.stdin, sys.stdout)
pace.wait()
for number in range(3):
    time.sleep({seconds})
    print("{name}", number, file=sys.stderr, flush=True)
    pace.end_of_step()
    {after}
pace.tell(dict(peak=5))
"""


def way(name: str, seconds: float, after: str = "pass") -> loop_ways.Turn:
    return loop_ways.Turn([sys.executable, "-c", CHILD.format(name=name, seconds=seconds, after=after)])


def test_ways_take_turns_one_step_at_a_time(capfd: pytest.CaptureFixture[str]) -> None:
    one, other = way("a", 0.02), way("b", 0.3)
    first = [one.next(), other.next(), one.next()]
    assert capfd.readouterr().err.split() == ["a", "0", "b", "0", "a", "1"]
    assert 0.02 <= first[0] < 0.3 and first[1] >= 0.3
    assert 0.02 <= first[2] < 0.3  # without the time of the other's turn
    one.finish()
    other.finish()
    assert capfd.readouterr().err.split() == ["a", "2", "b", "1", "b", "2"]
    assert one.about == {"peak": 5}


def test_a_way_that_breaks_is_an_error() -> None:
    turn = way("a", 0, "raise SystemExit(3)")
    turn.next()
    with pytest.raises(RuntimeError, match="ended with 3"):
        turn.next()


def test_a_way_without_steps_left_is_an_error() -> None:
    turn = way("a", 0)
    for _ in range(3):
        turn.next()
    with pytest.raises(ValueError, match="none left"):
        turn.next()


def test_clocks_time_the_calls_and_go_away() -> None:
    owner = types.SimpleNamespace(wait=time.sleep, other=time.sleep)
    with loop_profile.clocks([(owner, "wait")]) as seconds:
        owner.wait(0.02)
        owner.wait(0.02)
        owner.other(0.5)
    assert 0.04 <= seconds["wait"] < 0.5
    assert owner.wait is time.sleep


def test_operators_have_their_kind() -> None:
    assert loop_profile.kind_of("aten::addmm") == "products"
    assert loop_profile.kind_of("aten::_scaled_dot_product_flash_attention_for_cpu") == "attention"
    assert loop_profile.kind_of("aten::_fused_adamw_") == "optimizer"
    assert loop_profile.kind_of("aten::silu") == "elementwise and others"

"""The line of progress: it comes while tests run, counts them, names a failure at once, and pytest still ends it."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest

from tests.progress import Schedule, words

ROOT = Path(__file__).resolve().parent.parent
SLEEPY = """
import time
import pytest

@pytest.mark.parametrize("n", range(10))
def test_one(n):
    time.sleep(0.3)
    assert n != 1

def test_left_out():
    pytest.skip("why")
"""
LINE = re.compile(
    r"(\d+) of 11 tests, (\d+) %, (\d) failed, .* so far, (about .* left|time left not known yet)"
)


@pytest.mark.parametrize("workers", [(), ("-n", "2")], ids=["one process", "two workers"])
def test_lines_come_through_a_pipe_while_tests_run(tmp_path: Path, workers: tuple[str, ...]) -> None:
    (tmp_path / "test_sleepy.py").write_text(SLEEPY)
    options = [
        "-p",
        "tests.progress",
        "--progress",
        "0.2",
        f"--rootdir={tmp_path}",
        "-c",
        "/dev/null",
        "-rfs",
    ]
    command = [sys.executable, "-m", "pytest", *options, *workers, str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    said = [(time.monotonic(), line.rstrip()) for line in process.stdout]
    assert process.wait() == 1
    found = [(at, match) for at, line in said if (match := LINE.fullmatch(line))]
    assert len(found) >= 5
    counts = [int(match[1]) for _, match in found]
    assert counts == sorted(counts) and counts[-1] == 11 and any(0 < count < 11 for count in counts)
    assert any(match[4].startswith("about") for _, match in found)
    assert max(later - at for (at, _), (later, _) in pairwise(found)) < 10
    lines = [line for _, line in said]
    (failure,) = (
        at for at, line in said if line.startswith("FAILED") and line.endswith("test_one[1] (call)")
    )
    assert failure < found[-1][0] and found[-1][1][3] == "1"
    assert any(
        re.match(r"FAILED \S*::test_one\[1\](?! \(call\))", line) for line in lines
    )  # pytest's summary
    assert re.search(r"1 failed, 9 passed, 1 skipped in", lines[-1])  # pytest's own last line
    assert not any(re.match(r"[.sF]+( |$)", line) for line in lines)  # and none of its dots


def test_the_time_left_is_weighed_by_the_durations() -> None:
    """Nine tests of a second are done, one of 91 is not: 91 % is left, at twice the file's speed."""
    schedule = Schedule({"a.py": 1.0, "b.py": 91.0})
    schedule.start([f"a.py::test_{n}" for n in range(9)] + ["b.py::test"])
    assert schedule.left(0.0) is None
    for n in range(9):
        schedule.end(f"a.py::test_{n}")
    assert schedule.left(4.5) == pytest.approx(45.5)
    schedule.end("b.py::test")
    assert schedule.left(50.0) == 0


@pytest.mark.parametrize("seconds,text", [(9.6, "10 s"), (61, "1 min 01 s"), (600.2, "10 min 00 s")])
def test_seconds_in_words(seconds: float, text: str) -> None:
    assert words(seconds) == text

"""What a run shows: plain lines off a terminal, read while the run goes on; bars on one; nothing of other libraries."""

from __future__ import annotations

import contextlib
import io
import os
import pty
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from sftmix import progress
from sftmix.progress import activity, bar, duration, say
from tests.recipe.run.conftest import material  # noqa: F401 - a fixture
from tests.recipe.run.small import FLAGS

ROOT = Path(__file__).resolve().parents[2]
RECORD = {"ntp_loss": 2.5, "mixup_loss": 1.25, "num_tokens": 300, "seconds": 0.5}
# The command line with stages that are watched closely: `every` is the parameter that this test shortens.
PROGRAM = """
import functools, sys
from sftmix import cli, progress
from sftmix.run import stages
stages.bar = functools.partial(progress.bar, every=0.05)
cli.main()
"""
STEP = r"reference: (still at )?step \d+ of 6, ntp \d+\.\d{3}, [\d,]+ tokens/s(, \d+ s left)?"


def lines_of(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().out.splitlines()


def test_a_stage_in_a_pipe_is_read_while_it_runs(material: tuple[Path, Path], tmp_path: Path) -> None:  # noqa: F811
    """Lines come one by one, long before the end; they name step, loss, tokens/s and time left; no other bar."""
    arguments = [
        "reference",
        str(tmp_path / "r"),
        f"model.name={material[0]}",
        f"data.train={material[1]}",
        *FLAGS,
    ]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    started = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *arguments], cwd=ROOT, text=True, env={**environment, "FORCE_COLOR": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert started.stdout is not None and started.stderr is not None
    lines, was_running = [], []
    for line in started.stdout:
        lines.append(line.rstrip("\n"))
        was_running.append(started.poll() is None)
    errors = started.stderr.read()
    assert started.wait() == 0, errors
    assert lines[0] == f"run folder: {tmp_path / 'r'}"
    begin = lines.index("reference: started")
    while "still starting" in lines[begin + 1]:
        begin += 1
    assert was_running[begin] and was_running[begin + 1]
    assert lines[begin + 1].startswith("reference: step 1 of 6, ") and " left" in lines[begin + 1], lines
    assert re.fullmatch(r"reference: done in \d+ s, 6 of 6 steps, ntp \d+\.\d{3}, [\d,]+ tokens/s", lines[-1])
    assert all(re.fullmatch(STEP, line) for line in lines[begin + 1 : -1])
    assert "\x1b" not in "".join(lines) and "\r" not in "".join(lines)
    assert "it/s" not in errors and "\r" not in errors, errors  # no tqdm


def test_a_line_comes_at_the_latest_after_the_interval(capsys: pytest.CaptureFixture[str]) -> None:
    with bar("train", every=0.1) as work:
        time.sleep(0.25)
        work.steps(1, 4, RECORD)
        time.sleep(0.35)
        work.steps(2, 4, RECORD)
        work.steps(3, 4, RECORD)
        time.sleep(0.25)
        work.steps(4, 4, RECORD)
    lines = lines_of(capsys)
    assert lines[0] == "train: started"
    assert lines[1] == "train: … still starting (0 s)"
    first = next(i for i, line in enumerate(lines) if "step 1 of 4" in line)
    assert re.fullmatch(
        r"train: step 1 of 4, ntp 2\.500, mixup 1\.250, 600 tokens/s, \d s left", lines[first]
    )
    assert lines[first + 1].startswith("train: still at step 1 of 4")
    assert any(line.startswith("train: step 3 of 4") for line in lines)  # the newest, not every one
    assert not any("step 2 of 4" in line for line in lines)
    assert lines[-1] == "train: done in 1 s, 4 of 4 steps, ntp 2.500, mixup 1.250, 600 tokens/s"


def test_the_usual_interval_is_at_most_ten_seconds_early_and_thirty_later() -> None:
    assert progress.EARLY + progress.TICK <= 10 and progress.LATER <= 30
    work = progress.Work("x")
    work.started -= progress.EARLY_UNTIL + 1
    for silent, due in ((9, False), (29, False), (31, True)):
        progress._last_line = time.monotonic() - silent
        assert work.due() == due
    work.started = time.monotonic()
    progress._last_line = time.monotonic() - 8.5
    assert work.due()


def test_time_left_counts_only_the_steps_of_this_process() -> None:
    work = progress.Bar("train")
    work.update = lambda: None  # type: ignore[method-assign]  # no line wanted here
    work.steps(91, 100, RECORD)
    work.started = time.monotonic() - 5
    work.steps(92, 100, RECORD)
    assert work.left() == pytest.approx(8 * 2.5, rel=0.01)  # 2 steps took 5 s


def test_evaluation_counts_examples_and_a_stop_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with contextlib.suppress(KeyError), bar("evaluate base") as work:
        work.batches(16, 64)
        raise KeyError
    start, first, end = lines_of(capsys)
    assert start == "evaluate base: started"
    assert re.fullmatch(r"evaluate base: example 16 of 64, [\d.,]+ examples/s, 0 s left", first)
    assert re.fullmatch(r"evaluate base: stopped after 0 s, 16 of 64 examples, [\d.,]+ examples/s", end)


def test_a_quick_activity_is_silent_and_a_slow_one_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    with activity("blinking"):
        pass
    assert lines_of(capsys) == []
    with activity("loading", every=0.1), activity("reading", every=0.1):
        time.sleep(0.5)
        lines = lines_of(capsys)
    assert 2 <= len(lines) <= 5 and all(
        line.startswith("… still reading (") for line in lines
    )  # the inner one alone
    assert not [thread for thread in threading.enumerate() if "Work._watch" in thread.name]
    assert progress._at_work == []


@pytest.mark.parametrize("rank,spoken", [("0", 1), ("1", 0)])
def test_one_process_of_several_speaks_also_before_they_have_met(rank: str, spoken: int) -> None:
    """Under torchrun, and before the process group is joined."""
    code = (
        "from sftmix.progress import activity, bar, say\nimport time\n"
        "say('hello')\nwith bar('b') as b: b.batches(1, 2)\nwith activity('a', every=.01): time.sleep(.1)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "WORLD_SIZE": "2", "RANK": rank},
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.count("hello") == spoken, done.stderr
    assert bool(done.stdout) == bool(spoken)


def on_a_terminal(code: str, *, columns: int = 80, **environment: str) -> str:
    """What a program writes to a terminal of so many columns."""
    leader, follower = pty.openpty()
    settings = {**os.environ, "TERM": "xterm", "COLUMNS": str(columns), **environment}
    settings.pop("NO_COLOR", None)
    started = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=follower, stderr=follower, env=settings
    )
    os.close(follower)
    output = b""
    while True:
        try:
            output += os.read(leader, 4096)
        except OSError:  # the other side is closed
            break
    os.close(leader)
    assert started.wait() == 0, output.decode()
    return output.decode()


BAR = f"""
import time
from sftmix.progress import bar, say
with bar("train sftmix") as work:
    for step in range(1, 4):
        work.steps(step, 3, {RECORD!r})
        time.sleep(0.15)
say("end")
"""


def test_a_terminal_gets_a_bar_with_tokens_per_second() -> None:
    shown = on_a_terminal(BAR, columns=120)
    assert "\x1b[" in shown and "train sftmix: started" not in shown
    assert "3/3" in shown and "ntp 2.500, mixup 1.250, 600 tokens/s" in shown


@pytest.mark.parametrize("columns", [40, 80])
def test_a_narrow_terminal_keeps_the_bar_on_one_line(columns: int) -> None:
    shown = on_a_terminal(BAR, columns=columns)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)
    frames = [frame for frame in re.split(r"[\r\n]+", plain) if frame.strip()]
    assert all(frame.startswith(("train sftmix", "end")) for frame in frames), frames
    assert all(len(frame.rstrip()) <= columns for frame in frames) and "3/3" in plain


def test_a_dumb_terminal_gets_plain_lines() -> None:
    shown = on_a_terminal(BAR, TERM="dumb")
    assert "\x1b" not in shown and "train sftmix: started" in shown and "train sftmix: done in" in shown


@pytest.mark.parametrize(
    "seconds,text", [(0.4, "0 s"), (59.6, "1 min 0 s"), (80, "1 min 20 s"), (7500, "2 h 5 min")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_say_is_flushed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BufferedWriter(raw, 1 << 16), encoding="utf-8"))
    say("at once [not markup]")
    assert raw.getvalue().decode() == "at once [not markup]\n"


def tells(*arguments: str, **environment: Any) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, env={**os.environ, **environment}
    )


def test_a_reader_that_goes_away_does_not_end_the_run() -> None:
    """`sftmix run … | head -1`: the rest is silent, the work is done, nothing is printed at exit."""
    code = (
        "import sys\nfrom sftmix.progress import say, show\nfrom rich.table import Table\n"
        "for i in range(20000): say('a line that fills the pipe')\nshow(Table('x'))\nsys.stderr.write('worked')"
    )
    command = f'{sys.executable} -c "$CODE" | head -1'
    done = subprocess.run(
        ["bash", "-c", f"{command}; exit ${{PIPESTATUS[0]}}"], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "CODE": code},
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "a line that fills the pipe\n", "worked")

"""How far the tests are and how long is left: a pytest plugin, switched on by ``--progress SECONDS``.

A line at least every SECONDS, on a terminal and in a log alike, in place of pytest's dots; a failure is named at once.
Under pytest-xdist the controller prints. The time left is weighed by ``durations.json``, seconds a test of each file,
which ``--write-durations`` writes; only their ratios count, so that it holds on a machine of another speed.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

DURATIONS = Path(__file__).with_name("durations.json")


def words(seconds: float) -> str:
    """95 as "1 min 35 s"."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


class Schedule:
    """Which tests are still to come, and what they weigh in seconds of the machine that wrote the file."""

    def __init__(self, weights: dict[str, float]) -> None:
        self.weights = weights
        self.other = sorted(weights.values())[len(weights) // 2] if weights else 1.0
        self.waiting: dict[str, float] = {}
        self.total, self.total_weight = 0, 0.0

    def start(self, tests: list[str]) -> None:
        self.waiting = {test: self.weights.get(test.split("::")[0], self.other) for test in tests}
        self.total, self.total_weight = len(self.waiting), sum(self.waiting.values())

    def end(self, test: str) -> None:
        self.waiting.pop(test, None)

    def left(self, elapsed: float) -> float | None:
        """Seconds; None before a hundredth of the work is done, when nothing is known of this machine's speed."""
        rest = sum(self.waiting.values())
        done = self.total_weight - rest
        return elapsed * rest / done if done > 0.01 * self.total_weight else None


class Progress:
    """Counts what has ended and says so."""

    def __init__(self, config: pytest.Config, every: float) -> None:
        self.config, self.every = config, every
        known = json.loads(DURATIONS.read_text(encoding="utf-8")) if DURATIONS.exists() else {}
        self.schedule = Schedule(known)
        self.failed: set[str] = set()
        self.started = time.monotonic()
        self.stdout = os.fdopen(
            os.dup(1), "w", buffering=1
        )  # while a test runs, pytest captures descriptor 1
        self.stop, self.lock = threading.Event(), threading.Lock()
        self.thread = threading.Thread(target=self._tell, daemon=True)

    def line(self) -> str:
        """What is known now, in one line."""
        schedule, elapsed = self.schedule, time.monotonic() - self.started
        if not schedule.total:
            return f"collecting tests, {words(elapsed)} so far"
        done, left = schedule.total - len(schedule.waiting), schedule.left(elapsed)
        said = "time left not known yet" if left is None else f"about {words(left)} left"
        return (
            f"{done} of {schedule.total} tests, {100 * done // schedule.total} %, {len(self.failed)} failed, "
            f"{words(elapsed)} so far, {said}"
        )

    def say(self, text: str) -> None:
        reporter: Any = self.config.pluginmanager.get_plugin("terminalreporter")
        with self.lock:
            reporter.write_line(text)

    def _tell(self) -> None:
        while not self.stop.wait(self.every):
            self.say(self.line())

    def begin(self, tests: list[str]) -> None:
        self.schedule.start(tests)
        self.started = time.monotonic()

    # What pytest calls.

    def pytest_sessionstart(self) -> None:
        reporter: Any = self.config.pluginmanager.get_plugin("terminalreporter")
        reporter._tw._file = self.stdout
        reporter.showfspath = reporter._show_progress_info = False
        self.thread.start()

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node: Any, ids: list[str]) -> None:
        if not self.schedule.total:
            self.begin(ids)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        if session.items:  # the controller of pytest-xdist has none
            self.begin([item.nodeid for item in session.items])

    @pytest.hookimpl(wrapper=True)
    def pytest_report_teststatus(self) -> Generator[None, Any, Any]:
        """No dots: an outcome without letter and word is counted and not printed. The summary wants both."""
        outcome = yield
        return outcome if self.stop.is_set() else (outcome[0], "", "")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and report.nodeid not in self.failed:
            self.failed.add(report.nodeid)
            self.say(f"FAILED {report.nodeid} ({report.when})")
        if report.when == "teardown":
            self.schedule.end(report.nodeid)

    def pytest_sessionfinish(self) -> None:
        self.stop.set()
        self.thread.join()
        self.say(self.line())


class Durations:
    """Seconds a test of every file, fixtures included, into durations.json."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.tests: Counter[str] = Counter()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        file = report.nodeid.split("::")[0]
        self.seconds[file] += report.duration
        self.tests[file] += report.when == "setup"

    def pytest_sessionfinish(self) -> None:
        known = json.loads(DURATIONS.read_text(encoding="utf-8")) if DURATIONS.exists() else {}
        known |= {file: round(seconds / self.tests[file], 3) for file, seconds in self.seconds.items()}
        known = {file: known[file] for file in sorted(known) if (DURATIONS.parent.parent / file).exists()}
        DURATIONS.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--progress", type=float, default=0, metavar="SECONDS", help="a line of progress that often"
    )
    parser.addoption("--write-durations", action="store_true", help="write tests/durations.json")


def pytest_configure(config: pytest.Config) -> None:
    """In the controller, or where there is one process, in that."""
    if hasattr(config, "workerinput"):
        return
    if config.getoption("--progress") > 0:
        config.pluginmanager.register(Progress(config, config.getoption("--progress")))
    if config.getoption("--write-durations"):
        config.pluginmanager.register(Durations())

"""What a run shows while it works, on the main process only: lines, a stage's progress, and signs of life.

On a terminal a stage is a bar. Elsewhere (a pipe, a file, Slurm, nohup, CI) it is plain lines: one when it starts, one
with its first step, one every few seconds, one when it ends. Every line is flushed at once.
"""

from __future__ import annotations

import math
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console, RenderableType

from sftmix.rank import is_main

EARLY, LATER = 8.0, 30.0  # seconds between two lines: in a stage's first minutes, and after them
EARLY_UNTIL = 600.0
WINDOW = 20  # steps that the tokens per second are averaged over
TICK = 0.5  # seconds between two looks at whether a line is due


class _Console(Console):
    def on_broken_pipe(self) -> None:
        _mute()


console = _Console(stderr=False, highlight=False)
_printing = threading.RLock()
_last_line = time.monotonic()
_at_work: list[Work] = []  # the innermost last: only that one speaks


def say(text: str) -> None:
    """A line on the main process's screen."""
    if is_main():
        _line(text)


def show(renderable: RenderableType) -> None:
    """A table on the main process's screen."""
    if is_main():
        try:
            console.print(renderable)
        except BrokenPipeError:
            _mute()


def on_terminal() -> bool:
    """Whether output goes to a terminal that can redraw a line; FORCE_COLOR does not make a file one."""
    return sys.stdout.isatty() and console.is_terminal and not console.is_dumb_terminal


def duration(seconds: float) -> str:
    """``8 s``, ``1 min 20 s``, ``2 h 5 min``."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _line(text: str) -> None:
    global _last_line
    with _printing:
        _last_line = time.monotonic()
        if on_terminal():
            console.print(text, soft_wrap=True, markup=False)
            return
        try:
            print(text, flush=True)
        except BrokenPipeError:
            _mute()


def _mute() -> None:
    """Whoever read the output has gone: a run goes on in silence."""
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())


class Work:
    """Something that takes time; while it is the innermost, a thread prints ``text`` whenever a line is due."""

    def __init__(self, doing: str, every: float | None = None) -> None:
        self.doing, self.every = doing, every
        self.started = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    @property
    def gone(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started

    def text(self) -> str:
        """What there is to say now."""
        return f"… still {self.doing} ({duration(self.gone)})"

    def due(self) -> bool:
        """Whether nothing was printed for as long as nothing may be."""
        every = self.every or (EARLY if self.gone < EARLY_UNTIL else LATER)
        return time.monotonic() - _last_line >= every

    def start(self) -> None:
        _at_work.append(self)
        self._thread.start()

    def end(self) -> None:
        self._ended.set()
        _at_work.remove(self)
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(min(TICK, self.every or TICK)):
            with _printing:
                if _at_work[-1:] == [self] and self.due():
                    _line(self.text())


@contextmanager
def activity(doing: str, *, every: float | None = None) -> Iterator[None]:
    """Say that the program is still ``doing`` the block whenever it has been silent; nothing if it is quick.

    ``every``: seconds of silence allowed, by default 8 and after ten minutes 30.
    """
    if not is_main():
        yield
        return
    work = Work(doing, every)
    work.start()
    try:
        yield
    finally:
        work.end()


class Bar(Work):
    """One stage's progress; usable as the progress callback of the trainer and of the evaluation."""

    def __init__(self, name: str, every: float | None = None) -> None:
        super().__init__(name, every)
        self.done, self.total, self.unit, self.losses = 0, 0, "", ""
        self._before = 0  # steps that an earlier process did
        self._told = -1  # what ``done`` was in the newest line
        self._recent: deque[tuple[int, float]] = deque(maxlen=WINDOW)

    def batches(self, done: int, total: int) -> None:
        """Examples done so far, of ``total``."""
        with _printing:  # the watching thread reads these
            self.done, self.total, self.unit = done, total, "example"
            self.update()

    def steps(self, step: int, total: int, record: dict[str, Any]) -> None:
        """Optimizer steps done so far, and the newest record's losses, tokens and seconds."""
        losses = f"ntp {record['ntp_loss']:.3f}"
        if record.get("mixup_loss") is not None and math.isfinite(record["mixup_loss"]):
            losses += f", mixup {record['mixup_loss']:.3f}"
        with _printing:
            if self.unit != "step":
                self._before = step - 1
            self.done, self.total, self.unit, self.losses = step, total, "step", losses
            self._recent.append((record["num_tokens"], record["seconds"]))
            self.update()

    def rate(self) -> str:
        """``412 tokens/s`` of the newest steps, or ``8.1 examples/s``."""
        if self.unit == "step":
            tokens, seconds = (sum(values) for values in zip(*self._recent, strict=True))
            return f"{tokens / max(seconds, 1e-9):,.0f} tokens/s"
        return f"{self.done / max(self.gone, 1e-9):.1f} examples/s"

    def left(self) -> float:
        """Seconds left at the pace so far."""
        return self.gone / (self.done - self._before) * (self.total - self.done)

    def update(self) -> None:
        """Called after every change: the first one is printed at once."""
        if self._told < 0:
            _line(self.text())

    def text(self) -> str:
        if not self.done:
            return f"{self.doing}: … still starting ({duration(self.gone)})"
        still = "still at " if self.done == self._told else ""
        self._told = self.done
        at = f"{still}{self.unit} {self.done} of {self.total}"
        return ", ".join(filter(None, [f"{self.doing}: {at}", self.losses, self.rate(), self._left_text()]))

    def _left_text(self) -> str:
        return f"{duration(self.left())} left" if self.done < self.total else ""

    def open(self) -> None:
        _line(f"{self.doing}: started")
        self.start()

    def close(self, finished: bool) -> None:
        self.end()
        if finished:
            what = [f"{self.doing}: done in {duration(self.gone)}"]
        else:
            what = [f"{self.doing}: stopped after {duration(self.gone)}"]
        if self.done:
            what += [f"{self.done} of {self.total} {self.unit}s", self.losses, self.rate()]
        _line(", ".join(filter(None, what)))


class TerminalBar(Bar):
    """The same as a bar that redraws its line."""

    def open(self) -> None:
        from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn
        from rich.table import Column

        def text(field: str, width: int = 0) -> TextColumn:
            return TextColumn(field, table_column=Column(no_wrap=True, min_width=width or None))

        # A narrow terminal loses the bar and the end of the figures, never the step.
        room = max(0, min(30, console.width - 96))
        columns: list[ProgressColumn] = [text("{task.description}", len(self.doing) if not room else 18)]
        columns += [BarColumn(bar_width=room), TimeElapsedColumn()] if room else []
        columns += [text("{task.fields[at]}", 5), text("{task.fields[figures]}")]
        self._progress = Progress(*columns, console=console)
        self._task = self._progress.add_task(self.doing, total=None, at="", figures="")
        _at_work.append(self)
        self._progress.start()

    def update(self) -> None:
        figures = ", ".join(filter(None, [self._left_text(), self.losses, self.rate()]))
        self._progress.update(
            self._task, completed=self.done, total=self.total, at=f"{self.done}/{self.total}", figures=figures
        )

    def close(self, finished: bool) -> None:
        _at_work.remove(self)
        self._progress.stop()


class SilentBar(Bar):
    """For the processes that say nothing."""

    def open(self) -> None:
        pass

    def update(self) -> None:
        pass

    def close(self, finished: bool) -> None:
        pass


@contextmanager
def bar(name: str, *, every: float | None = None) -> Iterator[Bar]:
    """The progress of a stage, the block. ``every``: seconds between two plain lines, as for ``activity``."""
    kind = SilentBar if not is_main() else TerminalBar if on_terminal() else Bar
    work = kind(name, every)
    work.open()
    finished = False
    try:
        yield work
        finished = True
    finally:
        work.close(finished)

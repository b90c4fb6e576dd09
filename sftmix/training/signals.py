"""Signals that end a run: the step under way is finished and saved first.

SIGTERM, SIGINT, and SIGUSR1, which a scheduler can be told to send before a job's time is up. The documented exit
codes are 128 + the signal's number: 143, 130 and 138.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

CAUGHT = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)
)  # Windows has no SIGUSR1


class Stopped(SystemExit):
    """A run that a signal ended after a checkpoint; its exit code is 128 + the signal's number."""

    def __init__(self, number: int, where: str) -> None:
        super().__init__(128 + number)
        self.number, self.where = number, where

    def __str__(self) -> str:
        return (
            f"{self.where}: stopped by {signal.Signals(self.number).name}; the same command goes on from here"
        )


class Signals:
    """The first signal that came in the block of ``caught``; 0 for none."""

    def __init__(self) -> None:
        self.number = 0

    def _take(self, number: int, frame: FrameType | None) -> None:
        again = self.number == number == signal.SIGINT
        self.number = self.number or number
        # A second Ctrl-C asks to end at once; under torchrun the launcher passes the first one on as a second.
        if again and int(os.environ.get("WORLD_SIZE", "1")) == 1:
            raise KeyboardInterrupt

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Note the signals inside the block; the handlers that stood before come back after it.

        Only Python's main thread can: elsewhere signals do what they did.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before: dict[int, Any] = {number: signal.signal(number, self._take) for number in CAUGHT}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler if handler is not None else signal.SIG_DFL)


def end_at_signals() -> None:
    """Have a program end at once, with a line and its exit code, at SIGTERM and SIGUSR1 that nothing catches.

    Nothing is raised: that would come up in the middle of whatever runs, an import or a library's own handling.
    """

    own = os.getpid()

    def end(number: int, frame: FrameType | None) -> None:
        if (
            os.getpid() != own
        ):  # a worker that was forked, when a scheduler signals every process: the parent speaks
            os._exit(128 + number)
        shown = b"\x1b[?25h" if os.isatty(2) else b""  # the cursor, which a bar hides
        os.write(2, shown + f"sftmix: {Stopped(number, '')}\n".encode())
        os._exit(128 + number)

    for number in CAUGHT:
        if number != signal.SIGINT and signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, end)

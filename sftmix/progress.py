"""What a run shows while it works: one bar a stage, with the time left, on the main process only."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from sftmix.parallel import is_main

console = Console(stderr=False, highlight=False)


def say(text: str) -> None:
    """A line on the main process's screen."""
    if is_main():
        console.print(text, soft_wrap=True, markup=False)


class Bar:
    """One stage's bar; usable as the progress callback of the trainer and of the evaluation."""

    def __init__(self, progress: Progress, name: str) -> None:
        self._progress = progress
        self._task = progress.add_task(name, total=None, figures="")

    def batches(self, done: int, total: int) -> None:
        """Examples done so far, of ``total``."""
        self._progress.update(self._task, completed=done, total=total)

    def steps(self, step: int, total: int, record: dict[str, Any]) -> None:
        """Optimizer steps done so far, and the newest record's losses."""
        figures = [f"ntp {record['ntp_loss']:.3f}"]
        if record.get("mixup_loss") is not None and math.isfinite(record["mixup_loss"]):
            figures.append(f"mixup {record['mixup_loss']:.3f}")
        self._progress.update(self._task, completed=step, total=total, figures="  ".join(figures))


@contextmanager
def bar(name: str) -> Iterator[Bar]:
    """A progress bar for the block, with time gone and time left."""
    columns = (
        TextColumn("{task.description:<22}"), BarColumn(bar_width=30), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[figures]}"),
    )  # fmt: skip
    with Progress(*columns, console=console, disable=not is_main()) as progress:
        yield Bar(progress, name)

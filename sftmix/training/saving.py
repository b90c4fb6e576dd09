"""When a run's checkpoints are due, and writing them: at a step's end, or beside the training from a copy.

Every process adds its word to the sums that a step exchanges anyway, so all decide alike: the main process's clock
says when a checkpoint is due, and a signal to any of them ends all.
"""

from __future__ import annotations

import shutil
import threading
import time
from pathlib import Path

import torch.distributed as dist

from sftmix.config import TrainConfig, interval
from sftmix.model.rendezvous import PATIENCE
from sftmix.rank import is_main
from sftmix.training.checkpoint import Snapshot, complete_checkpoints, write
from sftmix.training.signals import CAUGHT, Signals


class Rhythm:
    """When to save, as ``train.checkpoint_every`` says, and whether a signal came."""

    def __init__(self, every: str) -> None:
        self.interval = interval("train.checkpoint_every", every)
        self.signals = Signals()
        self._since, self._step = time.monotonic(), -1  # when and at which step the newest save was begun

    def begin(self, step: int) -> None:
        """Count from here: ``step`` is where the run begins."""
        self._since, self._step = time.monotonic(), step

    def word(self) -> list[float]:
        """This process's part of the step's sums: whether time is up, then one number for each signal."""
        seconds = self.interval.seconds
        due = is_main() and seconds is not None and time.monotonic() - self._since >= seconds
        return [float(due), *(float(self.signals.number == number) for number in CAUGHT)]

    def heard(self, sums: list[float], step: int, *, stride: int = 1) -> tuple[bool, int]:
        """Of the sums of all words: whether a checkpoint is due after ``step``, and the signal that came, or 0.

        ``stride``: steps since this was asked before.
        """
        every = self.interval.steps
        number = next((int(n) for n, count in zip(CAUGHT, sums[1:], strict=True) if count), 0)
        passed = every is not None and step // every > (step - stride) // every
        return bool(sums[0]) or number != 0 or passed, number


class Saver(Rhythm):
    """The checkpoints of one run in ``folder``; ``stall`` is how many seconds the newest one held the training up."""

    def __init__(self, folder: Path, config: TrainConfig) -> None:
        super().__init__(config.checkpoint_every)
        self.folder, self.keep, self.beside = folder, config.keep_checkpoints, config.async_checkpoint
        self.stall = 0.0
        if is_main():
            folder.mkdir(parents=True, exist_ok=True)
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        # The thread's collectives must not meet those of the training.
        is_apart = self.beside and dist.is_initialized()
        self._group = dist.new_group(backend="gloo", timeout=PATIENCE) if is_apart else None

    def save(self, found: Snapshot) -> None:
        """Write the checkpoint, unless it is the one that the run began from; every process calls it.

        Raises what writing it, or the one before it beside the training, raised.
        """
        step = int(found.meta["step"])
        if step == self._step:
            return
        started = time.monotonic()
        self.settle()
        target = self.folder / f"step-{step:08d}"
        if self.beside:
            self._thread = threading.Thread(target=self._beside, args=(target, found))
            self._thread.start()
        else:
            self._write(target, found)
        self.begin(step)
        self.stall = time.monotonic() - started

    def settle(self) -> None:
        """Wait for the checkpoint that is being written beside the training; raises what went wrong with it."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _beside(self, target: Path, found: Snapshot) -> None:
        try:
            self._write(target, found)
        except Exception as error:  # told to the training by ``settle``
            self._error = error

    def _write(self, target: Path, found: Snapshot) -> None:
        write(target, found, group=self._group)
        if is_main():
            for old in complete_checkpoints(self.folder)[: -self.keep]:
                shutil.rmtree(old)

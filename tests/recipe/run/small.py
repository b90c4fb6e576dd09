"""A small whole run through the command line, and how two of them are compared."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sftmix import cli
from sftmix.run import stages

FLAGS = [
    "--model.dtype", "float32", "--train.batch_size=8", "train.micro_batch_size=4", "--train.epochs", "2",
    "--optim.lr", "0.01", "--reference.epochs", "2", "--data.heldout_fraction", "0.2", "--evaluate.max_new_tokens", "3",
    "--reference.dynamics", "both",
]  # fmt: skip


def sftmix(*arguments: str | Path) -> None:
    """The command line in this process; Ctrl-C and ValueError come through."""
    cli.app([str(a) for a in arguments], standalone_mode=False)


def run(material: tuple[Path, Path], folder: Path, *extra: str) -> None:
    sftmix("run", "--model", material[0], "--data", material[1], "--run-dir", folder, *FLAGS, *extra)


def trained(folder: Path, method: str = "sftmix") -> dict[str, torch.Tensor]:
    return load_file(folder / f"train-{method}" / "model" / "model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


class Stop(Exception):
    """Stands for a kill at some moment."""


def stop_in(monkeypatch: pytest.MonkeyPatch, stage: str, call: Callable[[], None], *, step: int = 5) -> None:
    """Run ``call`` with a kill at that step of ``stage``'s training; 5 is just after its first checkpoint."""

    class StoppingBar:
        def __init__(self, name: str) -> None:
            self.left = step if name == stage else -1

        def __enter__(self) -> StoppingBar:
            return self

        def __exit__(self, *error: object) -> None:
            pass

        def batches(self, done: int, total: int) -> None:
            pass

        def steps(self, number: int, total: int, record: dict[str, Any]) -> None:
            self.left -= 1
            if self.left == 0:
                raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(stages, "bar", StoppingBar)
        with pytest.raises(Stop):
            call()

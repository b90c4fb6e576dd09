"""Modules that run under torchrun on some number of gloo processes, and the results that each rank leaves."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.once import made_once

ROOT = Path(__file__).resolve().parents[2]


def launch(module: str, folder: Path, world: int) -> None:
    """Run ``module`` on ``world`` processes, its results in ``folder``."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    found = subprocess.run(
        [*command, "-m", module, str(folder)],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr[-6000:]


class Results(dict[int, list[Any]]):
    """Each rank's results by world size, made when asked for, once even if pytest runs in several processes."""

    def __init__(self, factory: pytest.TempPathFactory, module: str) -> None:
        super().__init__()
        self.factory, self.module = factory, module

    def __missing__(self, world: int) -> list[Any]:
        name = f"{self.module.rpartition('.')[2]}_{world}"
        folder = made_once(self.factory, name, lambda folder: launch(self.module, folder, world))
        paths = [folder / f"rank{rank}.pt" for rank in range(world)]
        assert all(path.is_file() for path in paths), "see the test that ran the ranks"
        self[world] = [torch.load(path) for path in paths]
        return self[world]

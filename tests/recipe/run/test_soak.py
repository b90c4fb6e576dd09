"""The short form of ``make soak``: a few kills at random moments over all stages end in the undisturbed run's bits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.recipe.run.soak import KINDS

ROOT = Path(__file__).resolve().parents[3]


def soak(folder: Path, kind: str, kills: int) -> list[str]:
    """In a process of its own: it forks, which one that has run threads should not."""
    command = [sys.executable, "-m", "tests.recipe.run.soak", str(folder), "--kind", kind, f"--kills={kills}"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=580, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    told: list[str] = json.loads(done.stdout.splitlines()[-1])["killed_in"]
    return told


def test_a_run_killed_at_random_moments_ends_as_one_that_was_not(tmp_path: Path) -> None:
    assert len(soak(tmp_path, "full", 4)) == 4


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_kind_killed_twenty_times(tmp_path: Path, kind: str) -> None:
    assert len(set(soak(tmp_path, kind, 20))) >= 4  # stages it was killed in

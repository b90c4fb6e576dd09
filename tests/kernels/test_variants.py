"""N and M that change from step to step make Triton compile nothing anew: each compilation costs seconds on a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]


def replay(*options: str) -> list[dict[str, int]]:
    """Keys of each kernel after each step, counted in a process of its own: here Triton interprets."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.kernels.variants", *options]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


KERNELS = {
    "_sftmix_fwd_kernel", "_sftmix_fwd_combine_kernel", "_sftmix_recompute_kernel", "_sftmix_stored_kernel",
    "_sftmix_tokens_kernel", "_sftmix_prepare_kernel", "_sftmix_finish_kernel", "_sftmix_upstream_kernel",
    "_sftmix_gradient_terms_kernel", "_sftmix_scale_kernel", "_sftmix_round_kernel",
}  # fmt: skip


def test_later_steps_compile_at_most_two_variants() -> None:
    """Two, not none: a first step may have no unpaired row."""
    steps = replay("--steps", "200")
    assert len(steps) == 200 and set(steps[-1]) >= KERNELS
    for name, count in steps[-1].items():
        assert count - steps[0].get(name, 0) <= 2, (name, steps[0].get(name), count)
    assert steps[40] == steps[-1]


def test_rows_of_no_whole_16_bytes_have_two_alignments_and_no_more() -> None:
    """The partners' first row is then aligned at some M and not at others."""
    steps = replay("--steps", "60", "--arch", "sm_80", "--hidden", "63")
    assert set(steps[-1]) >= KERNELS
    assert all(count <= 2 * steps[0].get(name, 0) for name, count in steps[-1].items())

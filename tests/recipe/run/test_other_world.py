"""A run that goes on with another number of processes, from damaged shards too, by the command line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from sftmix.scores.dynamics import read_dynamics
from sftmix.training.checkpoint import complete_checkpoints
from sftmix.training.metrics import read_metrics
from sftmix.training.tensor_files import tensor_files
from tests.recipe.hurt import hurt
from tests.recipe.run.small import FLAGS, run, trained
from tests.recipe.run.test_torchrun import workers

ROOT = Path(__file__).resolve().parents[3]
STOPPED = "stopped by SIGTERM"


def stopped(material: tuple[Path, Path], folder: Path, processes: int, stage: str, step: int) -> str:
    """Run until that step of a stage has its checkpoint, then SIGTERM one process; what it printed."""
    arguments = ["run", "--model", material[0], "--data", material[1], "--run-dir", folder, *FLAGS]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *(launcher if processes > 1 else []), "-m", "sftmix", *map(str, arguments)]
    started = subprocess.Popen(
        [*command, "--train.checkpoint_every=1 step"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        newest = f"step-{step:08d}"
        while not any(p.name >= newest for p in complete_checkpoints(folder / stage / "checkpoints")):
            assert started.poll() is None, started.communicate()[0][-4000:]
            time.sleep(0.01)
        os.kill(workers(folder)["1"] if processes > 1 else started.pid, signal.SIGTERM)
        text: str = started.communicate(timeout=120)[0]
    finally:
        started.kill()
    assert started.returncode != 0 and STOPPED in text, text[-4000:]
    return text


@pytest.mark.parametrize("how", ["flip", "cut", "remove"])
def test_one_process_two_and_one_again_with_a_damaged_shard(
    material: tuple[Path, Path], finished: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], how: str
) -> None:
    folder = tmp_path / "r"
    stopped(material, folder, 1, "train-ntp", 2)
    newest = complete_checkpoints(folder / "train-ntp" / "checkpoints")[-1]
    assert all(path.name.startswith("shard-00001") for path in tensor_files(newest))

    text = stopped(material, folder, 2, "train-sftmix", 3)
    assert (
        "reference: done before" in text
        and f"train-ntp: goes on after step {int(newest.name[-8:])} of 6" in text
    )
    newest = complete_checkpoints(folder / "train-sftmix" / "checkpoints")[-1]
    shards = [path for path in tensor_files(newest) if path.name.startswith("shard-00002")]
    assert shards, sorted(path.name for path in newest.iterdir())  # the second process's own
    hurt(shards[-1], how)

    capfd.readouterr()
    run(material, folder, "--train.checkpoint_every=1 step")
    said = "".join(capfd.readouterr())
    assert "train-sftmix: " in said and "going back to" in said and newest.name in said
    assert_as_one_process(folder, finished)


def assert_as_one_process(folder: Path, finished: Path) -> None:
    """The same order of data and lambda, the same losses and weights to the rounding of sums in another order."""
    one, other = (read_dynamics(each / "dynamics.parquet") for each in (folder, finished))
    assert one.examples == other.examples
    np.testing.assert_allclose(one.nll_sum, other.nll_sum, rtol=1e-5)
    assert (folder / "split.parquet").read_bytes() == (finished / "split.parquet").read_bytes()
    for method in ("ntp", "sftmix"):
        ours, theirs = (
            read_metrics(each / f"train-{method}" / "metrics.jsonl") for each in (folder, finished)
        )
        for key in ("step", "num_tokens", "num_mixed"):
            assert [r[key] for r in ours] == [r[key] for r in theirs]
        assert [r["loss"] for r in ours] == pytest.approx([r["loss"] for r in theirs], rel=1e-5)
        a, b = trained(finished, method), trained(folder, method)
        for name, value in a.items():
            torch.testing.assert_close(b[name], value, rtol=0, atol=1e-5, msg=name)

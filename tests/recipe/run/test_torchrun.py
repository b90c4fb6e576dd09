"""``torchrun -m sftmix run``: all stages by two processes, one of which is killed on the way."""

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

from sftmix.run.folder import read_evaluation
from sftmix.scores.dynamics import read_dynamics
from sftmix.training.metrics import read_metrics
from tests.once import made_once
from tests.recipe.run.small import FLAGS, trained

ROOT = Path(__file__).resolve().parents[3]
TORCHRUN = [
    sys.executable,
    "-m",
    "torch.distributed.run",
    "--standalone",
    "--nproc-per-node",
    "2",
    "--max-restarts",
    "2",
]


def workers(folder: Path) -> dict[str, int]:
    """The processes that work on a run folder, by rank."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            command = (entry / "cmdline").read_bytes().split(b"\0")
            variables = dict(v.partition(b"=")[::2] for v in (entry / "environ").read_bytes().split(b"\0"))
        except (OSError, ValueError):
            continue
        if str(folder).encode() in command and b"RANK" in variables:
            found[variables[b"RANK"].decode()] = int(entry.name)
    return found


@pytest.fixture(scope="module")
def killed(material: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of two processes; the second was killed once in the middle of the SFTMix training."""

    def launch(out: Path) -> None:
        folder = out / "run"
        arguments = ["run", "--model", material[0], "--data", material[1], "--run-dir", folder, *FLAGS]
        with (out / "log.txt").open("w") as log:
            started = subprocess.Popen(
                [*TORCHRUN, "-m", "sftmix", *map(str, arguments), "--train.checkpoint_every=1 step"],
                cwd=ROOT, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"},
            )  # fmt: skip
            while started.poll() is None and not list(folder.glob("train-sftmix/checkpoints/step-*2")):
                time.sleep(0.02)
            victim = workers(folder).get("1")
            if victim is not None:
                os.kill(victim, signal.SIGKILL)
                (out / "victim").write_text(str(victim))
            started.wait(timeout=250)
        assert started.returncode == 0, (out / "log.txt").read_text()[-4000:]

    return made_once(tmp_path_factory, "torchrun", launch)


def test_a_killed_process_is_started_again_and_the_run_ends(killed: Path) -> None:
    log = (killed / "log.txt").read_text()
    assert (killed / "victim").exists() and "done before" in log
    steps = [r["step"] for r in read_metrics(killed / "run" / "train-sftmix" / "metrics.jsonl")]
    assert steps == list(range(1, 7))


def test_only_the_first_process_speaks(killed: Path) -> None:
    log = (killed / "log.txt").read_text()
    assert log.count("reference: started") == 1 and log.count("score point 1/2: started") == 1


def test_the_result_is_that_of_one_process(killed: Path, finished: Path) -> None:
    """Scores, weights and held-out figures, to the rounding of sums in another order."""
    run = killed / "run"
    one, two = (read_dynamics(folder / "dynamics.parquet") for folder in (finished, run))
    assert one.examples == two.examples
    np.testing.assert_allclose(one.nll_sum, two.nll_sum, rtol=1e-5)
    for method in ("ntp", "sftmix"):
        a, b = trained(finished, method), trained(run, method)
        for name, value in a.items():
            torch.testing.assert_close(b[name], value, rtol=0, atol=1e-5, msg=name)
    a, b = (read_evaluation(folder / "evaluation.json") for folder in (finished, run))
    for label in ("base", "ntp", "sftmix"):
        assert b[label]["nll"] == pytest.approx(a[label]["nll"], rel=1e-5)
        assert [s["answer"] for s in a[label]["samples"]] == [s["answer"] for s in b[label]["samples"]]

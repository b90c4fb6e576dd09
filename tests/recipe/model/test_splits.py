"""Any split of one global batch over processes and micro-batches gives the same losses and gradients."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from sftmix.model.parallel import World, shard
from tests.once import made_once
from tests.recipe import tiny
from tests.recipe.model.splits import CASES, MICRO, REPLICATED, split
from tests.recipe.training.test_saving import names

ROOT = Path(__file__).resolve().parents[3]
WAYS = [f"{case}-{micro}" for case in CASES for micro in (MICRO if case in ("untied", "lora") else MICRO[:1])]


def launched(factory: pytest.TempPathFactory, processes: int) -> Path:
    def launch(folder: Path) -> None:
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={processes}",
        ]
        done = subprocess.run(
            [*command, "-m", "tests.recipe.model.splits", str(folder)],
            cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=500,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-6000:]

    return made_once(factory, f"splits{processes}", launch)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """By number of processes, the results of every way."""
    return {n: torch.load(launched(tmp_path_factory, n) / "results.pt") for n in (2, 4)}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One process, one micro-batch a step: the batch itself."""
    return {case: split(case, 12, tmp_path_factory.mktemp(case.replace(" ", "-"))) for case in CASES}


def assert_same(one: dict[str, Any], other: dict[str, Any], tolerance: float = 1e-6) -> None:
    """Each gradient to 1e-6 in the 2-norm; losses and norm to 2e-6, and as much again per later step."""
    assert one["gradients"].keys() == other["gradients"].keys()
    for name, value in one["gradients"].items():
        error = float((other["gradients"][name] - value).norm() / value.norm())
        assert error <= tolerance, f"{name}: {error:.2e}"
    for step, (a, b) in enumerate(zip(one["parts"], other["parts"], strict=True), start=1):
        assert b == pytest.approx(a, rel=step * 2e-6)


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("way", WAYS)
def test_a_split_over_processes_is_the_batch(
    found: dict[int, dict[str, Any]], alone: dict[str, Any], processes: int, way: str
) -> None:
    assert_same(alone[way.rpartition("-")[0]], found[processes][way])


@pytest.mark.parametrize("case", REPLICATED)
def test_replicas_are_the_batch(found: dict[int, dict[str, Any]], alone: dict[str, Any], case: str) -> None:
    """Two groups of two processes, each with the whole model."""
    assert_same(alone[case], found[4][f"replicas {case}"])


@pytest.mark.parametrize("case", CASES)
def test_accumulation_in_one_process_is_the_batch(alone: dict[str, Any], tmp_path: Path, case: str) -> None:
    assert_same(alone[case], split(case, 2, tmp_path))


@pytest.mark.parametrize("way", ["replicas untied", "untied-2", "exchange-2", "beside"])
def test_a_checkpoint_of_four_processes_is_taken_up_by_one(
    found: dict[int, dict[str, Any]], tmp_path: Path, way: str
) -> None:
    """Sharded, replicated, exchanged, or written beside the training."""
    folder = Path(found[4][way]["checkpoint"]).parents[1]
    assert names(folder)[-1] == 3
    other = split("untied", 4, tmp_path)
    masters = dict(tiny.model("llama").named_parameters())
    for kind in ("weights", "exp_avg"):
        one, four = (
            tiny.saved(Path(path), masters, kind)
            for path in (other["checkpoint"], found[4][way]["checkpoint"])
        )
        for name, value in one.items():
            bound = 1e-5 * float(value.abs().max())
            torch.testing.assert_close(four[name], value, rtol=0, atol=bound, msg=name)


@pytest.mark.parametrize("processes", [2, 4])
def test_a_signal_to_one_process_ends_all_after_one_checkpoint(
    found: dict[int, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory, processes: int
) -> None:
    assert found[processes]["signal"]["codes"] == [143] * processes
    assert names(launched(tmp_path_factory, processes) / "signal") == [2]


@pytest.mark.parametrize("processes", [2, 4])
def test_a_loss_that_is_no_number_on_one_process_is_left_out_by_all(
    found: dict[int, dict[str, Any]], processes: int
) -> None:
    told = found[processes]["nan"]
    assert told["codes"] == [0] * processes
    losses = [parts[0] for parts in told["parts"]]
    assert losses[1] is None and losses[0] is not None and losses[2] is not None


@pytest.mark.parametrize("size", [2, 4])
def test_every_group_waits_for_a_main_process_that_tokenises(
    found: dict[int, dict[str, Any]], size: int
) -> None:
    """torch's own default is thirty minutes, ten with NCCL, for each group that is made."""
    waits = found[size]["waits"]
    assert set(waits) == {7200.0} and len(waits) >= size  # the world, the checkpoints', the replicas'


def test_replicas_divide_the_processes() -> None:
    with pytest.raises(ValueError, match=r"train\.replicas: expected a divisor of the 4 processes, got 3"):
        shard(tiny.model(), World(size=4), replicas=3)
    with pytest.raises(ValueError, match="each of the 2 replicas has a head of its own"):
        shard(tiny.model(), World(size=4), replicas=2, head_sharding="exchange")

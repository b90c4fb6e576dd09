"""What a machine does to a run: a signal, a disk that fills, a folder that goes. It ends with a line, and goes on."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from sftmix.training.checkpoint import complete_checkpoints
from sftmix.training.metrics import read_metrics
from tests.recipe.run.small import FLAGS, run, same, trained

ROOT = Path(__file__).resolve().parents[3]
Material = tuple[Path, Path]


def started(
    material: Material, folder: Path, *, before: Callable[[], None] | None = None
) -> subprocess.Popen[str]:
    """``sftmix run`` in a process of its own."""
    arguments = ["run", "--model", material[0], "--data", material[1], "--run-dir", folder, *FLAGS]
    return subprocess.Popen(
        [sys.executable, "-m", "sftmix", *map(str, arguments)], cwd=ROOT, text=True, preexec_fn=before,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def wait_for(process: subprocess.Popen[str], path: Path) -> None:
    """Until a file is there and not empty."""
    deadline = time.monotonic() + 120
    while not (path.is_file() and path.stat().st_size) and time.monotonic() < deadline:
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        time.sleep(0.002)


@pytest.mark.parametrize(
    "number, code",
    [(signal.SIGTERM, 143), (signal.SIGINT, 130), pytest.param(signal.SIGUSR1, 138, marks=pytest.mark.slow)],
)
def test_a_signal_ends_the_command_with_its_code_and_a_checkpoint(
    material: Material, finished: Path, tmp_path: Path, number: int, code: int
) -> None:
    folder = tmp_path / "r"
    process = started(material, folder)
    wait_for(process, folder / "train-ntp" / "metrics.jsonl")
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    name = signal.Signals(number).name
    lines = [line for line in err.splitlines() if line.startswith("sftmix: ")]
    assert len(lines) == 1 and "the same command goes on from here" in lines[0]
    if f"stopped by {name}" in lines[0] and "train-ntp step" in lines[0]:
        step = int(lines[0].split("step ")[1].split()[0])
        assert complete_checkpoints(folder / "train-ntp" / "checkpoints")[-1].name == f"step-{step:08d}"
        assert len(read_metrics(folder / "train-ntp" / "metrics.jsonl")) == step
    assert "Traceback" not in err
    run(material, folder)
    assert all(same(trained(folder, method), trained(finished, method)) for method in ("ntp", "sftmix"))


def test_a_write_that_fails_half_way_loses_nothing(
    material: Material, finished: Path, tmp_path: Path
) -> None:
    """Files may not pass 24 kB: the first checkpoint stops in the middle, as on a full disk."""
    folder = tmp_path / "r"
    limit = 24_000
    process = started(
        material, folder, before=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    )
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2 and "Traceback" not in err, err
    line = next(line for line in err.splitlines() if line.startswith("sftmix: "))
    assert "expected to read or write it" in line and "the same command" in line
    assert complete_checkpoints(folder / "reference" / "checkpoints") == []
    run(material, folder)
    assert same(trained(folder), trained(finished))


def test_a_run_folder_that_is_deleted_ends_the_run_with_a_line(material: Material, tmp_path: Path) -> None:
    folder = tmp_path / "r"
    process = started(material, folder)
    wait_for(process, folder / "reference" / "metrics.jsonl")
    shutil.rmtree(folder)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2 and "Traceback" not in err, err
    assert any(line.startswith("sftmix: ") and "got" in line for line in err.splitlines()), err


def test_a_damaged_line_of_the_metrics_is_left_out_with_a_word(
    material: Material, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "r"
    run(material, folder)
    shutil.rmtree(folder / "train-sftmix" / "model")
    path = folder / "train-sftmix" / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    lines[1] = b'{"loss": 3}\n'
    lines[3] = b'\xff\xfe{"step"\n'
    path.write_bytes(b"".join(lines))
    capfd.readouterr()
    run(material, folder)
    told = capfd.readouterr().out
    assert "left out what cannot be read: line 2, 4" in " ".join(told.split())
    assert [record["step"] for record in read_metrics(path)] == [1, 3, 5, 6]

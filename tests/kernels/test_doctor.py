"""The doctor: a healthy machine passes; what is wrong is found, with its sentence and without a traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import sftmix_kernels.fused  # noqa: F401  # before a test takes TRITON_INTERPRET away
from sftmix_kernels import Finding
from sftmix_kernels.doctor import examine as doctor
from sftmix_kernels.doctor.findings import show
from sftmix_kernels.doctor.self_check import Way
from tests.test_install import run_blocked

ROOT = Path(__file__).resolve().parent.parent.parent
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


# ---- the command ----


def test_it_runs_without_triton_and_the_recipe_on_one_screen() -> None:
    """The CPU's path, on a machine of any size: what is enough is set to nothing."""
    done = run_blocked("""
import os, runpy
os.environ["CUDA_VISIBLE_DEVICES"], os.environ["OMP_NUM_THREADS"] = "", "1"
from sftmix_kernels.doctor import limits
limits.LEAST_MEMORY = limits.LEAST_DISK = limits.LEAST_TEMPORARY = 0
runpy.run_module("sftmix_kernels", run_name="__main__")
""")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) <= 40 and max(map(len, lines)) <= 80
    text = " ".join(done.stdout.split())
    assert text.startswith("sftmix_kernels:") and "Nothing is wrong." in text
    for part in (
        f"Python {sys.version.split()[0]}", f"torch {torch.__version__}", "triton not installed", "device CPU:",
        "bfloat16", "usable; torch runs", "GiB free", "GB free at", "loss chunked, in every data type; not fused:",
        "float32: chunked right", "bfloat16: chunked right", "float16: chunked right", "float32 ",
    ):  # fmt: skip
        assert part in text, part
    assert "Traceback" not in done.stderr


def run_module(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sftmix_kernels", *arguments]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **environment}
    )


def test_the_first_line_comes_before_torch_and_a_broken_torch_is_a_finding(tmp_path: Path) -> None:
    """`python -m torch.utils.collect_env` could not say what was wrong with a torch that it could not import."""
    (tmp_path / "torch.py").write_text("raise OSError('libcudart.so.12: cannot open shared object file')")
    done = run_module(PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    assert lines[0].startswith("sftmix_kernels: this machine")
    assert "! torch        cannot be imported: OSError: libcudart.so.12: cannot open" in lines[1]
    assert "install torch anew" in done.stdout
    assert done.stderr == ""
    done = run_module("--json", PYTHONPATH=str(tmp_path))
    assert json.loads(done.stdout)["ok"] is False


def test_only_the_main_process_prints() -> None:
    done = run_module(RANK="1", WORLD_SIZE="2")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_wrong_flag_is_one_line() -> None:
    done = run_module("--jsn")
    assert done.returncode == 2 and done.stderr.splitlines() == [
        "usage: python -m sftmix_kernels [--json], got --jsn"
    ]


def test_json_is_one_object_with_every_finding(capsys: pytest.CaptureFixture[str]) -> None:
    assert show("t", [Finding("a", "b"), Finding("c", "d", "wrong", "e")], as_json=True) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] is False
    assert found["findings"][1] == {"name": "c", "text": "d", "level": "wrong", "advice": "e"}


def test_examine_asks_everything_and_puts_more_before_the_check(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(doctor, "parity_findings", lambda device: [Finding("parity", "patched", "wrong")])
    monkeypatch.setattr(doctor, "current_device", lambda: CPU)
    assert doctor.examine([Finding("more", "here")], folders={"HF_HOME": str(tmp_path)}) == 1
    names = [line[2:14].strip() for line in capsys.readouterr().out.splitlines()]
    order = ("Python", "torch", "triton", "device", "products", "cores", "memory", "disk", "loss", "schedule")
    assert [name for name in dict.fromkeys(names) if name in order] == list(order)
    assert names.index("schedule") < names.index("more") < names.index("parity") < names.index("timing")


# ---- the path of a call ----


def test_on_a_gpu_the_kernels_and_the_schedule_of_its_chip(
    h100: None, monkeypatch: pytest.MonkeyPatch, says: Any
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(doctor, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(doctor, "build_findings", list)
    with FakeTensorMode():
        code, text = says(doctor.path_findings(GPU))
        assert doctor.ways(GPU)[torch.bfloat16] == [Way("fused", "recompute"), Way("fused", "stored")]
    assert code == 0 and "loss the Triton kernels (fused)" in text
    assert "stored from there on, at V, D = 128256, 4096 in bfloat16 (cost model of H200)" in text


def test_interpreting_on_a_gpu_is_wrong(h100: None, monkeypatch: pytest.MonkeyPatch, says: Any) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(doctor, "build_findings", list)
    with FakeTensorMode():
        code, text = says(doctor.path_findings(GPU))
    assert (
        code == 1
        and "TRITON_INTERPRET=1: kernels would be interpreted" in text
        and "unset TRITON_INTERPRET" in text
    )


def test_a_gpu_without_triton_takes_chunked_and_says_why(
    h100: None, monkeypatch: pytest.MonkeyPatch, says: Any
) -> None:
    from sftmix_kernels import choice

    monkeypatch.setattr(choice, "_HAS_TRITON", False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with FakeTensorMode():
        text = says(doctor.path_findings(GPU))[1]
    assert "loss chunked, in every data type; not fused: triton is not installed" in text


def test_what_triton_needs_at_its_first_kernel(
    monkeypatch: pytest.MonkeyPatch, says: Any, tmp_path: Path
) -> None:
    """A compiler, Python's headers and a folder for kernels: missed by many, and seen only when a kernel first runs."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("CC", sys.executable)
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(doctor.sysconfig, "get_paths", lambda scheme: {"include": str(tmp_path)})
    assert says(doctor.build_findings())[0] == 0
    monkeypatch.setenv("CC", "no-such-compiler")
    code, text = says(doctor.build_findings())
    assert (
        code == 1 and "no no-such-compiler on the PATH" in text and "apt-get install build-essential" in text
    )
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "Python.h").unlink()
    code, text = says(doctor.build_findings())
    assert (
        code == 1
        and "no gcc or clang on the PATH" in text
        and "no Python.h in" in text
        and "python3-dev" in text
    )


def test_a_kernel_cache_that_cannot_be_written_is_wrong(monkeypatch: pytest.MonkeyPatch, says: Any) -> None:
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    monkeypatch.setenv("TRITON_HOME", "/proc/no-home")
    code, text = says(doctor.build_findings())
    assert code == 1 and "kernel cache /proc/no-home/.triton/cache" in text and "set TRITON_CACHE_DIR" in text


# ---- timing ----


def test_a_product_is_timed_in_each_data_type(monkeypatch: pytest.MonkeyPatch, says: Any) -> None:
    times = {torch.float32: 2.0, torch.bfloat16: 80.0, torch.float16: 1.0}
    monkeypatch.setattr(doctor, "time_product", lambda dtype, device, sizes: times[dtype])
    text = says([doctor.timing_finding(CPU)])[1]
    assert "float32 2 ms, bfloat16 80 ms (40.0 x), float16 1 ms (0.5 x)" in text

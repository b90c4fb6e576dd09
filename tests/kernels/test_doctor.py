"""The doctor: a healthy machine passes; what is wrong is found, with its sentence and without a traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import sftmix_kernels.fused  # noqa: F401  # before a test takes TRITON_INTERPRET away
from sftmix_kernels import Finding, devices, doctor, limits, self_check
from sftmix_kernels.findings import show
from sftmix_kernels.self_check import FULL, PLAIN, Way
from tests.parity import assert_draws_within_contract
from tests.test_install import PYPROJECT, run_blocked, table_of

ROOT = Path(__file__).resolve().parent.parent.parent
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture
def says(capsys: pytest.CaptureFixture[str]) -> Callable[[Iterable[Finding]], tuple[int, str]]:
    """Exit code and printed text, in one line, of some findings."""

    def verdict(findings: Iterable[Finding]) -> tuple[int, str]:
        code = show("title", findings)
        return code, " ".join(capsys.readouterr().out.split())

    return verdict


# ---- the command ----


def test_it_runs_without_triton_and_the_recipe_on_one_screen() -> None:
    """The CPU's path, on a machine of any size: what is enough is set to nothing."""
    done = run_blocked("""
import os, runpy
os.environ["CUDA_VISIBLE_DEVICES"], os.environ["OMP_NUM_THREADS"] = "", "1"
from sftmix_kernels import limits
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


# ---- versions ----


def test_least_versions_are_pyprojects() -> None:
    needed = {requirement.name: str(requirement.specifier) for requirement in table_of("dependencies")}
    assert {name: f">={devices.LEAST[name]}" for name in ("torch", "triton")} == needed
    assert PYPROJECT["project"]["requires-python"] == f">={devices.LEAST['Python']}"


@pytest.mark.parametrize(
    "version, least, good",
    [
        ("2.11", "2.11", True), ("2.11.0+cu130", "2.11", True), ("2.13.0a0+git12", "2.11", True),
        ("2.9.1", "2.11", False), ("3.10", "3.6", True), ("2.10.99", "2.11", False), ("dev", "1.0", False),
    ],
)  # fmt: skip
def test_versions_are_compared_by_number(version: str, least: str, good: bool) -> None:
    assert Finding.of_version("x", version, least).level == ("well" if good else "wrong")


def test_an_old_torch_is_wrong(monkeypatch: pytest.MonkeyPatch, says: Any) -> None:
    monkeypatch.setattr(torch, "__version__", "2.5.1+cu121")
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    code, text = says(devices.version_findings(CPU))
    assert code == 1
    assert (
        'torch 2.5.1+cu121, a CPU build is too old (supported: >= 2.11) -> pip install --upgrade "torch>=2.11"'
        in text
    )


def test_triton_is_needed_on_a_gpu_only(monkeypatch: pytest.MonkeyPatch, says: Any) -> None:
    monkeypatch.setattr(devices, "find_spec", lambda name: None)
    assert says([devices.triton(CPU)]) == (
        0,
        "triton not installed; nothing on a CPU needs it Nothing is wrong.",
    )
    code, text = says([devices.triton(GPU)])
    assert code == 1 and 'slower chunked implementation -> pip install --upgrade "triton>=3.6"' in text


def test_a_triton_that_cannot_be_imported_is_wrong_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, says: Any
) -> None:
    import sftmix_kernels

    monkeypatch.setitem(sys.modules, "sftmix_kernels.fused", None)
    monkeypatch.delattr(sftmix_kernels, "fused", raising=False)
    code, text = says([devices.triton(GPU)])
    assert code == 1 and "triton installed, but its import fails: ModuleNotFoundError" in text
    assert "pip show torch" in text


def test_triton_under_the_name_of_torchs_rocm_build_is_found(
    monkeypatch: pytest.MonkeyPatch, says: Any
) -> None:
    monkeypatch.setattr(devices, "installed", {"pytorch-triton-rocm": "3.6.0"}.get)
    assert says([devices.triton(CPU)])[1].startswith("triton 3.6.0 (supported")


# ---- device ----


Properties = namedtuple("Properties", "name major minor multi_processor_count gcnArchName")


@pytest.fixture
def h100(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch as it is on a machine with one GPU, as far as it is asked."""
    properties = Properties("NVIDIA H100", 9, 0, 132, "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80"])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (79 * 2**30, 80 * 2**30))
    monkeypatch.setattr(devices, "time_product", lambda *args, **options: 1.0)


def test_a_gpu_is_told_with_what_it_can_do(h100: None, says: Any) -> None:
    code, text = says(devices.device_findings(devices.current_device()))
    assert code == 0
    assert "device NVIDIA H100, sm_90, 132 processors, 79.0 of 80.0 GiB free" in text
    assert "bfloat16 in hardware: compute capability 9.0" in text


@pytest.mark.parametrize(
    "error, advice",
    [
        ("CUDA error: no kernel image is available for execution on the device",
         "built for sm_75 sm_80: install one built for sm_90"),
        ("CUDA error: all CUDA-capable devices are busy or unavailable", "whether another process holds the GPU"),
    ],
)  # fmt: skip
def test_a_gpu_on_which_no_product_runs_is_wrong(
    h100: None, monkeypatch: pytest.MonkeyPatch, says: Any, error: str, advice: str
) -> None:
    """torch.cuda.is_available() is True for a GPU that this torch has no kernels for."""

    def fail(*args: object, **options: object) -> float:
        raise RuntimeError(error + "\nCompile with TORCH_USE_CUDA_DSA")

    monkeypatch.setattr(devices, "time_product", fail)
    code, text = says(devices.device_findings(GPU))
    assert code == 1 and error in text and advice in text and "DSA" not in text


def no_gpu(monkeypatch: pytest.MonkeyPatch, *, built: bool, sign: str, reason: str = "") -> None:
    def init() -> None:
        raise RuntimeError(reason)

    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: built)
    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.setattr(devices, "has_driver", lambda: sign == "driver")
    monkeypatch.setattr(devices, "has_card", lambda: sign != "")
    for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)


OLD_DRIVER = "The NVIDIA driver on your system is too old (found version 11040)."
NO_DRIVER = "Found no NVIDIA driver on your system."


@pytest.mark.parametrize(
    "built, sign, reason, code, part",
    [
        (False, "", "", 0, ""),
        (False, "driver", "", 1, "this torch is a CPU build -> install torch's CUDA (or ROCm) build"),
        (False, "card", "", 0, "~ GPU this machine has one, but this torch is a CPU build"),
        (True, "driver", NO_DRIVER, 1, f"sees none: RuntimeError: {NO_DRIVER} -> install the driver"),
        (True, "card", NO_DRIVER, 1, f"sees none: RuntimeError: {NO_DRIVER} -> install the driver"),
        (True, "", OLD_DRIVER, 1, f"{OLD_DRIVER} -> install the driver this torch needs, or a torch for the driver"),
        (True, "", NO_DRIVER, 0, "if not, all runs on the CPU, and a CPU build is smaller"),
    ],
)  # fmt: skip
def test_a_gpu_that_torch_does_not_use_is_told_with_torchs_reason(
    monkeypatch: pytest.MonkeyPatch, says: Any, built: bool, sign: str, reason: str, code: int, part: str
) -> None:
    no_gpu(monkeypatch, built=built, sign=sign, reason=reason)
    found, text = says(devices.device_findings(CPU))
    assert found == code and part in text
    assert ("GPU" in text) == bool(part)


def test_a_gpu_that_the_user_hides_is_no_fault(monkeypatch: pytest.MonkeyPatch, says: Any) -> None:
    no_gpu(monkeypatch, built=True, sign="driver", reason="No CUDA GPUs are available")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    code, text = says(devices.device_findings(CPU))
    assert code == 0 and "GPU hidden by CUDA_VISIBLE_DEVICES=-1" in text


def test_an_nvidia_card_is_seen_on_the_bus(tmp_path: Path) -> None:
    write(
        tmp_path, {"sys/bus/pci/devices/0/vendor": "0x10de", "sys/bus/pci/devices/0/class": "0x040300"}
    )  # its sound
    write(tmp_path, {"sys/bus/pci/devices/1/vendor": "0x8086", "sys/bus/pci/devices/1/class": "0x030000"})
    assert not devices.has_card(tmp_path)
    write(tmp_path, {"sys/bus/pci/devices/2/vendor": "0x10de", "sys/bus/pci/devices/2/class": "0x030200"})
    assert devices.has_card(tmp_path)


def test_16_bit_products_not_in_hardware_are_said_and_no_fault(
    monkeypatch: pytest.MonkeyPatch, says: Any
) -> None:
    from sftmix_kernels import ProductSupport

    monkeypatch.setattr(devices, "product_support", lambda *args: ProductSupport(False, "asked"))
    monkeypatch.setattr(devices, "unused_gpu", lambda: None)
    code, text = says(devices.device_findings(CPU))
    assert code == 0 and "~ products bfloat16 not in hardware, float32 is faster: asked" in text


# ---- limits ----


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


HOST = {"proc/meminfo": "MemTotal: 67108864 kB\nMemFree: 1 kB\nMemAvailable: 50331648 kB"}  # 64 and 48 GiB
V1_NONE = str(2**63 - 4096)
GIB = 2**30


@pytest.mark.parametrize(
    "files, free, total",
    [
        ({}, 48, 64),
        # version 2: its own group is unlimited, the one around it is not
        ({"proc/self/cgroup": "0::/pod/box", "sys/fs/cgroup/pod/memory.max": str(8 * GIB),
          "sys/fs/cgroup/pod/memory.current": str(5 * GIB), "sys/fs/cgroup/pod/box/memory.max": "max",
          "sys/fs/cgroup/pod/memory.stat": f"anon 1\ninactive_file {2 * GIB}"}, 5, 8),
        # version 2 in a container that sees its own group as the top
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/memory.max": str(2 * GIB),
          "sys/fs/cgroup/memory.current": str(GIB)}, 1, 2),
        # version 1; the path is the host's and cannot be seen from inside
        ({"proc/self/cgroup": "5:cpuset:/\n4:memory:/docker/ab12",
          "sys/fs/cgroup/memory/memory.limit_in_bytes": str(4 * GIB),
          "sys/fs/cgroup/memory/memory.usage_in_bytes": str(3 * GIB),
          "sys/fs/cgroup/memory/memory.stat": f"total_inactive_file {GIB // 2}"}, 1.5, 4),
        ({"proc/self/cgroup": "4:memory:/", "sys/fs/cgroup/memory/memory.limit_in_bytes": V1_NONE,
          "sys/fs/cgroup/memory/memory.usage_in_bytes": str(9 * GIB)}, 48, 64),
        # another group's limit is not ours
        ({"proc/self/cgroup": "0::/mine", "sys/fs/cgroup/other/memory.max": str(GIB)}, 48, 64),
    ],
)  # fmt: skip
def test_memory_is_the_containers(tmp_path: Path, files: dict[str, str], free: float, total: float) -> None:
    found = limits.memory(write(tmp_path, {**HOST, **files}))
    assert found == (free * GIB, total * GIB, total != 64)


def test_memory_without_proc_is_not_known(tmp_path: Path) -> None:
    assert limits.memory(tmp_path) is None


@pytest.mark.parametrize(
    "files, quota",
    [
        ({"proc/self/cgroup": "0::/a", "sys/fs/cgroup/a/cpu.max": "max 100000"}, None),
        ({"proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/a/cpu.max": "150000 100000",
          "sys/fs/cgroup/a/b/cpu.max": "400000 100000"}, 1.5),
        ({"proc/self/cgroup": "2:cpu,cpuacct:/x", "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "200000",
          "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000"}, 2.0),
        ({"proc/self/cgroup": "2:cpu:/", "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
          "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"}, None),
        ({"proc/self/cgroup": "not a line"}, None),
    ],
)  # fmt: skip
def test_the_quota_of_cores_is_the_containers(
    tmp_path: Path, files: dict[str, str], quota: float | None
) -> None:
    root = write(tmp_path, files)
    assert limits.cpu_quota(root) == quota
    found = limits.cores(root)
    allowed = len(os.sched_getaffinity(0))
    assert found.usable == (allowed if quota is None else min(allowed, -int(-quota // 1)))


def set_cores(monkeypatch: pytest.MonkeyPatch, usable: int, threads: int, quota: float | None = None) -> None:
    monkeypatch.setattr(limits, "cores", lambda: limits.Cores(usable, 64, quota))
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(limits.os, "getloadavg", lambda: (0.5, 0.5, 0.5))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


def test_more_threads_than_the_container_has_cores_are_wrong(
    monkeypatch: pytest.MonkeyPatch, says: Any
) -> None:
    set_cores(monkeypatch, usable=2, threads=64, quota=2.0)
    code, text = says(limits.limit_findings({}))
    assert code == 1 and "2 usable (quota 2 of the host's 64); torch runs 64 threads" in text
    assert "set OMP_NUM_THREADS=2" in text


@pytest.mark.parametrize("asked, code", [("16", 1), ("16,2", 1), ("4", 0), ("many", 0), ("", 0)])
def test_omp_num_threads_above_the_cores_is_wrong(
    monkeypatch: pytest.MonkeyPatch, says: Any, asked: str, code: int
) -> None:
    set_cores(monkeypatch, usable=4, threads=4)
    monkeypatch.setenv("OMP_NUM_THREADS", asked)
    found, text = says(limits.limit_findings({}))
    assert found == code and ("set OMP_NUM_THREADS=4" in text) == bool(code)


def test_one_thread_of_many_cores_and_a_busy_machine_are_said(
    monkeypatch: pytest.MonkeyPatch, says: Any
) -> None:
    set_cores(monkeypatch, usable=4, threads=1)
    code, text = says(limits.limit_findings({}))
    assert code == 0 and "~ cores" in text and "to use them all set OMP_NUM_THREADS=4" in text
    monkeypatch.setattr(limits.os, "getloadavg", lambda: (200.0, 1.0, 1.0))
    assert "other programs run (load 200.0)" in says(limits.limit_findings({}))[1]


def test_little_memory_is_wrong(monkeypatch: pytest.MonkeyPatch, says: Any) -> None:
    monkeypatch.setattr(limits, "memory", lambda: limits.Memory(3 * GIB, 16 * GIB, True))
    code, text = says(limits.limit_findings({}))
    assert code == 1 and "3.0 of 16.0 GiB free, by the container's limit -> free 4 GiB" in text


Usage = namedtuple("Usage", "total used free")


def test_a_full_disk_is_wrong_wherever_it_is(
    monkeypatch: pytest.MonkeyPatch, says: Any, tmp_path: Path
) -> None:
    cache = tmp_path / "cache" / "not" / "made"

    def usage(folder: Path) -> Usage:
        return Usage(0, 0, 4 * 10**9 if Path(folder) == tmp_path else 10**12)

    monkeypatch.setattr(limits.shutil, "disk_usage", usage)
    code, text = says(limits.limit_findings({"HF_HOME": str(cache)}))
    assert code == 1
    assert "! disk 4.0 GB free at" in text
    assert "free 5 GB, or set HF_HOME to a folder on another disk" in text
    monkeypatch.chdir(tmp_path)
    assert "free 5 GB, or go to a folder on another disk" in says(limits.limit_findings({}))[1]


def test_a_folder_that_cannot_be_written_is_wrong(
    monkeypatch: pytest.MonkeyPatch, says: Any, tmp_path: Path
) -> None:
    monkeypatch.setattr(limits.os, "access", lambda path, mode: Path(path) != tmp_path)
    code, text = says(limits.limit_findings({"HF_HOME": str(tmp_path)}))
    assert code == 1 and "cannot be written -> set HF_HOME to a folder of yours" in text


def test_a_current_folder_that_is_gone_is_a_finding(
    monkeypatch: pytest.MonkeyPatch, says: Any, tmp_path: Path
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    code, text = says(limits.limit_findings({}))
    assert code == 1 and "FileNotFoundError" in text and "change to a folder that is there" in text


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


# ---- the check of the loss ----


@pytest.mark.parametrize("options", [PLAIN, FULL], ids=["plain", "full"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_chunked_is_right(dtype: torch.dtype, options: dict[str, Any]) -> None:
    check = self_check.check_way(Way("chunked"), dtype, "cpu", options)
    assert check.is_right, check
    assert check.share > 0.1, check  # the bound is near the errors: a fault cannot hide under it


@pytest.fixture
def smaller(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Problems that Triton's interpreter does in seconds."""
    for name, size in {"PAIRS": 9, "ROWS": 24, "VOCAB": 131, "WIDTH": 32}.items():
        monkeypatch.setattr(self_check, name, size)
    self_check._expected.cache_clear()
    yield
    self_check._expected.cache_clear()


# In Triton's interpreter not bfloat16, whose bit patterns it multiplies; the check says so.
@pytest.mark.parametrize("dtype", DTYPES if torch.cuda.is_available() else [torch.float32, torch.float16])
@pytest.mark.parametrize("schedule", ["recompute", "stored"])
def test_fused_is_right(smaller: None, schedule: str, dtype: torch.dtype) -> None:
    for options in (PLAIN, FULL):
        check = self_check.check_way(Way("fused", schedule), dtype, doctor.current_device(), options)
        assert check.is_right and check.share > 0.1, check


# Each with the data types in which it must be found: a small one drowns in 16-bit roundings.
FAULTS: dict[str, tuple[int, Callable[[Any], Any]]] = {
    "loss": (1, lambda out: out._replace(loss=out.loss * 1.0001)),
    "nll": (1, lambda out: out._replace(nll=out.nll + 1e-4)),
    "lse": (3, lambda out: out._replace(lse=out.lse.roll(1))),
    "mixup_nll": (3, lambda out: out._replace(mixup_nll=out.mixup_nll.flip(0))),
    "NaN": (3, lambda out: out._replace(lse=torch.full_like(out.lse, float("nan")))),
    "shape": (3, lambda out: out._replace(nll=out.nll[1:])),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_loss_with_a_fault_is_found(monkeypatch: pytest.MonkeyPatch, says: Any, fault: str) -> None:
    right, (least, spoil) = self_check.sftmix_loss, FAULTS[fault]

    def broken(*args: Any, **options: Any) -> Any:
        out = right(*args, **options)
        return spoil(out) if options["impl"] == "chunked" else out

    monkeypatch.setattr(self_check, "sftmix_loss", broken)
    code, text = says(doctor.parity_findings(CPU))
    assert code == 1 and text.count("! parity") >= least
    assert "! parity float32: chunked" in text


@pytest.mark.parametrize("name", ["hidden", "weight", "bias"])
@pytest.mark.parametrize("factor", [1.001, 0.0, -1.0])
def test_a_gradient_with_a_fault_is_found(monkeypatch: pytest.MonkeyPatch, name: str, factor: float) -> None:
    right = self_check.sftmix_loss

    def broken(hidden: Any, weight: Any, *args: Any, bias: Any, impl: str, **options: Any) -> Any:
        leaves = {"hidden": hidden, "weight": weight, "bias": bias}
        if impl == "chunked":
            leaves[name].register_hook(lambda gradient: gradient * factor)
        return right(*[leaves["hidden"], leaves["weight"]], *args, bias=bias, impl=impl, **options)

    monkeypatch.setattr(self_check, "sftmix_loss", broken)
    check = self_check.check_way(Way("chunked"), torch.float32, "cpu", FULL)
    assert not check.is_right and check.result == f"d{name}"


def test_a_fault_deep_in_the_kernels_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pairs' shares exchanged where both implementations' operators take them."""
    from sftmix_kernels import functional

    right = functional._operator

    def broken(impl: str, schedule: str | None) -> Any:
        op = right(impl, schedule)
        return lambda hidden, weight, bias, target, lam, *rest: op(
            hidden, weight, bias, target, 1 - lam, *rest
        )

    monkeypatch.setattr(functional, "_operator", broken)
    for dtype in DTYPES:
        assert not self_check.check_way(Way("chunked"), dtype, "cpu", PLAIN).is_right


def test_a_loss_that_raises_is_a_finding(monkeypatch: pytest.MonkeyPatch, says: Any) -> None:
    right = self_check.sftmix_loss

    def broken(*args: Any, **options: Any) -> Any:
        if options["impl"] != "reference":
            raise RuntimeError("PassManager::run failed\nlong text")
        return right(*args, **options)

    monkeypatch.setattr(self_check, "sftmix_loss", broken)
    code, text = says(doctor.parity_findings(CPU))
    assert code == 1
    assert "float32: chunked fails: RuntimeError: PassManager::run failed -> mend" in text


def test_cases_that_the_time_does_not_reach_are_said(monkeypatch: pytest.MonkeyPatch, says: Any) -> None:
    monkeypatch.setattr(self_check, "check_loss", lambda ways, device: iter(()))
    code, text = says(doctor.parity_findings(CPU))
    assert code == 0 and "bfloat16: chunked not reached in 10 s" in text


def test_no_case_begins_when_the_time_is_over() -> None:
    assert list(self_check.check_loss({torch.float32: [Way("chunked")]}, "cpu", seconds=0)) == []


@pytest.mark.parametrize("scale", [0.3, 0.9, 1.1, 3.0])
def test_the_bound_is_that_of_the_tests(scale: float) -> None:
    """The doctor's share is above 1 exactly where tests/parity.py refuses."""
    for seed in range(8):
        g = torch.Generator().manual_seed(seed)
        draws = []
        for _ in range(3):
            truth = torch.randn(50, generator=g, dtype=torch.float64)
            error = 1e-3 * torch.randn(50, generator=g, dtype=torch.float64)
            ours = truth + 2 * scale * 1e-3 * torch.randn(50, generator=g, dtype=torch.float64)
            draws.append((ours.float(), (truth + error).float(), truth))
        sizes = [self_check._sizes(ours, torchs.double() - truth, truth) for ours, torchs, truth in draws]
        share = self_check._share(torch.stack(sizes), torch.finfo(torch.float32).eps)
        try:
            assert_draws_within_contract("x", draws)
        except AssertionError:
            assert share > 1
        else:
            assert share <= 1
        if scale in (0.3, 3.0):
            assert (share > 1) == (scale == 3.0)


# ---- timing ----


def test_a_product_is_timed_in_each_data_type(monkeypatch: pytest.MonkeyPatch, says: Any) -> None:
    times = {torch.float32: 2.0, torch.bfloat16: 80.0, torch.float16: 1.0}
    monkeypatch.setattr(doctor, "time_product", lambda dtype, device, sizes: times[dtype])
    text = says([doctor.timing_finding(CPU)])[1]
    assert "float32 2 ms, bfloat16 80 ms (40.0 x), float16 1 ms (0.5 x)" in text

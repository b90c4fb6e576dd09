"""Cores, memory and disk as the container has them, and the doctor's sentence where they are too little."""

from __future__ import annotations

import os
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch

from sftmix_kernels.doctor import limits


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

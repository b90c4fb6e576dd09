"""What this process may use: cores, memory, disk, and whether it is enough. A container's limits count, not the host's.

Linux writes them under /sys/fs/cgroup, in two versions: one tree for all (v2), or one a controller (v1). A process is
bound by the groups around its own too, so every folder from its own up to the top is read.
"""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from .findings import NOTE, WRONG, Finding, first_line

GIB = 2**30
LEAST_MEMORY, LEAST_DISK, LEAST_TEMPORARY = 4 * GIB, 5 * 10**9, 10**9
ROOT = Path("/")
# Limit and use in bytes, and the line of memory.stat with file pages that are given back when they are needed.
_MEMORY_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


class Cores(NamedTuple):
    """Cores this process may use, those of the host, and the container's quota of them, if it has one."""

    usable: int
    host: int
    quota: float | None


class Memory(NamedTuple):
    """Bytes this process can still take, and may take at most; whether a container's limit decides that."""

    free: int
    total: int
    limited: bool


class Disk(NamedTuple):
    """A folder, made or not: bytes free where it is or would be, and whether this process may write there."""

    folder: Path
    free: int
    writable: bool
    device: int


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):  # not there, or not ours to read
        return ""


def _number(path: Path) -> int | None:
    text = _text(path).strip()
    return int(text) if text.lstrip("-").isdigit() else None


def _line(text: str, name: str) -> int:
    """The number after ``name`` in a file of "name number" lines; 0 where there is none."""
    for line in text.splitlines():
        words = line.split()
        if len(words) >= 2 and words[0] == name and words[1].isdigit():
            return int(words[1])
    return 0


def _groups(controller: str, root: Path) -> Iterator[Path]:
    """Folders of the control groups that this process is in, from its own to the top, as far as they can be seen."""
    mounted = root / "sys/fs/cgroup"
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, names, path = [*line.split(":", 2), "", ""][:3]
        if names and controller not in names.split(","):
            continue
        top = mounted / names if (mounted / names).is_dir() else mounted / controller
        parts = [part for part in path.split("/") if part]
        # A container may see its own group as the top: folders above it are not there, and neither is its path.
        for depth in range(0 if ".." in parts else len(parts), -1, -1):
            yield top.joinpath(*parts[:depth])


def memory(root: Path = ROOT) -> Memory | None:
    """Free and total bytes by /proc/meminfo and the control groups; None where the system has no such file."""
    meminfo = _text(root / "proc/meminfo")
    host, free = (1024 * _line(meminfo, name) for name in ("MemTotal:", "MemAvailable:"))
    if not host:
        return None
    total = host
    for folder in _groups("memory", root):
        for limit_name, used_name, cached_name in _MEMORY_FILES:
            limit = _number(folder / limit_name)
            if limit is None or limit >= host:  # v1 writes about 2^63 for "none"
                continue
            used = (_number(folder / used_name) or 0) - _line(_text(folder / "memory.stat"), cached_name)
            total, free = min(total, limit), min(free, limit - used)
    return Memory(max(free, 0), total, total < host)


def cpu_quota(root: Path = ROOT) -> float | None:
    """Cores' worth of time that the control groups allow; None without a quota."""
    quotas = []
    for folder in _groups("cpu", root):
        words = _text(folder / "cpu.max").split()
        if len(words) == 2 and words[0].isdigit():
            quotas.append(int(words[0]) / int(words[1]))
        quota, period = (_number(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
        if quota is not None and quota > 0 and period:
            quotas.append(quota / period)
    return min(quotas, default=None)


def cores(root: Path = ROOT) -> Cores:
    """Cores by this process's affinity and by the quota, whichever is less."""
    host = os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else host
    quota = cpu_quota(root)
    return Cores(usable if quota is None else max(1, min(usable, math.ceil(quota))), host, quota)


def disk(folder: str | Path) -> Disk:
    """Of ``folder``, or of the nearest folder above it that is there."""
    folder = Path(os.path.abspath(os.path.expanduser(folder)))
    there = next((f for f in (folder, *folder.parents) if f.is_dir()), Path(folder.anchor))
    return Disk(
        folder, shutil.disk_usage(there).free, os.access(there, os.W_OK | os.X_OK), there.stat().st_dev
    )


# ---- what of it is too little ----


def limit_findings(folders: Mapping[str, str]) -> Iterator[Finding]:
    """Cores and threads, memory, and disk: of the current folder, of ``folders`` and of temporary files.

    ``folders`` are places by the environment variable that moves each.
    """
    yield _threads_finding()
    yield _memory_finding()
    least = {"": LEAST_DISK, **dict.fromkeys(folders, LEAST_DISK), "TMPDIR": LEAST_TEMPORARY}
    seen: set[int] = set()
    for setting, folder in {"": ".", **folders, "TMPDIR": _temporary_folder()}.items():
        try:
            found = disk(folder)
        except OSError as problem:  # a current folder that was deleted, a network disk that is gone
            yield Finding(
                "disk", f"{folder}: {first_line(problem)}", WRONG, "change to a folder that is there"
            )
            continue
        finding = _disk_finding(found, setting, least[setting])
        if finding.level == WRONG or found.device not in seen:
            yield finding
        seen.add(found.device)


def _threads_finding() -> Finding:
    found, number = cores(), torch.get_num_threads()
    text = f"{found.usable} usable"
    if found.quota is not None and found.quota < found.host:
        text += f" (quota {found.quota:g} of the host's {found.host})"
    elif found.usable < found.host:
        text += f" of the host's {found.host}"
    text += f"; torch runs {number} thread{'s' * (number != 1)}"
    asked = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()  # a list sets nested levels too
    text += f" (OMP_NUM_THREADS={asked})" if asked else ""
    if number > found.usable or (asked.isdigit() and int(asked) > found.usable):
        return Finding(
            "cores", text, WRONG, f"threads wait for each other: set OMP_NUM_THREADS={found.usable}"
        )
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0  # of the host, in a container too
    if load > 1.5 * found.host:
        return Finding(
            "cores", text, NOTE, f"other programs run (load {load:.1f}): times below are not this machine's"
        )
    if number == 1 < found.usable:
        return Finding("cores", text, NOTE, f"to use them all set OMP_NUM_THREADS={found.usable}")
    return Finding("cores", text)


def _memory_finding() -> Finding:
    found = memory()
    if found is None:
        return Finding("memory", "not known on this system")
    text = f"{found.free / GIB:.1f} of {found.total / GIB:.1f} GiB free"
    text += ", by the container's limit" if found.limited else ""
    if found.free < LEAST_MEMORY:
        advice = f"free {LEAST_MEMORY // GIB} GiB: end other programs, or give the container more"
        return Finding("memory", text, WRONG, advice)
    return Finding("memory", text)


def _disk_finding(found: Disk, setting: str, least: int) -> Finding:
    where = f"{found.folder}" + (f" ({setting})" if setting else "")
    move = f"set {setting} to a folder on another disk" if setting else "go to a folder on another disk"
    if not found.writable:
        advice = f"set {setting} to a folder of yours" if setting else "change to a folder of yours"
        return Finding("disk", f"{where} cannot be written", WRONG, advice)
    text = f"{found.free / 1e9:.1f} GB free at {where}"
    if found.free < least:
        return Finding("disk", text, WRONG, f"free {least // 10**9} GB, or {move}")
    return Finding("disk", text)


def _temporary_folder() -> str:
    try:
        return tempfile.gettempdir()
    except FileNotFoundError:  # none of the usual ones can be written
        return os.environ.get("TMPDIR", "/tmp")

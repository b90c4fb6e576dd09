"""Where a figure comes from: device, versions, commit and run id."""

from __future__ import annotations

import os
import platform
import secrets
import subprocess
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "triton", "liger-kernel", "cut-cross-entropy", "quack-kernels")
# Where there is no git, as in a copy of the tree, the commit is read from this file if somebody wrote it.
COMMIT_FILE = ROOT / ".commit"


def new_run_id(now: datetime | None = None) -> str:
    """UTC time to the second, which sorts by time, and four digits against collisions."""
    now = now or datetime.now(timezone.utc)
    return now.strftime("%Y%m%dT%H%M%SZ") + "-" + secrets.token_hex(2)


def device_name(device: str) -> str:
    """The full name of the GPU, or of the CPU with its number of cores."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next(
            (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model
        )
    except OSError:
        pass  # not Linux: the platform's own name has to do
    return f"{model}, {os.cpu_count()} cores"


def versions() -> dict[str, str]:
    """Python, torch, triton and every installed peer, with torch's CUDA version where it has one."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


def commit() -> str:
    """Short commit, with "-dirty" if code differs from it (results and README are no code), or "unknown"."""
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        changes = _git("status", "--porcelain", "--", ".", ":!bench/results", ":!README.md")
    except (OSError, subprocess.CalledProcessError):
        return COMMIT_FILE.read_text(encoding="utf-8").strip() if COMMIT_FILE.exists() else "unknown"
    return head + ("-dirty" if changes else "")


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True)
    return done.stdout.strip()

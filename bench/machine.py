"""Where a figure comes from: device, versions, commit and run id."""

from __future__ import annotations

import os
import platform
import re
import secrets
import shlex
import subprocess
import tempfile
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import torch

from sftmix_kernels import product_support

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "triton", "liger-kernel", "cut-cross-entropy", "quack-kernels")
# Where there is no git, as in a copy of the tree, the commit is read from this file if somebody wrote it.
COMMIT_FILE = ROOT / ".commit"
# What holds torch (ATen) and oneDNN to fewer instructions than the processor has.
RESTRICTIONS = ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")
# Results, pages and pictures are written from code, they are none.
NO_CODE = ("bench/results", "bench/pictures", "*.md")


def new_run_id(now: datetime | None = None) -> str:
    """UTC time to the second, which sorts by time, and four digits against collisions."""
    now = now or datetime.now(timezone.utc)
    return now.strftime("%Y%m%dT%H%M%SZ") + "-" + secrets.token_hex(2)


def device_name(device: str) -> str:
    """The full name of the GPU, or of the CPU with its number of cores and what it may use of its instructions."""
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
    return f"{model}, {os.cpu_count()} cores, {instruction_set()}"


def keep_compiled_apart() -> None:
    """Give torch.compile a cache for each instruction set, unless the environment names one.

    Its own key leaves ATEN_CPU_CAPABILITY out: code compiled without a restriction, run under it, gave wrong losses.
    """
    name = f"torchinductor-{re.sub(r'[^A-Za-z0-9]+', '-', instruction_set()).strip('-')}"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.path.join(tempfile.gettempdir(), name))


def instruction_set() -> str:
    """What torch uses of this CPU: "AVX-512-BF16", "AVX2", "AVX2 (restricted)" where the environment holds it back.

    -BF16 (-AMX) where bfloat16 products are done in hardware, as ``product_support`` finds; figures taken with and
    without it are figures of two machines.
    """
    name = torch.backends.cpu.get_cpu_capability()
    if platform.machine().lower() in ("aarch64", "arm64"):
        name = "Arm" if name == "DEFAULT" else f"Arm {name}"
    name = name.replace("AVX512", "AVX-512")
    if product_support(torch.bfloat16, "cpu").in_hardware:
        name += "-AMX" if torch.cpu._is_amx_tile_supported() else "-BF16"
    return name + (" (restricted)" if any(os.environ.get(variable) for variable in RESTRICTIONS) else "")


def command_line(module: str, arguments: Sequence[str]) -> str:
    """What to type for the same run, with the environment that holds the processor back; not where it was written."""
    arguments = list(arguments)
    if "--out" in arguments:
        at = arguments.index("--out")
        del arguments[at : at + 2]
    held = [f"{variable}={os.environ[variable]}" for variable in RESTRICTIONS if os.environ.get(variable)]
    return shlex.join([*held, "python", "-m", module, *arguments])


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
    """Short commit, with "-dirty" if code differs from it (results and pages are no code), or "unknown"."""
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        changes = _git("status", "--porcelain", "--", ".", *(f":!{path}" for path in NO_CODE))
    except (OSError, subprocess.CalledProcessError):
        return COMMIT_FILE.read_text(encoding="utf-8").strip() if COMMIT_FILE.exists() else "unknown"
    return head + ("-dirty" if changes else "")


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True)
    return done.stdout.strip()

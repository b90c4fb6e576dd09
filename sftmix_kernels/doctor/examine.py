"""Whether this machine is fit for the loss: ``python -m sftmix_kernels``; ``sftmix doctor`` adds the recipe's part.

Each thing that was looked at is a finding; what is wrong comes with a sentence on what to do. A machine in a bad state
is a finding too, never a traceback.
"""

from __future__ import annotations

import os
import shutil
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch

from ..choice import architecture, choose_impl, default_bound, stored_from, why_not_fused
from ..hardware import time_product
from . import limits, self_check
from .devices import current_device, device_findings, name_of, version_findings
from .findings import NOTE, TITLE, WRONG, Finding, first_line, show
from .self_check import Check, Way

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CPU_SIZES, GPU_SIZES = (256, 512, 512), (4096, 4096, 4096)  # of the product that is timed
HEAD = (128256, 4096)  # V, D of the head for which the schedule is told: Llama-3.1-8B's


def examine(
    more: Iterable[Finding] = (), *, folders: Mapping[str, str] | None = None, title: str = TITLE,
    as_json: bool = False,
) -> int:  # fmt: skip
    """Look at this machine and print what is found, a line a thing; 1 where something is wrong, else 0.

    ``more`` are findings that stand between the machine's and the check of the loss. ``folders``, by the environment
    variable that moves each, are places whose free disk counts beside the current folder's. ``as_json`` prints one
    JSON object at the end instead. Takes about 10 s.
    """
    return show(title, _findings(more, folders or {}), as_json=as_json)


def _findings(more: Iterable[Finding], folders: Mapping[str, str]) -> Iterator[Finding]:
    device = current_device()
    yield from version_findings(device)
    yield from device_findings(device)
    yield from limits.limit_findings(folders)
    yield from path_findings(device)
    yield from more
    yield from parity_findings(device)
    yield timing_finding(device)


# ---- the path of a call ----


def implementations(device: torch.device) -> dict[torch.dtype, tuple[str, str | None]]:
    """By data type: the implementation that serves ``impl=None`` on ``device``, and why `fused` cannot."""
    found = {}
    for dtype in DTYPES:
        found[dtype] = choose_impl(None, device, dtype), why_not_fused(device, dtype)
    return found


def path_findings(device: torch.device) -> Iterator[Finding]:
    """Implementation and schedule, why not another, and what the Triton kernels need at their first call."""
    interpreted, on_gpu = os.environ.get("TRITON_INTERPRET") == "1", device.type == "cuda"
    impl, reason = implementations(device)[torch.float32]
    if impl == "fused":
        yield Finding("loss", "the Triton kernels (fused) in float32, bfloat16, float16; float64 by chunked")
        yield _schedule_finding(device)
        yield from build_findings()
    else:
        why = (
            reason
            or "on a CPU its kernels run in Triton's interpreter, for tests, and only where it is named"
        )
        yield Finding("loss", f"{impl}, in every data type; not fused: {why}")
        yield Finding("schedule", "only fused has a choice; chunked makes gradients in the forward")
    if interpreted and on_gpu:
        text = "TRITON_INTERPRET=1: kernels would be interpreted, thousands of times slower than on this GPU"
        yield Finding("environment", text, WRONG, "unset TRITON_INTERPRET")
    if os.environ.get("CUDA_LAUNCH_BLOCKING") == "1" and on_gpu:
        yield Finding(
            "environment", "CUDA_LAUNCH_BLOCKING=1: the GPU waits", NOTE, "unset it when not debugging"
        )


def _schedule_finding(device: torch.device) -> Finding:
    from ..fused.configs import table_arch
    from ..fused.schedule import CHIPS

    arch = architecture(device)
    if arch in ("interpreter", "cpu"):
        return Finding("schedule", "recompute, as always in the interpreter")
    chip = CHIPS[table_arch(arch)].name
    least = stored_from(*HEAD, torch.bfloat16, arch, (True, True, False), default_bound(device))
    taken = "recompute for any N" if least < 0 else f"recompute below N = {least} rows, stored from there on"
    return Finding("schedule", f"{taken}, at V, D = {HEAD[0]}, {HEAD[1]} in bfloat16 (cost model of {chip})")


def build_findings() -> Iterator[Finding]:
    """Triton compiles a C file at its first kernel, and keeps kernels in a folder: a compiler, headers, the folder."""
    compiler = os.environ.get("CC") or "gcc or clang"
    if not any(shutil.which(name) for name in compiler.split(" or ")):
        advice = "install one (Debian and Ubuntu: apt-get install build-essential), or set CC to its path"
        yield Finding(
            "C compiler", f"no {compiler} on the PATH: Triton needs one at its first kernel", WRONG, advice
        )
    include = sysconfig.get_paths(sysconfig.get_default_scheme().replace("posix_local", "posix_prefix"))[
        "include"
    ]
    if not (Path(include) / "Python.h").is_file():
        advice = "install Python's headers (Debian and Ubuntu: python3-dev; Fedora: python3-devel)"
        yield Finding(
            "headers", f"no Python.h in {include}: Triton needs it at its first kernel", WRONG, advice
        )
    cache = os.environ.get("TRITON_CACHE_DIR") or os.path.join(
        os.environ.get("TRITON_HOME") or "~", ".triton/cache"
    )
    found = limits.disk(cache)
    if not found.writable or found.free < limits.LEAST_TEMPORARY:
        state = f"has {found.free / 1e9:.1f} GB free" if found.writable else "cannot be written"
        text = f"{found.folder}, where Triton keeps its kernels, {state}"
        yield Finding("kernel cache", text, WRONG, "set TRITON_CACHE_DIR to a folder of yours with 1 GB free")


# ---- whether it is right, and how fast ----


def ways(device: torch.device) -> dict[torch.dtype, list[Way]]:
    """What may serve a call on ``device``, by data type."""
    fused = [Way("fused", "recompute"), Way("fused", "stored")]
    return {
        dtype: fused if impl == "fused" else [Way(impl)]
        for dtype, (impl, _) in implementations(device).items()
    }


def parity_findings(device: torch.device) -> Iterator[Finding]:
    """The loss against the specification, a finding a data type."""
    expected = ways(device)
    done: dict[torch.dtype, list[Check]] = {dtype: [] for dtype in expected}
    for check in self_check.check_loss(expected, device):
        done[check.dtype].append(check)
    for dtype, checks in done.items():
        yield _parity_finding(dtype, expected[dtype], checks)


def _parity_finding(dtype: torch.dtype, expected: list[Way], checks: list[Check]) -> Finding:
    name = name_of(dtype)
    for check in checks:
        if check.problem:
            advice = "mend what is marked above; where nothing is, report it with the output of --json"
            return Finding("parity", f"{name}: {check.way} fails: {check.problem}", WRONG, advice)
        if not check.is_right:
            text = f"{name}: {check.way} is not right: {check.result} is off by {check.share:.3g} x what is allowed"
            advice = (
                "do not train with it: report it with the output of --json; impl='reference' serves meanwhile"
            )
            return Finding("parity", text, WRONG, advice)
    unseen = [str(way) for way in expected if way not in {check.way for check in checks}]
    if unseen:
        text = f"{name}: {', '.join(unseen)} not reached in {self_check.SECONDS:g} s"
        return Finding("parity", text, NOTE, "run it again when less else runs; compiled kernels are kept")
    worst = max(checks, key=lambda check: check.share)
    by = ", ".join(dict.fromkeys(str(check.way) for check in checks))
    return Finding(
        "parity", f"{name}: {by} right, largest error {worst.share:.2f} x what is allowed ({worst.result})"
    )


def timing_finding(device: torch.device) -> Finding:
    """The time of one product in each data type."""
    sizes = GPU_SIZES if device.type == "cuda" else CPU_SIZES
    times = {}
    try:
        for dtype in DTYPES:
            times[dtype] = time_product(dtype, device, sizes=sizes)
    except RuntimeError as problem:
        return Finding(
            "product", f"{name_of(DTYPES[len(times)])} fails: {first_line(problem)}", WRONG, "see the device"
        )
    base = times[torch.float32]
    told = [
        f"{name_of(dtype)} {ms:.3g} ms" + (f" ({ms / base:.1f} x)" if dtype is not torch.float32 else "")
        for dtype, ms in times.items()
    ]
    n, k, m = sizes
    return Finding("timing", f"[{n}, {k}] @ [{k}, {m}]: {', '.join(told)}")

"""What torch and triton are here, and what device they find: findings of the doctor, with the reason for each.

A GPU counts once it has run a product: torch may see one that it has no kernels for, or that another process holds.
"""

from __future__ import annotations

import glob
import os
import platform
import warnings
from collections.abc import Iterator
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import torch

from ..hardware import product_support, time_product
from .findings import NOTE, WRONG, Finding, first_line, upgrade
from .limits import GIB, LEAST_MEMORY

LEAST = {"Python": "3.10", "torch": "2.11", "triton": "3.6"}  # pyproject.toml's; a test compares
TRITON_NAMES = ("triton", "pytorch-triton", "triton-rocm", "pytorch-triton-rocm")  # of torch's builds
DRIVER_SIGNS = (
    "/dev/nvidia[0-9]*",
    "/proc/driver/nvidia/gpus/*",
    "/dev/dxg",
    "/dev/kfd",
)  # dxg: Windows' Linux
VISIBLE = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def current_device() -> torch.device:
    """The first GPU that torch sees, else the CPU."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the reason is asked for, and said, by unused_gpu()
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def version_findings(device: torch.device) -> Iterator[Finding]:
    """Python, torch and triton against the versions that are supported."""
    yield Finding.of_version("Python", platform.python_version(), LEAST["Python"])
    build = torch.version.cuda or torch.version.hip
    kind = f"for {'ROCm' if torch.version.hip else 'CUDA'} {build}" if build else "a CPU build"
    yield Finding.of_version("torch", torch.__version__, LEAST["torch"], text=f"{torch.__version__}, {kind}")
    yield triton(device)


def triton(device: torch.device) -> Finding:
    """Whether triton is there and can be imported; without it a GPU takes `chunked`, which is slower."""
    on_gpu = device.type == "cuda"
    if find_spec("triton") is None:
        if on_gpu:
            text = "not installed: this GPU would run the slower chunked implementation"
            return Finding("triton", text, WRONG, upgrade("triton", LEAST["triton"]))
        return Finding("triton", "not installed; nothing on a CPU needs it")
    if on_gpu:
        try:
            from .. import fused  # noqa: F401  # imports triton
        except Exception as problem:  # a library of another system or Python may raise anything
            return Finding.of_broken("triton", problem, "install the one that torch asks for: pip show torch")
    version = next(filter(None, map(installed, TRITON_NAMES)), None)
    if version is None:
        return Finding("triton", f"installed, version not known (supported: >= {LEAST['triton']})", NOTE)
    return Finding.of_version("triton", version, LEAST["triton"])


def installed(package: str) -> str | None:
    """The version of a distribution, None where it is not there."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def device_findings(device: torch.device) -> Iterator[Finding]:
    """The device and what it multiplies in hardware; a GPU that torch cannot use, and why."""
    yield gpu(device) if device.type == "cuda" else cpu()
    for dtype in (torch.bfloat16, torch.float16):
        yield products_finding(dtype, device)
    if device.type == "cpu" and (missing := unused_gpu()):
        yield missing


def products_finding(dtype: torch.dtype, device: torch.device) -> Finding:
    """Whether 16-bit products are to be asked of ``device``: where not, that is no fault, but worth knowing."""
    name = name_of(dtype)
    try:
        support = product_support(dtype, device)
    except RuntimeError as problem:  # of a GPU that runs nothing: gpu() says so
        return Finding("products", f"{name} not known: {first_line(problem)}", NOTE)
    if support.in_hardware:
        return Finding("products", f"{name} in hardware: {support.reason}")
    return Finding("products", f"{name} not in hardware, float32 is faster: {support.reason}", NOTE)


def gpu(device: torch.device) -> Finding:
    """The GPU, once it has run a product."""
    properties = torch.cuda.get_device_properties(device)
    arch = properties.gcnArchName if torch.version.hip else f"sm_{properties.major}{properties.minor}"
    count = torch.cuda.device_count()
    text = f"{properties.name}, {arch}, {properties.multi_processor_count} processors"
    text += f", first of {count} GPUs" if count > 1 else ""
    try:
        time_product(torch.float32, device)
        free, total = torch.cuda.mem_get_info(device)
    except RuntimeError as problem:
        advice = (
            "see whether another process holds the GPU, and whether nvidia-smi (or rocm-smi) shows it well"
        )
        if "no kernel image" in str(problem) or "invalid device function" in str(problem):
            built = " ".join(torch.cuda.get_arch_list())
            advice = (
                f"this torch is built for {built}: install one built for {arch} (pytorch.org/get-started)"
            )
        return Finding("device", f"{text}, but a product fails: {first_line(problem)}", WRONG, advice)
    text += f", {free / GIB:.1f} of {total / GIB:.1f} GiB free"
    if free < LEAST_MEMORY:
        return Finding(
            "device", text, NOTE, "little memory is free: see with nvidia-smi which process holds it"
        )
    return Finding("device", text)


def cpu() -> Finding:
    """The processor and the instructions that torch uses of it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = named[0] if named else platform.processor() or platform.machine()
    text = f"CPU: {name}, torch uses {torch.backends.cpu.get_cpu_capability()}"
    if torch.backends.mkldnn.is_available():
        return Finding("device", text)
    return Finding(
        "device", f"{text}, without oneDNN", NOTE, "16-bit products are slow in this build of torch"
    )


def unused_gpu() -> Finding | None:
    """Why torch uses no GPU, where there is one in this machine or torch is built for one."""
    driver, card = has_driver(), has_card()
    if not torch.backends.cuda.is_built():
        if not (driver or card):
            return None
        text, advice = (
            "this torch is a CPU build",
            "install torch's CUDA (or ROCm) build: pytorch.org/get-started",
        )
        # A card without a driver may be years old, and nobody meant to compute on it.
        return Finding("GPU", f"this machine has one, but {text}", WRONG if driver else NOTE, advice)
    hidden = [name for name in VISIBLE if os.environ.get(name) in ("", "-1")]
    if hidden:
        return Finding("GPU", f"hidden by {hidden[0]}={os.environ[hidden[0]]}", NOTE)
    reason = why_no_gpu()
    text = f"this torch is built for one and sees none: {reason}"
    if driver or card or "too old" in reason:
        advice = "install the driver this torch needs, or a torch for the driver (pytorch.org/get-started);"
        return Finding("GPU", text, WRONG, f"{advice} start a container with --gpus all")
    advice = (
        "if this machine has one, install its driver; if not, all runs on the CPU, and a CPU build is smaller"
    )
    return Finding("GPU", text, NOTE, advice)


def has_driver() -> bool:
    """Whether a GPU's driver has made its files, whatever torch says of it."""
    return any(glob.glob(sign) for sign in DRIVER_SIGNS)


def has_card(root: Path = Path("/")) -> bool:
    """Whether an NVIDIA display or compute card is on the bus; a container sees it too, without the driver's files."""
    for vendor in root.glob("sys/bus/pci/devices/*/vendor"):
        try:
            kind = (vendor.parent / "class").read_text(encoding="ascii")
            if vendor.read_text(encoding="ascii").strip() == "0x10de" and kind.startswith("0x03"):
                return True
        except (OSError, UnicodeDecodeError):  # gone meanwhile, or not ours to read
            continue
    return False


def why_no_gpu() -> str:
    """torch's own reason for seeing no GPU."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.cuda.init()
    except (RuntimeError, AssertionError) as problem:
        return first_line(problem)
    return "no reason is given"

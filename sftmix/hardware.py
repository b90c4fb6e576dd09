"""GPUs by name: what their makers state, and the shares of it that a plan takes for real.

Rates are those of the datasheets: dense 16-bit products with float32 sums, memory, and one direction of the links.
A datasheet's GB are read as 10^9 bytes; what cards report beyond, up to 7 %, is left to the driver and the allocator.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

GB = 10**9


@dataclass(frozen=True)
class Gpu:
    """One GPU and its links; rates per second."""

    name: str
    arch: str  # as sftmix_kernels names it
    flops: float  # dense bfloat16 products
    memory_bytes: int
    bandwidth: float  # bytes of device memory
    link: float  # bytes that a GPU receives from those of its node
    network: float  # bytes that a GPU receives from other nodes
    source: str


# The networks are what such nodes usually have per GPU (200 or 400 Gbit/s; 100 Gbit/s beside a desktop's card).
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("A100-80", "sm_80", 312e12, 80 * GB, 2039e9, 300e9, 25e9, "A100 80GB SXM datasheet, 2021"),
        Gpu("H100-80", "sm_90", 989e12, 80 * GB, 3350e9, 450e9, 50e9, "H100 SXM datasheet, 2023"),
        Gpu("H200", "sm_90", 989e12, 141 * GB, 4800e9, 450e9, 50e9, "H200 SXM datasheet, 2024"),
        Gpu("B200", "sm_100", 2250e12, 180 * GB, 7700e9, 900e9, 50e9, "HGX B200 datasheet, 2025"),
        Gpu("L40S", "sm_80", 362e12, 48 * GB, 864e9, 32e9, 25e9, "L40S datasheet, 2023; PCIe 4.0 x16"),
        Gpu("RTX4090", "sm_80", 165e12, 24 * GB, 1008e9, 32e9, 12.5e9, "Ada whitepaper, 2022; PCIe 4.0 x16"),
    )
}
# Assumptions, not measurements: eager transformers models reach a third to a half of the products' peak.
EFFICIENCY = 0.4  # of ``flops``, over a whole forward and backward
LINK_SHARE = 0.8  # of ``link`` and ``network``, for collective calls of megabytes
BANDWIDTH_SHARE = 0.8  # of ``bandwidth``, for the optimizer's passes


def find_gpu(
    name: str, *, flops: float | None = None, memory: float | None = None, bandwidth: float | None = None,
    link: float | None = None, network: float | None = None,
) -> Gpu:  # fmt: skip
    """A GPU of :data:`GPUS`, with figures of one's own: ``flops`` in TFLOP/s, ``memory`` in GB, the others in GB/s.

    Raises ``ValueError`` for an unknown name and for a figure that is not above 0.
    """
    known = {key.lower(): gpu for key, gpu in GPUS.items()}
    gpu = known.get(name.lower())
    if gpu is None:
        raise ValueError(f"gpu: expected one of {', '.join(GPUS)}, got {name!r}")
    given = {"flops": flops, "memory": memory, "bandwidth": bandwidth, "link": link, "network": network}
    for key, value in given.items():
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"gpu_{key}: expected a number above 0, got {value}")
    changes: dict[str, float | int | str] = {}
    if flops is not None:
        changes["flops"] = flops * 1e12
    if memory is not None:
        changes["memory_bytes"] = round(memory * GB)
    for key in ("bandwidth", "link", "network"):
        value = given[key]
        if value is not None:
            changes[key] = value * 1e9
    if changes:
        changes["source"] = f"{gpu.source}; {', '.join(sorted(changes))} as given"
    return dataclasses.replace(gpu, **changes)  # type: ignore[arg-type]


def gpu_of(device_name: str) -> Gpu | None:
    """The GPU that a driver calls ``device_name``, such as "NVIDIA H100 80GB HBM3"; None where it is none of ours."""
    words = device_name.replace("-", " ").replace("RTX 4090", "RTX4090").split()
    if "PCIe" in words or "NVL" in words:  # slower ones of the same name
        return None
    for name, gpu in GPUS.items():
        chip, _, memory = name.partition("-")
        if chip in words and (not memory or any(word.startswith(memory) for word in words)):
            return gpu
    return None

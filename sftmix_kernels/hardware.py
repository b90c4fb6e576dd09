"""What a device multiplies in hardware: whether 16-bit matrix products are to be asked of it.

A CPU without AVX-512-BF16, AMX or Arm's bf16 has none: torch then widens numbers one by one, and a bfloat16 product
takes 40 to 70 times a float32 one's time.
"""

from __future__ import annotations

import functools
import time
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import _disable_current_modes

PROBE_SIZES = (
    64,
    512,
    256,
)  # n, k, m of the product that is timed; 0.1 ms in float32, 5 to 20 ms where widened
ROUNDS = 5
WORTH_IT = 1.25  # slower than float32 by more than this is not done in hardware
# AMD's chips with matrix instructions for bfloat16 and float16, by the start of their name.
AMD_MATRIX = ("gfx908", "gfx90a", "gfx94", "gfx95", "gfx11", "gfx12")
NVIDIA_LEAST = {torch.bfloat16: (8, 0), torch.float16: (7, 0)}
_ASK_MKLDNN = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}


class ProductSupport(NamedTuple):
    """Whether a device multiplies matrices of a dtype in hardware, and how that is known, in words."""

    in_hardware: bool
    reason: str


def product_support(dtype: torch.dtype, device: torch.device | str = "cpu") -> ProductSupport:
    """Whether ``device`` multiplies matrices of ``dtype`` in hardware; asked, and in doubt timed, once a process.

    float32 and float64 always. bfloat16 and float16: an NVIDIA GPU by its compute capability, an AMD GPU by its chip,
    a CPU by what torch says of its instructions; where torch says yes, or does not know, by timing one product.
    Raises: ValueError for another dtype.
    """
    if dtype in (torch.float32, torch.float64):
        return ProductSupport(True, "every device has these products")
    if dtype not in _ASK_MKLDNN:
        raise ValueError(f"dtype: expected float32, float64, bfloat16 or float16, got {dtype}")
    return _support(dtype, torch.device(device))


@functools.cache
def _support(dtype: torch.dtype, device: torch.device) -> ProductSupport:
    name = str(dtype).removeprefix("torch.")
    if device.type == "meta":
        return ProductSupport(True, "nothing is computed on meta tensors")
    if device.type == "cuda" and torch.version.hip is None:
        found, least = torch.cuda.get_device_capability(device), NVIDIA_LEAST[dtype]
        return ProductSupport(
            found >= least, f"compute capability {found[0]}.{found[1]}, {name} from {least[0]}.{least[1]}"
        )
    if device.type == "cuda":
        chip = torch.cuda.get_device_properties(device).gcnArchName
        return ProductSupport(
            chip.startswith(AMD_MATRIX), f"{chip}, matrix cores from {', '.join(AMD_MATRIX)}"
        )
    if device.type == "cpu" and torch.backends.mkldnn.is_available():
        if not getattr(torch.ops.mkldnn, _ASK_MKLDNN[dtype])():
            return ProductSupport(False, f"torch finds no {name} instructions in this CPU")
    factor = product_factor(dtype, device)
    return ProductSupport(factor <= WORTH_IT, f"a {name} product takes {factor:.2g} of a float32 one's time")


def product_factor(dtype: torch.dtype, device: torch.device | str = "cpu") -> float:
    """Time of one matrix product in ``dtype`` over the same in float32 on ``device``, measured once a process."""
    return _factor(dtype, torch.device(device))


@functools.cache
def _factor(dtype: torch.dtype, device: torch.device) -> float:
    times = _times((dtype, torch.float32), device, PROBE_SIZES)
    return times[dtype] / times[torch.float32]


def time_product(
    dtype: torch.dtype, device: torch.device | str = "cpu", *, sizes: tuple[int, int, int] = PROBE_SIZES
) -> float:
    """Milliseconds of one product [n, k] @ [k, m] in ``dtype`` on ``device``: the least of a few, after a first one.

    On one thread of a CPU. Runs whatever dispatch modes are active: a tracer neither sees these products nor replaces
    them.
    """
    return _times((dtype,), torch.device(device), sizes)[dtype]


def _times(
    dtypes: tuple[torch.dtype, ...], device: torch.device, sizes: tuple[int, int, int]
) -> dict[torch.dtype, float]:
    """Milliseconds of each dtype, the least: by turns and on one thread, since threads wait on a busy machine."""
    rows, inner, columns = sizes
    threads = torch.get_num_threads()
    best = dict.fromkeys(dtypes, float("inf"))
    with _disable_current_modes(), torch.inference_mode():
        torch.set_num_threads(1)
        try:
            factors = {
                dtype: (
                    torch.ones(rows, inner, dtype=dtype, device=device),
                    torch.ones(inner, columns, dtype=dtype, device=device),
                )
                for dtype in dtypes
            }
            for round_ in range(ROUNDS + 1):
                for dtype, (left, right) in factors.items():
                    started = time.perf_counter()
                    float((left @ right)[0, 0])  # the read waits for the device
                    if round_:
                        best[dtype] = min(best[dtype], time.perf_counter() - started)
        finally:
            torch.set_num_threads(threads)
    return {dtype: 1000 * seconds for dtype, seconds in best.items()}

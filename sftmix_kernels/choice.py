"""Which implementation serves a call, and why not another."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec
from typing import TypeVar

import torch
from torch import Tensor

IMPLEMENTATIONS = ("reference", "chunked", "fused")
SCHEDULES = ("recompute", "stored")
FUSED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_HAS_TRITON = find_spec("triton") is not None
# Triton decides at its import whether kernels are interpreted; read once, so that torch.compile sees a constant.
_INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"


Function = TypeVar("Function", bound=Callable[..., object])


def constant(function: Function) -> Function:
    """``torch.compiler.assume_constant_result``, which itself would import all of torch._dynamo (seconds)."""
    # The attribute by which dynamo knows it; functions have none declared.
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def choose(impl: str | None, hidden: Tensor, fused_reason: str | None) -> str:
    """The implementation to run: by device where ``impl`` is None; a named one that cannot serve raises."""
    if impl is not None and impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl: expected one of {', '.join(IMPLEMENTATIONS)} or None, got {impl!r}")
    if impl is None:
        return "chunked" if hidden.device.type == "cpu" or fused_reason else "fused"
    if impl == "fused" and fused_reason:
        raise ValueError(
            f"impl: expected one that can serve this input ('chunked' can), got 'fused': {fused_reason}"
        )
    return impl


def why_not_fused(hidden: Tensor) -> str | None:
    """Why the Triton kernels cannot take ``hidden``; None where they can."""
    if not _HAS_TRITON:
        return "triton is not installed"
    if hidden.dtype not in FUSED_DTYPES:
        return f"its kernels have no {str(hidden.dtype).removeprefix('torch.')}"
    if hidden.device.type == "cpu" and not _INTERPRETING:
        return "a CPU tensor needs TRITON_INTERPRET=1 set before the import"
    return None


def check_schedule(schedule: str | None, impl: str) -> None:
    if schedule is not None and schedule not in SCHEDULES:
        raise ValueError(f"schedule: expected one of {', '.join(SCHEDULES)} or None, got {schedule!r}")
    if schedule is not None and impl != "fused":
        raise ValueError(f"schedule: expected None where impl {impl!r} runs, got {schedule!r}")

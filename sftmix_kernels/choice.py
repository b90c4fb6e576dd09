"""Which implementation and schedule serve a call, and why not another.

An implementation is chosen by device, a schedule of ``fused`` by the cost model of fused/schedule.py; what is named is
taken or refused. :data:`REFUSED` is the one table of what does not go together.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec
from operator import index
from typing import NamedTuple, TypeVar

import torch

from .call import Needs
from .chunked.scratch import DEFAULT_ROWS, default_scratch
from .vocab_parallel import Ranks

IMPLEMENTATIONS = ("reference", "chunked", "fused")
SCHEDULES = ("recompute", "stored")
FUSED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MEMORY_SHARE = 32  # ``stored`` takes at most this part of a GPU's memory where no bound is named
_HAS_TRITON = find_spec("triton") is not None
# Triton decides at its import whether kernels are interpreted; read once, so that torch.compile sees a constant.
_INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"

# (modifier, with what): why. A test walks it, and tries every other pair.
REFUSED = {
    (
        "vocab_parallel",
        "stored",
    ): "it makes gradients in the forward, before the log-sum-exp of all shards is known",
    (
        "exchange",
        "stored",
    ): "it makes gradients in the forward, before the log-sum-exp of all shards is known",
    ("exchange", "vocab_parallel"): "its ranks hold the same rows, those of an exchange each their own",
    ("rows", "stored"): "it makes gradients in the forward, before each row's upstream is known",
}

Function = TypeVar("Function", bound=Callable[..., object])


class Choice(NamedTuple):
    """How a call runs."""

    impl: str
    made: bool  # gradients in the forward
    scratch_bytes: int  # 0: the engine's default
    ranks: Ranks | None = None  # whose rows a call is about, where hidden states are exchanged


class HeadFacts(NamedTuple):
    """What a choice rests on."""

    device: torch.device
    dtype: torch.dtype
    num_rows: int
    vocab_size: int
    hidden_size: int


def constant(function: Function) -> Function:
    """``torch.compiler.assume_constant_result``, which itself would import all of torch._dynamo (seconds)."""
    # The attribute by which dynamo knows it; functions have none declared.
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def why_not_fused(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the Triton kernels cannot take hidden states of ``dtype`` on ``device``; None where they can."""
    if not _HAS_TRITON:
        return "triton is not installed"
    if dtype not in FUSED_DTYPES:
        return f"its kernels have no {str(dtype).removeprefix('torch.')}"
    if device.type == "cpu" and not _INTERPRETING:
        return "a CPU tensor needs TRITON_INTERPRET=1 set before the import"
    if device.type not in ("cpu", "cuda"):
        return f"its kernels do not run on {device.type}"
    return why_not_chip(device) if device.type == "cuda" else None


@constant
def why_not_chip(device: torch.device) -> str | None:
    """Why the kernels have no tiles for a GPU; None where they have."""
    if torch.version.hip:
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return (
        None
        if major >= 8
        else f"compute capability {major}.{minor} has too little shared memory for its tiles"
    )


def choose_impl(impl: str | None, device: torch.device, dtype: torch.dtype) -> str:
    """The implementation to run: by device where ``impl`` is None; a named one that cannot serve raises."""
    if impl is not None and impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl: expected one of {', '.join(IMPLEMENTATIONS)} or None, got {impl!r}")
    reason = why_not_fused(device, dtype)
    if impl is None:
        return "chunked" if device.type == "cpu" or reason else "fused"
    if impl == "fused" and reason:
        raise ValueError(
            f"impl: expected one that can serve this input ('chunked' can), got 'fused': {reason}"
        )
    return impl


def choose(
    impl: str, head: HeadFacts, needs: Needs, *, schedule: str | None, scratch_bytes: int | None, rows: bool,
    vocab_parallel: bool, exchange: bool = False, main_grad: bool,
) -> Choice:  # fmt: skip
    """How a call runs. ``rows``: each row's term may have an upstream of its own.

    Raises ValueError naming the argument.
    """
    if schedule is not None and schedule not in SCHEDULES:
        raise ValueError(f"schedule: expected one of {', '.join(SCHEDULES)} or None, got {schedule!r}")
    if schedule is not None and impl != "fused":
        raise ValueError(f"schedule: expected None where impl {impl!r} runs, got {schedule!r}")
    if scratch_bytes is not None and (type(scratch_bytes) is not int or scratch_bytes < 1):
        raise ValueError(f"scratch_bytes: expected an int > 0 or None, got {scratch_bytes!r}")
    for name, given in (("vocab_parallel", vocab_parallel), ("exchange", exchange), ("rows", rows)):
        if given and schedule is not None and (name, schedule) in REFUSED:
            what = "an upstream for each row (reduction='none')" if name == "rows" else name
            raise ValueError(
                f"schedule: expected 'recompute' or None with {what}, got {schedule!r}: {REFUSED[name, schedule]}"
            )
    again = rows or vocab_parallel or exchange or main_grad or not any(needs)
    if impl == "chunked":
        return Choice(impl, not again, scratch_bytes or default_scratch(head.device.type))
    if impl == "reference" or not any(needs) or (again and schedule is None):
        return Choice(impl, False, scratch_bytes or 0)
    if schedule is not None:
        return Choice(impl, schedule == "stored", scratch_bytes or 0)
    return Choice(impl, *default_schedule(head, needs, scratch_bytes or 0))


@constant
def architecture(device: torch.device) -> str:
    """``sm_90``, ... as the tile tables name it; ``interpreter`` or ``cpu`` where there is no GPU."""
    from .fused.configs import current_arch

    return current_arch(device)


@constant
def stored_from(
    vocab_size: int, hidden_size: int, dtype: torch.dtype, arch: str, needs: tuple[bool, ...],
    scratch_bytes: int | None,
) -> int:  # fmt: skip
    """From how many rows on ``stored`` is the faster schedule; -1: from none.

    A constant under compile, so that what is traced has one comparison with N and nothing of the cost model.
    """
    from .fused.schedule import Sizes, stored_from

    sizes = Sizes(
        vocab_size, hidden_size, dtype, arch, need_dhidden=needs[0], need_dweight=needs[1],
        scratch_bytes=scratch_bytes,
    )  # fmt: skip
    least = stored_from(sizes)
    return -1 if least is None else least


@constant
def default_bound(device: torch.device) -> int:
    """Bytes that ``stored`` may take where none are named: of the whole memory, since what is free changes from run to
    run, and with the schedule the rounding of the loss would."""
    return torch.cuda.get_device_properties(device).total_memory // MEMORY_SHARE


def default_schedule(head: HeadFacts, needs: Needs, scratch: int) -> tuple[bool, int]:
    """(whether ``stored`` runs, its bytes of scratch) of a call of ``fused`` that names no schedule.

    Where ``stored`` is chosen, what dweight's float32 sum takes has come off the bound.
    """
    arch = architecture(head.device)
    if arch in ("interpreter", "cpu"):
        return False, scratch
    bound = scratch or default_bound(head.device)
    # index makes traced sizes constants: a weight keeps its shape from step to step, and N alone is compared.
    vocab_size, hidden_size = index(head.vocab_size), index(head.hidden_size)
    least = stored_from(vocab_size, hidden_size, head.dtype, arch, tuple(needs), bound)
    if least < 0 or head.num_rows < least:
        return False, scratch
    rest = bound - (4 * vocab_size * hidden_size if needs.dweight else 0)
    usual = DEFAULT_ROWS * (vocab_size + -vocab_size % 16) * head.dtype.itemsize
    return True, rest if scratch else min(rest, usual)

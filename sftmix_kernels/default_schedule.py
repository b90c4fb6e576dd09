"""The schedule of a call of ``fused`` that names none; the choice itself is fused/schedule.py's, which needs triton."""

from __future__ import annotations

from operator import index

import torch
from torch import Tensor

from .choice import constant


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


def resolve_schedule(
    schedule: str | None, hidden: Tensor, weight: Tensor, *, needs: list[bool], scratch: int
) -> tuple[str, int]:
    """(schedule, ``scratch`` for its operator: bytes, 0 for its own default) of a call of ``fused``.

    Without a gradient the forward keeps no logits and ``recompute`` names it. Where ``stored`` is chosen, what
    dweight's float32 sum takes has come off the bound. In the interpreter it is ``recompute``.
    """
    if schedule is not None or not any(needs):
        return schedule if schedule and any(needs) else "recompute", scratch
    arch = architecture(hidden.device)
    if arch in ("interpreter", "cpu"):
        return "recompute", scratch
    # index makes traced sizes constants: a weight keeps its shape from step to step, and N alone is compared.
    vocab_size, hidden_size = index(weight.shape[0]), index(weight.shape[1])
    least = stored_from(vocab_size, hidden_size, weight.dtype, arch, tuple(needs), scratch or None)
    if least < 0 or hidden.shape[0] < least:
        return "recompute", scratch
    kept = 4 * vocab_size * hidden_size if needs[1] else 0
    return "stored", max(scratch - kept, 0)

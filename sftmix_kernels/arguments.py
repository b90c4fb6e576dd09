"""What the public functions make of their arguments: coefficients with weights and denominators in them, options."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import checks
from .scratch import DEFAULT_SCRATCH_BYTES


def coefficients(weights: Tensor | None, valid: Tensor, denominator: float | Tensor | None) -> Tensor:
    """weights / denominator at valid places and 0 elsewhere, whatever the denominator is where none is valid.

    float64, because rounding 1/denominator to float32 would shift every term of the loss the same way.
    """
    count = valid.sum().clamp(min=1) if denominator is None else denominator
    coef = (torch.ones_like(valid, dtype=torch.float64) if weights is None else weights.double()) / count
    return torch.where(valid, coef, torch.zeros_like(coef))


def scratch_of(scratch_bytes: int | None, impl: str) -> int:
    if scratch_bytes is None:
        return DEFAULT_SCRATCH_BYTES if impl == "chunked" else 0
    if type(scratch_bytes) is not int or scratch_bytes < 1:
        raise ValueError(f"scratch_bytes: expected an int > 0 or None, got {scratch_bytes!r}")
    return scratch_bytes


class HeadOptions(NamedTuple):
    """Numbers that belong to the head and the next-token terms; the reference's keywords."""

    softcap: float | None
    logit_scale: float
    label_smoothing: float = 0.0
    z_loss: float = 0.0

    def check(self) -> None:
        checks.check_number("logit_scale", self.logit_scale)
        if self.softcap is not None:
            checks.check_number("softcap", self.softcap)
        checks.check_share("label_smoothing", self.label_smoothing)
        checks.check_scalar("z_loss", self.z_loss, positive=False, tensors=False)

    def as_list(self) -> list[float]:
        """As the operators take them."""
        return [float(value or 0.0) for value in self]

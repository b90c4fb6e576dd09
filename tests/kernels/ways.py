"""The implementations and schedules that tests of behaviour walk, and what they share: leaves, gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.parity import Case

WAYS: dict[str, dict[str, Any]] = {
    "reference": {"impl": "reference"},
    "chunked": {"impl": "chunked"},
    "recompute": {"impl": "fused", "schedule": "recompute"},
    "stored": {"impl": "fused", "schedule": "stored"},
}
every_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
engines = pytest.mark.parametrize("way", list(WAYS.values())[1:], ids=list(WAYS)[1:])
# Functions without schedules: statistics, and rows that each have their own upstream.
IMPLS = ("reference", "chunked", "fused")
impls = pytest.mark.parametrize("impl", IMPLS)


def leaf(*tensors: Tensor | None) -> list[Tensor]:
    """Copies that require gradients; None is left out."""
    return [t.detach().clone().requires_grad_() for t in tensors if t is not None]


def leaves(case: Case) -> list[Tensor]:
    """hidden, weight and, where there is one, bias."""
    return leaf(case.hidden, case.weight, case.bias)


def widened(value: Any) -> Any:
    """A floating tensor in float64, anything else as it is."""
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def gradients(
    call: Callable[..., Tensor | Sequence[Tensor]],
    inputs: list[Tensor],
    upstream: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Gradients of ``inputs``, zeros where there is none, from what ``call`` returns of them."""
    outputs = call(*inputs)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    given = None if upstream is None else [u.to(o.dtype) for u, o in zip(upstream, outputs, strict=True)]
    found = torch.autograd.grad(outputs, inputs, given, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, inputs, strict=True)]

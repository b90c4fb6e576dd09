"""The Triton kernels on tensors as they are, without the checks and the choice of the public functions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sftmix_kernels.call import Call, Gradients, Kept, Options, Plan, Statistics, Upstream
from sftmix_kernels.fused import fused_backward, fused_forward


def plain_call(hidden: Tensor, weight: Tensor, lam: Tensor, **options: Any) -> Call:
    """``options``: fields of Call, Options and Plan by name; hidden and weight get gradients unless they say not."""
    numbers, plan = Options(), Plan(dhidden=1, dweight=1)
    fields = dict.fromkeys(Call._fields[: Call._fields.index("numbers")])
    tensors = {**fields, "hidden": hidden, "weight": weight, "lam": lam}
    for name, value in options.items():
        if name in Options._fields:
            numbers = numbers._replace(**{name: float(value)})
        elif name in Plan._fields:
            plan = plan._replace(**{name: int(value)})
        else:
            assert name in tensors, f"{name}: expected a field of a call"
            tensors[name] = value
    return Call(**tensors, numbers=list(numbers), plan=list(plan), engine="fused", group_name="")  # type: ignore[arg-type]


@torch.no_grad()
def forward_of(
    hidden: Tensor, weight: Tensor, column: Tensor, lam: Tensor, *, tile: Any = None, num_splits: int | None = None,
    **options: Any,
) -> Statistics:  # fmt: skip
    call = plain_call(hidden, weight, lam, **options)
    return fused_forward(call, column, tile=tile, num_splits=num_splits)


@torch.no_grad()
def backward_of(
    hidden: Tensor, weight: Tensor, column: Tensor, lam: Tensor, row: Tensor, pair: Tensor, row_carry: Tensor,
    pair_carry: Tensor, *, tile: Any = None, **options: Any,
) -> Gradients:  # fmt: skip
    """``row`` and ``pair``: the upstream of terms; the carries: of the forward's statistics."""
    call = plain_call(hidden, weight, lam, **options)
    kept, upstream = Kept(row_carry, pair_carry, hidden.new_empty(0)), Upstream(row.double(), pair.double())
    return fused_backward(call, column, kept, upstream, tile=tile)

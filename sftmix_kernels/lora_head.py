"""Low-rank adapters on the output layer: logits of W + s B A without the [V, D] sum.

    W h + s B (A h) = W h + up low,   low = s A h,  up = B
    dlow = G up,  dup = G^T low,  dhidden = G W + s A^T dlow,  dA = s dlow^T h        G: gradient of the affine logits

Every implementation takes the rows low [N, r] and the factor up [V, r] beside hidden and weight. Logits are linear in
both before the cap, so mixing a pair's rows mixes low too; autograd of the small product gives dA and the rest of
dhidden.

Cost beside a call without factors: low and its gradient, N r elements each, and dup, V r; 2 N (D + V) r flops for each
of the forward, the gradient of rows and the gradient of factors. The weight is not copied, and a frozen one has no
gradient and no product for it. Factors are used in hidden's dtype (of another dtype, B is converted: V r elements,
kept until the backward); their gradients are in their own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import checks

LoRA = tuple[Tensor, Tensor, float]  # A (r, D), B (V, r), scaling


def check_lora(lora: object, hidden: Tensor, weight: Tensor) -> None:
    """lora: (A [r, D], B [V, r], scaling), floating tensors on hidden's device and a finite number."""
    if not isinstance(lora, tuple) or len(lora) != 3 or isinstance(lora[2], (bool, Tensor)):
        raise ValueError(f"lora: expected (A [r, D], B [V, r], scaling), got {checks.describe(lora)}")
    down, up, scaling = lora
    rank = down.shape[0] if isinstance(down, Tensor) and down.ndim == 2 else 1
    checks.check_tensor("lora A", down, {"r": rank, "D": hidden.shape[1]}, checks.FLOAT_DTYPES)
    checks.check_tensor("lora B", up, {"V": weight.shape[0], "r": rank}, checks.FLOAT_DTYPES)
    for name, factor in (("lora A", down), ("lora B", up)):
        if type(factor).__name__ == "DTensor":
            raise ValueError(f"{name}: expected a local tensor, got a DTensor")
        checks.check_devices(hidden.device, **{name: factor})
    if not isinstance(scaling, (int, float)) or not abs(scaling) < float("inf"):
        raise ValueError(f"lora scaling: expected a finite number, got {scaling!r}")


def low_rank(hidden: Tensor, weight: Tensor, valid: Tensor, lora: LoRA) -> tuple[Tensor, Tensor]:
    """low = s A h of shape [N, r] and up = B [V, r], in hidden's dtype; differentiable in hidden and both factors.

    What is not finite in rows that are not ``valid`` [N] is taken as 0: it must not reach a factor's gradient.
    """
    check_lora(lora, hidden, weight)
    down, up, scaling = lora
    # In the wider of the two dtypes, as peft does: float32 adapters beside a 16-bit model.
    dtype = torch.promote_types(hidden.dtype, down.dtype)
    rows = torch.where(valid[:, None] | hidden.isfinite(), hidden, 0.0).to(dtype)
    reduced = F.linear(rows, down.to(dtype)) * scaling
    return reduced.to(hidden.dtype), up.to(hidden.dtype)

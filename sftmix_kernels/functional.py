"""The public functions: check the arguments, choose the implementation, fold weights into coefficients."""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch
from torch import Tensor

from . import checks, ops, reference
from .chunked import DEFAULT_SCRATCH_BYTES
from .reference import SFTMixLoss, TokenStats

IMPLEMENTATIONS = ("reference", "chunked", "fused")
FUSED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_HAS_TRITON = find_spec("triton") is not None
# Triton decides at its import whether kernels are interpreted; read once, so that torch.compile sees a constant.
_INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"


def _choose(impl: str | None, hidden: Tensor, fused_reason: str | None) -> str:
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


def _why_not_fused(hidden: Tensor) -> str | None:
    """Why the Triton kernels cannot take ``hidden``; None where they can."""
    if not _HAS_TRITON:
        return "triton is not installed"
    if hidden.dtype not in FUSED_DTYPES:
        return f"its kernels have no {str(hidden.dtype).removeprefix('torch.')}"
    if hidden.device.type == "cpu" and not _INTERPRETING:
        return "a CPU tensor needs TRITON_INTERPRET=1 set before the import"
    return None


def _coefficients(weights: Tensor | None, valid: Tensor, denominator: float | Tensor | None) -> Tensor:
    """weights / denominator at valid places and 0 elsewhere, whatever the denominator is where none is valid.

    float64, because rounding 1/denominator to float32 would shift every term of the loss the same way.
    """
    count = valid.sum().clamp(min=1) if denominator is None else denominator
    coef = (torch.ones_like(valid, dtype=torch.float64) if weights is None else weights.double()) / count
    return torch.where(valid, coef, torch.zeros_like(coef))


def _scratch(scratch_bytes: int | None, impl: str) -> int:
    if scratch_bytes is None:
        return DEFAULT_SCRATCH_BYTES if impl == "chunked" else 0
    if type(scratch_bytes) is not int or scratch_bytes < 1:
        raise ValueError(f"scratch_bytes: expected an int > 0 or None, got {scratch_bytes!r}")
    return scratch_bytes


def _check_rows(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, ignore_index: int,
    softcap: float | None, logit_scale: float,
) -> None:  # fmt: skip
    checks.check_head(hidden, weight, bias)
    checks.check_target(target, hidden.shape[0], weight.shape[0], ignore_index)
    checks.check_devices(hidden.device, target=target)
    checks.check_number("logit_scale", logit_scale)
    if softcap is not None:
        checks.check_number("softcap", softcap)


def sftmix_loss(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    target: Tensor,  # (N,) int64
    lam: Tensor,  # (M,) float32
    *,
    bias: Tensor | None = None,  # (V,)
    mixup_weight: float | Tensor = 0.2,
    row_weight: Tensor | None = None,  # (N,)
    pair_weight: Tensor | None = None,  # (M,)
    ntp_denominator: float | Tensor | None = None,
    mixup_denominator: float | Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    impl: str | None = None,
    scratch_bytes: int | None = None,
) -> SFTMixLoss:
    """Next-token loss of all rows plus ``mixup_weight`` times the Mixup loss of the pairs among them.

    Rows come as M confident rows, their M partners in the same order, then any number of unpaired rows. The mixture
    of a pair is taken between last hidden states and between one-hot targets with the pair's ``lam``; a pair with an
    ignored member adds nothing to it. M = 0, like ``mixup_weight=0``, is plain next-token loss, bit for bit.

    Args:
        hidden: [N, D] last hidden states (after the final norm); float32, float16, bfloat16 or float64.
        weight: [V, D] output embedding, dtype of ``hidden``.
        target: [N] int64, already shifted: the token that row n must predict, or ``ignore_index``.
        lam: [M] float32 in [0, 1], the share of the confident member; 2M at most N.
        bias: [V], dtype of ``hidden``.
        mixup_weight: mu of the paper, a number ≥ 0 or a 0-d tensor. The number 0 skips the mixture (``mixup_nll``
            is then NaN); under ``torch.compile`` pass a value that changes between steps as a tensor.
        row_weight: [N] weights of the rows' next-token terms. pair_weight: [M] weights of the pairs' Mixup terms.
        ntp_denominator, mixup_denominator: what the two sums are divided by, a number > 0 or a 0-d tensor; by
            default the supervised rows and the valid pairs of this call (counts, not weights, at least 1).
        ignore_index: target value of rows that bear no loss.
        softcap: logits become ``softcap * tanh(logits / softcap)``, after mixing. logit_scale: factor before that.
        impl: "reference", "chunked", "fused"; None takes "fused" on a GPU (where triton is
            installed and has the dtype, otherwise "chunked") and "chunked" on a CPU.
        scratch_bytes: bound for the logits held at a time ("chunked": default 64 MiB; "fused": its dlogits slice).

    Returns:
        SFTMixLoss: ``loss`` is differentiable in hidden, weight and bias; everything else is detached. With no
        supervised row ``loss`` is 0 and its gradients are 0.

    Raises:
        ValueError: naming the argument, on a wrong shape, dtype, device or value. On a GPU, and under compile, wrong
            values of target, lam and weights raise through ``torch._assert_async`` instead.

    Source: Xiao et al., arXiv 2410.05248, section 3: L = L_NTP + mu * L_Mixup.
    """
    _check_rows(hidden, weight, target, bias, ignore_index, softcap, logit_scale)
    checks.check_lam(lam, hidden.shape[0])
    num_pairs = lam.shape[0]
    checks.check_weights("row_weight", row_weight, {"N": hidden.shape[0]})
    checks.check_weights("pair_weight", pair_weight, {"M": num_pairs})
    checks.check_devices(hidden.device, lam=lam, row_weight=row_weight, pair_weight=pair_weight)
    checks.check_scalar("mixup_weight", mixup_weight, positive=False)
    for name, value in (("ntp_denominator", ntp_denominator), ("mixup_denominator", mixup_denominator)):
        if value is not None:
            checks.check_scalar(name, value, positive=True)
    impl = _choose(impl, hidden, _why_not_fused(hidden))
    scratch = _scratch(scratch_bytes, impl)

    plain = not isinstance(mixup_weight, Tensor) and mixup_weight == 0
    if plain:
        lam, pair_weight = lam[:0], None
    if impl == "reference":
        result = reference.sftmix_loss(
            hidden, weight, target, lam, bias=bias, mixup_weight=mixup_weight, row_weight=row_weight,
            pair_weight=pair_weight, ntp_denominator=ntp_denominator, mixup_denominator=mixup_denominator,
            ignore_index=ignore_index, softcap=softcap, logit_scale=logit_scale,
        )  # fmt: skip
    else:
        size = lam.shape[0]
        valid = target != ignore_index
        row_coef = _coefficients(row_weight, valid, ntp_denominator)
        pair_valid = valid[:size] & valid[size : 2 * size]
        pair_coef = mixup_weight * _coefficients(pair_weight, pair_valid, mixup_denominator)
        result = _call_op(
            impl, hidden, weight, bias, torch.where(valid, target, -1), lam, row_coef, pair_coef,
            softcap or 0.0, float(logit_scale), scratch,
        )  # fmt: skip
    if plain:
        return result._replace(
            mixup_nll=torch.full((num_pairs,), float("nan"), device=hidden.device, dtype=result.nll.dtype)
        )
    return result


def _call_op(
    impl: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, lam: Tensor, row_coef: Tensor,
    pair_coef: Tensor, softcap: float, logit_scale: float, scratch: int,
) -> SFTMixLoss:  # fmt: skip
    grad = torch.is_grad_enabled()
    needs = [grad and t is not None and t.requires_grad for t in (hidden, weight, bias)]
    op = ops.chunked_fwd if impl == "chunked" else ops.fused_fwd
    loss, nll, lse, is_top1, mixup_nll = op(
        hidden, weight, bias, target, lam, row_coef, pair_coef, softcap, logit_scale, *needs, scratch
    )[:5]
    return SFTMixLoss(loss, nll.detach(), lse.detach(), is_top1.detach(), mixup_nll.detach())


def linear_cross_entropy(
    hidden: Tensor,  # (..., D)
    weight: Tensor,  # (V, D)
    target: Tensor,  # (...) int64
    *,
    bias: Tensor | None = None,  # (V,)
    reduction: str = "mean",
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    impl: str | None = None,
    scratch_bytes: int | None = None,
) -> Tensor:
    """Cross-entropy of ``hidden @ weight.T + bias`` against ``target``, without the logits: the case M = 0.

    Args as in :func:`sftmix_loss`; ``hidden`` may have any batch dimensions, or none, and ``target`` the same.
    ``reduction`` is "mean" (over rows that are not ignored; 0, not NaN, when all are) or "sum".

    Returns: a scalar, float32 (float64 for float64 inputs).
    Raises: ValueError naming the argument.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction: expected 'mean' or 'sum', got {reduction!r}")
    if not isinstance(hidden, Tensor) or hidden.ndim < 1:
        raise ValueError(f"hidden: expected a floating tensor [..., D], got {checks.describe(hidden)}")
    checks.check_tensor(
        "target", target, {f"N{i}": n for i, n in enumerate(hidden.shape[:-1])}, (torch.int64,)
    )
    rows = hidden.reshape(-1, hidden.shape[-1])
    lam = torch.empty(0, dtype=torch.float32, device=hidden.device)
    return sftmix_loss(
        rows, weight, target.reshape(-1), lam, bias=bias, ntp_denominator=1 if reduction == "sum" else None,
        mixup_weight=0.0, ignore_index=ignore_index, softcap=softcap, logit_scale=logit_scale, impl=impl,
        scratch_bytes=scratch_bytes,
    ).loss  # fmt: skip


def token_stats(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    target: Tensor,  # (N,) int64
    *,
    bias: Tensor | None = None,  # (V,)
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    impl: str | None = None,
    scratch_bytes: int | None = None,
) -> TokenStats:
    """Log-probability, log-sum-exp, entropy and top-1 hit of each row, forward only and without the logits.

    Args as in :func:`sftmix_loss`. A tie for the largest logit counts as a hit.

    Returns: TokenStats of [N] tensors, detached; log-probability 0 and no hit at ignored rows.
    Raises: ValueError naming the argument.
    """
    _check_rows(hidden, weight, target, bias, ignore_index, softcap, logit_scale)
    impl = _choose(impl, hidden, _why_not_fused(hidden))
    scratch = _scratch(scratch_bytes, impl)
    if impl == "reference":
        return reference.token_stats(
            hidden,
            weight,
            target,
            bias=bias,
            ignore_index=ignore_index,
            softcap=softcap,
            logit_scale=logit_scale,
        )
    op = ops.chunked_stats if impl == "chunked" else ops.fused_stats
    nll, lse, entropy, is_top1 = op(
        hidden.detach(), weight.detach(), None if bias is None else bias.detach(),
        torch.where(target != ignore_index, target, -1), softcap or 0.0, float(logit_scale), scratch,
    )  # fmt: skip
    return TokenStats(-nll, lse, entropy, is_top1)

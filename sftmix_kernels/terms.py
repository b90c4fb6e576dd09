"""From statistics to the loss, and from the loss's upstream to that of each row: what both engines share.

    row_n  = w_n / D_ntp,  pair_m = mu v_m / D_mix             0 at ignored rows and at pairs with an ignored member
    term_n = (1 - e) c[y_n] nll_n + e / V sum_v c_v (lse_n - z_nv) + z lse_n^2       times exp(-nll_n), token scaling
    loss   = sum_n row_n term_n + sum_m pair_m mixup_nll_m                           in float64, rounded once

A factor of 0 selects, it does not multiply: what it stands before may be infinite.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .call import Call, Coefficients, Statistics, Upstream


def times(factor: Tensor, value: Tensor) -> Tensor:
    """factor * value, and 0 where the factor is 0, whatever the value."""
    return torch.where(factor != 0, factor * value, 0.0)


def given(tensor: Tensor | None, number: float) -> Tensor | float | None:
    """A number of the call, wherever it stands; None where there is none."""
    return tensor if tensor is not None else None if number != number else number


def at_target(call: Call, column: Tensor) -> Tensor | None:
    """The class weight of each row's target (N,), float64; None without class weights."""
    return None if call.class_weight is None else call.class_weight.double()[column.clamp(min=0)]


def _over(weights: Tensor | None, valid: Tensor, denominator: Tensor | float | None) -> Tensor:
    """weights / denominator at valid places, in float64. Over 0 stands nothing (checks.py), or classes of no weight."""
    share: Tensor | float
    if denominator is None:
        share = valid.sum(dtype=torch.float64).clamp_(min=1).reciprocal_()
    elif isinstance(denominator, Tensor):
        share = torch.where(denominator != 0, 1.0 / denominator.double(), 0.0)
    else:
        share = 1.0 / denominator if denominator else 0.0
    if weights is not None:
        return torch.where(valid, weights.double() * share, 0.0)
    if not isinstance(share, Tensor):
        share = torch.full((), share, dtype=torch.float64, device=valid.device)
    return torch.where(valid, share, 0.0)


def coefficients(call: Call) -> Coefficients:
    """float64, because rounding 1 / denominator to float32 would shift every term of the loss the same way."""
    options, (_, _, size) = call.options, call.sizes
    valid = call.target != call.wanted.ignore_index
    column = torch.where(valid, call.target, -1)
    denominator = given(call.ntp_denominator, options.ntp_denominator)
    mass = at_target(call, column) if denominator is None else None
    row = _over(call.row_weight, valid, denominator if mass is None else (mass * valid).sum())
    if size == 0:
        return Coefficients(column, row, row[:0].clone())
    pair_valid = valid[:size] & valid[size : 2 * size]
    pair = _over(call.pair_weight, pair_valid, given(call.mixup_denominator, options.mixup_denominator))
    share = given(call.mixup_weight, options.mixup_weight)
    return Coefficients(column, row, pair if share is None else pair.mul_(share))


class Terms(NamedTuple):
    """What the public functions return of rows and mixtures; 0 and False at ignored rows, but for lse and entropy."""

    loss: Tensor  # ()
    term: Tensor  # (N,)
    lse: Tensor  # (N,)
    entropy: Tensor  # (N,) or (0,)
    token_logprob: Tensor  # (N, K) or (0, 0)
    nll: Tensor  # (N,)
    is_top1: Tensor  # (N,) bool
    predicted: Tensor  # (N,) int64 or (0,)
    mixup_nll: Tensor  # (M,)
    z_loss: Tensor  # ()


def smoothed_term(call: Call, column: Tensor, found: Statistics) -> tuple[Tensor, Tensor | None]:
    """Each row's next-token term, without token scaling and not yet 0 at ignored rows; and its z-loss."""
    options, lse, nll = call.options, found.lse, found.nll
    e, mass = options.label_smoothing, at_target(call, column)
    term = nll if mass is None else times(mass.to(nll.dtype), nll)
    if e:
        weight = call.class_weight
        mean = 1.0 if weight is None else weight.double().mean().to(nll.dtype)
        spread = e * (mean * lse - found.mean_logit)
        term = spread if e == 1 else (1 - e) * term + spread
    z_loss = options.z_loss * lse.square() if options.z_loss else None
    return term if z_loss is None else term + z_loss, z_loss


def finish(call: Call, coef: Coefficients, found: Statistics) -> Terms:
    """The loss and what is said of each row and mixture."""
    column, nll = coef.column, found.nll
    valid = column >= 0
    term, z_loss = smoothed_term(call, column, found)
    if call.options.token_scaling:
        scaling = torch.exp(-nll)
        term = times(scaling, term)
        z_loss = None if z_loss is None else times(scaling, z_loss)
    term = torch.where(valid, term, 0.0)
    mixup_nll = _mixup_nll(call, valid, found.pair_carry[2:])
    loss = times(coef.row, term).sum()
    if call.sizes[2]:
        loss = loss + times(coef.pair, mixup_nll).sum()
    z_total = nll.new_zeros(()) if z_loss is None else times(coef.row, z_loss).sum().to(nll.dtype)
    logprob = found.token_logit
    if call.tokens is not None:
        there = valid[:, None] & (call.tokens >= 0)
        logprob = (logprob - found.lse[:, None]) - found.row_carry[1][:, None]
        logprob = torch.where(there, logprob, 0.0)
    predicted = found.predicted
    return Terms(
        loss.to(nll.dtype), term, found.lse.clone(), found.entropy.clone(), logprob, nll.clone(),
        valid & (found.target_logit >= found.max_logit),
        torch.where(valid, predicted, -1) if predicted.numel() else predicted, mixup_nll, z_total,
    )  # fmt: skip


def _mixup_nll(call: Call, valid: Tensor, nll: Tensor) -> Tensor:
    """Cross-entropy of each mixture (M,), from its -log p at both targets (2, M)."""
    size = call.sizes[2]
    if size == 0:
        return nll.new_empty(0)
    share = call.lam.to(nll.dtype)
    cross = times(torch.stack([share, 1 - share]), nll).sum(dim=0)
    return torch.where(valid[:size] & valid[size : 2 * size], cross, 0.0)


def upstream_of(call: Call, coef: Coefficients, nll: Tensor, grads: tuple[Tensor | None, ...]) -> Upstream:
    """The upstream of rows and pairs, from that of loss, term, lse, entropy and token_logprob."""
    loss, term, lse, entropy, token = (None if g is None or not g.numel() else g for g in grads)
    if loss is None:
        row, pair = torch.zeros_like(coef.row), torch.zeros_like(coef.pair)
    else:
        row, pair = times(coef.row, loss.double()), times(coef.pair, loss.double())
    if term is not None:
        row = row + torch.where(coef.column >= 0, term.double(), 0.0)
    if call.options.token_scaling:
        row = times(torch.exp(-nll).double(), row)
    if token is not None and call.tokens is not None:
        there = (coef.column >= 0)[:, None] & (call.tokens >= 0)
        token = torch.where(there, token, 0.0)
    return Upstream(row, pair, lse, entropy, token)

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


def class_weights(call: Call) -> Tensor | None:
    """Class weights of this call's columns (V,), in the dtype of sums."""
    whole, place = call.class_weight, call.place
    if whole is None:
        return None
    if place is not None:
        whole = whole.index_select(0, place[0] + torch.arange(call.weight.shape[0], device=whole.device))
    return whole.to(call.dtype)


def at_target(call: Call, column: Tensor) -> Tensor | None:
    """The class weight of each row's target (N,), float64; None without class weights."""
    return None if call.class_weight is None else call.class_weight.double()[column.clamp(min=0)]


def _over(weights: Tensor | None, valid: Tensor, denominator: Tensor | float) -> Tensor:
    coef = torch.ones_like(valid, dtype=torch.float64) if weights is None else weights.double()
    coef = coef / denominator
    return torch.where(valid & coef.isfinite(), coef, torch.zeros_like(coef))


def coefficients(call: Call) -> Coefficients:
    """float64, because rounding 1 / denominator to float32 would shift every term of the loss the same way.

    A denominator of 0 stands over nothing (checks.py), and gives 0.
    """
    options, (_, _, size) = call.options, call.sizes
    valid = call.target != call.wanted.ignore_index
    column = torch.where(valid, call.target, -1)
    denominator = given(call.ntp_denominator, options.ntp_denominator)
    if denominator is None:
        mass = at_target(call, column)
        denominator = valid.sum() if mass is None else (mass * valid).sum()
    row = _over(call.row_weight, valid, denominator)
    pair_valid = valid[:size] & valid[size : 2 * size]
    denominator = given(call.mixup_denominator, options.mixup_denominator)
    pair = _over(call.pair_weight, pair_valid, pair_valid.sum() if denominator is None else denominator)
    share = given(call.mixup_weight, options.mixup_weight)
    return Coefficients(column, row, pair if share is None else pair * share)


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
    column, (_, _, size) = coef.column, call.sizes
    valid, nll = column >= 0, found.nll
    zero = torch.zeros_like(nll)
    term, z_loss = smoothed_term(call, column, found)
    if call.options.token_scaling:
        scaling = torch.exp(-nll)
        term = times(scaling, term)
        z_loss = None if z_loss is None else times(scaling, z_loss)
    term = torch.where(valid, term, zero)
    share = call.lam.to(nll.dtype)
    mixup_nll = times(share, found.pair_carry[2]) + times(1 - share, found.pair_carry[3])
    mixup_nll = torch.where(valid[:size] & valid[size : 2 * size], mixup_nll, torch.zeros_like(mixup_nll))
    loss = times(coef.row, term).sum() + times(coef.pair, mixup_nll).sum()
    z_total = loss.new_zeros(()) if z_loss is None else times(coef.row, z_loss).sum()
    logprob = found.token_logit
    if call.tokens is not None:
        there = valid[:, None] & (call.tokens >= 0)
        logprob = (logprob - found.lse[:, None]) - found.row_carry[1][:, None]
        logprob = torch.where(there, logprob, torch.zeros_like(logprob))
    predicted = found.predicted
    return Terms(
        loss.to(nll.dtype), term, found.lse.clone(), found.entropy.clone(), logprob, nll.clone(),
        valid & (found.target_logit >= found.max_logit),
        torch.where(valid, predicted, -1) if predicted.numel() else predicted,
        mixup_nll, z_total.to(nll.dtype),
    )  # fmt: skip


def upstream_of(call: Call, coef: Coefficients, nll: Tensor, grads: tuple[Tensor | None, ...]) -> Upstream:
    """The upstream of rows and pairs, from that of loss, term, lse, entropy and token_logprob."""
    loss, term, lse, entropy, token = (None if g is None or not g.numel() else g for g in grads)
    row, pair = torch.zeros_like(coef.row), torch.zeros_like(coef.pair)
    if loss is not None:
        row, pair = times(coef.row, loss.double()), times(coef.pair, loss.double())
    if term is not None:
        row = row + torch.where(coef.column >= 0, term.double(), 0.0)
    if call.options.token_scaling:
        row = times(torch.exp(-nll).double(), row)
    if token is not None and call.tokens is not None:
        there = (coef.column >= 0)[:, None] & (call.tokens >= 0)
        token = torch.where(there, token, torch.zeros_like(token))
    return Upstream(row, pair, lse, entropy, token)

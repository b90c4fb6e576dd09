"""Kernels of [N]- and [M]-sized numbers, one program each: what terms.py and row_terms.py say in torch, in one launch.

A program walks all rows BLOCK at a time and sums in float64, lane by lane and then over lanes: the order is fixed by
N and M alone. Numbers are float64 until they are stored, so that each is rounded once. A factor of 0 selects.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import CHANGING


@triton.jit
def _times(factor, value):
    """factor * value, 0 where the factor is 0."""
    return tl.where(factor != 0.0, factor * value, 0.0)


@triton.jit
def _expm1(x):
    """exp(x) - 1 of float64 x <= 0, without cancellation near 0."""
    near = x * (1.0 + x * 0.5 * (1.0 + x * (1.0 / 3) * (1.0 + x * 0.25)))
    return tl.where(x > -1e-3, near, tl.exp(x) - 1.0)


@triton.jit
def _residual(nll, mass, rest):
    """p - mass of -log p, rest = 1 - mass, without cancellation where both are near 1."""
    return tl.where(mass >= 0.5, _expm1(-nll) + rest, tl.exp(-nll) - mass)


@triton.jit
def _number(tensor, number):
    """A number of the call, wherever it stands; NaN where there is none."""
    if tensor is None:
        return tl.full([], number, dtype=tl.float64)
    else:
        return tl.load(tensor).to(tl.float64)


@triton.jit
def _share(denominator, count):
    """1 / denominator, or over the count where that is NaN; 0 over 0."""
    by_count = 1.0 / tl.maximum(count, 1).to(tl.float64)
    given = tl.where(denominator != 0.0, 1.0 / tl.where(denominator != 0.0, denominator, 1.0), 0.0)
    return tl.where(denominator != denominator, by_count, given)


@triton.jit
def _is_bad(number, count):
    """Whether a denominator is negative, infinite or 0 over something; NaN is none given."""
    bad = (number < 0.0) | (number == float("inf")) | ((number == 0.0) & (count > 0))
    return bad.to(tl.int32)


@triton.jit
def _weights(weights, at, mask, valid, share):
    """share times the weights, 0 where not valid; and whether any weight is infinite or NaN."""
    if weights is None:
        return tl.where(valid, share, 0.0), tl.zeros_like(at)
    else:
        w = tl.load(weights + at, mask=mask, other=0).to(tl.float64)
        return tl.where(valid, w * share, 0.0), (mask & ~(tl.abs(w) < float("inf"))).to(tl.int32)


@triton.jit(
    do_not_specialize=(*CHANGING, "ignore_index"),
    do_not_specialize_on_alignment=(
        "target", "lam", "row_weight", "pair_weight", "mixup_weight", "ntp_denominator", "mixup_denominator",
    ),
)  # fmt: skip
def _sftmix_prepare_kernel(
    target,  # (N,) int64
    lam,  # (M,) float32
    row_weight,  # (N,) of any dtype, or None
    pair_weight,  # (M,)
    mixup_weight,  # () or None
    ntp_denominator,
    mixup_denominator,
    column,  # out: Coefficients
    row,
    pair,
    is_right,  # out: () bool
    num_rows,
    num_pairs,
    vocab_size,
    ignore_index,
    mixup_number: tl.float64,  # NaN: not given
    ntp_number: tl.float64,
    pairs_number: tl.float64,
    BLOCK: tl.constexpr,
):
    lanes = tl.arange(0, BLOCK)
    wrong = tl.zeros([BLOCK], dtype=tl.int32)
    rows_here = tl.zeros([BLOCK], dtype=tl.int32)
    pairs_here = tl.zeros([BLOCK], dtype=tl.int32)
    for first in range(0, num_rows, BLOCK):
        at = first + lanes
        mask = at < num_rows
        y = tl.load(target + at, mask=mask, other=0)
        valid = mask & (y != ignore_index)
        rows_here += valid.to(tl.int32)
        wrong |= (valid & ((y < 0) | (y >= vocab_size))).to(tl.int32)
        _, bad = _weights(row_weight, at, mask, valid, 1.0)
        wrong |= bad
    for first in range(0, num_pairs, BLOCK):
        at = first + lanes
        mask = at < num_pairs
        y_c = tl.load(target + at, mask=mask, other=0)
        y_u = tl.load(target + num_pairs + at, mask=mask, other=0)
        valid = mask & (y_c != ignore_index) & (y_u != ignore_index)
        pairs_here += valid.to(tl.int32)
        share = tl.load(lam + at, mask=mask, other=0.0)
        wrong |= (mask & ~((share >= 0.0) & (share <= 1.0))).to(tl.int32)
        _, bad = _weights(pair_weight, at, mask, valid, 1.0)
        wrong |= bad

    num_valid, num_mixed = tl.sum(rows_here, axis=0), tl.sum(pairs_here, axis=0)
    ntp, mixed = _number(ntp_denominator, ntp_number), _number(mixup_denominator, pairs_number)
    mu = _number(mixup_weight, mixup_number)
    bad = tl.max(wrong, axis=0) | _is_bad(ntp, num_valid) | _is_bad(mixed, num_mixed) | _is_bad(mu, 0)
    if ntp_denominator is not None:
        bad |= (ntp != ntp).to(tl.int32)
    if mixup_denominator is not None:
        bad |= (mixed != mixed).to(tl.int32)
    if mixup_weight is not None:
        bad |= (mu != mu).to(tl.int32)
    tl.store(is_right, bad == 0)
    by_rows, by_pairs = _share(ntp, num_valid), _share(mixed, num_mixed)
    mu = tl.where(mu != mu, 1.0, mu)
    for first in range(0, num_rows, BLOCK):
        at = first + lanes
        mask = at < num_rows
        y = tl.load(target + at, mask=mask, other=0)
        valid = mask & (y != ignore_index)
        coef, _ = _weights(row_weight, at, mask, valid, by_rows)
        tl.store(column + at, tl.where(valid, y, -1), mask=mask)
        tl.store(row + at, coef, mask=mask)
    for first in range(0, num_pairs, BLOCK):
        at = first + lanes
        mask = at < num_pairs
        y_c = tl.load(target + at, mask=mask, other=0)
        y_u = tl.load(target + num_pairs + at, mask=mask, other=0)
        valid = mask & (y_c != ignore_index) & (y_u != ignore_index)
        coef, _ = _weights(pair_weight, at, mask, valid, by_pairs)
        tl.store(pair + at, coef * mu, mask=mask)


@triton.jit(
    do_not_specialize=CHANGING,
    do_not_specialize_on_alignment=("lam", "pair_nll", "row_carry", "max_logit", "target_logit", "mean_logit"),
)  # fmt: skip
def _sftmix_finish_kernel(
    column,  # (N,)
    row,  # (N,) float64
    pair,  # (M,)
    max_logit,  # (N,)
    target_logit,
    mean_logit,  # or None
    row_carry,  # (3, N)
    pair_nll,  # (2, M)
    lam,  # (M,)
    best,  # (N,) int64 columns, or None
    loss,  # out: Terms
    term,
    lse_out,
    nll_out,
    is_top1,
    predicted,
    mixup_nll,
    z_total,
    num_rows,
    num_pairs,
    smoothing: tl.float64,
    z_loss: tl.float64,
    TOKEN_SCALING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], dtype=tl.float64)
    z_sum = tl.zeros([BLOCK], dtype=tl.float64)
    for first in range(0, num_rows, BLOCK):
        at = first + lanes
        mask = at < num_rows
        is_valid = mask & (tl.load(column + at, mask=mask, other=-1) >= 0)
        coef = tl.load(row + at, mask=mask, other=0.0)
        lse_32 = tl.load(row_carry + at, mask=mask, other=0.0)
        nll_32 = tl.load(row_carry + 2 * num_rows + at, mask=mask, other=0.0)
        lse, nll = lse_32.to(tl.float64), nll_32.to(tl.float64)
        value = nll
        if mean_logit is not None:
            spread = smoothing * (lse - tl.load(mean_logit + at, mask=mask, other=0.0).to(tl.float64))
            value = tl.where(smoothing == 1.0, spread, (1.0 - smoothing) * nll + spread)
        z = tl.where(z_loss != 0.0, z_loss * lse * lse, 0.0)
        value = tl.where(z_loss != 0.0, value + z, value)
        if TOKEN_SCALING:
            p = tl.exp(-nll)
            value, z = _times(p, value), _times(p, z)
        value = tl.where(is_valid, value, 0.0).to(tl.float32)
        total += _times(coef, value.to(tl.float64))
        z_sum += _times(coef, z)
        hit = tl.load(target_logit + at, mask=mask, other=0.0) >= tl.load(
            max_logit + at, mask=mask, other=0.0
        )
        tl.store(term + at, value, mask=mask)
        tl.store(lse_out + at, lse_32, mask=mask)
        tl.store(nll_out + at, nll_32, mask=mask)
        tl.store(is_top1 + at, is_valid & hit, mask=mask)
        if best is not None:
            tl.store(
                predicted + at, tl.where(is_valid, tl.load(best + at, mask=mask, other=-1), -1), mask=mask
            )
    for first in range(0, num_pairs, BLOCK):
        at = first + lanes
        mask = at < num_pairs
        y_c = tl.load(column + at, mask=mask, other=-1)
        y_u = tl.load(column + num_pairs + at, mask=mask, other=-1)
        share = tl.load(lam + at, mask=mask, other=0.0).to(tl.float64)
        nll_c = tl.load(pair_nll + at, mask=mask, other=0.0).to(tl.float64)
        nll_u = tl.load(pair_nll + num_pairs + at, mask=mask, other=0.0).to(tl.float64)
        cross = _times(share, nll_c) + _times(1.0 - share, nll_u)
        cross = tl.where((y_c >= 0) & (y_u >= 0), cross, 0.0).to(tl.float32)
        tl.store(mixup_nll + at, cross, mask=mask)
        total += _times(tl.load(pair + at, mask=mask, other=0.0), cross.to(tl.float64))
    tl.store(loss, tl.sum(total, axis=0).to(tl.float32))
    tl.store(z_total, tl.sum(z_sum, axis=0).to(tl.float32))


@triton.jit(do_not_specialize=(*CHANGING, "stride_grad"), do_not_specialize_on_alignment=("grad_term", "nll"))
def _sftmix_upstream_kernel(
    grad_loss,  # () or None
    grad_term,  # (N,) of any stride, or None
    column,  # (N,)
    nll,  # (N,)
    row,  # (N,) float64
    pair,  # (M,)
    row_out,  # (N,) float64
    pair_out,  # (M,)
    num_rows,
    num_pairs,
    stride_grad,
    TOKEN_SCALING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < num_rows
    if grad_loss is None:
        g = tl.zeros([BLOCK], dtype=tl.float64)
    else:
        g = tl.zeros([BLOCK], dtype=tl.float64) + tl.load(grad_loss).to(tl.float64)
    value = _times(tl.load(row + at, mask=mask, other=0.0), g)
    if grad_term is not None:
        own = tl.load(grad_term + at * stride_grad, mask=mask, other=0.0).to(tl.float64)
        value += tl.where(tl.load(column + at, mask=mask, other=-1) >= 0, own, 0.0)
    if TOKEN_SCALING:
        value = _times(tl.exp(-tl.load(nll + at, mask=mask, other=0.0).to(tl.float64)), value)
    tl.store(row_out + at, value, mask=mask)
    mask = at < num_pairs
    tl.store(pair_out + at, _times(tl.load(pair + at, mask=mask, other=0.0), g), mask=mask)


@triton.jit
def _largest(row, pair, num_rows, num_pairs, factor, BLOCK: tl.constexpr):
    """The largest magnitude of the coefficients times the factor, rounded to float32; 1 where all are 0."""
    largest = tl.zeros([BLOCK], dtype=tl.float32)
    lanes = tl.arange(0, BLOCK)
    for first in range(0, num_rows, BLOCK):
        at = first + lanes
        coef = (tl.load(row + at, mask=at < num_rows, other=0.0) * factor).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(coef))
    for first in range(0, num_pairs, BLOCK):
        at = first + lanes
        coef = (tl.load(pair + at, mask=at < num_pairs, other=0.0) * factor).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(coef))
    scale = tl.max(largest, axis=0)
    return tl.where(scale > 0.0, scale, 1.0)


@triton.jit
def _dead(row, pair, at, mask, num_pairs):
    """Whether nothing is asked of a row: its own coefficient and its pair's are 0."""
    coef = tl.load(row + at, mask=mask, other=0.0)
    is_paired = mask & (at < 2 * num_pairs)
    beside = tl.load(pair + tl.where(at < num_pairs, at, at - num_pairs), mask=is_paired, other=0.0)
    return (coef == 0.0) & (beside == 0.0)


@triton.jit(do_not_specialize=CHANGING)
def _sftmix_scale_kernel(
    row,  # (N,) float64
    pair,  # (M,)
    row_out,  # (N,) float32
    pair_out,  # (M,)
    dead,  # (N,) bool
    scale,  # () float32
    num_rows,
    num_pairs,
    logit_scale,
    SCALED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    by = tl.full([1], 1.0, dtype=tl.float32)
    if SCALED:
        by = by * _largest(row, pair, num_rows, num_pairs, 1.0, BLOCK)
    tl.store(scale + tl.arange(0, 1), by)
    lanes = tl.arange(0, BLOCK)
    for first in range(0, num_rows, BLOCK):
        at = first + lanes
        mask = at < num_rows
        coef = tl.load(row + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(row_out + at, tl.div_rn(coef, by + tl.zeros_like(coef)) * logit_scale, mask=mask)
        tl.store(dead + at, _dead(row, pair, at, mask, num_pairs), mask=mask)
    for first in range(0, num_pairs, BLOCK):
        at = first + lanes
        mask = at < num_pairs
        coef = tl.load(pair + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(pair_out + at, tl.div_rn(coef, by + tl.zeros_like(coef)) * logit_scale, mask=mask)


@triton.jit(do_not_specialize=CHANGING, do_not_specialize_on_alignment=("lam", "place"))
def _sftmix_gradient_terms_kernel(
    column,  # (N,)
    row,  # (N,) float64 upstream
    pair,  # (M,)
    row_carry,  # (3, N)
    pair_carry,  # (4, M)
    lam,  # (M,)
    place,  # (2,) int64 or None: the second is V
    rows_out,  # (3 or 4, N) float32: GradientTerms.rows
    pairs_out,  # (5, M)
    dead,  # (N,) bool
    scale,  # () float32, or None
    num_rows,
    num_pairs,
    logit_scale: tl.float64,
    smoothing: tl.float64,
    uniform: tl.float64,  # smoothing / V where place is None
    z_loss: tl.float64,
    SMOOTHED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    by = tl.full([1], 1.0, dtype=tl.float32)
    if scale is not None:
        by = by * _largest(row, pair, num_rows, num_pairs, logit_scale, BLOCK)
        tl.store(scale + tl.arange(0, 1), by)
    if place is not None:
        uniform = smoothing / tl.load(place + 1).to(tl.float64)
    lanes = tl.arange(0, BLOCK)
    for first in range(0, num_rows, BLOCK):
        at = first + lanes
        mask = at < num_rows
        coef = (tl.load(row + at, mask=mask, other=0.0) * logit_scale).to(tl.float32)
        coef = tl.div_rn(coef, by + tl.zeros_like(coef)).to(tl.float64)
        lse_32 = tl.load(row_carry + at, mask=mask, other=0.0)
        low = tl.load(row_carry + num_rows + at, mask=mask, other=0.0).to(tl.float64)
        nll = tl.load(row_carry + 2 * num_rows + at, mask=mask, other=0.0).to(tl.float64)
        own = _expm1(-nll)
        if SMOOTHED:
            own = (1.0 - smoothing) * own + (smoothing * tl.exp(-nll) - uniform)
            tl.store(rows_out + 3 * num_rows + at, (coef * uniform).to(tl.float32), mask=mask)
        pull = tl.where(z_loss != 0.0, 2.0 * z_loss * lse_32.to(tl.float64), 0.0)
        own = tl.where(z_loss != 0.0, own + pull * tl.exp(-nll), own)
        factor = _times(coef, 1.0 + pull)
        tl.store(rows_out + at, tl.where(factor != 0.0, lse_32, float("inf")), mask=mask)
        tl.store(rows_out + num_rows + at, _times(factor, tl.exp(-low)).to(tl.float32), mask=mask)
        tl.store(rows_out + 2 * num_rows + at, _times(coef, own).to(tl.float32), mask=mask)
        tl.store(dead + at, _dead(row, pair, at, mask, num_pairs), mask=mask)
    for first in range(0, num_pairs, BLOCK):
        at = first + lanes
        mask = at < num_pairs
        coef = (tl.load(pair + at, mask=mask, other=0.0) * logit_scale).to(tl.float32)
        coef = tl.div_rn(coef, by + tl.zeros_like(coef)).to(tl.float64)
        same = tl.load(column + at, mask=mask, other=0) == tl.load(
            column + num_pairs + at, mask=mask, other=0
        )
        share_32 = tl.load(lam + at, mask=mask, other=0.0)
        share = share_32.to(tl.float64)
        lse = tl.load(pair_carry + at, mask=mask, other=0.0)
        low = tl.load(pair_carry + num_pairs + at, mask=mask, other=0.0).to(tl.float64)
        nll_c = tl.load(pair_carry + 2 * num_pairs + at, mask=mask, other=0.0).to(tl.float64)
        nll_u = tl.load(pair_carry + 3 * num_pairs + at, mask=mask, other=0.0).to(tl.float64)
        at_c = _residual(nll_c, share, 1.0 - share)
        at_u = _residual(nll_u, tl.where(same, 1.0, 1.0 - share), tl.where(same, 0.0, share))
        tl.store(pairs_out + at, tl.where(coef != 0.0, lse, float("inf")), mask=mask)
        tl.store(pairs_out + num_pairs + at, _times(coef, tl.exp(-low)).to(tl.float32), mask=mask)
        tl.store(pairs_out + 2 * num_pairs + at, _times(coef, at_c).to(tl.float32), mask=mask)
        tl.store(pairs_out + 3 * num_pairs + at, _times(coef, at_u).to(tl.float32), mask=mask)
        tl.store(pairs_out + 4 * num_pairs + at, share_32, mask=mask)

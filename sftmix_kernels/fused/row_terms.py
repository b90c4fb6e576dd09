"""What the recomputing kernel multiplies and substitutes in each row: [N]-sized numbers from upstream and statistics.

    m = (1 - e) c[y],  g = e / V sum_v c_v,  G away from the target = a ((m + g + 2 z lse) p - e c / V)
    at the target = a (m (p - 1) + g p - e c[y] / V + 2 z lse p)         over the slope, a coefficient, c class weights

An upstream t of a row's lse, q of its entropy H and u_k of its tokens' log-probabilities adds

    (t - sum_k u_k - q (logit - lse + H)) p + sum_k u_k 1[y_k]

At a target the residual comes from the forward's nll: w the label's mass there, expm1(-nll) + (1 - w) where w >= 1/2
and exp(-nll) - w elsewhere, so that p = 0.999999 keeps its digits. The forward's lse was rounded; what rounding took
scales the row's coefficient. float16 divides all coefficients by their maximum, which returns in float32 at the end.

A coefficient of 0 selects: the row's lse is then taken as inf, so that p is 0. A row of which nothing is asked may hold
NaN, which 0 times it would bring to its partner and to dweight: rows are copied with zeros in its place.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..call import Call, Kept, Upstream
from ..terms import at_target, times
from .tokens import affine_at, finished, sums_of_equals


class GradientTerms(NamedTuple):
    """Per-row numbers the kernel multiplies and substitutes; float32, coefficients folded in."""

    rows: Tensor  # (3, N) lse, factor of P, G at the target; (4, N) a e / V; (5, N) -q, with an upstream of entropy
    pairs: Tensor  # (5, M) lse_x, b exp(-low), b (p - w) at y_c, the same at y_u, lam
    scale: Tensor | None  # () what the products are multiplied by in float32, None for 1
    tokens: Tensor | None  # (N, K) contiguous columns whose G is ``at_tokens``
    at_tokens: Tensor | None  # (N, K)


def _residual(nll: Tensor, mass: Tensor, rest: Tensor) -> Tensor:
    """p - mass at a target whose -log p is ``nll``, without cancellation near 1; ``rest`` is 1 - mass."""
    return torch.where(mass >= 0.5, torch.expm1(-nll) + rest, torch.exp(-nll) - mass)


def dead_rows(call: Call, upstream: Upstream) -> Tensor:
    """Rows (N,) of which nothing is asked, bool."""
    num_pairs = call.sizes[2]
    dead = upstream.row == 0
    if num_pairs:
        no_pair = upstream.pair == 0
        dead[:num_pairs] &= no_pair
        dead[num_pairs : 2 * num_pairs] &= no_pair
    for each in upstream[2:]:
        if each is not None:
            dead &= (each == 0).all(dim=1) if each.ndim == 2 else each == 0
    return dead


def living(call: Call, dead: Tensor) -> Call:
    """The call with hidden and low 0 in the ``dead`` rows (N,)."""
    hidden, low = (None if t is None else t.masked_fill(dead[:, None], 0) for t in (call.hidden, call.low))
    assert hidden is not None
    return call._replace(hidden=hidden, low=low)


def _scaled_upstream(call: Call, upstream: Upstream) -> tuple[Upstream, Tensor | None]:
    """Coefficients in float32, times the logit scale; at most 1 where dlogits are float16, and what divided them."""
    wanted = [None if t is None else (t * call.options.logit_scale).float() for t in upstream]
    if call.hidden.dtype != torch.float16:
        return Upstream(*wanted), None  # type: ignore[arg-type]  # row and pair are tensors
    scale = torch.cat([t.flatten() for t in wanted if t is not None]).abs().amax()
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return Upstream(*(None if t is None else t / scale for t in wanted)), scale  # type: ignore[arg-type]


def _next_token(call: Call, column: Tensor, kept: Kept, coef: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Of each row (N,): the factor of p, G at the target, and what smoothing subtracts; all times ``coef``."""
    e, z_loss = call.options.label_smoothing, call.options.z_loss
    lse, _, nll = kept.row_carry
    p, own = torch.exp(-nll), torch.expm1(-nll)
    factor = torch.ones_like(own)
    uniform = e / (call.weight.shape[0] if call.place is None else call.place[1].float())
    if call.class_weight is not None:
        # Of the target also where its column is another shard's.
        anywhere = torch.where(call.target == call.wanted.ignore_index, -1, call.target)
        weight = at_target(call, column if call.place is None else anywhere)
        assert weight is not None
        weight, spread = weight.float(), (e * call.class_weight.double().mean()).float()
        own, factor = (1 - e) * weight * own, (1 - e) * weight + spread
        if e:
            own = own + (spread * p - uniform * weight)
    elif e:  # (p - 1) + e would keep the digits of 1, not those of 1 - e
        own = (1 - e) * own + (e * p - uniform)
    if z_loss:
        factor, own = factor + 2 * z_loss * lse, own + 2 * z_loss * lse * p
    return times(coef, factor), times(coef, own), coef * uniform if e else None


def _row_terms(call: Call, column: Tensor, kept: Kept, upstream: Upstream) -> Tensor:
    """``GradientTerms.rows``."""
    lse, low, nll = kept.row_carry
    factor, own, uniform = _next_token(call, column, kept, upstream.row)
    extra = slope = None
    if upstream.lse is not None:
        extra = upstream.lse
    if upstream.token is not None:
        total = upstream.token.sum(dim=1)
        extra = -total if extra is None else extra - total
    is_alive = factor != 0
    p = torch.exp(-nll)
    if upstream.entropy is not None:
        slope = -upstream.entropy
        beside = times(slope, kept.entropy)
        extra = beside if extra is None else extra + beside
        is_alive = is_alive | (slope != 0)
        own = own - torch.where(p > 0, times(slope, p * nll), 0.0)  # p log p is 0 where p is 0
    if extra is not None:
        factor, own = factor + extra, own + times(extra, p)
        is_alive = is_alive | (factor != 0)
    rounded = torch.exp(-low)
    planes = [torch.where(is_alive, lse, float("inf")), times(factor, rounded), own]
    if uniform is not None or slope is not None:
        planes.append(torch.zeros_like(own) if uniform is None else uniform)
    return torch.stack(planes if slope is None else [*planes, times(slope, rounded)])


def _pair_terms(call: Call, column: Tensor, kept: Kept, coef: Tensor) -> Tensor:
    """``GradientTerms.pairs``."""
    lam, num_pairs = call.lam, call.sizes[2]
    lse, low, nll_c, nll_u = kept.pair_carry
    # Where both labels are one column the partner's number, written last, stands for the whole label.
    same = column[:num_pairs] == column[num_pairs : 2 * num_pairs]
    mass_u, rest_u = torch.where(same, 1.0, 1 - lam), torch.where(same, 0.0, lam)
    at_c, at_u = _residual(nll_c, lam, 1 - lam), _residual(nll_u, mass_u, rest_u)
    lse = torch.where(coef != 0, lse, float("inf"))
    return torch.stack((lse, times(coef, torch.exp(-low)), times(coef, at_c), times(coef, at_u), lam))


def _at_tokens(call: Call, column: Tensor, rows: Tensor, pairs: Tensor, token: Tensor) -> Tensor:
    """G (N, K), over the scale, at ``call.tokens``: what the kernel has there, and the tokens' own part."""
    tokens = call.tokens
    assert tokens is not None
    affine = affine_at(call, tokens)
    logits, slope = finished(call, affine)
    down = logits - rows[0][:, None]
    p, factor = torch.exp(down), rows[1][:, None]
    if rows.shape[0] == 5:
        factor = factor + rows[4][:, None] * torch.where(p > 0, down, 0.0)
    found = p * factor
    if call.options.label_smoothing:
        weights = call.column_weight
        found -= rows[3][:, None] * (1.0 if weights is None else weights[tokens.clamp(min=0)])
    found = torch.where(tokens == column[:, None], rows[2][:, None], found)
    found = (found + sums_of_equals(tokens, token, call.wanted.scratch_bytes)) * slope
    if size := 2 * call.sizes[2]:
        found[:size] += _mixtures_at_tokens(call, column, affine[:size], pairs)
    return found


def _mixtures_at_tokens(call: Call, column: Tensor, affine: Tensor, pairs: Tensor) -> Tensor:
    """What the mixture adds at both members' tokens (2M, K), whose own affine logits are ``affine``."""
    num_pairs = call.sizes[2]
    assert call.tokens is not None
    tokens = call.tokens[: 2 * num_pairs]
    hidden, low = (
        None if t is None else torch.cat([t[num_pairs : 2 * num_pairs], t[:num_pairs]])
        for t in (call.hidden, call.low)
    )
    assert hidden is not None
    beside = affine_at(call._replace(hidden=hidden, low=low), tokens)
    share = torch.cat([call.lam, 1 - call.lam])[:, None]
    logits, slope = finished(call, times(share, affine) + times(1 - share, beside))
    lse, factor, at_c, at_u, _ = pairs.repeat(1, 2)[:, :, None]
    found = torch.exp(logits - lse) * factor
    for first, value in ((0, at_c), (num_pairs, at_u)):
        label = column[first : first + num_pairs].repeat(2)[:, None]
        found = torch.where(tokens == label, value, found)
    return share * found * slope


def gradient_terms(call: Call, column: Tensor, kept: Kept, upstream: Upstream) -> GradientTerms:
    """Fold coefficients, what the rounding of lse took, and the labels into the numbers the kernel needs."""
    upstream, scale = _scaled_upstream(call, upstream)
    rows = _row_terms(call, column, kept, upstream)
    pairs = _pair_terms(call, column, kept, upstream.pair)
    if upstream.token is None or call.tokens is None:
        return GradientTerms(rows, pairs, scale, None, None)
    values = _at_tokens(call, column, rows, pairs, upstream.token)
    return GradientTerms(rows, pairs, scale, call.tokens.contiguous(), values)

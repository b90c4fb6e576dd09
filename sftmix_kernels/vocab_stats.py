"""Statistics of a shard of the vocabulary, and what all shards' together say of each row and mixture.

    lse = logsumexp_r lse_r,   target_logit = sum_r target_logit_r,   max = max_r max_r,   mean = sum_r V_r mean_r / V
    entropy = sum_r p_r (entropy_r + lse - lse_r),   p_r = exp(lse_r - lse), the share of shard r

The shards' statistics are gathered by one collective and folded in the order of the ranks, so that every rank gets
the same bits. A shard without a column has lse_r = -inf, p_r = 0 and adds nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .chunked import chunked_loss
from .reference import sum_dtype
from .rows import Head, Needs
from .vocab_shard import gather, group_named


class Rows(NamedTuple):
    """Rows and mixtures as a shard sees them."""

    hidden: Tensor  # (N, D)
    column: Tensor  # (N,) of this shard; -1 at ignored rows and where the column is another shard's
    lam: Tensor  # (M,)
    low: Tensor | None  # (N, r)


class _Stats(NamedTuple):
    """What a shard, or each of all, knows of N rows and M mixtures; ``low`` is what rounding took from lse."""

    lse: Tensor  # (N,)
    low: Tensor  # (N,)
    max_logit: Tensor  # (N,)
    target_logit: Tensor  # (N,) 0 where the column is elsewhere
    moment: (
        Tensor  # (N,) sum of the logits with label smoothing, the entropy where it is asked for, otherwise 0
    )
    lse_x: Tensor  # (M,)
    low_x: Tensor  # (M,)
    target_logit_xc: Tensor  # (M,)
    target_logit_xu: Tensor  # (M,)


class Whole(NamedTuple):
    """What all columns say; the carries are what a backward recomputes from."""

    nll: Tensor  # (N,) 0 at ignored rows
    lse: Tensor  # (N,)
    is_top1: Tensor  # (N,)
    mean_logit: Tensor  # (N,) 0 without label smoothing
    entropy: Tensor  # (N,) where asked for
    mixup_nll: Tensor  # (M,) 0 at pairs with an ignored member
    row_carry: Tensor  # (3, N) lse, what its rounding took, nll
    pair_carry: Tensor  # (4, M) the same of the mixture, and its -log p at both targets


def own_columns(target: Tensor, place: Tensor, num_columns: int) -> Tensor:
    """Targets as columns of this shard; -1 at ignored rows and where the column is another shard's."""
    column = target - place[0]
    return torch.where((target >= 0) & (column >= 0) & (column < num_columns), column, -1)


def _shard_stats(rows: Rows, head: Head, *, fused: bool, scratch_bytes: int, entropy: bool) -> _Stats:
    """Statistics of this shard's columns alone."""
    hidden, column, lam, low = rows
    dtype, num_rows, num_pairs = sum_dtype(hidden.dtype), hidden.shape[0], lam.shape[0]
    zero, zero_x = hidden.new_zeros(num_rows, dtype=dtype), hidden.new_zeros(num_pairs, dtype=dtype)
    if head.weight.shape[0] == 0:  # no column: log of an empty sum
        none, none_x = torch.full_like(zero, -torch.inf), torch.full_like(zero_x, -torch.inf)
        return _Stats(none, zero, none, zero, zero, none_x, zero_x, zero_x, zero_x)
    smoothed = head.label_smoothing != 0
    if fused:
        from .fused import fused_forward

        f = fused_forward(
            hidden, head.weight, column, lam, bias=head.bias, softcap=head.softcap, logit_scale=head.logit_scale,
            low=low, up=head.up, want_mean_logit=smoothed, want_entropy=entropy,
        )  # fmt: skip
        low_c, low_x = f.row_carry[1], f.pair_carry[1]
        found = (f.lse, low_c, f.max_logit, f.target_logit, f.mean_logit, f.entropy, f.lse_x, low_x)
        at_labels = f.target_logit_xc, f.target_logit_xu
    else:
        c = chunked_loss(
            hidden, head, column, lam, row_coef=zero, pair_coef=zero_x, needs=Needs(entropy=entropy),
            scratch_bytes=scratch_bytes, low=low,
        )  # fmt: skip
        found = (c.lse, c.low, c.max_logit, c.target_logit, c.mean_logit, c.entropy, c.lse_x, c.low_x)
        at_labels = c.target_logit_xc, c.target_logit_xu
    *of_rows, mean_logit, own_entropy, lse_x, low_x = found
    moment = mean_logit * head.weight.shape[0] if smoothed else own_entropy if entropy else zero
    return _Stats._make((*of_rows, moment, lse_x, low_x, *at_labels))


def _log_sum(lse: Tensor, low: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log of the ranks' summed exponentials [R, n]: float64, then as rounded to lse's dtype and the rest."""
    exact = torch.logsumexp(lse.double() + low.double(), dim=0)
    rounded = exact.to(lse.dtype)
    return exact, rounded, (exact - rounded).to(lse.dtype)


def _nll(lse: Tensor, target_logit: Tensor, valid: Tensor) -> Tensor:
    """-log p [n] in the statistics' dtype from float64 lse, 0 where there is no target."""
    nll = (lse - target_logit).to(target_logit.dtype)
    return torch.where(valid, nll, torch.zeros_like(nll))


def _entropy(lse: Tensor, of: _Stats) -> Tensor:
    """Entropy [n] from float64 lse and each shard's own; every term is at least 0, so nothing cancels."""
    log_share = of.lse.double() + of.low.double() - lse
    part = log_share.exp() * (of.moment.double() - log_share)
    return torch.where(log_share > -torch.inf, part, 0.0).sum(dim=0).to(of.moment.dtype)


def whole_stats(
    rows: Rows,
    head: Head,
    place: Tensor,  # (2,) first column of this shard, V
    valid: Tensor,  # (N,)
    *,
    fused: bool,
    scratch_bytes: int,
    group_name: str,
    entropy: bool = False,
) -> Whole:
    """Statistics of all columns; one collective. ``entropy`` is for a head without label smoothing."""
    local = _shard_stats(rows, head, fused=fused, scratch_bytes=scratch_bytes, entropy=entropy)
    packed = gather(torch.cat(local), group_named(group_name))
    of = _Stats(*packed.split([t.shape[0] for t in local], dim=1))

    lse, rounded, low = _log_sum(of.lse, of.low)
    target_logit = of.target_logit.sum(dim=0)
    nll = _nll(lse, target_logit, valid)
    is_top1 = valid & (target_logit >= of.max_logit.amax(dim=0))
    lse_x, rounded_x, low_x = _log_sum(of.lse_x, of.low_x)
    num_pairs = rows.lam.shape[0]
    valid_c, valid_u = valid[:num_pairs], valid[num_pairs : 2 * num_pairs]
    nll_xc = _nll(lse_x, of.target_logit_xc.sum(dim=0), valid_c)
    nll_xu = _nll(lse_x, of.target_logit_xu.sum(dim=0), valid_u)
    share = rows.lam.to(nll.dtype)
    mixup_nll = share * nll_xc + (1 - share) * nll_xu
    return Whole(
        nll=nll,
        lse=rounded,
        is_top1=is_top1,
        mean_logit=of.moment.sum(dim=0) / place[1],
        entropy=_entropy(lse, of) if entropy else nll.new_empty(0),
        mixup_nll=torch.where(valid_c & valid_u, mixup_nll, torch.zeros_like(mixup_nll)),
        row_carry=torch.stack([rounded, low, nll]),
        pair_carry=torch.stack([rounded_x, low_x, nll_xc, nll_xu]),
    )

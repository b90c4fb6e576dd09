"""What the statistics of all shards of the vocabulary say of each row and mixture: a step between an engine's passes.

    lse = logsumexp_r lse_r,   target_logit = sum_r target_logit_r,   max = max_r max_r,   mean = sum_r V_r mean_r / V
    entropy = sum_r p_r (entropy_r + lse - lse_r),   p_r = exp(lse_r - lse), the share of shard r

The shards' statistics are gathered by one collective and folded in the order of the ranks, so that every rank gets
the same bits. A shard without a column has lse_r = -inf, p_r = 0 and adds nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..call import Call, Statistics
from .shard import gather, group_named


def own_columns(column: Tensor, place: Tensor, num_columns: int) -> Tensor:
    """Columns of the whole vocabulary (...) as columns of this shard; -1 at -1 and where they are another shard's."""
    own = column - place[0]
    return torch.where((column >= 0) & (own >= 0) & (own < num_columns), own, -1)


def of_no_columns(call: Call) -> Statistics:
    """Statistics of a shard without a column: log of an empty sum."""
    num_rows, _, num_pairs = call.sizes
    wanted, dtype = call.wanted, call.dtype

    def zeros(*shape: int) -> Tensor:
        return call.hidden.new_zeros(shape, dtype=dtype)

    row, pair = zeros(3, num_rows), zeros(4, num_pairs)
    row[0], pair[0] = -torch.inf, -torch.inf
    return Statistics(
        torch.full_like(row[0], -torch.inf), zeros(num_rows), zeros(num_rows if call.options.label_smoothing else 0),
        zeros(num_rows if wanted.entropy else 0),
        call.hidden.new_zeros(num_rows if wanted.predicted else 0, dtype=torch.int64),
        zeros(*((0, 0) if call.tokens is None else call.tokens.shape)), zeros(2, num_pairs), row, pair,
    )  # fmt: skip


def whole(local: Statistics, call: Call, column: Tensor) -> Statistics:
    """Statistics of all columns from this shard's; ``column`` (N,) counts the whole vocabulary's. One collective."""
    assert call.place is not None
    num_pairs, first = call.sizes[2], call.place[0]
    # A column's number is exact in float64 alone.
    total = local.mean_logit.double() * call.weight.shape[0]
    parts = [
        t.double() for t in (*local[:2], total, local.entropy, local.predicted + first, local.token_logit)
    ]
    parts += [t.double() for t in (local.logit_x, local.row_carry[:2], local.pair_carry[:2])]
    packed = gather(torch.cat([part.flatten() for part in parts]), group_named(call.group_name))
    split = packed.split([part.numel() for part in parts], dim=1)
    of = [t.view(packed.shape[0], *part.shape) for t, part in zip(split, parts, strict=True)]
    top, target_logit, total, entropy, predicted, token_logit, logit_x, row, pair = of

    lse, row_lse = _log_sum(row, call.dtype)
    lse_x, pair_lse = _log_sum(pair, call.dtype)
    at_target, at_labels = target_logit.sum(dim=0), logit_x.sum(dim=0)
    valid = column >= 0
    nll = torch.where(valid, lse - at_target, 0.0)
    valid_x = torch.stack([valid[:num_pairs], valid[num_pairs : 2 * num_pairs]])
    nll_x = torch.where(valid_x, lse_x - at_labels, 0.0)
    return Statistics(
        max_logit=top.amax(dim=0).to(call.dtype),
        target_logit=at_target.to(call.dtype),
        mean_logit=(total.sum(dim=0) / call.place[1]).to(call.dtype),
        entropy=_entropy(lse, row, entropy).to(call.dtype),
        predicted=_first_best(top, predicted),
        token_logit=token_logit.sum(dim=0).to(call.dtype),
        logit_x=at_labels.to(call.dtype),
        row_carry=torch.cat([row_lse, nll[None].to(call.dtype)]),
        pair_carry=torch.cat([pair_lse, nll_x.to(call.dtype)]),
    )


def _log_sum(lse_and_low: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Log of the ranks' summed exponentials (R, 2, n): float64, then as rounded to ``dtype`` and the rest (2, n)."""
    exact = torch.logsumexp(lse_and_low.sum(dim=1), dim=0)
    rounded = exact.to(dtype)
    rest = torch.where(exact.isfinite(), exact - rounded, 0.0)
    return exact, torch.stack([rounded, rest.to(dtype)])


def _first_best(top: Tensor, predicted: Tensor) -> Tensor:
    """The column of the first shard that has the largest logit, (N,); (0,) where none is asked for."""
    if not predicted.numel():
        return predicted[0].to(torch.int64)
    return predicted.gather(0, top.argmax(dim=0)[None])[0].to(torch.int64)


def _entropy(lse: Tensor, row: Tensor, own: Tensor) -> Tensor:
    """Entropy (N,) from float64 lse and each shard's own; every term is at least 0, so nothing cancels."""
    if not own.numel():
        return own[0]
    log_share = row.sum(dim=1) - lse
    part = log_share.exp() * (own - log_share)
    return torch.where(log_share > -torch.inf, part, 0.0).sum(dim=0)

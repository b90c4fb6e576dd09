"""Rows of every rank in one call: how many there are, the order they are joined in, and the way there and back.

Every rank holds other rows, N_r of them with M_r pairs, and its own V_r columns of the layer. Joined they are a call
like any other, in the order of the ranks within each part:

    rows    all ranks' confident rows, all their partners, all rows without a partner;  N = sum of N_r
    there   padded to the largest N_r, gathered, and taken in that order without the padding
    back    a rank's part of every gradient of rows, summed over the ranks and handed to the row's owner alone
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..call import Call, Statistics, Upstream
from ..reference import sum_dtype
from .shard import gather, group_named, shard_place

# Of one tensor each, under the names that torch has given them since 2.13 or, before it, the others.
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

# What is told of a call: sizes, which may differ between ranks, then what must not.
SIZES = ("N", "M", "V_r")
ALIKE = (
    "dtype", "D", "rank of lora", "K of tokens", "softcap", "logit_scale", "label_smoothing", "z_loss",
    "gradients of hidden", "gradients of weight", "gradients of bias", "gradients of lora A", "gradients of lora B",
    "function", "want_predicted", "class_weight", "main_grad", "impl",
)  # fmt: skip


class Ranks(NamedTuple):
    """The sizes of every rank, and where rows stand."""

    group_name: str
    rank: int
    num_rows: tuple[int, ...]  # N_r
    num_pairs: tuple[int, ...]  # M_r
    num_columns: tuple[int, ...]  # V_r
    source: Tensor  # (N,) where each joined row stands among all ranks' padded ones
    own: Tensor  # (N_r,) where this rank's rows stand among the joined ones

    @property
    def own_pairs(self) -> slice:
        start = sum(self.num_pairs[: self.rank])
        return slice(start, start + self.num_pairs[self.rank])


def agree(call: Call | None, group_name: str, device: torch.device) -> Ranks:
    """The sizes of every rank, after a collective call in which each says what it is about to ask for.

    ``call`` is None where this rank's own is refused. The host waits for the sizes, once a call.
    Raises ValueError on every rank where one of them has none, or where they ask for different things.
    """
    group = group_named(group_name)
    told = [0.0] * (1 + len(SIZES) + len(ALIKE)) if call is None else [1.0, *_told(call)]
    everyone: list[list[float]] = gather(
        torch.tensor(told, dtype=torch.float64, device=device), group
    ).tolist()
    refused = [rank for rank, each in enumerate(everyone) if not each[0]]
    if refused:
        raise ValueError(f"exchange: expected a call on every rank, but that of rank {refused[0]} is refused")
    for name, values in zip(
        ALIKE, zip(*(each[1 + len(SIZES) :] for each in everyone), strict=True), strict=True
    ):
        if len(set(values)) > 1:
            shown = ", ".join(f"{value:g}" for value in values)
            raise ValueError(f"exchange: expected the same {name} on every rank, got {shown}")
    sizes = (tuple(int(each[1 + at]) for each in everyone) for at in range(len(SIZES)))
    num_rows, num_pairs, num_columns = sizes
    rank = dist.get_rank(group)
    source, own = (t.to(device, non_blocking=True) for t in _order(num_rows, num_pairs, rank))
    return Ranks(group_name, rank, num_rows, num_pairs, num_columns, source, own)


def refuse(group_name: str, device: torch.device, weight: Any, *, has_place: bool) -> None:
    """Take part in what is left of the others' agreement, or they would wait for this rank; they raise.

    Where the shards' sizes are still to be told the ``weight``'s is, for the others look for their targets in the sum.
    """
    if not has_place:
        local = weight.to_local() if type(weight).__name__ == "DTensor" else weight
        size = local.shape[0] if isinstance(local, Tensor) and local.ndim else 0
        shard_place(torch.empty(size, 0, device=device), group_name)
    with suppress(ValueError):
        agree(None, group_name, device)


def _told(call: Call) -> list[float]:
    options, wanted = call.options, call.wanted
    rank = -1 if call.low is None else call.low.shape[1]
    count = -1 if call.tokens is None else call.tokens.shape[1]
    dtype = torch.finfo(call.hidden.dtype)
    return [
        call.hidden.shape[0], call.lam.shape[0], call.weight.shape[0],
        dtype.bits + dtype.eps, call.hidden.shape[1], rank, count,
        options.softcap, options.logit_scale, options.label_smoothing, options.z_loss, *wanted.needs,
        wanted.entropy, wanted.predicted, call.class_weight is not None, call.main_grad is not None,
        call.engine == "reference",
    ]  # fmt: skip


def _order(num_rows: Sequence[int], num_pairs: Sequence[int], rank: int) -> tuple[Tensor, Tensor]:
    """``source`` and ``own`` of :class:`Ranks`."""
    most = max(num_rows)
    parts: list[list[Tensor]] = [[], [], []]  # confident, partners, without one
    for each, (rows, pairs) in enumerate(zip(num_rows, num_pairs, strict=True)):
        borders = (0, pairs, 2 * pairs, rows)
        for part, start, stop in zip(parts, borders[:-1], borders[1:], strict=True):
            part.append(torch.arange(each * most + start, each * most + stop))
    source = torch.cat([rows for part in parts for rows in part])
    owner = source // max(most, 1)
    return source, (owner == rank).nonzero()[:, 0]


def join_rows(rows: Tensor, ranks: Ranks) -> Tensor:
    """Rows (N_r, ...) of every rank, joined (N, ...)."""
    most = max(ranks.num_rows)
    if not most:
        return rows
    padded = rows.new_zeros(most, *rows.shape[1:])
    padded[: rows.shape[0]] = rows
    everyone = rows.new_empty(most * len(ranks.num_rows), *rows.shape[1:])
    _all_gather(everyone, padded, group=group_named(ranks.group_name))
    return everyone.index_select(0, ranks.source)


def join_pairs(pairs: Tensor, ranks: Ranks) -> Tensor:
    """One number of each pair (M_r,) of every rank, joined (M,)."""
    most = max(ranks.num_pairs)
    if not most:
        return pairs
    padded = pairs.new_zeros(most)
    padded[: pairs.shape[0]] = pairs
    everyone = gather(padded, group_named(ranks.group_name))
    return torch.cat([each[:size] for each, size in zip(everyone, ranks.num_pairs, strict=True)])


def own_sum(joined: Tensor, dtype: torch.dtype, ranks: Ranks) -> Tensor:
    """Each rank's part (N, C) of the gradients of all rows, summed in the dtype of sums: those of own rows (N_r, C)."""
    most, width = max(ranks.num_rows), joined.shape[1]
    if not most:
        return joined.to(dtype)
    padded = joined.new_zeros(most * len(ranks.num_rows), width, dtype=sum_dtype(dtype))
    padded.index_copy_(0, ranks.source, joined.to(padded.dtype))
    total = padded.new_empty(most, width)
    _reduce_scatter(total, padded, group=group_named(ranks.group_name))
    return total[: ranks.num_rows[ranks.rank]].to(dtype)


def join_call(call: Call, column: Tensor, ranks: Ranks) -> Call:
    """The rows of all ranks as one call; what stands beside them is in the coefficients of their owners."""
    columns = column[:, None] if call.tokens is None else torch.cat([column[:, None], call.tokens], dim=1)
    columns = join_rows(columns, ranks)
    target = torch.where(columns[:, 0] >= 0, columns[:, 0], call.wanted.ignore_index)
    return call._replace(
        hidden=join_rows(call.hidden, ranks),
        low=None if call.low is None else join_rows(call.low, ranks),
        target=target,
        lam=join_pairs(call.lam, ranks),
        tokens=None if call.tokens is None else columns[:, 1:].contiguous(),
        row_weight=None, pair_weight=None, mixup_weight=None, ntp_denominator=None, mixup_denominator=None,
    )  # fmt: skip


def own_statistics(found: Statistics, ranks: Ranks) -> Statistics:
    """Of the joined rows and mixtures, this rank's."""

    def rows(value: Tensor, dim: int = 0) -> Tensor:
        return value.index_select(dim, ranks.own) if value.numel() else value

    pairs = ranks.own_pairs
    return Statistics(
        max_logit=rows(found.max_logit),
        target_logit=rows(found.target_logit),
        mean_logit=rows(found.mean_logit),
        entropy=rows(found.entropy),
        predicted=rows(found.predicted),
        token_logit=rows(found.token_logit),
        logit_x=found.logit_x[:, pairs],
        row_carry=rows(found.row_carry, 1),
        pair_carry=found.pair_carry[:, pairs],
    )


def join_upstream(own: Upstream, call: Call, ranks: Ranks) -> Upstream:
    """What the ranks' losses are multiplied by, of all rows; ``call`` is this rank's.

    Which of them a rank has may differ, so that of a function with statistics all are joined.
    """
    pair = join_pairs(own.pair, ranks)
    if not call.wanted.entropy:
        return Upstream(join_rows(own.row, ranks), pair)
    num_rows = own.row.shape[0]

    def given(value: Tensor | None, count: int) -> Tensor:
        return own.row.new_zeros(num_rows, count) if value is None else value.double().view(num_rows, count)

    count = 0 if call.tokens is None else call.tokens.shape[1]
    parts = [own.row[:, None], given(own.lse, 1), given(own.entropy, 1), given(own.token, count)]
    joined = join_rows(torch.cat(parts, dim=1), ranks)
    row, lse, entropy = (joined[:, at].contiguous() for at in range(3))
    token = joined[:, 3:].to(call.dtype).contiguous() if count else None
    return Upstream(row, pair, lse.to(call.dtype), entropy.to(call.dtype), token)


class _Whole(torch.autograd.Function):
    """Every rank's rows of the layer, joined; each rank's own get the sum of all ranks' gradients."""

    @staticmethod
    def forward(ctx: Any, ranks: Ranks, *shards: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.ranks = ranks
        group, sizes = group_named(ranks.group_name), ranks.num_columns
        found: list[Tensor | None] = []
        for shard in shards:
            if shard is None:
                found.append(None)
                continue
            padded = shard.new_zeros(max(sizes), *shard.shape[1:])
            padded[: shard.shape[0]] = shard
            everyone = gather(padded, group)
            found.append(torch.cat([each[:size] for each, size in zip(everyone, sizes, strict=True)]))
        return tuple(found)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        ranks: Ranks = ctx.ranks
        start = sum(ranks.num_columns[: ranks.rank])
        found: list[Tensor | None] = [None]
        for grad, needed in zip(grads, ctx.needs_input_grad[1:], strict=True):
            if grad is None or not needed:
                found.append(None)
                continue
            total = grad.to(sum_dtype(grad.dtype), copy=True).contiguous()
            dist.all_reduce(total, group=group_named(ranks.group_name))
            found.append(total[start : start + ranks.num_columns[ranks.rank]].to(grad.dtype))
        return tuple(found)


def reference_layer(
    weight: Tensor, bias: Tensor | None, up: Tensor | None, ranks: Ranks
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """For the reference: the whole layer on every rank, which is what the exchange spares. First derivatives only."""
    found: Any = _Whole.apply(ranks, weight, bias, up)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return tuple(found)  # type: ignore[return-value]  # of three

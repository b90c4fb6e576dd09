"""Gradients in portable torch, a chunk of rows at a time: what a CPU runs.

A chunk's logits A (confident rows), B (partners) and X = lam A + (1 - lam) B (mixed before scale and cap) are turned
in place into the gradients of the scalar loss, so three products per row and no [N, V] tensor:

    G_c = a_c g_c + lam b g_x,   G_u = a_u g_u + (1 - lam) b g_x        g as rows.py has them
    dhidden = G W,   dweight = sum over chunks of G^T hidden,   dbias = sum of G over rows
    dlow = G up,     dup = sum over chunks of G^T low          with low-rank factors: logits W h + up low

For 16-bit inputs a and b, of rows and pairs, are divided by their largest magnitude ``scale``, so that gradients are
rounded at unit scale; ``scale`` comes back and is applied in float32. Sums over chunks are float32. Log-sum-exps that
were ``kept`` (of all columns, where the weight is a shard of the vocabulary, or of an earlier forward) replace the
chunk's own; then a target of -1 means that its column is not here.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from ..call import Call, Coefficients, Gradients, Kept, Statistics, Upstream
from ..checks import readable
from ..terms import times
from .layer import Layer
from .products import Products
from .rows import (
    Pairs,
    RowSums,
    add_mixture_gradient_,
    affine,
    at_column,
    clear_,
    exponentials_,
    finish_logits_,
    head_of,
    may_be_infinite,
    may_be_zero,
    mix_,
    next_token_gradient_,
    own_label,
    unit_scale,
    write_label_,
)
from .scratch import Sizes, blocks, choose_sizes
from .statistics import Filled, Group, groups_of, weighted_sum


class _Work(NamedTuple):
    """What the loop multiplies terms by, in the dtype of sums; and log-sum-exps that are known."""

    column: Tensor  # (N,) targets among these columns, -1 where there is none
    row: Tensor  # (N,)
    pair: Tensor  # (M,)
    kept: Kept | None
    upstream: Upstream | None  # of what is not the loss

    @property
    def sums(self) -> tuple[RowSums, RowSums] | None:
        """Of all rows and mixtures, where they are known."""
        return (
            None
            if self.kept is None
            else (RowSums(*self.kept.row_carry[:2]), RowSums(*self.kept.pair_carry[:2]))
        )


class _Chunks:
    """The loop's state: inputs, outputs and the buffers that every chunk reuses.

    The buffers are made once, because memory that comes and goes with every block costs a CPU more than its arithmetic.
    """

    def __init__(self, call: Call, work: _Work, scale: Tensor) -> None:
        layer, dtype = Layer(head_of(call)), call.dtype
        num_rows, vocab_size, num_pairs = call.sizes
        self.call, self.layer, self.head, self.work, self.dtype = call, layer, layer.head, work, dtype
        self.has_infinities = may_be_infinite(self.head)
        self.weights: Tensor | None = None
        if call.class_weight is not None:
            ignored = call.target == call.wanted.ignore_index
            self.weights = call.class_weight[call.target.masked_fill(ignored, 0)].to(dtype)
        self.has_dead = may_be_zero(work.row) or (num_pairs > 0 and may_be_zero(work.pair))
        self.sizes: Sizes = choose_sizes(
            num_rows, num_pairs, vocab_size, dtype=layer.dtype, wide_dtype=dtype, device=call.hidden.device.type,
            scratch_bytes=call.wanted.scratch_bytes,
        )  # fmt: skip
        self.stored = call.hidden.new_empty(self.sizes.stored, vocab_size, dtype=layer.dtype)
        self.wide = call.hidden.new_empty(self.sizes.wide, vocab_size, dtype=dtype)
        self.filled = Filled(call, exact=False)
        self.products = Products(call, layer, scale)

    def run(self) -> Gradients:
        num_rows, _, num_pairs = self.call.sizes
        for group in groups_of(num_rows, num_pairs):
            size = self.sizes.pairs if group.sides == 2 else self.sizes.singles
            for chunk in blocks(0, group.length, size):
                _chunk(self, group, chunk)
        return self.products.result()

    def living(self, group: Group, chunk: slice, rows: Tensor) -> Tensor:
        """Hidden states (n, D) with 0 in rows that bear no loss, which may hold NaN: 0 times it would not be 0."""
        if not self.has_dead:
            return rows
        dead = self.dead(group, chunk)
        if group.sides == 2:
            dead = dead & (self.work.pair[chunk] == 0)[None]
        dead = dead.flatten()
        if readable(rows) and bool(rows[dead].isfinite().all()):
            return rows
        return rows.masked_fill(dead[:, None], 0)

    def weight(self, group: Group, rows: slice) -> Tensor | float:
        """c at each row's target (sides, n), which may be a column of another shard; 1 without class weights."""
        return 1.0 if self.weights is None else group.of(self.weights, rows)

    def dead(self, group: Group, part: slice) -> Tensor:
        """Which rows (sides, n) have no upstream of their own."""
        dead = group.of(self.work.row, part) == 0
        for each in (self.work.upstream or ())[2:]:
            if each is not None:
                dead = dead & (group.of(each, part) == 0).view(*dead.shape, -1).all(dim=-1)
        return dead

    def kept_logits(self, logits: Tensor) -> Tensor | None:
        """A copy of final logits where the entropy's gradient will need them beside their exponentials."""
        upstream = self.work.upstream
        return None if upstream is None or upstream.entropy is None else logits.clone()

    def open_block(self, stored: Tensor) -> tuple[Tensor, Tensor]:
        """A block's logits [sides, b, V] in the dtype of sums, itself or a copy, and room for the mixture [b, V]."""
        sides, count, vocab_size = stored.shape
        if stored.dtype == self.dtype:
            return stored, self.wide[:count]
        rows = sides * count
        wide = self.wide[:rows].view(sides, count, vocab_size).copy_(stored)
        return wide, self.wide[rows : rows + count]


def _chunk(state: _Chunks, group: Group, chunk: slice) -> None:
    """One chunk: a product for all its rows, blocks of rows, two products."""
    call, layer, count = state.call, state.layer, chunk.stop - chunk.start
    hidden = layer.widen(group.of(call.hidden, chunk).flatten(0, 1))
    low = None if call.low is None else layer.widen(group.of(call.low, chunk).flatten(0, 1))
    stored = state.stored[: group.sides * count]
    for columns, head in layer.slices():
        affine(head, hidden, low, stored[:, columns])
    planes = stored.view(group.sides, count, -1)
    size = state.sizes.block if group.sides == 2 else state.sizes.block_singles
    for part in blocks(0, count, size):
        rows = slice(chunk.start + part.start, chunk.start + part.stop)
        block, mixed = state.open_block(planes[:, part])
        if group.sides == 2:
            _pair_rows(state, group, rows, block, mixed)
        else:
            _single_rows(state, group, rows, block)
        if planes.dtype != block.dtype:  # round the block's gradient to where its logits were
            planes[:, part].copy_(block)
    if call.needs.dweight or call.needs.dup:
        hidden, low = (
            state.living(group, chunk, hidden),
            None if low is None else state.living(group, chunk, low),
        )
    state.products.add(group, chunk, hidden, low, stored)


def _finish_rows(
    state: _Chunks, group: Group, rows: slice, logits: Tensor, own_logit: Tensor
) -> tuple[RowSums, Tensor]:
    """Sums and coefficients of a block's rows from their final logits [sides, b, V], which become exponentials."""
    head, filled, work = state.head, state.filled, state.work
    target, coef = group.of(work.column, rows), group.of(work.row, rows)
    if filled.predicted.numel():
        group.of(filled.predicted, rows).copy_(logits.argmax(dim=-1))
    if work.sums is None and head.label_smoothing:
        group.of(filled.mean_logit, rows).copy_(weighted_sum(logits, head.class_weight) / logits.shape[-1])
    of_rows = None if work.sums is None else RowSums(*(group.of(t, rows) for t in work.sums[0]))
    row_max, sums = exponentials_(logits, of_rows)
    filled.write_rows(group, rows, target, own_logit, row_max, sums)
    if head.token_scaling and work.kept is None:
        coef = times(coef, torch.exp(sums.logprob(own_logit)))
    return sums, coef


def _single_rows(state: _Chunks, group: Group, rows: slice, block: Tensor) -> None:
    """Statistics of a block of unpaired rows and its gradient over its logits [1, b, V]."""
    head, target = state.head, group.of(state.work.column, rows)
    logits, slope = finish_logits_(head, block, True)
    own_logit = at_column(logits, target)
    copy = state.kept_logits(logits)
    sums, coef = _finish_rows(state, group, rows, logits, own_logit)
    weight, logprob = state.weight(group, rows), sums.logprob(own_logit)
    extra = None if state.work.upstream is None else _extra_(state, group, rows, logits, copy, sums)
    next_token_gradient_(head, logits, coef, sums, weight, state.has_dead)
    own = own_label(head, target, logprob, sums, weight)
    write_label_(logits, target, times(coef, own) if state.has_dead else coef * own)
    if extra is not None:
        logits.add_(extra)
    if slope is not None:
        logits.mul_(slope)
        if state.has_dead:
            clear_(logits, state.dead(group, rows), sums.lse)
    elif head.logit_scale != 1.0:
        logits.mul_(head.logit_scale)


def _extra_(
    state: _Chunks, group: Group, rows: slice, exponentials: Tensor, logits: Tensor | None, sums: RowSums
) -> Tensor:
    """The gradient of a block's log-sum-exps, entropies and tokens' log-probabilities, [1, b, V]."""
    upstream, kept = state.work.upstream, state.work.kept
    assert upstream is not None and kept is not None
    total = torch.zeros_like(sums.lse) if upstream.lse is None else group.of(upstream.lse, rows).clone()
    token = None if upstream.token is None else group.of(upstream.token, rows)
    if token is not None:
        total -= token.sum(dim=-1)
    p = exponentials * torch.exp(-sums.log_total)[..., None]
    found = p * total[..., None]
    dead = total == 0
    if logits is not None and upstream.entropy is not None:
        own = group.of(upstream.entropy, rows)
        surprise = (logits - sums.lse[..., None]) + group.of(kept.entropy, rows)[..., None]
        found -= torch.where(p > 0, p * surprise, 0.0) * own[..., None]
        dead &= own == 0
    clear_(found, dead, sums.lse)
    if token is not None and state.call.tokens is not None:
        tokens = group.of(state.call.tokens, rows)
        found.scatter_add_(-1, tokens.clamp(min=0), torch.where(tokens >= 0, token, torch.zeros_like(token)))
    return found


def _pair_rows(state: _Chunks, group: Group, rows: slice, block: Tensor, mixed: Tensor) -> None:
    """Statistics of a block of pairs and their gradients over their logits [2, b, V]; ``mixed`` [b, V] is scratch."""
    head, work, target = state.head, state.work, group.of(state.work.column, rows)
    lam = state.call.lam[rows].to(state.dtype)
    mix_(block[0], block[1], lam, mixed, state.has_infinities)
    (logits, slope), (mixed, slope_x) = (finish_logits_(head, t, True) for t in (block, mixed))

    def at_labels(of: Tensor, of_mixture: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        both = of_mixture.expand(2, -1, -1)
        return at_column(of, target), at_column(of, target.flip(0)), at_column(both, target)

    own, other, logit_x = at_labels(logits, mixed)
    copy = state.kept_logits(logits)
    slopes = None if slope is None or slope_x is None else at_labels(slope, slope_x)
    sums, row_coef = _finish_rows(state, group, rows, logits, own)
    _, sums_x = exponentials_(mixed, None if work.sums is None else RowSums(*(t[rows] for t in work.sums[1])))
    state.filled.write_mixtures(rows, target, logit_x, sums_x)
    weight = state.weight(group, rows)
    extra = None if work.upstream is None else _extra_(state, group, rows, logits, copy, sums)
    next_token_gradient_(head, logits, row_coef, sums, weight, state.has_dead)
    if slope is not None and slope_x is not None:
        logits.mul_(slope)
        mixed.mul_(slope_x)
        if state.has_dead:
            clear_(logits, state.dead(group, rows), sums.lse)
    share = torch.stack([lam, 1 - lam])
    pairs = Pairs(target, share, weight, own, other, logit_x, sums, sums_x, slopes)
    add_mixture_gradient_(head, pairs, logits, mixed, (row_coef, work.pair[rows]), state.has_dead)
    if extra is not None:
        logits.add_(extra if slope is None else extra * slope)
    if slope is None and head.logit_scale != 1.0:
        logits.mul_(head.logit_scale)


def _unit(call: Call, row: Tensor, pair: Tensor, others: Iterable[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Coefficients in the dtype of sums, at most 1 where gradients are 16-bit; and what they were divided by."""
    row, pair = row.to(call.dtype), pair.to(call.dtype)
    if call.hidden.dtype == call.dtype:
        return row, pair, torch.ones((), dtype=call.dtype, device=row.device)
    scale = unit_scale(torch.cat([row, *(other.flatten() for other in others)]), pair)
    return row / scale, pair / scale, scale


def statistics_with_gradients(call: Call, coef: Coefficients) -> tuple[Statistics, Tensor, Gradients]:
    """Statistics of every row and pair; ``scale``; and the gradients of the loss divided by it.

    One chunk's logits, in the dtype of products, and the float32 logits of the block of it in work take
    ``scratch_bytes`` at most (a chunk has at least a row or pair; a softcap's slopes come on top). Memory beside:
    2 n D itemsize for a chunk of n rows, O(N + M), dhidden N D itemsize and dweight 4 V D until the backward; 16-bit
    products: (itemsize + 4) D min(V, PRODUCT_COLUMNS); 16-bit inputs whose products are float32 (layer.py): 8 n D, and
    a slice of the weight, WIDENED_BYTES or 512 D. Gradients of weight, bias and up are in the dtype of sums.
    """
    row, pair, scale = _unit(call, coef.row, coef.pair, ())
    state = _Chunks(call, _Work(coef.column, row, pair, None, None), scale)
    found = state.run()
    return state.filled.result(), scale, found


def gradients(call: Call, column: Tensor, kept: Kept, upstream: Upstream) -> Gradients:
    """Gradients from logits made again, with the upstream and what a forward kept of all columns; memory as above.

    With ``call.main_grad``, which grows by dweight, there is none beside it. Of a shard, dhidden and dlow stay in the
    dtype of sums: a sum over shards is to be rounded once.
    """
    rest = [t.to(call.dtype) for t in upstream[2:] if t is not None]
    row, pair, scale = _unit(call, upstream.row, upstream.pair, rest)
    others = None
    if rest:
        lse, entropy, token = (None if t is None else t.to(call.dtype) / scale for t in upstream[2:])
        others = Upstream(row, pair, lse, entropy, token)
    found = _Chunks(call, _Work(column, row, pair, kept, others), scale).run()
    if call.hidden.dtype == call.dtype:
        return found
    of_rows = call.dtype if call.place is not None else call.hidden.dtype
    of_layer = call.weight.dtype
    dtypes = (of_rows, of_layer, of_layer, of_rows, of_layer)
    return Gradients(*(scaled(each, scale, dtype) for each, dtype in zip(found, dtypes, strict=True)))


def scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient times factor, multiplied in factor's dtype and rounded once to ``dtype``; never the same memory."""
    if gradient.dtype == factor.dtype == dtype:
        return gradient * factor
    output = torch.empty_like(gradient, dtype=dtype)
    for rows in blocks(0, gradient.shape[0], 4096):  # so that copies stay small
        torch.mul(gradient[rows].to(factor.dtype), factor, out=output[rows])
    return output

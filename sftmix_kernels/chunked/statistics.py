"""Statistics of rows and mixtures in portable torch, a tile of logits at a time: the forward pass without gradients.

A tile's logits of a pair's members, A and B, give those of the mixture, X = lam A + (1 - lam) B, before scale and cap.
Tile by tile, of the final logits z of each of the three:

    m' = max(m, max z),   s' = s exp(m - m') + sum exp(z - m'),   lse = m + log s
    t' = exp(m - m') (t + (m - m') s) + sum exp(z - m') (z - m'),   entropy = log s - t / s

s and t are float64 [n], sums within a tile are of the logits' dtype.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..call import Call, Statistics
from .layer import Layer
from .rows import RowSums, affine, finish_logits_, head_of, may_be_infinite, mix_
from .scratch import blocks, choose_tile

NEGLIGIBLE = -1000.0  # exp of it is 0 in float32 and float64; times it, 0 and not NaN as of -inf


class Group(NamedTuple):
    """Rows that are taken together: pairs (two sides, confident rows and then partners) or unpaired rows (one)."""

    sides: int
    first: int
    length: int  # of each side

    def of(self, tensor: Tensor, part: slice) -> Tensor:
        """Rows of a tensor (N, ...) as (sides, n, ...)."""
        if self.sides == 1:
            return tensor[self.first + part.start : self.first + part.stop].unsqueeze(0)
        rows = tensor[: 2 * self.length].view(2, self.length, *tensor.shape[1:])
        return rows[:, part]


def groups_of(num_rows: int, num_pairs: int) -> Iterator[Group]:
    """The pairs, then the unpaired rows, where there are any."""
    if num_pairs:
        yield Group(2, 0, num_pairs)
    if num_rows > 2 * num_pairs:
        yield Group(1, 2 * num_pairs, num_rows - 2 * num_pairs)


class Filled:
    """What a call says of its rows and mixtures, filled part by part."""

    def __init__(self, call: Call, *, exact: bool) -> None:
        """``exact``: what rounding took from log-sum-exps will be asked for, otherwise 0 stands for it."""
        num_rows, _, num_pairs = call.sizes
        self.exact = exact

        def new(*size: int, dtype: torch.dtype = call.dtype) -> Tensor:
            return call.hidden.new_empty(size, dtype=dtype)

        self.of_rows = new(num_rows, 5)  # lse, low, nll, max_logit, target_logit
        self.of_pairs = new(num_pairs, 6)  # lse, low, nll at both targets, mixed logits at both
        self.entropy = new(num_rows if call.wanted.entropy else 0)
        self.mean_logit = new(num_rows if call.options.label_smoothing else 0)
        self.predicted = new(num_rows if call.wanted.predicted else 0, dtype=torch.int64)
        self.token_logit = new(*((0, 0) if call.tokens is None else call.tokens.shape))

    def carried(self, sums: RowSums) -> tuple[Tensor, Tensor]:
        lse = sums.lse
        return lse, sums.low if self.exact else torch.zeros_like(lse)

    def write_rows(
        self, group: Group, part: slice, target: Tensor, own_logit: Tensor, row_max: Tensor, sums: RowSums
    ) -> None:
        """All [sides, n]; a target of -1 has nll and target logit 0."""
        absent = target < 0
        nll = (-sums.logprob(own_logit)).masked_fill_(absent, 0)
        found = (*self.carried(sums), nll, row_max, own_logit.masked_fill(absent, 0))
        torch.stack(found, dim=-1, out=group.of(self.of_rows, part))

    def write_mixtures(self, part: slice, target: Tensor, logit_x: Tensor, sums: RowSums) -> None:
        """target and the mixed logits at both targets [2, n]; sums [n]."""
        absent = target < 0
        nll = (-sums.logprob(logit_x)).masked_fill_(absent, 0)
        found = (*self.carried(sums), *nll, *logit_x.masked_fill(absent, 0))
        torch.stack(found, dim=-1, out=self.of_pairs[part])

    def result(self) -> Statistics:
        rows, pairs = self.of_rows.t().contiguous(), self.of_pairs.t().contiguous()
        return Statistics(
            rows[3], rows[4], self.mean_logit, self.entropy, self.predicted, self.token_logit, pairs[4:],
            rows[:3], pairs[:4],
        )  # fmt: skip


class _Running:
    """The running sums of rows [...] over tiles [..., c]."""

    def __init__(self, *, entropy: bool, mean: bool, predicted: bool) -> None:
        self.has_entropy, self.has_mean, self.has_predicted = entropy, mean, predicted
        self.is_first = True
        self.top = self.shift = self.total = self.moment = self.sum_logits = self.best = torch.empty(0)

    def fold_(self, logits: Tensor, weights: Tensor, first: int, class_weight: Tensor | None) -> None:
        """A tile's final logits from column ``first`` on, overwritten; ``weights``, as large, is scratch."""
        tile_sum = weighted_sum(logits, class_weight).double() if self.has_mean else None
        top = self._top(logits, first)
        # A row of -inf alone has a finite shift, so that its exponentials are 0 and not NaN.
        shift = top.clamp(min=torch.finfo(top.dtype).min)
        logits.sub_(shift[..., None])
        if self.has_entropy:
            torch.exp(logits, out=weights)
            moment = logits.clamp_(min=NEGLIGIBLE).mul_(weights).sum(dim=-1).double()
        else:
            weights, moment = logits.exp_(), self.moment
        total = weights.sum(dim=-1).double()
        if not self.is_first:
            change = (self.shift - shift).double()
            factor = change.exp()
            if self.has_entropy:
                moment = moment + factor * (self.moment + change * self.total)
            total = total + factor * self.total
        self.top, self.shift, self.total, self.moment = top, shift, total, moment
        if tile_sum is not None:
            self.sum_logits = tile_sum if self.is_first else self.sum_logits + tile_sum
        self.is_first = False

    def _top(self, logits: Tensor, first: int) -> Tensor:
        """The largest logit so far; the first column that has it in ``best``."""
        if not self.has_predicted:
            top = logits.amax(dim=-1)
            return top if self.is_first else torch.maximum(top, self.top)
        top, column = logits.max(dim=-1)
        self.best = column if self.is_first else torch.where(top > self.top, column + first, self.best)
        return top if self.is_first else torch.maximum(top, self.top)

    def sums(self) -> RowSums:
        return RowSums(self.shift, self.total.log().to(self.shift.dtype))

    def entropy(self) -> Tensor:
        return self.total.log() - self.moment / self.total


def weighted_sum(logits: Tensor, class_weight: Tensor | None) -> Tensor:
    """Sum of the logits [..., c], each times its class's weight; a class of weight 0 has none."""
    if class_weight is None:
        return logits.sum(dim=-1)
    return (logits.masked_fill(class_weight == 0, 0) * class_weight).sum(dim=-1)


def _read(into: Tensor | None, logits: Tensor, target: Tensor, columns: slice) -> Tensor:
    """logits [..., c] at ``target`` [..., K] where that is one of ``columns``, elsewhere ``into``, or anything."""
    column = target - columns.start
    found = logits.gather(-1, column.clamp(0, logits.shape[-1] - 1))
    if into is None:
        return found
    return torch.where((column >= 0) & (column < logits.shape[-1]), found, into)


def _goes_on(call: Call) -> bool:
    """Whether something is computed with log-sum-exps after the pass."""
    return any(call.needs) or call.place is not None or call.tokens is not None


class _Pass:
    """One call: the layer, the rows, and the buffers that every tile reuses."""

    def __init__(self, call: Call, column: Tensor) -> None:
        self.call, self.target, self.layer = call, column, Layer(head_of(call))
        self.has_entropy, self.filled = bool(call.wanted.entropy), Filled(call, exact=_goes_on(call))
        self.has_infinities = may_be_infinite(self.layer.head)

    def run(self, group: Group) -> None:
        """Statistics of a group's rows, and of the mixtures of pairs."""
        call, dtype = self.call, self.call.dtype
        direct, planes = self.layer.dtype == dtype, 3 if group.sides == 2 else 1
        cell = dtype.itemsize * (planes + self.has_entropy)
        cell += 0 if direct else group.sides * self.layer.dtype.itemsize
        size, width = choose_tile(
            group.length, call.weight.shape[0], cell_bytes=cell, most_columns=self.layer.most_columns,
            device=call.hidden.device.type, scratch_bytes=call.wanted.scratch_bytes,
        )  # fmt: skip
        wide = call.hidden.new_empty(planes + self.has_entropy, size, width, dtype=dtype)
        narrow = wide if direct else call.hidden.new_empty(group.sides, size, width, dtype=self.layer.dtype)
        for part in blocks(0, group.length, size):
            self._rows(group, part, wide, narrow, width)

    def _rows(self, group: Group, part: slice, wide: Tensor, narrow: Tensor, width: int) -> None:
        """Statistics of a run of rows, all columns."""
        call, sides, layer, head = self.call, group.sides, self.layer, self.layer.head
        hidden = layer.widen(group.of(call.hidden, part).flatten(0, 1))
        low = None if call.low is None else layer.widen(group.of(call.low, part).flatten(0, 1))
        target, count = group.of(self.target, part), part.stop - part.start
        share = call.lam[part].to(call.dtype)
        running = _Running(
            entropy=self.has_entropy, mean=head.label_smoothing != 0, predicted=bool(call.wanted.predicted)
        )
        wanted = target[..., None] if call.tokens is None else group.of(call.tokens, part)
        wanted = wanted if call.tokens is None else torch.cat([target[..., None], wanted], dim=-1)
        own: Tensor | None = None
        at_x: Tensor | None = None
        for columns in blocks(0, head.weight.shape[0], width):
            planes = _tile(wide, count, columns)
            logits, products = planes[:sides], _tile(narrow, count, columns)[:sides]
            affine(layer.of(columns), hidden, low, products.flatten(0, 1))
            if products.dtype != logits.dtype:
                logits.copy_(products)
            if sides == 2:
                mix_(logits[0], logits[1], share, planes[2], self.has_infinities)
            final, _ = finish_logits_(head, planes[: 3 if sides == 2 else 1])
            own = _read(own, final[:sides], wanted, columns)
            if sides == 2:
                at_x = _read(at_x, final[2].expand(2, -1, -1), target[..., None], columns)
            weights = None if head.class_weight is None else head.class_weight[columns]
            running.fold_(final, planes[-1:], columns.start, weights)
        assert own is not None, "a layer has at least one column"
        self._write(group, part, running, own, at_x)

    def _write(self, group: Group, part: slice, running: _Running, own: Tensor, at_x: Tensor | None) -> None:
        target, sums, sides, filled = group.of(self.target, part), running.sums(), group.sides, self.filled
        rows = RowSums(sums.shift[:sides], sums.log_total[:sides])
        filled.write_rows(group, part, target, own[..., 0], running.top[:sides], rows)
        if self.has_entropy:
            group.of(filled.entropy, part).copy_(running.entropy()[:sides])
        if running.has_mean:
            mean = running.sum_logits[:sides] / self.layer.head.weight.shape[0]
            group.of(filled.mean_logit, part).copy_(mean)
        if running.has_predicted:
            group.of(filled.predicted, part).copy_(running.best[:sides])
        if self.call.tokens is not None:
            absent = group.of(self.call.tokens, part) < 0
            group.of(filled.token_logit, part).copy_(own[..., 1:].masked_fill(absent, 0))
        if at_x is not None:
            mixture = RowSums(sums.shift[2], sums.log_total[2])
            filled.write_mixtures(part, target, at_x[..., 0], mixture)


def _tile(buffer: Tensor, count: int, columns: slice) -> Tensor:
    """The planes of a buffer [planes, size, width] cut to a tile of ``count`` rows, contiguous."""
    planes, width = buffer.shape[0], columns.stop - columns.start
    return buffer.view(-1)[: planes * count * width].view(planes, count, width)


def statistics(
    call: Call,
    column: Tensor,  # (N,) the targets among these columns, -1 at ignored rows and where they are elsewhere
) -> Statistics:
    """Statistics of every row and mixture, no gradient.

    Memory: one tile of logits, at most min(``scratch_bytes``, CACHE_BYTES) on a CPU (elsewhere ``scratch_bytes``; at
    least one row or pair of one column), the entropy's exponentials in it, O(N + M), and n D itemsize for n rows of a
    tile that are pairs. Products widened: 4 n D and a slice of the weight, WIDENED_BYTES or 512 D.
    """
    all_rows = _Pass(call, column)
    for group in groups_of(call.hidden.shape[0], call.lam.shape[0]):
        all_rows.run(group)
    return all_rows.filled.result()

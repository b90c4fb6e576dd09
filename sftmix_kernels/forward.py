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

from .layer import Layer
from .reference import sum_dtype
from .rows import Head, RowSums, affine, finish_logits_
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


class Statistics:
    """What a call says of its rows and mixtures, filled part by part."""

    def __init__(self, head: Head, hidden: Tensor, num_pairs: int, *, entropy: bool = False) -> None:
        num_rows, dtype = hidden.shape[0], sum_dtype(hidden.dtype)

        def new(*size: int) -> Tensor:
            return hidden.new_empty(size, dtype=dtype)

        self.of_rows = new(num_rows, 5)  # nll, lse, low, max_logit, target_logit
        self.of_pairs = new(num_pairs, 5)  # mixup_nll, lse, low, mixed logits at both targets
        self.entropy = new(num_rows if entropy else 0)
        self.mean_logit = new(num_rows if head.label_smoothing else 0)

    def write_rows(
        self, group: Group, part: slice, target: Tensor, own_logit: Tensor, row_max: Tensor, sums: RowSums
    ) -> None:
        """All [sides, n]; a target of -1 has nll and target logit 0."""
        absent = target < 0
        nll = (-sums.logprob(own_logit)).masked_fill_(absent, 0)
        found = (nll, sums.lse, sums.low, row_max, own_logit.masked_fill(absent, 0))
        torch.stack(found, dim=-1, out=group.of(self.of_rows, part))

    def write_mixtures(
        self, part: slice, target: Tensor, share: Tensor, logit_x: Tensor, sums: RowSums
    ) -> None:
        """target, share (lam and 1 - lam) and the mixed logits at both targets [2, n]; sums [n]."""
        absent = target < 0
        cross_entropy = -(share * sums.logprob(logit_x)).sum(dim=0)
        found = (cross_entropy.masked_fill_(absent.any(dim=0), 0), sums.lse, sums.low)
        torch.stack((*found, *logit_x.masked_fill(absent, 0)), dim=-1, out=self.of_pairs[part])


class _Running:
    """The running sums of rows [...] over tiles [..., c]."""

    def __init__(self, *, entropy: bool, mean: bool) -> None:
        self.has_entropy, self.has_mean, self.is_first = entropy, mean, True
        self.top = self.shift = self.total = self.moment = self.sum_logits = torch.empty(0)

    def fold_(self, logits: Tensor, weights: Tensor) -> None:
        """A tile's final logits, which are overwritten; ``weights``, of their size, is scratch for the entropy."""
        top, tile_sum = logits.amax(dim=-1), logits.sum(dim=-1).double() if self.has_mean else None
        top = top if self.is_first else torch.maximum(top, self.top)
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

    def sums(self) -> RowSums:
        return RowSums(self.shift, self.total.log().to(self.shift.dtype))

    def entropy(self) -> Tensor:
        return self.total.log() - self.moment / self.total


def _read(into: Tensor | None, logits: Tensor, target: Tensor, columns: slice) -> Tensor:
    """logits [..., c] at ``target`` [...] where it is one of ``columns``, elsewhere what ``into`` has, or anything."""
    column = target - columns.start
    found = logits.gather(-1, column.clamp(0, logits.shape[-1] - 1)[..., None]).squeeze(-1)
    if into is None:
        return found
    return torch.where((column >= 0) & (column < logits.shape[-1]), found, into)


class _Pass:
    """One call: the layer, the rows, and the buffers that every tile reuses."""

    def __init__(
        self, layer: Layer, hidden: Tensor, target: Tensor, lam: Tensor, low: Tensor | None, *, entropy: bool,
        scratch_bytes: int,
    ) -> None:  # fmt: skip
        self.layer, self.hidden, self.target, self.lam, self.low_rank = layer, hidden, target, lam, low
        self.dtype, self.has_entropy, self.scratch_bytes = sum_dtype(hidden.dtype), entropy, scratch_bytes
        self.stats = Statistics(layer.head, hidden, lam.shape[0], entropy=entropy)

    def run(self, group: Group) -> None:
        """Statistics of a group's rows, and of the mixtures of pairs."""
        direct, planes = self.layer.dtype == self.dtype, 3 if group.sides == 2 else 1
        cell = self.dtype.itemsize * (planes + self.has_entropy)
        cell += 0 if direct else group.sides * self.layer.dtype.itemsize
        size, width = choose_tile(
            group.length, self.layer.head.weight.shape[0], cell_bytes=cell, most_columns=self.layer.most_columns,
            device=self.hidden.device.type, scratch_bytes=self.scratch_bytes,
        )  # fmt: skip
        wide = self.hidden.new_empty(planes + self.has_entropy, size, width, dtype=self.dtype)
        narrow = wide if direct else self.hidden.new_empty(group.sides, size, width, dtype=self.layer.dtype)
        for part in blocks(0, group.length, size):
            self._rows(group, part, wide, narrow, width)

    def _rows(self, group: Group, part: slice, wide: Tensor, narrow: Tensor, width: int) -> None:
        """Statistics of a run of rows, all columns."""
        sides, layer, head = group.sides, self.layer, self.layer.head
        hidden = layer.widen(group.of(self.hidden, part).flatten(0, 1))
        low = None if self.low_rank is None else layer.widen(group.of(self.low_rank, part).flatten(0, 1))
        target, count = group.of(self.target, part), part.stop - part.start
        share = self.lam[part].to(self.dtype)
        running = _Running(entropy=self.has_entropy, mean=head.label_smoothing != 0)
        own: Tensor | None = None
        at_x: Tensor | None = None
        for columns in blocks(0, head.weight.shape[0], width):
            planes = _tile(wide, count, columns)
            logits, products = planes[:sides], _tile(narrow, count, columns)[:sides]
            affine(layer.of(columns), hidden, low, products.flatten(0, 1))
            if products.dtype != logits.dtype:
                logits.copy_(products)
            if sides == 2:
                torch.lerp(logits[1], logits[0], share[:, None], out=planes[2])
            final, _ = finish_logits_(head, planes[: 3 if sides == 2 else 1])
            own = _read(own, final[:sides], target, columns)
            if sides == 2:
                at_x = _read(at_x, final[2].expand(2, -1, -1), target, columns)
            running.fold_(final, planes[-1:])
        assert own is not None, "a layer has at least one column"
        self._write(group, part, running, own, at_x)

    def _write(self, group: Group, part: slice, running: _Running, own: Tensor, at_x: Tensor | None) -> None:
        target, sums, sides = group.of(self.target, part), running.sums(), group.sides
        rows = RowSums(sums.shift[:sides], sums.log_total[:sides])
        self.stats.write_rows(group, part, target, own, running.top[:sides], rows)
        if self.has_entropy:
            group.of(self.stats.entropy, part).copy_(running.entropy()[:sides])
        if running.has_mean:
            mean = running.sum_logits[:sides] / self.layer.head.weight.shape[0]
            group.of(self.stats.mean_logit, part).copy_(mean)
        if at_x is not None:
            share = self.lam[part].to(self.dtype)
            mixture = RowSums(sums.shift[2], sums.log_total[2])
            self.stats.write_mixtures(part, target, torch.stack([share, 1 - share]), at_x, mixture)


def _tile(buffer: Tensor, count: int, columns: slice) -> Tensor:
    """The planes of a buffer [planes, size, width] cut to a tile of ``count`` rows, contiguous."""
    planes, width = buffer.shape[0], columns.stop - columns.start
    return buffer.view(-1)[: planes * count * width].view(planes, count, width)


def forward_statistics(
    hidden: Tensor,  # (N, D)
    head: Head,
    target: Tensor,  # (N,) int64, -1 at ignored rows and where the column is not here
    lam: Tensor,  # (M,) float32
    *,
    scratch_bytes: int,
    entropy: bool = False,
    low: Tensor | None = None,  # (N, r), with head.up
) -> Statistics:
    """Statistics of every row and mixture, no gradient.

    Memory: one tile of logits, at most min(``scratch_bytes``, CACHE_BYTES) on a CPU (elsewhere ``scratch_bytes``; at
    least one row or pair of one column), the entropy's exponentials in it, O(N + M), and n D itemsize for n rows of a
    tile that are pairs. Products widened: 4 n D and a slice of the weight, WIDENED_BYTES or 512 D.
    """
    call = _Pass(Layer(head), hidden, target, lam, low, entropy=entropy, scratch_bytes=scratch_bytes)
    for group in groups_of(hidden.shape[0], lam.shape[0]):
        call.run(group)
    return call.stats

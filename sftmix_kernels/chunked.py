"""The loss in portable torch, a chunk of rows at a time: what a CPU runs.

A chunk's logits A (confident rows), B (partners) and X = lam A + (1 - lam) B (mixed before scale and cap) are turned
in place into the gradients of the scalar loss, so three products per row and no [N, V] tensor:

    g_c = (1 + 2 z lse) softmax A - (1 - e) 1[y_c] - e / V,   g_x = softmax X - lam 1[y_c] - (1 - lam) 1[y_u]
    G_c = a_c g_c + lam b g_x,   G_u = a_u g_u + (1 - lam) b g_x
    dhidden = G W,   dweight = sum over chunks of G^T hidden,   dbias = sum of G over rows
    dlow = G up,     dup = sum over chunks of G^T low           with low-rank factors: logits W h + up low

with label smoothing e and z-loss z. For 16-bit inputs a = row_coef and b = pair_coef are divided by their largest
magnitude ``scale``, so that gradients are rounded at unit scale; ``scale`` comes back and is applied in float32.
Sums over chunks are float32. ``given`` log-sum-exps (of all columns, where ``weight`` is a shard of the vocabulary,
or of an earlier forward) replace the chunk's own; then a target of -1 means that its column is not here.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .forward import Group, Statistics, forward_statistics, groups_of
from .layer import Layer
from .reference import sum_dtype
from .rows import (
    Given,
    Head,
    Needs,
    Pairs,
    RowSums,
    add_mixture_gradient_,
    affine,
    at_column,
    exponentials_,
    finish_logits_,
    next_token_gradient_,
    own_label,
    unit_scale,
    write_label_,
)  # fmt: skip
from .scratch import PRODUCT_COLUMNS, Sizes, blocks, choose_sizes


class ChunkedResult(NamedTuple):
    """Outputs of :func:`chunked_loss`. Gradients are those of the loss divided by ``scale``; empty if not needed.

    Statistics may be columns of one tensor: an operator returns copies of those it returns.
    """

    nll: Tensor  # (N,)
    lse: Tensor  # (N,)
    is_top1: Tensor  # (N,) bool
    mixup_nll: Tensor  # (M,)
    entropy: Tensor  # (N,) or (0,)
    scale: Tensor  # ()
    dhidden: Tensor  # (N, D) in hidden's dtype
    dweight: Tensor  # (V, D) float32, float64 for float64
    dbias: Tensor  # (V,) float32, float64 for float64
    max_logit: Tensor  # (N,)
    target_logit: Tensor  # (N,) 0 where the target is -1
    mean_logit: Tensor  # (N,) over these columns; (0,) without label smoothing
    low: Tensor  # (N,) what rounding took from lse; this and low_x (0,) by the stored schedule
    lse_x: Tensor  # (M,)
    low_x: Tensor  # (M,)
    target_logit_xc: Tensor  # (M,) mixed logit at the confident target, 0 where that is -1
    target_logit_xu: Tensor  # (M,)
    dlow: Tensor  # (N, r) of the low-rank rows, in hidden's dtype
    dup: Tensor  # (V, r) float32, float64 for float64


class _Chunks:
    """The loop's state: inputs, outputs and the buffers that every chunk reuses.

    The buffers are made once, because memory that comes and goes with every block costs a CPU more than its arithmetic.
    """

    def __init__(
        self, layer: Layer, hidden: Tensor, target: Tensor, needs: Needs, num_pairs: int, sizes: Sizes,
        main_grad: Tensor | None, low: Tensor | None,
    ) -> None:  # fmt: skip
        head, dtype = layer.head, sum_dtype(hidden.dtype)
        self.layer, self.head, self.hidden, self.target, self.needs = layer, head, hidden, target, needs
        self.dtype, self.sizes, self.is_written, self.low_rank = dtype, sizes, main_grad is not None, low
        self.product_scale: Tensor | None = (
            None  # what a dweight product is multiplied by on its way to main_grad
        )
        vocab_size, width = head.weight.shape
        self.stored = hidden.new_empty(sizes.stored, vocab_size, dtype=layer.dtype)
        self.wide = hidden.new_empty(sizes.wide, vocab_size, dtype=dtype)
        self.stats = Statistics(head, hidden, num_pairs)

        def new(*size: int) -> Tensor:
            return torch.empty(size, dtype=dtype, device=hidden.device)

        self.dhidden = hidden.new_empty(hidden.shape if needs.dhidden else (0,))
        shape = (vocab_size, width) if needs.dweight and main_grad is None else (0,)
        self.dweight = new(*shape) if main_grad is None else main_grad
        # float64, so that it does not matter how many chunks there are: V numbers cost nothing.
        self.dbias = torch.zeros(vocab_size if needs.dbias else 0, dtype=torch.float64, device=hidden.device)
        rank = 0 if low is None else low.shape[1]
        self.dlow = hidden.new_empty((hidden.shape[0], rank) if needs.dlow else (0,))
        self.dup = new(*((vocab_size, rank) if needs.dup else (0,))).zero_()

    def products(
        self, group: Group, chunk: slice, hidden: Tensor, low: Tensor | None, gradient: Tensor
    ) -> None:
        """dhidden and dlow of a chunk's rows and its share of dweight, dbias and dup, from dlogits [n, V]."""
        needs = self.needs
        if needs.dbias:
            self.dbias += gradient.sum(dim=0, dtype=self.dtype)
        if needs.dhidden or needs.dlow:
            self._products_of_rows(group, chunk, gradient)
        if needs.dweight:
            self.add_to_dweight(hidden, gradient)
        if needs.dup and low is not None:
            self.dup += torch.mm(gradient.t(), low)

    def _products_of_rows(self, group: Group, chunk: slice, gradient: Tensor) -> None:
        """dhidden = G W and dlow = G up, summed over slices of a widened weight before they are rounded."""
        dhidden: Tensor | None = None
        dlow: Tensor | None = None
        for columns, head in self.layer.slices():
            part = gradient[:, columns]
            if self.needs.dhidden:
                dhidden = (
                    torch.mm(part, head.weight) if dhidden is None else dhidden.addmm_(part, head.weight)
                )
            if self.needs.dlow and head.up is not None:
                dlow = torch.mm(part, head.up) if dlow is None else dlow.addmm_(part, head.up)
        for into, found in ((self.dhidden, dhidden), (self.dlow, dlow)):
            if found is not None:
                into_rows = group.of(into, chunk)
                into_rows.copy_(found.view(into_rows.shape))

    def add_to_dweight(self, hidden: Tensor, gradient: Tensor) -> None:
        """dweight += G^T hidden; the first chunk writes it. 16-bit products are rounded, then summed in float32."""
        written, self.is_written = self.is_written, True
        if hidden.dtype == self.dtype:
            if self.product_scale is not None:
                hidden = hidden * self.product_scale
            torch.addmm(self.dweight, gradient.t(), hidden, beta=1 if written else 0, out=self.dweight)
            return
        # In slices of the vocabulary, so that no second [V, D] is made.
        for columns in blocks(0, gradient.shape[1], PRODUCT_COLUMNS):
            product = torch.mm(gradient[:, columns].t(), hidden)
            if not written:
                self.dweight[columns] = product
            elif self.product_scale is None:
                self.dweight[columns] += product
            else:
                self.dweight[columns] += product.to(self.dtype).mul_(self.product_scale)

    def open_block(self, stored: Tensor) -> tuple[Tensor, Tensor]:
        """A block's logits [sides, b, V] in the dtype of sums, itself or a copy, and room for the mixture [b, V]."""
        sides, count, vocab_size = stored.shape
        if stored.dtype == self.dtype:
            return stored, self.wide[:count]
        rows = sides * count
        wide = self.wide[:rows].view(sides, count, vocab_size).copy_(stored)
        return wide, self.wide[rows : rows + count]


def _chunk(
    state: _Chunks, group: Group, chunk: slice, lam: Tensor, coefs: tuple[Tensor, Tensor],
    given: Given | None,
) -> None:  # fmt: skip
    """One chunk: a product for all its rows, blocks of rows, two products."""
    layer, count = state.layer, chunk.stop - chunk.start
    hidden = layer.widen(group.of(state.hidden, chunk).flatten(0, 1))
    low = None if state.low_rank is None else layer.widen(group.of(state.low_rank, chunk).flatten(0, 1))
    stored = state.stored[: group.sides * count]
    for columns, head in layer.slices():
        affine(head, hidden, low, stored[:, columns])
    planes = stored.view(group.sides, count, -1)
    size = state.sizes.block if group.sides == 2 else state.sizes.block_singles
    for part in blocks(0, count, size):
        rows = slice(chunk.start + part.start, chunk.start + part.stop)
        block, mixed = state.open_block(planes[:, part])
        if group.sides == 2:
            _pair_rows(state, group, rows, lam[rows], coefs, given, block, mixed)
        else:
            _single_rows(state, group, rows, coefs[0], given, block)
        if planes.dtype != block.dtype:  # round the block's gradient to where its logits were
            planes[:, part].copy_(block)
    state.products(group, chunk, hidden, low, stored)


def _finish_rows(
    state: _Chunks, group: Group, rows: slice, given: Given | None, logits: Tensor, own_logit: Tensor
) -> RowSums:
    """Statistics of a block's rows from their final logits [sides, b, V], which become exponentials."""
    if state.head.label_smoothing:
        group.of(state.stats.mean_logit, rows).copy_(logits.sum(dim=-1) / logits.shape[-1])
    of_rows = None if given is None else RowSums(group.of(given.lse, rows), group.of(given.low, rows))
    row_max, sums = exponentials_(logits, of_rows)
    state.stats.write_rows(group, rows, group.of(state.target, rows), own_logit, row_max, sums)
    return sums


def _single_rows(
    state: _Chunks, group: Group, rows: slice, row_coef: Tensor, given: Given | None, block: Tensor
) -> None:
    """Statistics of a block of unpaired rows and its gradient over its logits [1, b, V]."""
    head, target, coef = state.head, group.of(state.target, rows), group.of(row_coef, rows)
    logits, slope = finish_logits_(head, block, True)
    own_logit = at_column(logits, target)
    sums = _finish_rows(state, group, rows, given, logits, own_logit)
    next_token_gradient_(head, logits, coef, sums)
    write_label_(logits, target, coef * own_label(head, sums.logprob(own_logit), sums))
    if slope is not None:
        logits.mul_(slope)
    elif head.logit_scale != 1.0:
        logits.mul_(head.logit_scale)


def _pair_rows(
    state: _Chunks, group: Group, rows: slice, lam: Tensor, coefs: tuple[Tensor, Tensor],
    given: Given | None, block: Tensor, mixed: Tensor,
) -> None:  # fmt: skip
    """Statistics of a block of pairs and their gradients over their logits [2, b, V]; ``mixed`` [b, V] is scratch."""
    head, target = state.head, group.of(state.target, rows)
    lam = lam.to(state.dtype)
    share = torch.stack([lam, 1 - lam])
    torch.lerp(block[1], block[0], lam[:, None], out=mixed)
    (logits, slope), (mixed, slope_x) = (finish_logits_(head, t, True) for t in (block, mixed))

    def at_labels(of: Tensor, of_mixture: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        both = of_mixture.expand(2, -1, -1)
        return at_column(of, target), at_column(of, target.flip(0)), at_column(both, target)

    own, other, logit_x = at_labels(logits, mixed)
    slopes = None if slope is None or slope_x is None else at_labels(slope, slope_x)
    sums = _finish_rows(state, group, rows, given, logits, own)
    _, sums_x = exponentials_(mixed, None if given is None else RowSums(given.lse_x[rows], given.low_x[rows]))
    state.stats.write_mixtures(rows, target, share, logit_x, sums_x)
    row_coef = group.of(coefs[0], rows)
    next_token_gradient_(head, logits, row_coef, sums)
    if slope is not None and slope_x is not None:
        logits.mul_(slope)
        mixed.mul_(slope_x)
    pairs = Pairs(target, share, own, other, logit_x, sums, sums_x, slopes)
    add_mixture_gradient_(head, pairs, logits, mixed, (row_coef, coefs[1][rows]))
    if slope is None and head.logit_scale != 1.0:
        logits.mul_(head.logit_scale)


def chunked_loss(
    hidden: Tensor,  # (N, D)
    head: Head,
    target: Tensor,  # (N,) int64, -1 at ignored rows
    lam: Tensor,  # (M,) float32
    *,
    row_coef: Tensor,  # (N,)
    pair_coef: Tensor,  # (M,)
    needs: Needs,
    scratch_bytes: int,
    given: Given | None = None,
    main_grad: Tensor | None = None,  # (V, D) float32
    low: Tensor | None = None,  # (N, r), with head.up
) -> ChunkedResult:
    """Statistics of every row and pair and, where ``needs`` asks, the gradients of the loss divided by ``scale``.

    One chunk's logits, in the dtype of products, and the float32 logits of the block of it in work take
    ``scratch_bytes`` at most (a chunk has at least a row or pair; a softcap's slopes come on top). ``main_grad`` +=
    dweight times ``scale``. Memory beside: 2 n D itemsize for a chunk of n rows, O(N + M), dhidden N D itemsize and
    dweight 4 V D until the backward; 16-bit products: (itemsize + 4) D min(V, PRODUCT_COLUMNS); 16-bit inputs whose
    products are float32 (layer.py): 8 n D, and a slice of the weight, WIDENED_BYTES or 512 D. Without gradients
    :func:`forward_statistics` runs, with its memory.
    """
    num_rows, num_pairs = hidden.shape[0], lam.shape[0]
    if not needs.gradient:
        found = forward_statistics(
            hidden, head, target, lam, scratch_bytes=scratch_bytes, entropy=needs.entropy, low=low
        )
        absent = tuple(found.of_rows.new_empty(0) for _ in range(5))
        return _result(found, target, found.of_rows.new_ones(()), absent)
    assert not needs.entropy, "the entropy comes from a forward pass"
    layer = Layer(head)
    sizes = choose_sizes(
        num_rows, num_pairs, head.weight.shape[0], dtype=layer.dtype, wide_dtype=sum_dtype(hidden.dtype),
        device=hidden.device.type, scratch_bytes=scratch_bytes,
    )  # fmt: skip
    state = _Chunks(layer, hidden, target, needs, num_pairs, sizes, main_grad, low)
    row_coef, pair_coef = row_coef.to(state.dtype), pair_coef.to(state.dtype)
    scale = torch.ones((), dtype=state.dtype, device=hidden.device)
    if hidden.dtype != state.dtype:
        scale = unit_scale(row_coef, pair_coef)
        row_coef, pair_coef = row_coef / scale, pair_coef / scale
        state.product_scale = None if main_grad is None else scale
    for group in groups_of(num_rows, num_pairs):
        size = sizes.pairs if group.sides == 2 else sizes.singles
        for chunk in blocks(0, group.length, size):
            _chunk(state, group, chunk, lam, (row_coef, pair_coef), given)
    if not state.is_written:
        state.dweight.zero_()
    gradients = (state.dhidden, state.dweight, state.dbias.to(state.dtype), state.dlow, state.dup)
    return _result(state.stats, target, scale, gradients)


def _result(found: Statistics, target: Tensor, scale: Tensor, gradients: tuple[Tensor, ...]) -> ChunkedResult:
    dhidden, dweight, dbias, dlow, dup = gradients
    nll, lse, low, max_logit, target_logit = found.of_rows.unbind(dim=1)
    mixup_nll, lse_x, low_x, at_xc, at_xu = found.of_pairs.unbind(dim=1)
    is_top1 = (target >= 0) & (target_logit >= max_logit)
    return ChunkedResult(
        nll, lse, is_top1, mixup_nll, found.entropy, scale, dhidden, dweight, dbias, max_logit, target_logit,
        found.mean_logit, low, lse_x, low_x, at_xc, at_xu, dlow, dup,
    )  # fmt: skip

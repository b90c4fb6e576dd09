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

from .reference import sum_dtype
from .rows import (
    Given,
    Head,
    Pairs,
    RowSums,
    add_mixture_gradient_,
    affine,
    at_column,
    entropy_of,
    exponentials_,
    finish_logits_,
    gather_rows,
    next_token_gradient_,
    own_label,
    scatter_rows,
    unit_scale,
    write_label_,
)  # fmt: skip
from .scratch import PRODUCT_COLUMNS, Sizes, blocks, choose_sizes


class Needs(NamedTuple):
    """What a call must produce beside the statistics."""

    dhidden: bool = False
    dweight: bool = False
    dbias: bool = False
    dlow: bool = False
    dup: bool = False
    entropy: bool = False

    @property
    def gradient(self) -> bool:
        return self.dhidden or self.dweight or self.dbias or self.dlow or self.dup


class ChunkedResult(NamedTuple):
    """Outputs of :func:`chunked_loss`. Gradients are those of the loss divided by ``scale``; empty if not needed."""

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
        self, head: Head, hidden: Tensor, target: Tensor, needs: Needs, num_pairs: int, sizes: Sizes,
        main_grad: Tensor | None, low: Tensor | None,
    ) -> None:  # fmt: skip
        num_rows, dtype = hidden.shape[0], sum_dtype(hidden.dtype)
        self.head, self.hidden, self.target, self.needs, self.dtype = head, hidden, target, needs, dtype
        self.sizes, self.is_written, self.low_rank = sizes, main_grad is not None, low
        self.product_scale: Tensor | None = None  # what a 16-bit dweight product is multiplied by
        self.stored = hidden.new_empty(sizes.stored, head.weight.shape[0])
        self.wide = hidden.new_empty(sizes.wide, head.weight.shape[0], dtype=dtype)

        def new(*size: int) -> Tensor:
            return torch.empty(size, dtype=dtype, device=hidden.device)

        self.nll, self.lse, self.low, self.max_logit, self.target_logit = (new(num_rows) for _ in range(5))
        self.entropy = new(num_rows if needs.entropy else 0)
        self.mean_logit = new(num_rows if head.label_smoothing else 0)
        self.mixup_nll, self.lse_x, self.low_x, self.at_xc, self.at_xu = (new(num_pairs) for _ in range(5))
        vocab_size, width = head.weight.shape
        self.dhidden = hidden.new_empty((num_rows, width) if needs.dhidden else (0,))
        shape = (vocab_size, width) if needs.dweight and main_grad is None else (0,)
        self.dweight = new(*shape) if main_grad is None else main_grad
        # float64, so that it does not matter how many chunks there are: V numbers cost nothing.
        self.dbias = torch.zeros(vocab_size if needs.dbias else 0, dtype=torch.float64, device=hidden.device)
        rank = 0 if low is None else low.shape[1]
        self.dlow = hidden.new_empty((num_rows, rank) if needs.dlow else (0,))
        self.dup = new(*((vocab_size, rank) if needs.dup else (0,))).zero_()

    def before_softmax(self, rows: slice, logits: Tensor) -> None:
        """What must be read off the final logits [n, V] while they are there."""
        if self.needs.entropy:
            self.entropy[rows] = entropy_of(logits)
        if self.head.label_smoothing:
            self.mean_logit[rows] = logits.sum(dim=1) / logits.shape[1]

    def write_stats(self, rows: slice, target_logit: Tensor, row_max: Tensor, sums: RowSums) -> None:
        valid, zero = self.target[rows] >= 0, torch.zeros_like(row_max)
        self.nll[rows] = torch.where(valid, -sums.logprob(target_logit), zero)
        self.lse[rows], self.low[rows], self.max_logit[rows] = sums.lse, sums.low, row_max
        self.target_logit[rows] = torch.where(valid, target_logit, zero)

    def products(self, hidden: Tensor, gradient: Tensor, parts: list[slice]) -> None:
        """dhidden of ``parts`` and the chunk's share of dweight and dbias, from dlogits [n, V]."""
        if self.needs.dbias:
            self.dbias += gradient.sum(dim=0, dtype=self.dtype)
        if self.needs.dhidden:
            scatter_rows(self.dhidden, torch.mm(gradient, self.head.weight), parts)
        if self.needs.dweight:
            self.add_to_dweight(hidden, gradient)
        if self.needs.dlow and self.head.up is not None:
            scatter_rows(self.dlow, torch.mm(gradient, self.head.up), parts)
        if self.needs.dup and self.low_rank is not None:
            self.dup += torch.mm(gradient.t(), gather_rows(self.low_rank, parts))

    def add_to_dweight(self, hidden: Tensor, gradient: Tensor) -> None:
        """dweight += G^T hidden; the first chunk writes it. 16-bit products are rounded, then summed in float32."""
        written, self.is_written = self.is_written, True
        if hidden.dtype == self.dtype:
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

    def open_block(self, stored: Tensor, slot: int) -> Tensor:
        """The block's logits in the dtype of sums: ``stored`` itself, or a copy in a slot of the wide buffer."""
        if stored.dtype == self.dtype:
            return stored
        first = slot * stored.shape[0]
        return self.wide[first : first + stored.shape[0]].copy_(stored)

    def close_block(self, stored: Tensor, gradient: Tensor) -> None:
        """Round the block's gradient to where its logits were; nothing to do when it is there."""
        if stored.dtype != gradient.dtype:
            stored.copy_(gradient)


def _single_chunk(state: _Chunks, rows: slice, coef: Tensor, given: Given | None) -> None:
    """One chunk of unpaired rows (or of plain next-token loss): a product, blocks of rows, two products."""
    hidden, logits = state.hidden[rows], state.stored[: rows.stop - rows.start]
    affine(state.head, hidden, state.low_rank, [rows], logits)
    for part in blocks(rows.start, rows.stop, state.sizes.block_singles):
        _single_rows(state, part, coef, given, logits[part.start - rows.start : part.stop - rows.start])
    if state.needs.gradient:
        state.products(hidden, logits, [rows])


def _single_rows(state: _Chunks, rows: slice, coef: Tensor, given: Given | None, stored: Tensor) -> None:
    """Statistics of a block of rows and its gradient over its logits."""
    head, target = state.head, state.target[rows]
    logits, slope = finish_logits_(head, state.open_block(stored, 0), state.needs.gradient)
    state.before_softmax(rows, logits)
    target_logit = at_column(logits, target)
    row_max, sums = exponentials_(logits, None if given is None else given.of_rows(rows))
    state.write_stats(rows, target_logit, row_max, sums)
    if not state.needs.gradient:
        return
    next_token_gradient_(head, logits, coef[rows], sums)
    write_label_(logits, target, coef[rows] * own_label(head, sums.logprob(target_logit), sums.lse))
    if slope is not None:
        logits.mul_(slope)
    elif head.logit_scale != 1.0:
        logits.mul_(head.logit_scale)
    state.close_block(stored, logits)


def _pair_chunk(
    state: _Chunks, pairs: slice, lam: Tensor, coefs: tuple[Tensor, Tensor],
    given: Given | None,
) -> None:  # fmt: skip
    """One chunk of pairs: a product for both members, blocks of pairs, two products."""
    n, num_pairs, buffer = pairs.stop - pairs.start, lam.shape[0], state.stored
    partners = slice(num_pairs + pairs.start, num_pairs + pairs.stop)
    hidden = gather_rows(state.hidden, [pairs, partners])
    affine(state.head, hidden, state.low_rank, [pairs, partners], buffer[: 2 * n])
    for part in blocks(pairs.start, pairs.stop, state.sizes.block):
        first, last = part.start - pairs.start, part.stop - pairs.start
        stored = (buffer[first:last], buffer[n + first : n + last])
        _pair_rows(state, part, lam, coefs, given, stored)
    if state.needs.gradient:
        state.products(hidden, buffer[: 2 * n], [pairs, partners])


def _pair_rows(
    state: _Chunks, pairs: slice, lam: Tensor, coefs: tuple[Tensor, Tensor],
    given: Given | None, stored: tuple[Tensor, Tensor],
) -> None:  # fmt: skip
    """Statistics of a block of pairs and their gradients over their logits."""
    head, num_pairs = state.head, lam.shape[0]
    sides = (pairs, slice(num_pairs + pairs.start, num_pairs + pairs.stop))
    target = (state.target[sides[0]], state.target[sides[1]])
    share = lam[pairs].to(state.dtype)
    logits = (state.open_block(stored[0], 0), state.open_block(stored[1], 1))
    mixed = state.wide[-len(share) :]
    torch.lerp(logits[1], logits[0], share[:, None], out=mixed)
    found_slopes = [finish_logits_(head, t, state.needs.gradient)[1] for t in (*logits, mixed)]
    slopes = [slope for slope in found_slopes if slope is not None]
    for rows, part in zip(sides, logits, strict=True):
        state.before_softmax(rows, part)

    at_labels, slopes_at = (
        tuple((at_column(t, target[0]), at_column(t, target[1])) for t in tensors)
        for tensors in ((*logits, mixed), slopes)
    )
    sums = []
    for side, rows in enumerate(sides):
        row_max, found = exponentials_(logits[side], None if given is None else given.of_rows(rows))
        state.write_stats(rows, at_labels[side][side], row_max, found)
        sums.append(found)
    _, sums_x = exponentials_(mixed, None if given is None else given.of_pairs(pairs))
    chunk = Pairs(target, (share, 1 - share), logits, mixed, at_labels, (sums[0], sums[1], sums_x), slopes_at)
    _write_mixture(state, pairs, chunk)
    if not state.needs.gradient:
        return
    row_coef = (coefs[0][sides[0]], coefs[0][sides[1]])
    for side in (0, 1):
        next_token_gradient_(head, logits[side], row_coef[side], sums[side])
    for probs, slope in zip((*logits, mixed), slopes, strict=False):
        probs.mul_(slope)
    add_mixture_gradient_(head, chunk, row_coef, coefs[1][pairs])
    for side in (0, 1):
        if not slopes and head.logit_scale != 1.0:
            logits[side].mul_(head.logit_scale)
        state.close_block(stored[side], logits[side])


def _write_mixture(state: _Chunks, pairs: slice, chunk: Pairs) -> None:
    logprob, lse_x = chunk.logprob_x(), chunk.sums[2].lse
    state.low_x[pairs] = chunk.sums[2].low
    here, zero = (chunk.target[0] >= 0, chunk.target[1] >= 0), torch.zeros_like(lse_x)
    cross_entropy = -(chunk.share[0] * logprob[0] + chunk.share[1] * logprob[1])
    state.mixup_nll[pairs] = torch.where(here[0] & here[1], cross_entropy, zero)
    state.lse_x[pairs] = lse_x
    state.at_xc[pairs] = torch.where(here[0], chunk.at_labels[2][0], zero)
    state.at_xu[pairs] = torch.where(here[1], chunk.at_labels[2][1], zero)


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

    One chunk's logits, in hidden's dtype, and the float32 logits of the block of it in work take ``scratch_bytes`` at
    most (a chunk has at least a row or pair; a softcap's slopes come on top). ``main_grad`` += dweight times ``scale``.
    Memory beside: 2 n D itemsize for a chunk of n rows, O(N + M), dhidden N D itemsize and dweight 4 V D until the
    backward; 16-bit: (itemsize + 4) D min(V, PRODUCT_COLUMNS). The entropy: two float32 blocks and a mask.
    """
    num_rows, num_pairs = hidden.shape[0], lam.shape[0]
    sizes = choose_sizes(
        num_rows, num_pairs, head.weight.shape[0], dtype=hidden.dtype, wide_dtype=sum_dtype(hidden.dtype),
        device=hidden.device.type, scratch_bytes=scratch_bytes,
    )  # fmt: skip
    state = _Chunks(head, hidden, target, needs, num_pairs, sizes, main_grad, low)
    row_coef, pair_coef = row_coef.to(state.dtype), pair_coef.to(state.dtype)
    scale = torch.ones((), dtype=state.dtype, device=hidden.device)
    if hidden.dtype != state.dtype:
        scale = unit_scale(row_coef, pair_coef)
        row_coef, pair_coef = row_coef / scale, pair_coef / scale
        state.product_scale = None if main_grad is None else scale
    for pairs in blocks(0, num_pairs, max(sizes.pairs, 1)):
        _pair_chunk(state, pairs, lam, (row_coef, pair_coef), given)
    for rows in blocks(2 * num_pairs, num_rows, max(sizes.singles, 1)):
        _single_chunk(state, rows, row_coef, given)
    if not state.is_written:
        state.dweight.zero_()
    is_top1 = (target >= 0) & (state.target_logit >= state.max_logit)
    return ChunkedResult(
        state.nll, state.lse, is_top1, state.mixup_nll, state.entropy, scale, state.dhidden, state.dweight,
        state.dbias.to(state.dtype), state.max_logit, state.target_logit, state.mean_logit, state.low, state.lse_x,
        state.low_x, state.at_xc, state.at_xu, state.dlow, state.dup,
    )  # fmt: skip

"""Loss and gradients by the ``stored`` schedule: a chunk of rows at a time, its logits turned into dlogits in place.

    dhidden = G W,  dweight = sum over chunks of G^T hidden (float32),  dbias = sum of G over rows
    dlow = G up,    dup = sum over chunks of G^T low (float32)     with low-rank factors: a += up low_c, u += up low_u

G is made by stored_kernel.py. Three units of work against the four of ``recompute``; float32 dweight and dhidden are
kept until the backward, which only multiplies them. A row that bears no loss does not reach dweight, whatever it holds.

Logits pass through memory in hidden's dtype. With 16-bit inputs that is one rounding of each logit, at most 2^-9 of it
in bfloat16 and 2^-12 in float16, which neither ``recompute`` nor a forward without gradients has: lse of a row differs
by at most that part of its largest logit, nll by at most twice as much, and so does the loss between schedules.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ..call import Call, Coefficients, Gradients, Statistics, empty_gradients
from ..chunked.rows import Head, affine, gather_rows
from ..chunked.scratch import DEFAULT_ROWS, chunk_size
from .products import add_product, write_product
from .rows import Scaled, scaled_coefficients
from .stored_kernel import _sftmix_stored_kernel
from .tiles import on_device, refuse_cpu, row_block
from .tokens import token_logits


class _Rows(NamedTuple):
    """A chunk: ``size`` pairs or plain rows from ``start``."""

    start: int
    size: int
    paired: bool

    def slices(self, num_pairs: int) -> list[slice]:
        """Its rows among all N: one run, or the confident rows and their partners."""
        first = slice(self.start, self.start + self.size)
        return [first, slice(num_pairs + first.start, num_pairs + first.stop)] if self.paired else [first]


def _chunks(num_rows: int, num_pairs: int, row_bytes: int, scratch_bytes: int) -> list[_Rows]:
    """Pairs, then the rows beside them, in chunks of at most half of each and within ``scratch_bytes``."""
    budget = scratch_bytes or DEFAULT_ROWS * row_bytes
    chunks = []
    for start, count, paired in ((0, num_pairs, True), (2 * num_pairs, num_rows - 2 * num_pairs, False)):
        if count == 0:
            continue
        size = chunk_size(count, row_bytes * (2 if paired else 1), budget)
        chunks += [_Rows(start + at, min(size, count - at), paired) for at in range(0, count, size)]
    return chunks


class _Loop:
    """The results, filled chunk by chunk, and the buffer of logits that every chunk reuses."""

    def __init__(self, call: Call, column: Tensor, coef: Scaled, chunks: list[_Rows]) -> None:
        num_rows, vocab_size, num_pairs = call.sizes
        self.call, self.target, self.coef = call, column.contiguous(), coef
        self.layer = Head(call.weight, call.bias, up=call.up)
        self.class_weight = call.column_weight
        self.class_mean = None if self.class_weight is None else self.class_weight.double().mean().float()
        stats = torch.zeros(6 * (num_rows + num_pairs), dtype=torch.float32, device=call.hidden.device)
        self.row_stats = stats[: 6 * num_rows].view(6, num_rows)
        self.pair_stats = stats[6 * num_rows :].view(6, num_pairs)
        self.predicted = call.hidden.new_empty(num_rows, dtype=torch.int64) if call.wanted.predicted else None
        self.gradients = empty_gradients(call, torch.float32)
        for total in (self.gradients.dbias, self.gradients.dup):
            total.zero_()
        self.is_written = False
        rows = max((chunk.size * (2 if chunk.paired else 1) for chunk in chunks), default=0)
        # Rows of whole 32 bytes, so that loads and stores are 16 bytes a thread whatever V is.
        self.buffer = call.hidden.new_empty(rows, triton.cdiv(vocab_size, 16) * 16)

    def run(self, chunk: _Rows) -> None:
        """Logits of a chunk, their gradients in place, and the products with them."""
        call, needs, found = self.call, self.call.needs, self.gradients
        runs, vocab_size = chunk.slices(call.sizes[2]), call.sizes[1]
        hidden = gather_rows(call.hidden, runs)
        low = None if call.low is None else gather_rows(call.low, runs)
        stored = self.buffer[: hidden.shape[0]]
        logits = stored[:, :vocab_size]
        affine(self.layer, hidden, low, logits)
        self._launch(chunk, stored)
        for into, factor in ((found.dhidden, call.weight), (found.dlow, call.up)):
            if into.numel() and factor is not None:
                for rows, gradient in zip(runs, logits.split(chunk.size), strict=True):
                    write_product(into[rows], gradient, factor)
        if needs.dbias:
            found.dbias.add_(logits.sum(dim=0, dtype=torch.float32))
        if needs.dweight:
            # The first chunk writes: zeros would cost a pass over [V, D] to make and another to read.
            add = add_product if self.is_written else write_product
            add(found.dweight, logits.t(), self._living(chunk, hidden))
            self.is_written = True
        if needs.dup and low is not None:
            add_product(found.dup, logits.t(), self._living(chunk, low))

    def _launch(self, chunk: _Rows, stored: Tensor) -> None:
        call, options = self.call, self.call.options
        num_rows, vocab_size, num_pairs = call.sizes
        _sftmix_stored_kernel[(chunk.size,)](
            logits=stored, target=self.target, lam=call.lam, row_coef=self.coef.row, pair_coef=self.coef.pair,
            class_weight=self.class_weight, class_mean=self.class_mean, row_stats=self.row_stats,
            pair_stats=self.pair_stats, predicted=self.predicted, first_row=chunk.start, num_rows=num_rows,
            num_pairs=num_pairs, chunk_rows=chunk.size, vocab_size=vocab_size, width=stored.stride(0),
            smoothing=options.label_smoothing, z_loss=options.z_loss, SOFTCAP=options.softcap,
            LOGIT_SCALE=options.logit_scale, SMOOTHED=options.label_smoothing != 0,
            TOKEN_SCALING=options.token_scaling != 0, PAIRED=chunk.paired, EXACT=stored.dtype == torch.float32,
            BLOCK_V=row_block(vocab_size, stored.device), num_warps=8,
        )  # fmt: skip

    def _living(self, chunk: _Rows, rows: Tensor) -> Tensor:
        """A chunk's hidden states (n, D) with 0 in rows that bear no loss, which may hold NaN; a pair's in place."""
        dead = gather_rows(self.coef.dead, chunk.slices(self.call.sizes[2]))[:, None]
        return rows.masked_fill_(dead, 0) if chunk.paired else rows.masked_fill(dead, 0)

    def statistics(self) -> Statistics:
        max_logit, target_logit, mean_logit = self.row_stats[3:]
        nothing, smoothed = max_logit.new_empty(0), self.call.options.label_smoothing != 0
        return Statistics(
            max_logit, target_logit, mean_logit if smoothed else nothing, nothing,
            nothing.long() if self.predicted is None else self.predicted,
            nothing.new_empty(0, 0) if self.call.tokens is None else token_logits(self.call), self.pair_stats[4:],
            self.row_stats[:3], self.pair_stats[:4],
        )  # fmt: skip


def statistics_with_gradients(call: Call, coef: Coefficients) -> tuple[Statistics, Tensor, Gradients]:
    """Statistics of every row and pair; ``scale``; and the gradients of the loss over it. No host synchronisation.

    The buffer of logits, in hidden's dtype, takes at most ``scratch_bytes`` (0: that of 4096 rows), at most half of
    all pairs or unpaired rows, and at least one pair or row.

    Memory: n V' itemsize for a chunk of n rows (V' is V rounded up to 16), n D itemsize for its hidden states, O(N + M)
    of statistics, dhidden N D itemsize and dweight 4 V D, which stay until the backward. Off GPUs of capability 8.0
    16-bit products copy their operands: at most 4 (n V + n D + V D).

    Raises ValueError on CPU tensors outside the interpreter.
    """
    refuse_cpu(call.hidden.device)
    scaled = scaled_coefficients(coef, call.options.logit_scale, call.hidden.dtype)
    num_rows, vocab_size, num_pairs = call.sizes
    row_bytes = triton.cdiv(vocab_size, 16) * 16 * call.hidden.element_size()
    chunks = _chunks(num_rows, num_pairs, row_bytes, call.wanted.scratch_bytes)
    loop = _Loop(call._replace(lam=call.lam.contiguous()), coef.column, scaled, chunks)
    with on_device(call.hidden.device):
        for chunk in chunks:
            loop.run(chunk)
    if not chunks:
        loop.gradients.dweight.zero_()
    return loop.statistics(), scaled.scale, loop.gradients

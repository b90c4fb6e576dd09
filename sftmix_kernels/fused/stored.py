"""Loss and gradients by the ``stored`` schedule: a chunk of rows at a time, its logits turned into dlogits in place.

    A = f(a), B = f(u), X = f(lam a + (1 - lam) u)      a = W h_c + b and u = W h_u + b as the library rounded them
    m = max_j z_j,  l = sum_j exp(z_j - m),  p_j = exp(z_j - m) / l,  -log p_y = log l - (z_y - m)      z in A, B, X
    dA = a_c J_A ((1 + 2 z lse_A) P_A - (1 - e) 1[y_c] - e / V),  dB = a_u J_B (the same of B and y_u)
    dX = b J_X (P_X - lam 1[y_c] - (1 - lam) 1[y_u])        J = f' with softcap and scale, e smoothing, z z-loss
    G_c = dA + lam dX over a,  G_u = dB + (1 - lam) dX over u
    dhidden = G W,  dweight = sum over chunks of G^T hidden (float32),  dbias = sum of G over rows
    dlow = G up,    dup = sum over chunks of G^T low (float32)     with low-rank factors: a += up low_c, u += up low_u

One program has a pair (or an unpaired row) and passes over it twice: statistics, then gradients. The label columns are
computed from scalars, by expm1 where p is near the label's mass, and written last. Three units of work against the four
of ``recompute``; it keeps float32 dweight and dhidden until the backward, which only multiplies them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..chunked import ChunkedResult
from ..rows import Head, Needs, affine, gather_rows, unit_scale
from ..scratch import chunk_size
from .configs import choose_row_block
from .exponentials import capped, exp
from .products import add_product, write_product
from .stats import fold, no_columns, settled
from .tiles import Problem, on_device

# Without a bound: enough rows for the products' full speed, while the logits' traffic stays in one reused buffer.
DEFAULT_ROWS = 4096


@triton.jit
def _expm1(x):
    """exp(x) - 1 for x <= 0 without cancellation near 0: a Taylor sum above -1/2."""
    p = 1.0 + x * (1.0 / 7) * (1.0 + x * (1.0 / 8) * (1.0 + x * (1.0 / 9)))
    p = 1.0 + x * (1.0 / 4) * (1.0 + x * (1.0 / 5) * (1.0 + x * (1.0 / 6) * p))
    p = x * (1.0 + x * 0.5 * (1.0 + x * (1.0 / 3) * p))
    return tl.where(x > -0.5, p, tl.exp(x) - 1.0)


@triton.jit
def _residual(log_p, mass):
    """p - mass without cancellation where both are near 1."""
    return tl.where(mass >= 0.5, _expm1(log_p) + (1.0 - mass), tl.exp(log_p) - mass)


@triton.jit
def _load_row(row, offs, width):
    """(1, columns) float32; the padding between V and width is read and never used."""
    return tl.load(row + offs, mask=offs < width, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _load_at(row, column):
    """(1,) float32: the affine logit at ``column``."""
    return tl.load(row + column).to(tl.float32)


@triton.jit
def _fold_row(
    stats, z, offs, vocab_size, SOFTCAP: tl.constexpr, LOGIT_SCALE: tl.constexpr, EXACT: tl.constexpr,
    MOMENT: tl.constexpr,
):  # fmt: skip
    """Fold a block of affine logits z (1, columns) into stats."""
    z, _ = capped(z, SOFTCAP, LOGIT_SCALE, EXACT)
    z = tl.where((offs < vocab_size)[None, :], z, float("-inf"))
    return fold(stats, z, offs, vocab_size, MOMENT, EXACT)


@triton.jit
def _store_row_stats(row_stats, row, num_rows, stats, z, has_target, vocab_size, MOMENT: tl.constexpr):
    """Planes of row_stats: nll, lse, maximum, target logit, moment. z (1,): the logit at the target."""
    top, total, moment = stats
    tl.store(row_stats + row, tl.where(has_target, tl.log(total) - (z - top), 0.0))
    tl.store(row_stats + num_rows + row, top + tl.log(total))
    tl.store(row_stats + 2 * num_rows + row, top)
    tl.store(row_stats + 3 * num_rows + row, tl.where(has_target, z, 0.0))
    if MOMENT == 1:
        tl.store(row_stats + 4 * num_rows + row, tl.log(total) - moment / total)
    if MOMENT == 2:
        tl.store(row_stats + 4 * num_rows + row, moment / vocab_size)


@triton.jit
def _store_pair_stats(pair_stats, pair, num_pairs, stats, z_c, z_u, here_c, here_u, share):
    """Planes of pair_stats: mixed nll, lse_x, X at both targets; and log p of X at both targets, (1,)."""
    top, total, _ = stats
    log_c, log_u = (z_c - top) - tl.log(total), (z_u - top) - tl.log(total)
    nll = tl.where(here_c & here_u, -(share * log_c + (1.0 - share) * log_u), 0.0)
    tl.store(pair_stats + pair, nll)
    tl.store(pair_stats + num_pairs + pair, top + tl.log(total))
    tl.store(pair_stats + 2 * num_pairs + pair, tl.where(here_c, z_c, 0.0))
    tl.store(pair_stats + 3 * num_pairs + pair, tl.where(here_u, z_u, 0.0))
    return log_c, log_u


@triton.jit
def _row_gradient(z, slope, coef, stats, smoothing, vocab_size, z_loss, SMOOTHED: tl.constexpr):
    """A row's own gradient away from its label; z (1, columns) or (1, 1)."""
    top, total, _ = stats
    bulk = coef * (1.0 + 2.0 * z_loss * (top + tl.log(total))) / total
    g = exp(z - top[:, None]) * bulk[:, None]
    if SMOOTHED:
        g -= (coef * (smoothing / vocab_size))[:, None]
    return g * slope


@triton.jit
def _label_gradient(z, slope, coef, stats, smoothing, vocab_size, z_loss):
    """A row's own gradient at its label, (1,)."""
    top, total, _ = stats
    log_p = (z - top) - tl.log(total)
    p = tl.exp(log_p)
    # (p - 1) + e would keep the digits of 1, not those of 1 - e.
    residual = (1.0 - smoothing) * _expm1(log_p) + (smoothing * p - smoothing / vocab_size)
    return coef * (residual + 2.0 * z_loss * (top + tl.log(total)) * p) * slope


@triton.jit(do_not_specialize=["first_row"])
def _sftmix_stored_kernel(
    logits,  # (rows or 2 * rows, width) in: W h + b; out: dlogits; the partners follow the confident rows
    target,  # (N,) int64
    lam,  # (M,) float32
    row_coef,  # (N,) float32, with the logit scale
    pair_coef,  # (M,)
    row_stats,  # (5, N) nll, lse, maximum, target logit, entropy or mean logit
    pair_stats,  # (4, M) mixed nll, lse_x, X at y_c, X at y_u
    first_row,
    num_rows,  # N
    num_pairs,  # M
    chunk_rows,
    vocab_size,
    width,  # V padded to a multiple of 16
    smoothing,
    z_loss,
    SOFTCAP: tl.constexpr,
    LOGIT_SCALE: tl.constexpr,
    SMOOTHED: tl.constexpr,
    MOMENT: tl.constexpr,
    PAIRED: tl.constexpr,
    WANT_GRADIENT: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    one = tl.arange(0, 1)
    row_c = first_row + tl.program_id(0).to(tl.int64) + one
    row_u = row_c + num_pairs
    c = logits + tl.program_id(0).to(tl.int64) * width
    u = logits + (chunk_rows + tl.program_id(0).to(tl.int64)) * width
    zero = tl.zeros([1], dtype=tl.float32)
    stats_c = no_columns(zero)
    stats_u = no_columns(zero)
    stats_x = no_columns(zero)

    # The logits at the labels, before anything is overwritten: the reductions below are barriers.
    y_c = tl.load(target + row_c)
    here_c = (y_c >= 0) & (y_c < vocab_size)
    y_c = tl.where(here_c, y_c, 0)
    c_at_c = _load_at(c, y_c)
    if PAIRED:
        y_u = tl.load(target + row_u)
        here_u = (y_u >= 0) & (y_u < vocab_size)
        y_u = tl.where(here_u, y_u, 0)
        c_at_u, u_at_c, u_at_u = _load_at(c, y_u), _load_at(u, y_c), _load_at(u, y_u)
        share = tl.load(lam + row_c)

    for first_v in range(0, vocab_size, BLOCK_V):
        offs = first_v + tl.arange(0, BLOCK_V)
        a = _load_row(c, offs, width)
        if PAIRED:
            b = _load_row(u, offs, width)
            x = share[:, None] * a + (1.0 - share)[:, None] * b
            stats_x = _fold_row(stats_x, x, offs, vocab_size, SOFTCAP, LOGIT_SCALE, EXACT, 0)
            stats_u = _fold_row(stats_u, b, offs, vocab_size, SOFTCAP, LOGIT_SCALE, EXACT, MOMENT)
        stats_c = _fold_row(stats_c, a, offs, vocab_size, SOFTCAP, LOGIT_SCALE, EXACT, MOMENT)

    stats_c, stats_u, stats_x = settled(stats_c, EXACT), settled(stats_u, EXACT), settled(stats_x, EXACT)
    z_c, slope_c = capped(c_at_c, SOFTCAP, LOGIT_SCALE, EXACT)
    _store_row_stats(row_stats, row_c, num_rows, stats_c, z_c, here_c, vocab_size, MOMENT)
    if PAIRED:
        z_u, slope_u = capped(u_at_u, SOFTCAP, LOGIT_SCALE, EXACT)
        _store_row_stats(row_stats, row_u, num_rows, stats_u, z_u, here_u, vocab_size, MOMENT)
        x_at_c, slope_xc = capped(share * c_at_c + (1.0 - share) * u_at_c, SOFTCAP, LOGIT_SCALE, EXACT)
        x_at_u, slope_xu = capped(share * c_at_u + (1.0 - share) * u_at_u, SOFTCAP, LOGIT_SCALE, EXACT)
        log_xc, log_xu = _store_pair_stats(
            pair_stats, row_c, num_pairs, stats_x, x_at_c, x_at_u, here_c, here_u, share
        )

    if WANT_GRADIENT:
        coef_c = tl.load(row_coef + row_c)
        if PAIRED:
            coef_u, coef_x = tl.load(row_coef + row_u), tl.load(pair_coef + row_c)
            bulk_x = coef_x / stats_x[1]
        for first_v in range(0, vocab_size, BLOCK_V):
            offs = first_v + tl.arange(0, BLOCK_V)
            a = _load_row(c, offs, width)
            z, slope = capped(a, SOFTCAP, LOGIT_SCALE, EXACT)
            g_c = _row_gradient(z, slope, coef_c, stats_c, smoothing, vocab_size, z_loss, SMOOTHED)
            if PAIRED:
                b = _load_row(u, offs, width)
                z, slope = capped(
                    share[:, None] * a + (1.0 - share)[:, None] * b, SOFTCAP, LOGIT_SCALE, EXACT
                )
                g_x = exp(z - stats_x[0][:, None]) * bulk_x[:, None] * slope
                g_c += share[:, None] * g_x
                z, slope = capped(b, SOFTCAP, LOGIT_SCALE, EXACT)
                g_u = _row_gradient(z, slope, coef_u, stats_u, smoothing, vocab_size, z_loss, SMOOTHED)
                g_u += (1.0 - share)[:, None] * g_x
                _store_block(u, offs, width, g_u)
            _store_block(c, offs, width, g_c)

        tl.debug_barrier()  # the block stores of other threads come before the label columns
        own_c = _label_gradient(z_c, slope_c, coef_c, stats_c, smoothing, vocab_size, z_loss)
        if PAIRED:
            same = y_c == y_u
            at_c = coef_x * _residual(log_xc, tl.where(same, 1.0, share)) * slope_xc
            at_u = coef_x * _residual(log_xu, tl.where(same, 1.0, 1.0 - share)) * slope_xu
            own_u = _label_gradient(z_u, slope_u, coef_u, stats_u, smoothing, vocab_size, z_loss)
            z, slope = capped(c_at_u[:, None], SOFTCAP, LOGIT_SCALE, EXACT)
            other_c = _row_gradient(z, slope, coef_c, stats_c, smoothing, vocab_size, z_loss, SMOOTHED)
            z, slope = capped(u_at_c[:, None], SOFTCAP, LOGIT_SCALE, EXACT)
            other_u = _row_gradient(z, slope, coef_u, stats_u, smoothing, vocab_size, z_loss, SMOOTHED)
            # A label of one member only is no label of a pair, whose coefficient is then 0.
            _store_at(c, y_u, tl.reshape(other_c, [1]) + share * at_u, here_u & ~(same & here_c))
            _store_at(u, y_c, tl.reshape(other_u, [1]) + (1.0 - share) * at_c, here_c & ~(same & here_u))
            _store_at(u, y_u, own_u + (1.0 - share) * at_u, here_u)
            own_c += share * at_c
        _store_at(c, y_c, own_c, here_c)


@triton.jit
def _store_block(row, offs, width, g):
    tl.store(row + offs[None, :], g.to(row.dtype.element_ty), mask=(offs < width)[None, :])


@triton.jit
def _store_at(row, column, g, mask):
    tl.store(row + column, g.to(row.dtype.element_ty), mask=mask)


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

    def __init__(
        self, head: Head, problem: Problem, needs: Needs, num_pairs: int, chunks: list[_Rows], *,
        low: Tensor | None,
    ) -> None:  # fmt: skip
        hidden, weight = problem.hidden, problem.weight
        self.head, self.problem, self.needs, self.num_pairs = head, problem, needs, num_pairs

        def floats(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float32, device=hidden.device)

        self.row_stats, self.pair_stats = floats(5, hidden.shape[0]), floats(4, num_pairs)
        self.dhidden = hidden.new_empty(hidden.shape if needs.dhidden else (0,))
        self.dweight = self.row_stats.new_empty(weight.shape if needs.dweight else (0,))
        self.is_written = False
        self.dbias = floats(weight.shape[0] if needs.dbias else 0)
        self.low, rank = low, 0 if low is None else low.shape[1]
        self.dlow = hidden.new_empty((hidden.shape[0], rank) if needs.dlow else (0,))
        self.dup = floats(*((weight.shape[0], rank) if needs.dup else (0,)))
        rows = max((chunk.size * (2 if chunk.paired else 1) for chunk in chunks), default=0)
        # Rows of whole 32 bytes, so that loads and stores are 16 bytes a thread whatever V is.
        self.buffer = hidden.new_empty(rows, triton.cdiv(weight.shape[0], 16) * 16)

    @property
    def moment(self) -> int:
        return 1 if self.needs.entropy else 2 if self.head.label_smoothing else 0

    def run(self, chunk: _Rows, lam: Tensor, row_coef: Tensor, pair_coef: Tensor) -> None:
        """Logits of a chunk, their gradients in place, and the products with them."""
        runs = chunk.slices(self.num_pairs)
        parts = [self.problem.hidden[rows] for rows in runs]
        hidden = torch.cat(parts) if chunk.paired else parts[0]
        weight, vocab_size = self.problem.weight, self.problem.weight.shape[0]
        stored = self.buffer[: hidden.shape[0]]
        logits = stored[:, :vocab_size]
        up = self.head.up
        low = None if self.low is None else gather_rows(self.low, runs)
        affine(Head(weight, self.problem.bias, up=up), hidden, low, logits)
        num_warps = 8
        _sftmix_stored_kernel[(chunk.size,)](
            logits=stored, target=self.problem.target, lam=lam, row_coef=row_coef, pair_coef=pair_coef,
            row_stats=self.row_stats, pair_stats=self.pair_stats, first_row=chunk.start,
            num_rows=self.problem.hidden.shape[0], num_pairs=self.num_pairs, chunk_rows=chunk.size,
            vocab_size=vocab_size, width=stored.stride(0), smoothing=self.head.label_smoothing,
            z_loss=self.head.z_loss, SOFTCAP=self.problem.softcap, LOGIT_SCALE=self.problem.logit_scale,
            SMOOTHED=self.head.label_smoothing != 0, MOMENT=self.moment, PAIRED=chunk.paired,
            WANT_GRADIENT=self.needs.gradient, EXACT=hidden.dtype == torch.float32,
            BLOCK_V=choose_row_block(vocab_size), num_warps=num_warps,
        )  # fmt: skip
        if self.needs.dhidden:
            for rows, gradient in zip(runs, logits.split(chunk.size), strict=True):
                write_product(self.dhidden[rows], gradient, weight, None)
        if self.needs.dweight:
            # The first chunk writes: zeros would cost a pass over [V, D] to make and another to read.
            (add_product if self.is_written else write_product)(self.dweight, logits.t(), hidden)
            self.is_written = True
        if self.needs.dbias:
            self.dbias += logits.sum(dim=0, dtype=torch.float32)
        if self.needs.dlow and up is not None:
            for rows, gradient in zip(runs, logits.split(chunk.size), strict=True):
                write_product(self.dlow[rows], gradient, up, None)
        if self.needs.dup and low is not None:
            add_product(self.dup, logits.t(), low)


def stored_loss(
    hidden: Tensor,  # (N, D)
    head: Head,
    target: Tensor,  # (N,) int64, -1 where the row is ignored
    lam: Tensor,  # (M,) float32
    *,
    row_coef: Tensor,  # (N,) 0 at ignored rows
    pair_coef: Tensor,  # (M,) 0 at pairs with an ignored member
    needs: Needs,
    scratch_bytes: int,
    low: Tensor | None = None,  # (N, r), with head.up
) -> ChunkedResult:
    """:func:`chunked.chunked_loss` by one kernel a chunk; no host synchronisation.

    The buffer of logits, in hidden's dtype, takes at most ``scratch_bytes`` (0: that of 4096 rows), at most half of
    all pairs or unpaired rows, and at least one pair or row.

    Memory: n V' itemsize for a chunk of n rows (V' is V rounded up to 16), n D itemsize for a chunk of pairs, O(N + M)
    of statistics, dhidden N D itemsize and dweight 4 V D, which stay until the backward. There float32 gradients are
    handed over where the upstream gradient is 1 (CPU), and others written beside. Off GPUs of capability 8.0 16-bit
    products copy their operands: at most 4 (n V + n D + V D).

    Raises ValueError on CPU tensors outside the interpreter, on a ``head`` that is a shard, and where both the entropy
    and label smoothing are asked for.
    """
    if head.total_vocab is not None:
        raise ValueError("total_vocab: expected None with the stored schedule, which has no shards")
    if needs.entropy and head.label_smoothing:
        raise ValueError("needs: expected no entropy beside label_smoothing, got both")
    problem = Problem.prepare(
        hidden, head.weight, target, bias=head.bias, softcap=head.softcap, logit_scale=head.logit_scale
    )
    row_coef, pair_coef = row_coef.float(), pair_coef.float()
    scale = torch.ones((), dtype=torch.float32, device=hidden.device)
    if hidden.dtype != torch.float32:
        scale = unit_scale(row_coef, pair_coef)
        row_coef, pair_coef = row_coef / scale, pair_coef / scale
    row_coef, pair_coef = row_coef * problem.logit_scale, pair_coef * problem.logit_scale
    row_bytes = triton.cdiv(head.weight.shape[0], 16) * 16 * hidden.element_size()
    chunks = _chunks(hidden.shape[0], lam.shape[0], row_bytes, scratch_bytes)
    loop = _Loop(head, problem, needs, lam.shape[0], chunks, low=low)
    with on_device(hidden):
        for chunk in chunks:
            loop.run(chunk, lam.contiguous(), row_coef, pair_coef)
    if not chunks:
        loop.dweight.zero_()
    nll, lse, max_logit, target_logit, moment = loop.row_stats
    mixup_nll, lse_x, at_xc, at_xu = loop.pair_stats
    none = nll.new_empty(0)
    is_top1 = (target >= 0) & (target_logit >= max_logit)
    return ChunkedResult(
        nll, lse, is_top1, mixup_nll, moment if loop.moment == 1 else none, scale, loop.dhidden, loop.dweight,
        loop.dbias, max_logit, target_logit, moment if loop.moment == 2 else none, none, lse_x, none, at_xc,
        at_xu, loop.dlow, loop.dup,
    )  # fmt: skip

"""A row of logits in memory, or a pair's two, turned into gradients in place: the kernel of the ``stored`` schedule.

    A = f(a), B = f(u), X = f(lam a + (1 - lam) u)      a = W h_c + b and u = W h_u + b as the library rounded them
    m = max_j z_j,  l = sum_j exp(z_j - m),  p_j = exp(z_j - m) / l,  -log p_y = log l - (z_y - m)      z in A, B, X
    n = (1 - e) c[y],  s = e / V sum_v c_v                  c class weights, 1 without them; e smoothing, z z-loss
    dA = a_c J_A ((n + s + 2 z lse_A) P_A - n 1[y_c] - e c / V),  dB = a_u J_B (the same of B and y_u)
    dX = b J_X (P_X - lam 1[y_c] - (1 - lam) 1[y_u])        J = f' with softcap and scale; a times p_y, token scaling
    G_c = dA + lam dX over a,  G_u = dB + (1 - lam) dX over u

One program has a pair (or an unpaired row) and passes over it twice: statistics, then gradients, from the end, which
L2 still holds. Statistics are those of lanes, COLUMNS neighbouring columns of every block, which one thread has, so
that no block waits for a reduction; they are joined once. The label columns are computed from scalars, by expm1 where p
is near the label's mass, and written last. A factor of 0 selects: lam, 1 - lam, a or b of 0 make what they stand before
0, also where it is infinite or NaN.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .exponentials import capped, exp
from .stats import first_column, fold, no_columns
from .tiles import CHANGING

COLUMNS = tl.constexpr(8)  # of a lane: what a thread loads at once with 16 bits


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
def _columns_from(first_v, BLOCK_V: tl.constexpr):
    """(lanes, COLUMNS) int32: the columns of a block."""
    lanes = tl.arange(0, BLOCK_V // COLUMNS) * COLUMNS
    return first_v + lanes[:, None] + tl.arange(0, COLUMNS)[None, :]


@triton.jit
def _joined(stats, EXACT: tl.constexpr):
    """Of all lanes together, (1,) each: maximum, sum of exponentials, rounded once where EXACT, and moment."""
    tops, totals, moments, rests = stats
    zero = tl.zeros([1], dtype=tl.float32)
    top = zero + tl.max(tops, axis=0)
    fade = exp(tops - tl.where(top == float("-inf"), 0.0, top))
    if EXACT:
        total = tl.sum(fade * (totals.to(tl.float64) + rests), axis=0).to(tl.float32)
    else:
        total = tl.sum(fade * totals, axis=0)
    return top, zero + total, zero + tl.sum(moments, axis=0)


@triton.jit
def _store_predicted(predicted, row, tops, best, top):
    """The first column of the row's maximum: the least of the lanes that have it."""
    if predicted is not None:
        first = tl.min(tl.where(tops == top, best, 2147483647), axis=0)
        tl.store(predicted + row, first.to(tl.int64))


@triton.jit
def _load_row(row, offs, width):
    """(lanes, COLUMNS) float32; the padding between V and width is read and never used."""
    return tl.load(row + offs, mask=offs < width, other=0.0).to(tl.float32)


@triton.jit
def _label(target, vocab_size):
    """(1,) each: a row's target column, and whether it is one; else column 0, so that it can be read."""
    y = tl.load(target)
    here = (y >= 0) & (y < vocab_size)
    return tl.where(here, y, 0), here


@triton.jit
def _load_at(row, column):
    """(1,) float32: the affine logit at ``column``."""
    return tl.load(row + column).to(tl.float32)


@triton.jit
def _mix(share, one, other):
    """share * one + (1 - share) * other; a member without a share is left out, whatever it is."""
    return tl.where(share > 0.0, share * one, 0.0) + tl.where(share < 1.0, (1.0 - share) * other, 0.0)


@triton.jit
def _fold_row(
    stats, best, z, offs, vocab_size, class_weight, SOFTCAP: tl.constexpr, LOGIT_SCALE: tl.constexpr,
    EXACT: tl.constexpr, MOMENT: tl.constexpr, PREDICTED: tl.constexpr,
):  # fmt: skip
    """Fold a block of affine logits z into the lanes' stats, and into the first column of each lane's maximum."""
    z, _ = capped(z, SOFTCAP, LOGIT_SCALE, EXACT)
    z = tl.where(offs < vocab_size, z, float("-inf"))
    if PREDICTED:
        best = first_column(best, stats[0], z, offs)
    return fold(stats, z, offs, vocab_size, class_weight, MOMENT, EXACT), best


@triton.jit
def _store_row_stats(row_stats, row, num_rows, stats, z, has_target, vocab_size, MOMENT: tl.constexpr):
    """Planes of row_stats: lse, 0, nll, maximum, target logit, mean logit. z (1,): the logit at the target."""
    top, total, moment = stats
    tl.store(row_stats + row, top + tl.log(total))
    tl.store(row_stats + 2 * num_rows + row, tl.where(has_target, tl.log(total) - (z - top), 0.0))
    tl.store(row_stats + 3 * num_rows + row, top)
    tl.store(row_stats + 4 * num_rows + row, tl.where(has_target, z, 0.0))
    if MOMENT != 0:
        tl.store(row_stats + 5 * num_rows + row, moment / vocab_size)


@triton.jit
def _store_pair_stats(pair_stats, pair, num_pairs, stats, z_c, z_u, here_c, here_u):
    """Planes of pair_stats: lse_x, 0, nll and X at both targets; and log p of X at both targets, (1,)."""
    top, total, _ = stats
    log_c, log_u = (z_c - top) - tl.log(total), (z_u - top) - tl.log(total)
    tl.store(pair_stats + pair, top + tl.log(total))
    tl.store(pair_stats + 2 * num_pairs + pair, tl.where(here_c, -log_c, 0.0))
    tl.store(pair_stats + 3 * num_pairs + pair, tl.where(here_u, -log_u, 0.0))
    tl.store(pair_stats + 4 * num_pairs + pair, tl.where(here_c, z_c, 0.0))
    tl.store(pair_stats + 5 * num_pairs + pair, tl.where(here_u, z_u, 0.0))
    return log_c, log_u


@triton.jit
def _row_terms(
    coef, z, stats, y, class_weight, class_mean, smoothing, z_loss, vocab_size, TOKEN_SCALING: tl.constexpr
):  # fmt: skip
    """(1,) each: a; what exp(z - m) is multiplied by; e / V; G over the slope at the target, whose logit is z."""
    top, total, _ = stats
    log_p = (z - top) - tl.log(total)
    p = tl.exp(log_p)
    if TOKEN_SCALING:
        coef = tl.where(coef != 0.0, coef * p, 0.0)
    uniform = smoothing / vocab_size
    # (p - 1) + e would keep the digits of 1, not those of 1 - e.
    if class_weight is None:
        bulk = 1.0
        residual = (1.0 - smoothing) * _expm1(log_p) + (smoothing * p - uniform)
    else:
        weight, spread = tl.load(class_weight + y), smoothing * tl.load(class_mean)
        bulk = (1.0 - smoothing) * weight + spread
        residual = (1.0 - smoothing) * weight * _expm1(log_p) + (spread * p - uniform * weight)
    pull = 2.0 * z_loss * (top + tl.log(total))
    bulk = coef * (bulk + pull) / total
    return coef, bulk, uniform, tl.where(coef != 0.0, coef * (residual + pull * p), 0.0)


@triton.jit
def _row_gradient(z, slope, terms, top, offs, vocab_size, class_weight, SMOOTHED: tl.constexpr):
    """A row's own gradient away from its label; z (lanes, columns) of the columns offs."""
    coef, bulk, uniform, _ = terms
    g = exp(z - top[:, None]) * bulk[:, None]
    if SMOOTHED:
        share = (coef * uniform)[:, None]
        if class_weight is not None:
            share *= tl.load(class_weight + offs, mask=offs < vocab_size, other=0.0)
        g -= share
    return tl.where((coef != 0.0)[:, None], g * slope, 0.0)


@triton.jit(do_not_specialize=CHANGING, do_not_specialize_on_alignment=("lam", "pair_stats"))
def _sftmix_stored_kernel(
    logits,  # (rows or 2 * rows, width) in: W h + b; out: dlogits; the partners follow the confident rows
    target,  # (N,) int64
    lam,  # (M,) float32
    row_coef,  # (N,) float32, with the logit scale
    pair_coef,  # (M,)
    class_weight,  # (V,) float32, or None with the next
    class_mean,  # ()
    row_stats,  # (6, N) lse, 0, nll, maximum, target logit, mean logit; zeros
    pair_stats,  # (6, M) lse_x, 0, nll of X at y_c and y_u, X at both; zeros
    predicted,  # (N,) int64 or None
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
    TOKEN_SCALING: tl.constexpr,
    PAIRED: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    MOMENT: tl.constexpr = 2 if SMOOTHED else 0
    one = tl.arange(0, 1)
    row_c = first_row + tl.program_id(0).to(tl.int64) + one
    row_u = row_c + num_pairs
    c = logits + tl.program_id(0).to(tl.int64) * width
    u = logits + (chunk_rows + tl.program_id(0).to(tl.int64)) * width
    zero = tl.zeros([BLOCK_V // COLUMNS], dtype=tl.float32)
    stats_c = no_columns(zero)
    stats_u = no_columns(zero)
    stats_x = no_columns(zero)
    best_c = tl.zeros([BLOCK_V // COLUMNS], dtype=tl.int32)
    best_u = tl.zeros([BLOCK_V // COLUMNS], dtype=tl.int32)

    # The logits at the labels, before anything is overwritten: the reductions below are barriers.
    y_c, here_c = _label(target + row_c, vocab_size)
    c_at_c = _load_at(c, y_c)
    if PAIRED:
        y_u, here_u = _label(target + row_u, vocab_size)
        c_at_u, u_at_c, u_at_u = _load_at(c, y_u), _load_at(u, y_c), _load_at(u, y_u)
        share = tl.load(lam + row_c)

    for first_v in range(0, vocab_size, BLOCK_V):
        offs = _columns_from(first_v, BLOCK_V)
        a = _load_row(c, offs, width)
        if PAIRED:
            b = _load_row(u, offs, width)
            x = _mix(share[:, None], a, b)
            stats_x, _ = _fold_row(
                stats_x, best_c, x, offs, vocab_size, None, SOFTCAP, LOGIT_SCALE, EXACT, 0, False
            )  # fmt: skip
            stats_u, best_u = _fold_row(
                stats_u, best_u, b, offs, vocab_size, class_weight, SOFTCAP, LOGIT_SCALE, EXACT, MOMENT,
                predicted is not None,
            )  # fmt: skip
        stats_c, best_c = _fold_row(
            stats_c, best_c, a, offs, vocab_size, class_weight, SOFTCAP, LOGIT_SCALE, EXACT, MOMENT,
            predicted is not None,
        )  # fmt: skip

    lanes_c, lanes_u = stats_c[0], stats_u[0]
    stats_c = _joined(stats_c, EXACT)
    _store_predicted(predicted, row_c, lanes_c, best_c, stats_c[0])
    z_c, slope_c = capped(c_at_c, SOFTCAP, LOGIT_SCALE, EXACT)
    _store_row_stats(row_stats, row_c, num_rows, stats_c, z_c, here_c, vocab_size, MOMENT)
    terms_c = _row_terms(
        tl.load(row_coef + row_c), z_c, stats_c, y_c, class_weight, class_mean, smoothing, z_loss, vocab_size,
        TOKEN_SCALING,
    )  # fmt: skip
    if PAIRED:
        stats_u, stats_x = _joined(stats_u, EXACT), _joined(stats_x, EXACT)
        _store_predicted(predicted, row_u, lanes_u, best_u, stats_u[0])
        z_u, slope_u = capped(u_at_u, SOFTCAP, LOGIT_SCALE, EXACT)
        _store_row_stats(row_stats, row_u, num_rows, stats_u, z_u, here_u, vocab_size, MOMENT)
        terms_u = _row_terms(
            tl.load(row_coef + row_u), z_u, stats_u, y_u, class_weight, class_mean, smoothing, z_loss, vocab_size,
            TOKEN_SCALING,
        )  # fmt: skip
        x_at_c, slope_xc = capped(_mix(share, c_at_c, u_at_c), SOFTCAP, LOGIT_SCALE, EXACT)
        x_at_u, slope_xu = capped(_mix(share, c_at_u, u_at_u), SOFTCAP, LOGIT_SCALE, EXACT)
        log_xc, log_xu = _store_pair_stats(
            pair_stats, row_c, num_pairs, stats_x, x_at_c, x_at_u, here_c, here_u
        )
        coef_x = tl.load(pair_coef + row_c)
        is_pair = coef_x != 0.0

    num_blocks = tl.cdiv(vocab_size, BLOCK_V)
    for block in range(num_blocks):
        offs = _columns_from((num_blocks - 1 - block) * BLOCK_V, BLOCK_V)
        a = _load_row(c, offs, width)
        z, slope = capped(a, SOFTCAP, LOGIT_SCALE, EXACT)
        g_c = _row_gradient(z, slope, terms_c, stats_c[0], offs, vocab_size, class_weight, SMOOTHED)
        if PAIRED:
            b = _load_row(u, offs, width)
            z, slope = capped(_mix(share[:, None], a, b), SOFTCAP, LOGIT_SCALE, EXACT)
            g_x = exp(z - stats_x[0][:, None]) * (coef_x / stats_x[1])[:, None] * slope
            g_x = tl.where(is_pair[:, None], g_x, 0.0)
            g_c += share[:, None] * g_x
            z, slope = capped(b, SOFTCAP, LOGIT_SCALE, EXACT)
            g_u = _row_gradient(z, slope, terms_u, stats_u[0], offs, vocab_size, class_weight, SMOOTHED)
            g_u += (1.0 - share)[:, None] * g_x
            _store_block(u, offs, width, g_u)
        _store_block(c, offs, width, g_c)

    tl.debug_barrier()  # the block stores of other threads come before the label columns
    own_c = terms_c[3] * slope_c
    if PAIRED:
        same = y_c == y_u
        at_c = coef_x * _residual(log_xc, tl.where(same, 1.0, share)) * slope_xc
        at_u = coef_x * _residual(log_xu, tl.where(same, 1.0, 1.0 - share)) * slope_xu
        at_c, at_u = tl.where(is_pair, at_c, 0.0), tl.where(is_pair, at_u, 0.0)
        own_u = terms_u[3] * slope_u
        z, slope = capped(c_at_u[:, None], SOFTCAP, LOGIT_SCALE, EXACT)
        other_c = _row_gradient(
            z, slope, terms_c, stats_c[0], y_u[:, None], vocab_size, class_weight, SMOOTHED
        )
        z, slope = capped(u_at_c[:, None], SOFTCAP, LOGIT_SCALE, EXACT)
        other_u = _row_gradient(
            z, slope, terms_u, stats_u[0], y_c[:, None], vocab_size, class_weight, SMOOTHED
        )
        # A label of one member only is no label of a pair, whose coefficient is then 0.
        _store_at(c, y_u, tl.reshape(other_c, [1]) + share * at_u, here_u & ~(same & here_c))
        _store_at(u, y_c, tl.reshape(other_u, [1]) + (1.0 - share) * at_c, here_c & ~(same & here_u))
        _store_at(u, y_u, own_u + (1.0 - share) * at_u, here_u)
        own_c += share * at_c
    _store_at(c, y_c, own_c, here_c)


@triton.jit
def _store_block(row, offs, width, g):
    tl.store(row + offs, g.to(row.dtype.element_ty), mask=offs < width)


@triton.jit
def _store_at(row, column, g, mask):
    tl.store(row + column, g.to(row.dtype.element_ty), mask=mask)

"""Statistics of a pair's two rows of logits and of their mixture, in one pass, with no logits stored.

    A = f(W h_c + b),  B = f(W h_u + b),  X = f(lam W h_c + (1 - lam) W h_u + b)
    m = max_j z_j,  l = sum_j exp(z_j - m),  t = sum_j exp(z_j - m) (z_j - m)          z in A, B, X
    target logits: A[y_c], B[y_u], X[y_c], X[y_u]

A program owns BLOCK_N pairs and one split of the vocabulary: it walks the split's tiles, keeps (m, l) of A, B and X in
registers (when asked also t, for the entropy, or sum_j c_j z_j, for the mean logit, and the maximum's first column) and
writes them once; stats.py folds the splits. Target logits come from the accumulator that m and l come from, so that a
target at the top is at the top exactly.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..call import Call, Statistics
from .configs import Tile, choose_num_splits, num_processors, programs_per_processor
from .exponentials import capped
from .stats import empty_stats, first_column, fold, fold_splits, moment_of, no_columns, settled
from .tiles import (
    CHANGING,
    Problem,
    RowPart,
    add_low_rank,
    any_bit,
    column_inside,
    launch_arguments,
    load_target,
    logits_tile,
    on_device,
    row_parts,
    tile_coordinates,
    with_bias,
)
from .tokens import token_logits


@triton.jit
def _logits(
    z,  # (rows, columns) W h + b
    first_v,
    vocab_size,
    SOFTCAP: tl.constexpr,
    LOGIT_SCALE: tl.constexpr,
    EVEN_V: tl.constexpr,
    EXACT: tl.constexpr,
    STEP: tl.constexpr = 1,
    OFFSET: tl.constexpr = 0,
):
    """f(z), -inf in the vocabulary's tail; z is every STEP-th column of a tile, from OFFSET."""
    z, _ = capped(z, SOFTCAP, LOGIT_SCALE, EXACT)
    if not EVEN_V:
        if first_v + STEP * z.shape[1] > vocab_size:  # in one tile of many
            offs_v = first_v + tl.arange(0, z.shape[1]) * STEP + OFFSET
            z = tl.where((offs_v < vocab_size)[None, :], z, float("-inf"))
    return z


@triton.jit
def _mixed(share, a, b):
    """lam a + (1 - lam) b, rounded alike in a tile and in a row's target logit; share is lam, shaped as a and b are."""
    return tl.fma(share, a, (1.0 - share) * b)


@triton.jit
def _selected(share, a, b, x):
    """Of rows (rows,): x, or a where lam is 1 and b where it is 0, whose mixture with an infinite logit is NaN."""
    return tl.where(share == 1.0, a, tl.where(share == 0.0, b, x))


@triton.jit
def _selected_stats(share, stats_c, stats_u, stats_x):
    """The stats of X; X is A where lam is 1 and B where it is 0. Here and not in a tile: it costs nothing here."""
    return (
        _selected(share, stats_c[0], stats_u[0], stats_x[0]),
        _selected(share, stats_c[1], stats_u[1], stats_x[1]),
        stats_x[2],
        _selected(share, stats_c[3], stats_u[3], stats_x[3]),
    )


@triton.jit
def _at_column(z, column):
    """The entry of each row (rows,) at its column, 0 where that is -1. z (rows, columns)."""
    here = tl.arange(0, z.shape[1])[None, :] == column[:, None]
    return tl.sum(tl.where(here, z, 0.0), axis=1)


@triton.jit
def _places(column_c, column_u):
    """Which halves of a pair's tile hold any target, as bits: bit 0 of y_c the even columns, 1 the odd; 2 and 3 of y_u.

    columns (rows,), -1 where the target is elsewhere.
    """
    bits_c = tl.where(column_c < 0, 0, 1 << column_c % 2)
    return any_bit(bits_c | tl.where(column_u < 0, 0, 4 << column_u % 2))


@triton.jit
def _store_pair_targets(
    outs,  # pointers (rows,) to A at y_c, B at y_u, X at y_c and at y_u
    rows,
    half_a,  # (rows, columns) W h_c + b, every second column from HALF
    half_b,  # (rows, columns) W h_u + b
    share,  # (rows,) lam
    columns,  # of y_c and y_u in the tile, (rows,) each
    places,
    SOFTCAP: tl.constexpr,
    LOGIT_SCALE: tl.constexpr,
    EXACT: tl.constexpr,
    HALF: tl.constexpr,
):
    """The target logits that are in this half; most tiles hold none and skip it."""
    for label in tl.static_range(2):
        if places & (1 << (2 * label + HALF)):
            column = tl.where(columns[label] % 2 == HALF, columns[label] // 2, -1)
            a = _at_column(half_a, column)
            b = _at_column(half_b, column)
            own, _ = capped(b if label else a, SOFTCAP, LOGIT_SCALE, EXACT)
            mixed, _ = capped(_selected(share, a, b, _mixed(share, a, b)), SOFTCAP, LOGIT_SCALE, EXACT)
            tl.store(outs[label] + rows, own, mask=column >= 0)
            tl.store(outs[2 + label] + rows, mixed, mask=column >= 0)


@triton.jit
def _fold_mixture(
    stats,  # of X
    a,  # (rows, columns) W h_c + b
    b,  # (rows, columns) W h_u + b
    share,  # (rows,) lam
    targets,  # outs, rows and columns of _store_pair_targets
    first_v,
    vocab_size,
    SOFTCAP: tl.constexpr,
    LOGIT_SCALE: tl.constexpr,
    EVEN_V: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Fold a pair's tile of X and store its target logits.

    Even columns, then odd ones: the mixture of half a tile is all that is live beside A and B.
    """
    outs, rows, columns = targets
    places = _places(columns[0], columns[1])
    halves_a = a.reshape(a.shape[0], a.shape[1] // 2, 2).split()
    halves_b = b.reshape(b.shape[0], b.shape[1] // 2, 2).split()
    for half in tl.static_range(2):
        _store_pair_targets(
            outs, rows, halves_a[half], halves_b[half], share, columns, places, SOFTCAP, LOGIT_SCALE, EXACT, half
        )  # fmt: skip
        x = _mixed(share[:, None], halves_a[half], halves_b[half])
        x = _logits(x, first_v, vocab_size, SOFTCAP, LOGIT_SCALE, EVEN_V, EXACT, 2, half)
        stats = fold(stats, x, 0, 0, None, 0, EXACT)
    return stats


@triton.jit
def _fold_rows(
    stats,
    best,  # (rows,) the first column of the maximum so far
    z,  # (rows, columns) W h + b
    first_v,
    class_weight,
    vocab_size,
    PREDICTED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    LOGIT_SCALE: tl.constexpr,
    EVEN_V: tl.constexpr,
    EXACT: tl.constexpr,
    MOMENT: tl.constexpr,
):
    """Fold a tile of A or of B."""
    z = _logits(z, first_v, vocab_size, SOFTCAP, LOGIT_SCALE, EVEN_V, EXACT)
    offs_v = first_v + tl.arange(0, z.shape[1])
    if PREDICTED:
        best = first_column(best, stats[0], z, offs_v)
    return fold(stats, z, offs_v, vocab_size, class_weight, MOMENT, EXACT), best


@triton.jit
def _store_stats(part_max, part_sum, part_moment, at, mask, stats, MOMENT: tl.constexpr, EXACT: tl.constexpr):
    top, total, moment = settled(stats, EXACT)
    tl.store(part_max + at, top, mask=mask)
    tl.store(part_sum + at, total, mask=mask)
    if MOMENT != 0:
        tl.store(part_moment + at, moment, mask=mask)


@triton.jit(
    do_not_specialize=CHANGING,
    do_not_specialize_on_alignment=(
        "target_c", "target_u", "lam", "target_logit_c", "target_logit_u", "target_logit_xc", "target_logit_xu",
    ),
)  # fmt: skip
def _sftmix_fwd_kernel(
    hidden_c,  # (rows, D) pointer or descriptor
    hidden_u,  # (rows, D)
    weight,  # (V, D)
    bias,  # (V,) or None
    class_weight,  # (V,) float32 or None
    target_c,  # (rows,) int64
    target_u,  # (rows,)
    lam,  # (rows,) float32
    part_max,  # (splits, planes * rows) planes: A, then B and X when PAIRED
    part_sum,  # (splits, planes * rows)
    part_moment,  # (splits, planes * rows)
    part_best,  # (splits, planes * rows) int32, or None
    target_logit_c,  # (rows,) zeros
    target_logit_u,  # (rows,) zeros
    target_logit_xc,  # (rows,) zeros
    target_logit_xu,  # (rows,) zeros
    low_c,  # (rows, r), or None with all that follows to stride_uv
    low_u,  # (rows, r)
    up,  # (V, r)
    rank,
    stride_ln,
    stride_uv,
    num_rows,
    vocab_size,
    hidden_size,
    stride_hn,
    stride_wv,
    num_blocks_n,
    num_splits,
    tiles_per_split,
    SOFTCAP: tl.constexpr,
    LOGIT_SCALE: tl.constexpr,
    MOMENT: tl.constexpr,
    PAIRED: tl.constexpr,
    USE_DESCRIPTORS: tl.constexpr,
    EVEN_D: tl.constexpr,
    EVEN_V: tl.constexpr,
    PRECISION: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_N: tl.constexpr,
):
    block_n, split = tile_coordinates(num_blocks_n, num_splits, GROUP_N)
    first_n = block_n * BLOCK_N
    rows = first_n + tl.arange(0, BLOCK_N)
    row_mask = rows < num_rows
    y_c = load_target(target_c, rows, row_mask, 0, vocab_size)
    y_u = load_target(target_u, rows, row_mask, 0, vocab_size)
    share = tl.load(lam + rows, mask=row_mask & PAIRED, other=0.5)
    zero = tl.zeros([BLOCK_N], dtype=tl.float32)
    stats_c = no_columns(zero)
    stats_u = no_columns(zero)
    stats_x = no_columns(zero)
    best_c = tl.zeros([BLOCK_N], dtype=tl.int32)
    best_u = tl.zeros([BLOCK_N], dtype=tl.int32)
    outs = (target_logit_c, target_logit_u, target_logit_xc, target_logit_xu)

    begin = split.to(tl.int32) * tiles_per_split
    end = tl.minimum(begin + tiles_per_split, tl.cdiv(vocab_size, BLOCK_V))
    for tile in range(begin, end):
        first_v = tile * BLOCK_V
        a, b = logits_tile(
            hidden_c, hidden_u, weight, first_n, first_v, num_rows, vocab_size, hidden_size, stride_hn, stride_wv,
            PAIRED, USE_DESCRIPTORS, EVEN_D, PRECISION, BLOCK_N, BLOCK_V, BLOCK_D,
        )  # fmt: skip
        if up is not None:
            a, b = add_low_rank(
                a, b, low_c, low_u, up, first_n, first_v, num_rows, vocab_size, rank, stride_ln, stride_uv, PAIRED,
                PRECISION, BLOCK_R,
            )  # fmt: skip
        offs_v = first_v + tl.arange(0, BLOCK_V)
        a = with_bias(a, bias, offs_v, vocab_size)
        column_c = column_inside(y_c, first_v, BLOCK_V)
        if PAIRED:
            b = with_bias(b, bias, offs_v, vocab_size)
            columns = (column_c, column_inside(y_u, first_v, BLOCK_V))
            stats_x = _fold_mixture(
                stats_x, a, b, share, (outs, rows, columns), first_v, vocab_size, SOFTCAP, LOGIT_SCALE, EVEN_V,
                EXACT,
            )  # fmt: skip
            stats_u, best_u = _fold_rows(
                stats_u, best_u, b, first_v, class_weight, vocab_size, part_best is not None, SOFTCAP, LOGIT_SCALE,
                EVEN_V, EXACT, MOMENT,
            )  # fmt: skip
        elif any_bit((column_c >= 0).to(tl.int32)):
            own, _ = capped(_at_column(a, column_c), SOFTCAP, LOGIT_SCALE, EXACT)
            tl.store(target_logit_c + rows, own, mask=column_c >= 0)
        stats_c, best_c = _fold_rows(
            stats_c, best_c, a, first_v, class_weight, vocab_size, part_best is not None, SOFTCAP, LOGIT_SCALE,
            EVEN_V, EXACT, MOMENT,
        )  # fmt: skip

    at = split * (3 if PAIRED else 1) * num_rows + rows
    stats_x = _selected_stats(share, stats_c, stats_u, stats_x)
    _store_stats(part_max, part_sum, part_moment, at, row_mask, stats_c, MOMENT, EXACT)
    if part_best is not None:
        tl.store(part_best + at, best_c, mask=row_mask)
        if PAIRED:
            tl.store(part_best + at + num_rows, best_u, mask=row_mask)
    if PAIRED:
        _store_stats(part_max, part_sum, part_moment, at + num_rows, row_mask, stats_u, MOMENT, EXACT)
        _store_stats(part_max, part_sum, part_moment, at + 2 * num_rows, row_mask, stats_x, 0, EXACT)


def _num_program_slots(device: torch.device, tile: Tile) -> int:
    """Programs of ``tile`` that run at once on ``device``; 1 in the interpreter."""
    if device.type != "cuda":
        return 1
    return num_processors(device) * programs_per_processor(tile)


def _forward_part(
    stats: Statistics,
    problem: Problem,
    lam: Tensor,  # (M,)
    part: RowPart,
    *,
    moment: int,
    tile: Tile,
    num_splits: int | None,
) -> None:
    """Both launches for one run of rows; results go to the part's places in ``stats``."""
    vocab_size = problem.weight.shape[0]
    num_blocks_n, num_tiles = triton.cdiv(part.size, tile.block_n), triton.cdiv(vocab_size, tile.block_v)
    wanted = num_splits or choose_num_splits(num_blocks_n, num_tiles, _num_program_slots(lam.device, tile))
    tiles_per_split = triton.cdiv(num_tiles, wanted)
    splits = triton.cdiv(num_tiles, tiles_per_split)
    size = splits * (part.num_rows + part.num_mixed)
    buffers: dict[str, Tensor | None] = {
        name: torch.empty(size if kept else 0, dtype=torch.float32, device=lam.device)
        for name, kept in (("part_max", True), ("part_sum", True), ("part_moment", moment != 0))
    }
    has_best = stats.predicted.numel() > 0
    buffers["part_best"] = torch.empty(size, dtype=torch.int32, device=lam.device) if has_best else None
    _sftmix_fwd_kernel[(num_blocks_n * splits,)](
        **launch_arguments(problem, part, tile),
        **buffers,
        lam=lam,
        target_logit_c=stats.target_logit[part.first],
        target_logit_u=stats.target_logit[part.second],
        target_logit_xc=stats.logit_x[0],
        target_logit_xu=stats.logit_x[1],
        num_splits=splits,
        tiles_per_split=tiles_per_split,
        MOMENT=moment,
        EVEN_V=vocab_size % tile.block_v == 0,
    )
    fold_splits(
        stats, buffers, problem.target, part, num_splits=splits, vocab_size=vocab_size, moment=moment,
        exact=problem.hidden.dtype == torch.float32,
    )  # fmt: skip


def fused_forward(
    call: Call,
    column: Tensor,  # (N,) targets among these columns, -1 at ignored rows and where they are elsewhere
    *,
    tile: Tile | None = None,
    num_splits: int | None = None,
) -> Statistics:
    """Statistics of every row and mixture, with no logits in memory; no host synchronisation.

    ``tile`` and ``num_splits`` force the launch shape (tests).

    Memory: 4 (8 N + 6 M) bytes of results and, for S splits of the vocabulary, 12 S (N + M) of partial sums (predicted:
    4 S (N + M) more); no logits. Tokens: tokens.py.

    Raises ValueError on CPU tensors outside the interpreter.
    """
    stats, problem = empty_stats(call), Problem.of(call, column)
    num_rows, _, num_pairs = call.sizes
    with on_device(call.hidden.device):
        for part in row_parts(num_rows, num_pairs):
            chosen = tile or problem.choose_tile("forward", part, predicted=bool(call.wanted.predicted))
            _forward_part(
                stats, problem, call.lam.contiguous(), part, moment=moment_of(call.options, call.wanted), tile=chosen,
                num_splits=num_splits,
            )  # fmt: skip
    return stats if call.tokens is None else stats._replace(token_logit=token_logits(call))

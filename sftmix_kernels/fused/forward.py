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
from .configs import Tile, choose_num_splits, programs_per_processor
from .stats import empty_stats, first_column, fold, fold_splits, moment_of, no_columns, settled
from .tiles import (
    CHANGING,
    Problem,
    RowPart,
    add_low_rank,
    any_inside,
    capped,
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
    affine,  # (rows, columns) W h
    bias,
    offs_v,
    vocab_size,
    SOFTCAP: tl.constexpr,
    LOGIT_SCALE: tl.constexpr,
    EVEN_V: tl.constexpr,
    EXACT: tl.constexpr,
):
    """f(affine + bias), -inf in the vocabulary's tail."""
    z, _ = capped(with_bias(affine, bias, offs_v, vocab_size), SOFTCAP, LOGIT_SCALE, EXACT)
    if not EVEN_V:
        z = tl.where((offs_v < vocab_size)[None, :], z, float("-inf"))
    return z


@triton.jit
def _store_target_logit(out, rows, z, label, STEP: tl.constexpr, OFFSET: tl.constexpr):
    """out[row] = z[row, target] where z holds the target. label: the targets' columns in the tile, any of them in it.

    z is every STEP-th column of the tile from OFFSET. The branch skips the gathering in most tiles.
    """
    target, hit = label
    if hit:
        here = (tl.arange(0, z.shape[1]) * STEP + OFFSET)[None, :] == target[:, None]
        # Said by arithmetic: a second reduction over the columns costs 500 bytes of stack on sm_90.
        found = (target >= 0) & (target < STEP * z.shape[1]) & (target % STEP == OFFSET)
        tl.store(out + rows, tl.sum(tl.where(here, z, 0.0), axis=1), mask=found)


@triton.jit
def _store_stats(part_max, part_sum, part_moment, at, mask, stats, MOMENT: tl.constexpr, EXACT: tl.constexpr):
    top, total, moment = settled(stats, EXACT)
    tl.store(part_max + at, top, mask=mask)
    tl.store(part_sum + at, total, mask=mask)
    if MOMENT != 0:
        tl.store(part_moment + at, moment, mask=mask)


@triton.jit
def _fold_pairs(
    a,  # (rows, columns) W h_c
    b,  # (rows, columns) W h_u
    share,  # (rows,) lam
    stats,  # of A, B and X
    best,  # first columns of the maxima of A and B
    labels,  # of the confident and of the partner
    outs,  # pointers to target logits: A at y_c, B at y_u, X at y_c and at y_u
    rows,
    first_v,
    bias,
    class_weight,
    vocab_size,
    PREDICTED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    LOGIT_SCALE: tl.constexpr,
    EVEN_V: tl.constexpr,
    EXACT: tl.constexpr,
    MOMENT: tl.constexpr,
    STEP: tl.constexpr,
    OFFSET: tl.constexpr,
):
    """Fold every STEP-th column of a pair's tile, from OFFSET: one of the three sets of logits at a time."""
    stats_c, stats_u, stats_x = stats
    best_c, best_u = best
    label_c, label_u = labels
    offs_v = first_v + tl.arange(0, a.shape[1]) * STEP + OFFSET
    x = share[:, None] * a + (1.0 - share)[:, None] * b
    x = _logits(x, bias, offs_v, vocab_size, SOFTCAP, LOGIT_SCALE, EVEN_V, EXACT)
    _store_target_logit(outs[2], rows, x, label_c, STEP, OFFSET)
    _store_target_logit(outs[3], rows, x, label_u, STEP, OFFSET)
    stats_x = fold(stats_x, x, offs_v, vocab_size, None, 0, EXACT)
    b = _logits(b, bias, offs_v, vocab_size, SOFTCAP, LOGIT_SCALE, EVEN_V, EXACT)
    _store_target_logit(outs[1], rows, b, label_u, STEP, OFFSET)
    if PREDICTED:
        best_u = first_column(best_u, stats_u[0], b, offs_v)
    stats_u = fold(stats_u, b, offs_v, vocab_size, class_weight, MOMENT, EXACT)
    a = _logits(a, bias, offs_v, vocab_size, SOFTCAP, LOGIT_SCALE, EVEN_V, EXACT)
    _store_target_logit(outs[0], rows, a, label_c, STEP, OFFSET)
    if PREDICTED:
        best_c = first_column(best_c, stats_c[0], a, offs_v)
    stats_c = fold(stats_c, a, offs_v, vocab_size, class_weight, MOMENT, EXACT)
    return stats_c, stats_u, stats_x, best_c, best_u


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
    share = tl.load(lam + rows, mask=row_mask & PAIRED, other=0.0)
    zero = tl.zeros([BLOCK_N], dtype=tl.float32)
    stats_c = no_columns(zero)
    stats_u = no_columns(zero)
    stats_x = no_columns(zero)
    best_c = tl.zeros([BLOCK_N], dtype=tl.int32)
    best_u = tl.zeros([BLOCK_N], dtype=tl.int32)

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
        label_c = (y_c - first_v, any_inside(y_c - first_v, BLOCK_V))
        label_u = (y_u - first_v, any_inside(y_u - first_v, BLOCK_V))
        if PAIRED:
            # Even columns, then odd ones: the mixture of half a tile is all that must be live beside A and B.
            outs = (target_logit_c, target_logit_u, target_logit_xc, target_logit_xu)
            halves_a = a.reshape(BLOCK_N, BLOCK_V // 2, 2).split()
            halves_b = b.reshape(BLOCK_N, BLOCK_V // 2, 2).split()
            for half in tl.static_range(2):
                stats_c, stats_u, stats_x, best_c, best_u = _fold_pairs(
                    halves_a[half], halves_b[half], share, (stats_c, stats_u, stats_x), (best_c, best_u),
                    (label_c, label_u), outs, rows, first_v, bias, class_weight, vocab_size, part_best is not None,
                    SOFTCAP, LOGIT_SCALE, EVEN_V, EXACT, MOMENT, 2, half,
                )  # fmt: skip
        else:
            offs_v = first_v + tl.arange(0, BLOCK_V)
            a = _logits(a, bias, offs_v, vocab_size, SOFTCAP, LOGIT_SCALE, EVEN_V, EXACT)
            _store_target_logit(target_logit_c, rows, a, label_c, 1, 0)
            if part_best is not None:
                best_c = first_column(best_c, stats_c[0], a, offs_v)
            stats_c = fold(stats_c, a, offs_v, vocab_size, class_weight, MOMENT, EXACT)

    at = split * (3 if PAIRED else 1) * num_rows + rows
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
    num_processors: int = torch.cuda.get_device_properties(device).multi_processor_count
    return num_processors * programs_per_processor(tile)


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
    problem, stats = Problem.of(call, column), empty_stats(call)
    num_rows, _, num_pairs = call.sizes
    with on_device(call.hidden):
        for part in row_parts(num_rows, num_pairs):
            chosen = tile or problem.choose_tile("forward", part, predicted=bool(call.wanted.predicted))
            _forward_part(
                stats, problem, call.lam.contiguous(), part, moment=moment_of(call), tile=chosen,
                num_splits=num_splits,
            )  # fmt: skip
    return stats if call.tokens is None else stats._replace(token_logit=token_logits(call))

"""Statistics of a pair's two rows of logits and of their mixture, in one pass, with no logits stored.

    A = f(W h_c + b),  B = f(W h_u + b),  X = f(lam W h_c + (1 - lam) W h_u + b)
    m = max_j z_j,  l = sum_j exp(z_j - m),  lse = m + log l                       z in A, B, X
    entropy = -sum_j p_j log p_j = log l - (1/l) sum_j exp(z_j - m) (z_j - m)
    nll = lse - z[y], taken at y_c in A, y_u in B, and at both in X

A program owns BLOCK_N pairs and one split of the vocabulary: it walks the split's tiles and keeps (m, l) of A, B and X
in registers. A second kernel folds the splits. ``lse_low`` is what rounding took from m + log l, so that probabilities
are right where the logits are large. Target logits come from the accumulator that made m and l.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import INTERPRETED, Tile, choose_num_splits, choose_tile, current_arch
from .tiles import (
    RowPart,
    any_inside,
    check_launchable,
    load_target,
    logits_tile,
    main_loop_arguments,
    on_device,
    row_parts,
    tanh,
    tile_coordinates,
    unit_stride,
    with_bias,
)


class FusedStats(NamedTuple):
    """What one forward pass knows of N rows and M mixtures; float32, natural logarithms."""

    lse: Tensor  # (N,)
    max_logit: Tensor  # (N,)
    target_logit: Tensor  # (N,) 0 where the row has no target
    lse_x: Tensor  # (M,)
    target_logit_xc: Tensor  # (M,) mixed logit at the confident target; 0 where there is none
    target_logit_xu: Tensor  # (M,) at the partner's
    entropy: Tensor  # (N,), or (0,) when not wanted
    nll: Tensor  # (N,) -log p of the target, right to float32 even where it is tiny; 0 without a target
    nll_xc: Tensor  # (M,) the same of the mixture, at the confident target
    nll_xu: Tensor  # (M,) at the partner's
    row_carry: Tensor  # (3, N) for the backward: lse, the part of it lost in rounding, nll
    pair_carry: Tensor  # (4, M) lse_x, the part lost, nll_xc, nll_xu


@triton.jit
def _logits(affine, bias, offs_v, vocab_size, SOFTCAP: tl.constexpr, LOGIT_SCALE: tl.constexpr, EVEN_V: tl.constexpr, EXACT: tl.constexpr):
    """f(affine + bias), -inf in the vocabulary's tail."""
    z = with_bias(affine, bias, offs_v, vocab_size)
    if LOGIT_SCALE != 1.0:
        z = z * LOGIT_SCALE
    if SOFTCAP != 0.0:
        z = SOFTCAP * tanh(z * (1.0 / SOFTCAP), EXACT)
    if not EVEN_V:
        z = tl.where((offs_v < vocab_size)[None, :], z, float("-inf"))
    return z


@triton.jit
def _fold(stats, z, WANT_MOMENT: tl.constexpr):
    """Fold z (rows, columns) into stats: running max m, sum of exp(z - m), and sum of exp(z - m) (z - m)."""
    top, total, moment = stats
    new = tl.maximum(top, tl.max(z, axis=1))
    shift = tl.where(new == float("-inf"), 0.0, new)
    z = z - shift[:, None]
    e = tl.exp(z)
    down = tl.where(top == float("-inf"), 0.0, top - shift)
    fade = tl.where(top == float("-inf"), 0.0, tl.exp(down))
    if WANT_MOMENT:
        finite = tl.where(e > 0.0, z, 0.0)
        moment = fade * (moment + total * down) + tl.sum(e * finite, axis=1)
    return new, fade * total + tl.sum(e, axis=1), moment


@triton.jit
def _store_target_logit(out, rows, z, columns, label, STEP: tl.constexpr, OFFSET: tl.constexpr):
    """out[row] = z[row, target] for the rows whose target z holds; label: (target's column in the tile, any in it)."""
    target, hit = label
    if hit:
        here = columns[None, :] == target[:, None]
        found = (target >= 0) & (target < STEP * z.shape[1]) & (target % STEP == OFFSET)
        tl.store(out + rows, tl.sum(tl.where(here, z, 0.0), axis=1), mask=found)


@triton.jit
def _store_stats(part_max, part_sum, part_moment, at, mask, stats, WANT_MOMENT: tl.constexpr):
    top, total, moment = stats
    tl.store(part_max + at, top, mask=mask)
    tl.store(part_sum + at, total, mask=mask)
    if WANT_MOMENT:
        tl.store(part_moment + at, moment, mask=mask)


@triton.jit
def _fold_pairs(
    a,  # (rows, columns) W h_c
    b,  # (rows, columns) W h_u
    share,  # (rows,) lam
    stats,  # of A, B and X
    labels,  # of the confident and of the partner
    outs,  # pointers to target logits: A at y_c, B at y_u, X at y_c and at y_u
    rows,
    columns,  # (columns,) their places in the tile
    first_v,
    bias,
    vocab_size,
    SOFTCAP: tl.constexpr,
    LOGIT_SCALE: tl.constexpr,
    EVEN_V: tl.constexpr,
    EXACT: tl.constexpr,
    WANT_MOMENT: tl.constexpr,
    STEP: tl.constexpr, OFFSET: tl.constexpr,
):
    stats_c, stats_u, stats_x = stats
    label_c, label_u = labels
    offs_v = first_v + columns
    x = share[:, None] * a + (1.0 - share)[:, None] * b
    x = _logits(x, bias, offs_v, vocab_size, SOFTCAP, LOGIT_SCALE, EVEN_V, EXACT)
    _store_target_logit(outs[2], rows, x, columns, label_c, STEP, OFFSET)
    _store_target_logit(outs[3], rows, x, columns, label_u, STEP, OFFSET)
    stats_x = _fold(stats_x, x, False)
    b = _logits(b, bias, offs_v, vocab_size, SOFTCAP, LOGIT_SCALE, EVEN_V, EXACT)
    _store_target_logit(outs[1], rows, b, columns, label_u, STEP, OFFSET)
    stats_u = _fold(stats_u, b, WANT_MOMENT)
    a = _logits(a, bias, offs_v, vocab_size, SOFTCAP, LOGIT_SCALE, EVEN_V, EXACT)
    _store_target_logit(outs[0], rows, a, columns, label_c, STEP, OFFSET)
    stats_c = _fold(stats_c, a, WANT_MOMENT)
    return stats_c, stats_u, stats_x


@triton.jit
def _sftmix_fwd_kernel(
    hidden_c,  # (rows, D) pointer or descriptor
    hidden_u,  # (rows, D)
    weight,  # (V, D)
    bias,  # (V,) or None
    target_c,  # (rows,) int64
    target_u,  # (rows,)
    lam,  # (rows,) float32
    part_max,  # (splits, planes * rows) planes: A, then B and X when PAIRED
    part_sum,  # (splits, planes * rows)
    part_moment,  # (splits, planes * rows)
    target_logit_c,  # (rows,) zeros
    target_logit_u,  # (rows,) zeros
    target_logit_xc,  # (rows,) zeros
    target_logit_xu,  # (rows,) zeros
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
    WANT_MOMENT: tl.constexpr,
    PAIRED: tl.constexpr,
    USE_DESCRIPTORS: tl.constexpr,
    EVEN_D: tl.constexpr,
    EVEN_V: tl.constexpr,
    PRECISION: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
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
    stats_c = (zero - float("inf"), zero, zero)
    stats_u = (zero - float("inf"), zero, zero)
    stats_x = (zero - float("inf"), zero, zero)

    begin = split.to(tl.int32) * tiles_per_split
    end = tl.minimum(begin + tiles_per_split, tl.cdiv(vocab_size, BLOCK_V))
    for tile in range(begin, end):
        first_v = tile * BLOCK_V
        a, b = logits_tile(
            hidden_c, hidden_u, weight, first_n, first_v, num_rows, vocab_size, hidden_size, stride_hn, stride_wv,
            PAIRED, USE_DESCRIPTORS, EVEN_D, PRECISION, BLOCK_N, BLOCK_V, BLOCK_D,
        )  # fmt: skip
        label_c = (y_c - first_v, any_inside(y_c - first_v, BLOCK_V))
        label_u = (y_u - first_v, any_inside(y_u - first_v, BLOCK_V))
        if PAIRED:
            # Even columns, then odd ones: the mixture of half a tile is all that must be live beside A and B.
            outs = (target_logit_c, target_logit_u, target_logit_xc, target_logit_xu)
            halves_a = a.reshape(BLOCK_N, BLOCK_V // 2, 2).split()
            halves_b = b.reshape(BLOCK_N, BLOCK_V // 2, 2).split()
            for half in tl.static_range(2):
                stats_c, stats_u, stats_x = _fold_pairs(
                    halves_a[half], halves_b[half], share, (stats_c, stats_u, stats_x), (label_c, label_u), outs,
                    rows, 2 * tl.arange(0, BLOCK_V // 2) + half, first_v, bias, vocab_size,
                    SOFTCAP, LOGIT_SCALE, EVEN_V, EXACT, WANT_MOMENT, 2, half,
                )  # fmt: skip
        else:
            columns = tl.arange(0, BLOCK_V)
            a = _logits(a, bias, first_v + columns, vocab_size, SOFTCAP, LOGIT_SCALE, EVEN_V, EXACT)
            _store_target_logit(target_logit_c, rows, a, columns, label_c, 1, 0)
            stats_c = _fold(stats_c, a, WANT_MOMENT)

    plane = num_rows.to(tl.int64)
    at = split * plane * (3 if PAIRED else 1) + rows
    _store_stats(part_max, part_sum, part_moment, at, row_mask, stats_c, WANT_MOMENT)
    if PAIRED:
        _store_stats(part_max, part_sum, part_moment, at + plane, row_mask, stats_u, WANT_MOMENT)
        _store_stats(part_max, part_sum, part_moment, at + 2 * plane, row_mask, stats_x, False)


@triton.jit
def _nll(target_ptrs, logit_ptrs, mask, lse, low, vocab_size):
    """-log p at the target, 0 where there is none; lse - z first, which is exact when p is near 1."""
    y = tl.load(target_ptrs, mask=mask, other=-1)
    z = tl.load(logit_ptrs, mask=mask, other=0.0)
    return tl.where((y >= 0) & (y < vocab_size), (lse - z) + low, 0.0)


@triton.jit
def _sftmix_fwd_combine_kernel(
    part_max,  # (splits, rows + mixed): the rows' planes, then the mixtures'
    part_sum,  # (splits, rows + mixed)
    part_moment,  # (splits, rows + mixed)
    target,  # (rows,) int64
    target_logit,  # (rows,)
    target_logit_xc,  # (mixed,)
    target_logit_xu,  # (mixed,)
    lse,  # (rows,)
    max_logit,  # (rows,)
    entropy,  # (rows,)
    nll,  # (rows,)
    row_carry,  # (3, N), from this part's first row
    pair_carry,  # (4, mixed)
    num_rows,
    num_mixed,
    stride_carry,
    num_splits,
    vocab_size,
    WANT_MOMENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    size = num_rows.to(tl.int64) + num_mixed
    mask = offs < size
    zero = tl.zeros([BLOCK], dtype=tl.float32)
    top, total, moment = zero - float("inf"), zero, zero
    for split in range(0, num_splits):
        at = split * size + offs
        m = tl.load(part_max + at, mask=mask, other=0.0)
        new = tl.maximum(top, m)
        shift = tl.where(new == float("-inf"), 0.0, new)
        down_old = tl.where(top == float("-inf"), 0.0, top - shift)
        down_new = tl.where(m == float("-inf"), 0.0, m - shift)
        fade_old, fade_new = tl.exp(down_old), tl.exp(down_new)
        part = tl.load(part_sum + at, mask=mask, other=1.0)
        if WANT_MOMENT:
            part_t = tl.load(part_moment + at, mask=mask & (offs < num_rows), other=0.0)
            moment = fade_old * (moment + total * down_old) + fade_new * (part_t + part * down_new)
        total = fade_old * total + fade_new * part
        top = new

    log_total = tl.log(total)
    log_sum_exp = top + log_total
    # Knuth's exact sum: log_sum_exp + low is top + log_total without rounding.
    shadow = log_sum_exp - top
    low = (top - (log_sum_exp - shadow)) + (log_total - shadow)
    low = tl.where(tl.abs(log_sum_exp) < float("inf"), low, 0.0)

    is_row = offs < num_rows
    row_nll = _nll(target + offs, target_logit + offs, is_row, log_sum_exp, low, vocab_size)
    tl.store(lse + offs, log_sum_exp, mask=is_row)
    tl.store(max_logit + offs, top, mask=is_row)
    tl.store(nll + offs, row_nll, mask=is_row)
    tl.store(row_carry + offs, log_sum_exp, mask=is_row)
    tl.store(row_carry + stride_carry + offs, low, mask=is_row)
    tl.store(row_carry + 2 * stride_carry + offs, row_nll, mask=is_row)
    if WANT_MOMENT:
        tl.store(entropy + offs, log_total - moment / total, mask=is_row)

    is_mixed = mask & (offs >= num_rows)
    pair = offs - num_rows
    nll_xc = _nll(target + pair, target_logit_xc + pair, is_mixed, log_sum_exp, low, vocab_size)
    nll_xu = _nll(target + num_mixed + pair, target_logit_xu + pair, is_mixed, log_sum_exp, low, vocab_size)
    tl.store(pair_carry + pair, log_sum_exp, mask=is_mixed)
    tl.store(pair_carry + num_mixed + pair, low, mask=is_mixed)
    tl.store(pair_carry + 2 * num_mixed + pair, nll_xc, mask=is_mixed)
    tl.store(pair_carry + 3 * num_mixed + pair, nll_xu, mask=is_mixed)


def _empty_stats(hidden: Tensor, num_pairs: int, want_entropy: bool) -> FusedStats:
    """Buffers for the results; the target logits are zero because rows without a target are not written."""
    num_rows = hidden.shape[0]

    def floats(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=hidden.device)

    pair_carry = floats(4, num_pairs)
    return FusedStats(
        lse=floats(num_rows),
        max_logit=floats(num_rows),
        target_logit=floats(num_rows).zero_(),
        lse_x=pair_carry[0],
        target_logit_xc=floats(num_pairs).zero_(),
        target_logit_xu=floats(num_pairs).zero_(),
        entropy=floats(num_rows if want_entropy else 0),
        nll=floats(num_rows),
        nll_xc=pair_carry[2],
        nll_xu=pair_carry[3],
        row_carry=floats(3, num_rows),
        pair_carry=pair_carry,
    )


def _num_program_slots(device: torch.device, tile: Tile) -> int:
    """Programs of ``tile`` that run at once on ``device``; 1 in the interpreter."""
    if device.type != "cuda":
        return 1
    per_processor = 2 if tile.num_warps <= 4 else 1
    return torch.cuda.get_device_properties(device).multi_processor_count * per_processor


def _forward_part(
    stats: FusedStats,
    problem: dict[str, Any],
    part: RowPart,
    *,
    tile: Tile,
    num_splits: int | None,
) -> None:
    """Both launches for one run of rows; results go to the part's places in ``stats``."""
    hidden, weight, target = problem["hidden"], problem["weight"], problem["target"]
    num_blocks_n, num_tiles = triton.cdiv(part.count, tile.block_n), triton.cdiv(weight.shape[0], tile.block_v)
    wanted = num_splits or choose_num_splits(num_blocks_n, num_tiles, _num_program_slots(hidden.device, tile))
    tiles_per_split = triton.cdiv(num_tiles, wanted)
    splits = triton.cdiv(num_tiles, tiles_per_split)
    num_mixed = part.count if part.paired else 0
    size, want_moment = part.num_rows + num_mixed, stats.entropy.numel() > 0
    buffers = {
        name: torch.empty(splits * (size if kept else 0), dtype=torch.float32, device=hidden.device)
        for name, kept in (("part_max", True), ("part_sum", True), ("part_moment", want_moment))
    }
    _sftmix_fwd_kernel[(num_blocks_n * splits,)](
        **main_loop_arguments(hidden, weight, part, tile=tile),
        **buffers,
        bias=problem["bias"],
        target_c=target[part.first],
        target_u=target[part.second],
        lam=problem["lam"],
        target_logit_c=stats.target_logit[part.first],
        target_logit_u=stats.target_logit[part.second],
        target_logit_xc=stats.target_logit_xc,
        target_logit_xu=stats.target_logit_xu,
        num_blocks_n=num_blocks_n,
        num_splits=splits,
        tiles_per_split=tiles_per_split,
        SOFTCAP=problem["softcap"],
        LOGIT_SCALE=problem["logit_scale"],
        WANT_MOMENT=want_moment,
        EVEN_V=weight.shape[0] % tile.block_v == 0,
    )
    block = 4096 if INTERPRETED else 128
    _sftmix_fwd_combine_kernel[(triton.cdiv(size, block),)](
        **buffers,
        target=target[part.rows],
        target_logit=stats.target_logit[part.rows],
        target_logit_xc=stats.target_logit_xc,
        target_logit_xu=stats.target_logit_xu,
        lse=stats.lse[part.rows],
        max_logit=stats.max_logit[part.rows],
        entropy=stats.entropy[part.rows] if want_moment else stats.entropy,
        nll=stats.nll[part.rows],
        row_carry=stats.row_carry[:, part.rows],
        pair_carry=stats.pair_carry,
        num_rows=part.num_rows,
        num_mixed=num_mixed,
        stride_carry=stats.row_carry.stride(0),
        num_splits=splits,
        vocab_size=weight.shape[0],
        WANT_MOMENT=want_moment,
        BLOCK=block,
        num_warps=4,
    )


def fused_forward(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    target: Tensor,  # (N,) int64, -1 where the row is ignored
    lam: Tensor,  # (M,) float32
    *,
    bias: Tensor | None = None,  # (V,)
    softcap: float = 0.0,
    logit_scale: float = 1.0,
    want_entropy: bool = False,
    tile: Tile | None = None,
    num_splits: int | None = None,
) -> FusedStats:
    """Log-sum-exps, maxima and target logits of N rows and M mixtures; O(N) memory, no host synchronisation.

    Rows are M confident ones, their M partners, then N - 2M unpaired ones. ``softcap`` 0 means none. ``tile`` and
    ``num_splits`` force the launch shape (tests). Raises ValueError on CPU tensors outside the interpreter.
    """
    check_launchable(hidden)
    stats = _empty_stats(hidden, lam.shape[0], want_entropy)
    problem = dict(
        hidden=unit_stride(hidden), weight=unit_stride(weight), target=target.contiguous(), lam=lam.contiguous(),
        bias=None if bias is None else bias.contiguous(), softcap=float(softcap), logit_scale=float(logit_scale),
    )  # fmt: skip
    for part in row_parts(hidden.shape[0], lam.shape[0]):
        chosen = tile or choose_tile(
            "forward", num_rows=part.count, vocab_size=weight.shape[0], hidden_size=weight.shape[1],
            dtype=hidden.dtype, arch=current_arch(hidden.device), paired=part.paired, softcap=softcap != 0.0,
        )  # fmt: skip
        with on_device(hidden):
            _forward_part(stats, problem, part, tile=chosen, num_splits=num_splits)
    return stats

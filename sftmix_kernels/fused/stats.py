"""What one forward pass knows of each row and mixture, and the kernel that folds the vocabulary's splits into it.

    over splits s:  m = max_s m_s,  l = sum_s l_s exp(m_s - m),  lse = m + log l = fl(lse) + low
    entropy = log l - t / l,  t = sum_s exp(m_s - m) (t_s + l_s (m_s - m))       t_s = sum_j exp(z_j - m_s) (z_j - m_s)
    mean logit = sum_s sum_j c_j z_j / V                               c class weights, 1 without them
    nll = (fl(lse) - z[y]) + low

``low`` is what float32 rounds away from m + log l: 5e-7 at an lse of 10, 5e-4 at 10^4. With it exp(z - lse) and
expm1(-nll) keep the digits that the rounded lse alone has lost.

One float32 running sum over hundreds of tiles would drop every tile that adds less than half its last digit: all of a
peaked row's tail. For float32 inputs the sums are compensated (Knuth's exact sum): ``rest`` collects what is rounded
away. 16-bit inputs err by far more in their products and have no register to spare.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..call import Call, Options, Plan, Statistics
from .configs import INTERPRETED
from .exponentials import exp
from .tiles import CHANGING, RowPart


@triton.jit
def exact_sum(one, other):
    """fl(one + other), and what the rounding took: together one + other exactly (Knuth)."""
    total = one + other
    shadow = total - one
    return total, (one - (total - shadow)) + (other - shadow)


@triton.jit
def no_columns(zero):
    """The stats of rows of which nothing has been folded yet; zero (rows,)."""
    return zero - float("inf"), zero, zero, zero


@triton.jit
def settled(stats, EXACT: tl.constexpr):
    """Max, sum of exponentials and moment of a fold that has ended."""
    top, total, moment, rest = stats
    if EXACT:
        total += rest
    return top, total, moment


@triton.jit
def across(columns):
    """One value a column (columns,) as a row of a tile; what is a tile's already, as it is."""
    if len(columns.shape) == 1:
        return columns[None, :]
    else:
        return columns


@triton.jit
def weighted(z, offs_v, vocab_size, class_weight):
    """z times its columns' class weights, where there are any; 0 where one is 0, and past the vocabulary's end."""
    if class_weight is None:
        return tl.where(across(offs_v < vocab_size), z, 0.0)
    else:
        c = across(tl.load(class_weight + offs_v, mask=offs_v < vocab_size, other=0.0))
        return tl.where(c != 0.0, c * z, 0.0)


@triton.jit
def first_column(best, top, z, offs_v):
    """The first column that has the largest of z and of what was folded before: ``top``, in ``best``."""
    largest = tl.max(z, axis=1)
    column = tl.min(tl.where(z == largest[:, None], across(offs_v), 2147483647), axis=1)
    return tl.where(largest > top, column, tl.where(largest == top, tl.minimum(best, column), best))


@triton.jit
def fold(
    stats,  # (rows,) each: running max m, sum of exp(z - m), the moment, and what rounding took from the sum
    z,  # (rows, columns) -inf past the vocabulary's end
    offs_v,  # (columns,), or of each entry
    vocab_size,
    class_weight,  # (V,) or None
    MOMENT: tl.constexpr,  # 0: none, 1: what gives the entropy, 2: the mean logit
    EXACT: tl.constexpr,  # compensate the sum
):
    """Fold z into stats; the moment is the sum of exp(z - m) (z - m), or of c z."""
    top, total, moment, rest = stats
    if MOMENT == 2:
        moment += tl.sum(weighted(z, offs_v, vocab_size, class_weight), axis=1)
    new = tl.maximum(top, tl.max(z, axis=1))
    shift = tl.where(new == float("-inf"), 0.0, new)
    z = z - shift[:, None]
    e = exp(z)
    down = tl.where(top == float("-inf"), 0.0, top - shift)
    fade = tl.where(top == float("-inf"), 0.0, exp(down))
    if MOMENT == 1:
        # exp of less is 0, and 0 times -inf NaN; a NaN stays one in e
        moment = fade * (moment + total * down) + tl.sum(e * tl.maximum(z, -87.0), axis=1)
    if EXACT:
        total, lost = exact_sum(fade * total, tl.sum(e, axis=1))
        rest = fade * rest + lost
    else:
        total = fade * total + tl.sum(e, axis=1)
    return new, total, moment, rest


@triton.jit
def _nll(target_ptrs, logit_ptrs, mask, lse, low, vocab_size):
    """-log p at the target, 0 where there is none; lse - z first, which is exact when p is near 1."""
    y = tl.load(target_ptrs, mask=mask, other=-1)
    z = tl.load(logit_ptrs, mask=mask, other=0.0)
    return tl.where((y >= 0) & (y < vocab_size), (lse - z) + low, 0.0)


@triton.jit(
    do_not_specialize=CHANGING,
    do_not_specialize_on_alignment=(
        "target", "target_logit", "target_logit_xc", "target_logit_xu", "max_logit", "moment_out", "predicted",
        "row_carry", "pair_carry",
    ),
)  # fmt: skip
def _sftmix_fwd_combine_kernel(
    part_max,  # (splits, rows + mixed): the rows' planes, then the mixtures'
    part_sum,  # (splits, rows + mixed)
    part_moment,  # (splits, rows + mixed)
    part_best,  # (splits, rows + mixed) int32, or None
    target,  # (rows,) int64
    target_logit,  # (rows,)
    target_logit_xc,  # (mixed,)
    target_logit_xu,  # (mixed,)
    max_logit,  # (rows,)
    moment_out,  # (rows,) entropy or mean logit
    predicted,  # (rows,) int64
    row_carry,  # (3, N), from this part's first row
    pair_carry,  # (4, mixed)
    num_rows,
    num_mixed,
    stride_carry,
    num_splits,
    vocab_size,
    MOMENT: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    size = num_rows + num_mixed
    mask = offs < size
    at = offs
    zero = tl.zeros([BLOCK], dtype=tl.float32)
    top, total, moment, rest = no_columns(zero)
    best = tl.zeros([BLOCK], dtype=tl.int32)
    for _ in range(num_splits):
        m = tl.load(part_max + at, mask=mask, other=0.0)
        if part_best is not None:
            best = tl.where(m > top, tl.load(part_best + at, mask=mask & (offs < num_rows), other=0), best)
        new = tl.maximum(top, m)
        shift = tl.where(new == float("-inf"), 0.0, new)
        down_old = tl.where(top == float("-inf"), 0.0, top - shift)
        down_new = tl.where(m == float("-inf"), 0.0, m - shift)
        fade_old, fade_new = exp(down_old), exp(down_new)
        part = tl.load(part_sum + at, mask=mask, other=1.0)
        if MOMENT != 0:
            part_t = tl.load(part_moment + at, mask=mask & (offs < num_rows), other=0.0)
        if MOMENT == 1:
            moment = fade_old * (moment + total * down_old) + fade_new * (part_t + part * down_new)
        if MOMENT == 2:
            moment += part_t
        if EXACT:
            total, lost = exact_sum(fade_old * total, fade_new * part)
            rest = fade_old * rest + lost
        else:
            total = fade_old * total + fade_new * part
        top = new
        at += size

    if EXACT:
        total += rest
    log_total = tl.log(total)
    log_sum_exp, low = exact_sum(top, log_total)
    low = tl.where(tl.abs(log_sum_exp) < float("inf"), low, 0.0)

    is_row = offs < num_rows
    row_nll = _nll(target + offs, target_logit + offs, is_row, log_sum_exp, low, vocab_size)
    tl.store(max_logit + offs, top, mask=is_row)
    if part_best is not None:
        tl.store(predicted + offs, best.to(tl.int64), mask=is_row)
    tl.store(row_carry + offs, log_sum_exp, mask=is_row)
    tl.store(row_carry + stride_carry + offs, low, mask=is_row)
    tl.store(row_carry + 2 * stride_carry + offs, row_nll, mask=is_row)
    if MOMENT == 1:
        tl.store(moment_out + offs, log_total - moment / total, mask=is_row)
    if MOMENT == 2:
        tl.store(moment_out + offs, moment / vocab_size, mask=is_row)

    is_mixed = mask & (offs >= num_rows)
    pair = offs - num_rows
    nll_xc = _nll(target + pair, target_logit_xc + pair, is_mixed, log_sum_exp, low, vocab_size)
    nll_xu = _nll(target + num_mixed + pair, target_logit_xu + pair, is_mixed, log_sum_exp, low, vocab_size)
    tl.store(pair_carry + pair, log_sum_exp, mask=is_mixed)
    tl.store(pair_carry + num_mixed + pair, low, mask=is_mixed)
    tl.store(pair_carry + 2 * num_mixed + pair, nll_xc, mask=is_mixed)
    tl.store(pair_carry + 3 * num_mixed + pair, nll_xu, mask=is_mixed)


def moment_of(options: Options, wanted: Plan) -> int:
    """Which sum beside l the kernels carry: 0 none, 1 what gives the entropy, 2 what gives the mean logit."""
    return 2 if options.label_smoothing else wanted.entropy


def empty_stats(call: Call) -> Statistics:
    """Buffers for the results; logits at targets are zero because rows without a target are not written."""
    num_rows, _, num_pairs = call.sizes
    moment = moment_of(call.options, call.wanted)

    def floats(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=call.hidden.device)

    return Statistics(
        max_logit=floats(num_rows),
        target_logit=floats(num_rows).zero_(),
        mean_logit=floats(num_rows if moment == 2 else 0),
        entropy=floats(num_rows if moment == 1 else 0),
        predicted=call.hidden.new_empty(num_rows if call.wanted.predicted else 0, dtype=torch.int64),
        token_logit=floats(0, 0),
        logit_x=floats(2, num_pairs).zero_(),
        row_carry=floats(3, num_rows),
        pair_carry=floats(4, num_pairs),
    )


def fold_splits(
    stats: Statistics,
    buffers: dict[str, Tensor | None],  # part_max, part_sum, part_moment, part_best
    target: Tensor,  # (N,)
    part: RowPart,
    *,
    num_splits: int,
    vocab_size: int,
    moment: int,
    exact: bool,
) -> None:
    """Fold the splits of one run of rows into its places in ``stats``; its target logits are there already."""
    size = part.num_rows + part.num_mixed
    moment_out = stats.mean_logit if moment == 2 else stats.entropy
    block = 4096 if INTERPRETED else 128
    _sftmix_fwd_combine_kernel[(triton.cdiv(size, block),)](
        **buffers,
        target=target[part.rows],
        target_logit=stats.target_logit[part.rows],
        target_logit_xc=stats.logit_x[0],
        target_logit_xu=stats.logit_x[1],
        max_logit=stats.max_logit[part.rows],
        moment_out=moment_out[part.rows] if moment else moment_out,
        predicted=stats.predicted[part.rows] if stats.predicted.numel() else stats.predicted,
        row_carry=stats.row_carry[:, part.rows],
        pair_carry=stats.pair_carry,
        num_rows=part.num_rows,
        num_mixed=part.num_mixed,
        stride_carry=stats.row_carry.stride(0),
        num_splits=num_splits,
        vocab_size=vocab_size,
        MOMENT=moment,
        EXACT=exact,
        BLOCK=block,
        num_warps=4,
    )

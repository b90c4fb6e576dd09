"""What one forward pass knows of each row and mixture, and the kernel that folds the vocabulary's splits into it.

    over splits s:  m = max_s m_s,  l = sum_s l_s exp(m_s - m),  lse = m + log l = fl(lse) + low
    entropy = log l - t / l,  t = sum_s exp(m_s - m) (t_s + l_s (m_s - m))       t_s = sum_j exp(z_j - m_s) (z_j - m_s)
    mean logit = sum_s sum_j z_j / V
    nll = (fl(lse) - z[y]) + low

``low`` is what float32 rounds away from m + log l: 5e-7 at an lse of 10, 5e-4 at 10^4. With it exp(z - lse) and
expm1(-nll) keep the digits that the rounded lse alone has lost.

One float32 running sum over hundreds of tiles would drop every tile that adds less than half its last digit: all of a
peaked row's tail. For float32 inputs the sums are compensated (Knuth's exact sum): ``rest`` collects what is rounded
away. 16-bit inputs err by far more in their products and have no register to spare.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import INTERPRETED
from .exponentials import exp
from .tiles import RowPart


class FusedStats(NamedTuple):
    """What one forward pass knows of N rows and M mixtures; float32, natural logarithms."""

    lse: Tensor  # (N,)
    max_logit: Tensor  # (N,)
    target_logit: Tensor  # (N,) 0 where the row has no target
    lse_x: Tensor  # (M,)
    target_logit_xc: Tensor  # (M,) mixed logit at the confident target; 0 where there is none
    target_logit_xu: Tensor  # (M,) at the partner's
    entropy: Tensor  # (N,), or (0,) when not wanted
    mean_logit: Tensor  # (N,) over these V columns, or (0,) when not wanted
    nll: Tensor  # (N,) -log p of the target, right to float32 even where it is tiny; 0 without a target
    nll_xc: Tensor  # (M,) the same of the mixture, at the confident target
    nll_xu: Tensor  # (M,) at the partner's
    row_carry: Tensor  # (3, N) for the backward: lse, the part of it lost in rounding, nll
    pair_carry: Tensor  # (4, M) lse_x, the part lost, nll_xc, nll_xu

    @property
    def moment(self) -> int:
        """Which sum beside l the kernels carry: 0 none, 1 what gives the entropy, 2 what gives the mean logit."""
        return 1 if self.entropy.numel() else 2 if self.mean_logit.numel() else 0

    def mixup_nll(self, target: Tensor, lam: Tensor) -> Tensor:
        """-lam log p_x[y_c] - (1 - lam) log p_x[y_u] of each mixture (M,), 0 where a member is ignored."""
        num_pairs = lam.shape[0]
        valid = (target[:num_pairs] >= 0) & (target[num_pairs : 2 * num_pairs] >= 0)
        cross = lam * self.nll_xc + (1 - lam) * self.nll_xu
        return torch.where(valid, cross, torch.zeros_like(cross))


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
def fold(
    stats,  # (rows,) each: running max m, sum of exp(z - m), the moment, and what rounding took from the sum
    z,  # (rows, columns) -inf past the vocabulary's end
    offs_v,  # (columns,)
    vocab_size,
    MOMENT: tl.constexpr,  # FusedStats.moment
    EXACT: tl.constexpr,  # compensate the sum
):
    """Fold z into stats; the moment is the sum of exp(z - m) (z - m), or of z."""
    top, total, moment, rest = stats
    if MOMENT == 2:
        moment += tl.sum(tl.where((offs_v < vocab_size)[None, :], z, 0.0), axis=1)
    new = tl.maximum(top, tl.max(z, axis=1))
    shift = tl.where(new == float("-inf"), 0.0, new)
    z = z - shift[:, None]
    if MOMENT == 1:
        z = tl.maximum(z, -87.0)  # a product with exp of less is 0, or the NaN of 0 times -inf
    e = exp(z)
    down = tl.where(top == float("-inf"), 0.0, top - shift)
    fade = tl.where(top == float("-inf"), 0.0, exp(down))
    if MOMENT == 1:
        moment = fade * (moment + total * down) + tl.sum(e * z, axis=1)
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
    moment_out,  # (rows,) entropy or mean logit
    nll,  # (rows,)
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
    for _ in range(num_splits):
        m = tl.load(part_max + at, mask=mask, other=0.0)
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
    tl.store(lse + offs, log_sum_exp, mask=is_row)
    tl.store(max_logit + offs, top, mask=is_row)
    tl.store(nll + offs, row_nll, mask=is_row)
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


def empty_stats(hidden: Tensor, num_pairs: int, *, entropy: bool, mean_logit: bool) -> FusedStats:
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
        entropy=floats(num_rows if entropy else 0),
        mean_logit=floats(num_rows if mean_logit else 0),
        nll=floats(num_rows),
        nll_xc=pair_carry[2],
        nll_xu=pair_carry[3],
        row_carry=floats(3, num_rows),
        pair_carry=pair_carry,
    )


def fold_splits(
    stats: FusedStats,
    buffers: dict[str, Tensor],  # part_max, part_sum, part_moment
    target: Tensor,  # (N,)
    part: RowPart,
    *,
    num_splits: int,
    vocab_size: int,
    exact: bool,
) -> None:
    """Fold the splits of one run of rows into its places in ``stats``; its target logits are there already."""
    size = part.num_rows + part.num_mixed
    moment_out = stats.mean_logit if stats.moment == 2 else stats.entropy
    block = 4096 if INTERPRETED else 128
    _sftmix_fwd_combine_kernel[(triton.cdiv(size, block),)](
        **buffers,
        target=target[part.rows],
        target_logit=stats.target_logit[part.rows],
        target_logit_xc=stats.target_logit_xc,
        target_logit_xu=stats.target_logit_xu,
        lse=stats.lse[part.rows],
        max_logit=stats.max_logit[part.rows],
        moment_out=moment_out[part.rows] if stats.moment else moment_out,
        nll=stats.nll[part.rows],
        row_carry=stats.row_carry[:, part.rows],
        pair_carry=stats.pair_carry,
        num_rows=part.num_rows,
        num_mixed=part.num_mixed,
        stride_carry=stats.row_carry.stride(0),
        num_splits=num_splits,
        vocab_size=vocab_size,
        MOMENT=stats.moment,
        EXACT=exact,
        BLOCK=block,
        num_warps=4,
    )

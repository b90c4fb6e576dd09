"""terms.py and row_terms.py in one launch each, for calls without class weights, tokens and shards; the same values.

On a GPU every small operation in torch is a launch of its own, and about a hundred of them stood beside the products.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from .. import terms
from ..call import Call, Coefficients, Kept, Statistics, Upstream
from ..checks import MADE_IN_KERNELS, left_to_kernels
from ..terms import Terms
from . import row_terms
from .configs import INTERPRETED
from .row_kernels import (
    _sftmix_finish_kernel,
    _sftmix_gradient_terms_kernel,
    _sftmix_prepare_kernel,
    _sftmix_scale_kernel,
    _sftmix_upstream_kernel,
)
from .row_terms import GradientTerms
from .tiles import on_device

BLOCK = 4096 if INTERPRETED else 1024


def serves(call: Call) -> bool:
    """Whether the kernels here take ``call``: one vocabulary, no class weights and no tokens."""
    return call.place is None and call.class_weight is None and call.tokens is None


def coefficients(call: Call) -> Coefficients:
    """As ``terms.coefficients``; on a GPU the values of what stands beside the rows are checked in the same launch."""
    if not serves(call):
        return terms.coefficients(call)
    (num_rows, vocab_size, num_pairs), options, hidden = call.sizes, call.options, call.hidden
    column = hidden.new_empty(num_rows, dtype=torch.int64)
    row = hidden.new_empty(num_rows, dtype=torch.float64)
    pair = hidden.new_empty(num_pairs, dtype=torch.float64)
    is_right = hidden.new_empty((), dtype=torch.bool)
    with on_device(hidden.device):
        _sftmix_prepare_kernel[(1,)](
            target=call.target.contiguous(), lam=call.lam.contiguous(), row_weight=_flat(call.row_weight),
            pair_weight=_flat(call.pair_weight), mixup_weight=call.mixup_weight, ntp_denominator=call.ntp_denominator,
            mixup_denominator=call.mixup_denominator, column=column, row=row, pair=pair, is_right=is_right,
            num_rows=num_rows, num_pairs=num_pairs, vocab_size=vocab_size, ignore_index=call.wanted.ignore_index,
            mixup_number=options.mixup_weight, ntp_number=options.ntp_denominator,
            pairs_number=options.mixup_denominator, BLOCK=BLOCK, num_warps=8,
        )  # fmt: skip
    if left_to_kernels(call.engine, hidden.device, plain=True):
        torch._assert_async(is_right, MADE_IN_KERNELS)
    return Coefficients(column, row, pair)


def _flat(weights: Tensor | None) -> Tensor | None:
    return None if weights is None else weights.contiguous()


def finish(call: Call, coef: Coefficients, found: Statistics) -> Terms:
    """As ``terms.finish``."""
    if not serves(call):
        return terms.finish(call, coef, found)
    (num_rows, _, num_pairs), options = call.sizes, call.options
    like, best = found.lse, found.predicted
    total, z_total = like.new_empty(()), like.new_empty(())
    term, lse, nll = like.new_empty(num_rows), like.new_empty(num_rows), like.new_empty(num_rows)
    is_top1 = like.new_empty(num_rows, dtype=torch.bool)
    predicted, mixup_nll = torch.empty_like(best), like.new_empty(num_pairs)
    with on_device(like.device):
        _sftmix_finish_kernel[(1,)](
            column=coef.column, row=coef.row, pair=coef.pair, max_logit=found.max_logit,
            target_logit=found.target_logit, mean_logit=found.mean_logit if options.label_smoothing else None,
            row_carry=found.row_carry, pair_nll=found.pair_carry[2:], lam=call.lam.contiguous(),
            best=best if call.wanted.predicted else None, loss=total, term=term, lse_out=lse, nll_out=nll,
            is_top1=is_top1, predicted=predicted, mixup_nll=mixup_nll, z_total=z_total, num_rows=num_rows,
            num_pairs=num_pairs, smoothing=options.label_smoothing, z_loss=options.z_loss,
            TOKEN_SCALING=options.token_scaling != 0, BLOCK=BLOCK, num_warps=8,
        )  # fmt: skip
    entropy = found.entropy.clone() if call.wanted.entropy else found.entropy.new_empty(0)
    nothing = like.new_empty(0, 0)
    return Terms(total, term, lse, entropy, nothing, nll, is_top1, predicted, mixup_nll, z_total)


def upstream_of(call: Call, coef: Coefficients, nll: Tensor, grads: tuple[Tensor | None, ...]) -> Upstream:
    """As ``terms.upstream_of``."""
    if not serves(call):
        return terms.upstream_of(call, coef, nll, grads)
    loss, term, lse, entropy, _ = (None if g is None or not g.numel() else g for g in grads)
    num_rows, _, num_pairs = call.sizes
    row, pair = torch.empty_like(coef.row), torch.empty_like(coef.pair)
    block = min(BLOCK, 1024)
    with on_device(nll.device):
        _sftmix_upstream_kernel[(max(triton.cdiv(num_rows, block), 1),)](
            grad_loss=loss, grad_term=term, column=coef.column, nll=nll, row=coef.row, pair=coef.pair, row_out=row,
            pair_out=pair, num_rows=num_rows, num_pairs=num_pairs, stride_grad=0 if term is None else term.stride(0),
            TOKEN_SCALING=call.options.token_scaling != 0, BLOCK=block, num_warps=8,
        )  # fmt: skip
    return Upstream(row, pair, lse, entropy)


def living_terms(call: Call, column: Tensor, kept: Kept, upstream: Upstream) -> tuple[Call, GradientTerms]:
    """As ``row_terms.living`` and ``row_terms.gradient_terms``, of N >= 1 rows."""
    beside = (call.class_weight, call.tokens, *upstream[2:])
    if any(each is not None for each in beside):
        call = row_terms.living(call, row_terms.dead_rows(call, upstream))
        return call, row_terms.gradient_terms(call, column, kept, upstream)
    (num_rows, vocab_size, num_pairs), options, like = call.sizes, call.options, kept.row_carry.contiguous()
    e = options.label_smoothing
    rows, pairs = like.new_empty(4 if e else 3, num_rows), like.new_empty(5, num_pairs)
    dead = like.new_empty(num_rows, dtype=torch.bool)
    scale = like.new_empty(()) if call.hidden.dtype == torch.float16 else None
    with on_device(like.device):
        _sftmix_gradient_terms_kernel[(1,)](
            column=column.contiguous(), row=upstream.row.contiguous(), pair=upstream.pair.contiguous(),
            row_carry=like, pair_carry=kept.pair_carry.contiguous(),
            lam=call.lam.contiguous(), place=call.place, rows_out=rows, pairs_out=pairs, dead=dead, scale=scale,
            num_rows=num_rows,
            num_pairs=num_pairs, logit_scale=options.logit_scale, smoothing=e, uniform=e / vocab_size,
            z_loss=options.z_loss, SMOOTHED=e != 0, BLOCK=BLOCK, num_warps=8,
        )  # fmt: skip
    return row_terms.living(call, dead), GradientTerms(rows, pairs, scale, None, None)


class Scaled(NamedTuple):
    """What the stored schedule multiplies by, divided by its largest with 16-bit inputs."""

    row: Tensor  # (N,) float32, with the logit scale
    pair: Tensor  # (M,)
    dead: Tensor  # (N,) bool: neither the row nor its pair bears loss
    scale: Tensor  # () float32


def scaled_coefficients(coef: Coefficients, logit_scale: float, dtype: torch.dtype) -> Scaled:
    like, num_rows, num_pairs = coef.row, coef.row.shape[0], coef.pair.shape[0]
    found = Scaled(
        like.new_empty(num_rows, dtype=torch.float32), like.new_empty(num_pairs, dtype=torch.float32),
        like.new_empty(num_rows, dtype=torch.bool), like.new_empty((), dtype=torch.float32),
    )  # fmt: skip
    with on_device(like.device):
        _sftmix_scale_kernel[(1,)](
            row=coef.row, pair=coef.pair, row_out=found.row, pair_out=found.pair, dead=found.dead, scale=found.scale,
            num_rows=num_rows, num_pairs=num_pairs, logit_scale=logit_scale,
            SCALED=dtype != torch.float32, BLOCK=BLOCK, num_warps=8,
        )  # fmt: skip
    return found

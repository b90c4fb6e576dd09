"""The loss with the vocabulary's rows of ``weight`` and ``bias`` spread over the ranks of a process group.

Every rank holds the same rows (hidden, target, lam) and its own V_r columns of logits, any number of them:

    first_r = sum of V_q over ranks q < r,   V = sum of V_q
    dhidden = sum_r G_r W_r,   dweight_r = G_r^T hidden,   dbias_r = sum of G_r over rows
    dlow = sum_r G_r up_r,     dup_r = G_r^T low                                  with low-rank factors

A target becomes a column of its own shard or -1 in every other, so it can match nothing there. Collectives: one of the
shards' sizes and one of all statistics (vocab_stats.py) in the forward, the sums of dhidden and dlow in the backward.
G needs the lse of all shards, so the backward recomputes its logits: a fourth product per row. Arguments as in ops.py;
``target`` counts columns of the whole vocabulary and ``place`` is [first_r, V].
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .chunked import chunked_loss
from .fused_ops import five, needed
from .ops import FiveTensors, Tensors, fake_like, fake_stats, refuse_double_backward, total_loss, wanted
from .reference import sum_dtype
from .rows import Given, Head, Needs, head_of, row_term
from .vocab_shard import group_named
from .vocab_stats import Rows, own_columns, whole_stats


@torch.library.custom_op("sftmix_kernels::vocab_parallel_fwd", mutates_args=())
def vocab_parallel_fwd(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V_r, D)
    bias: Tensor | None,  # (V_r,)
    target: Tensor,  # (N,)
    lam: Tensor,  # (M,)
    row_coef: Tensor,  # (N,)
    pair_coef: Tensor,  # (M,)
    place: Tensor,  # (2,)
    options: list[float],
    needs: list[bool],
    scratch_bytes: int,
    fused: bool,
    group_name: str,
    low: Tensor | None = None,  # (N, r)
    up: Tensor | None = None,  # (V_r, r)
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss, nll, lse, is_top1, mixup_nll, then row_carry [3, N] and pair_carry [4, M] for the backward."""
    head = head_of(weight, bias, options, up=up)
    rows = Rows(hidden, own_columns(target, place, weight.shape[0]), lam, low)
    s = whole_stats(
        rows, head, place, target >= 0, fused=fused, scratch_bytes=scratch_bytes, group_name=group_name
    )
    loss = total_loss(row_term(head, s.nll, s.lse, s.mean_logit), s.mixup_nll, row_coef, pair_coef)
    return loss, s.nll, s.lse, s.is_top1, s.mixup_nll, s.row_carry, s.pair_carry


@vocab_parallel_fwd.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, lam: Tensor, *rest: Any
) -> Tensors:
    nll, lse, _, is_top1 = fake_stats(hidden)
    num_rows, num_pairs = hidden.shape[0], lam.shape[0]
    carries = nll.new_empty(3, num_rows), nll.new_empty(4, num_pairs)
    return nll.new_empty(()), nll, lse, is_top1, nll.new_empty(num_pairs), *carries


@torch.library.custom_op("sftmix_kernels::vocab_parallel_bwd", mutates_args=())
def vocab_parallel_bwd(
    grad_loss: Tensor,  # () or (N,): then the rows' own upstream gradients, and there are no pairs
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V_r, D)
    bias: Tensor | None,  # (V_r,)
    target: Tensor,  # (N,)
    lam: Tensor,  # (M,)
    row_coef: Tensor,  # (N,)
    pair_coef: Tensor,  # (M,)
    place: Tensor,  # (2,)
    row_carry: Tensor,  # (3, N)
    pair_carry: Tensor,  # (4, M)
    options: list[float],
    needs: list[bool],
    scratch_bytes: int,
    fused: bool,
    group_name: str,
    low: Tensor | None = None,  # (N, r)
    up: Tensor | None = None,  # (V_r, r)
) -> FiveTensors:
    """dhidden and dlow summed over the ranks, this shard's dweight, dbias and dup; empty where not needed."""
    gradients = fake_like(hidden, weight, low, up, needs)
    if weight.shape[0]:
        head = head_of(weight, bias, options, place[1].to(sum_dtype(hidden.dtype)), up)
        rows = Rows(hidden, own_columns(target, place, weight.shape[0]), lam, low)
        coefs = row_coef * grad_loss, pair_coef * grad_loss if grad_loss.ndim == 0 else pair_coef
        run = _fused_gradients if fused else _chunked_gradients
        carries = (row_carry, pair_carry)
        gradients = run(rows, head, coefs=coefs, carries=carries, needs=needs, scratch_bytes=scratch_bytes)
    else:
        gradients = five(tuple(t.zero_() for t in gradients))
    dhidden, dweight, dbias, dlow, dup = gradients
    dhidden, dlow = (_summed(gradient, hidden.dtype, group_name) for gradient in (dhidden, dlow))
    return dhidden, dweight, dbias, dlow, dup


def _summed(gradient: Tensor, dtype: torch.dtype, group_name: str) -> Tensor:
    """The ranks' gradients of rows summed, then rounded to ``dtype``; an empty one is not needed."""
    total = gradient.to(sum_dtype(dtype))
    if total.numel():
        dist.all_reduce(total, group=group_named(group_name))
    return total.to(dtype)


def _chunked_gradients(
    rows: Rows, head: Head, *, coefs: tuple[Tensor, Tensor], carries: tuple[Tensor, Tensor], needs: list[bool],
    scratch_bytes: int,
) -> FiveTensors:  # fmt: skip
    """dhidden and dlow in the sums' dtype, the others in weight's."""
    result = chunked_loss(
        rows.hidden, head, rows.column, rows.lam, row_coef=coefs[0], pair_coef=coefs[1], needs=Needs(*needs),
        scratch_bytes=scratch_bytes, given=Given(*carries[0][:2], *carries[1][:2]), low=rows.low,
    )  # fmt: skip
    scale, dtype = result.scale, head.weight.dtype
    dhidden, dlow = (g.to(scale.dtype) * scale for g in (result.dhidden, result.dlow))
    dweight, dbias, dup = (g.mul_(scale).to(dtype) for g in (result.dweight, result.dbias, result.dup))
    return dhidden, dweight, dbias, dlow, dup


def _fused_gradients(
    rows: Rows, head: Head, *, coefs: tuple[Tensor, Tensor], carries: tuple[Tensor, Tensor], needs: list[bool],
    scratch_bytes: int,
) -> FiveTensors:  # fmt: skip
    """The same by the kernels; dhidden and dlow are rounded to hidden's dtype once per shard."""
    from .fused import fused_backward

    gradients = fused_backward(
        rows.hidden, head.weight, rows.column, rows.lam, coefs[0].float(), coefs[1].float(), *carries,
        bias=head.bias, softcap=head.softcap, logit_scale=head.logit_scale, label_smoothing=head.label_smoothing,
        z_loss=head.z_loss, total_vocab=head.total_vocab, low=rows.low, up=head.up,
        scratch_bytes=scratch_bytes or None, **needed(needs),
    )  # fmt: skip
    return five(gradients)


@vocab_parallel_bwd.register_fake
def _(
    grad_loss: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, lam: Tensor,
    row_coef: Tensor, pair_coef: Tensor, place: Tensor, row_carry: Tensor, pair_carry: Tensor,
    options: list[float], needs: list[bool], scratch_bytes: int, fused: bool, group_name: str,
    low: Tensor | None = None, up: Tensor | None = None,
) -> Tensors:  # fmt: skip
    return fake_like(hidden, weight, low, up, needs)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
    ctx.set_materialize_grads(False)  # or autograd makes zeros for every output, the [V, D] ones too
    ctx.save_for_backward(*inputs[:8], *output[5:], *inputs[13:])
    ctx.extra = inputs[8:13]


def _autograd(ctx: Any, grad_loss: Tensor | None, *unused: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_loss is None:  # an undefined upstream gradient is one of zeros
        return (None,) * 15
    *inputs, low, up = ctx.saved_tensors
    return wanted(vocab_parallel_bwd(grad_loss, *inputs, *ctx.extra, low, up), ctx.extra[1], 10)


vocab_parallel_fwd.register_autograd(_autograd, setup_context=_setup)
vocab_parallel_bwd.register_autograd(refuse_double_backward)


@torch.library.custom_op("sftmix_kernels::vocab_parallel_rows_fwd", mutates_args=())
def vocab_parallel_rows_fwd(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V_r, D)
    bias: Tensor | None,  # (V_r,)
    target: Tensor,  # (N,)
    place: Tensor,  # (2,)
    options: list[float],
    needs: list[bool],
    scratch_bytes: int,
    fused: bool,
    group_name: str,
    low: Tensor | None = None,  # (N, r)
    up: Tensor | None = None,  # (V_r, r)
) -> tuple[Tensor, Tensor]:
    """Each row's next-token term (0 at ignored rows) and row_carry [3, N] for the backward."""
    head = head_of(weight, bias, options, up=up)
    none = hidden.new_empty(0, dtype=torch.float32)
    rows = Rows(hidden, own_columns(target, place, weight.shape[0]), none, low)
    s = whole_stats(
        rows, head, place, target >= 0, fused=fused, scratch_bytes=scratch_bytes, group_name=group_name
    )
    term = row_term(head, s.nll, s.lse, s.mean_logit)
    return torch.where(target >= 0, term, torch.zeros_like(term)), s.row_carry


@vocab_parallel_rows_fwd.register_fake
def _(hidden: Tensor, *rest: Any) -> Tensors:
    term = fake_stats(hidden)[0]
    return term, term.new_empty(3, hidden.shape[0])


def _rows_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:5], output[1], *inputs[10:])
    ctx.extra = inputs[5:10]


def _rows_autograd(ctx: Any, grad_rows: Tensor | None, *unused: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_rows is None:  # an undefined upstream gradient is one of zeros
        return (None,) * 12
    *inputs, target, place, row_carry, low, up = ctx.saved_tensors
    lam, pair_carry = row_carry.new_empty(0, dtype=torch.float32), row_carry.new_empty(4, 0)
    coefs = (target >= 0).double(), lam.double()
    gradients = vocab_parallel_bwd(
        grad_rows, *inputs, target, lam, *coefs, place, row_carry, pair_carry, *ctx.extra, low, up
    )
    return wanted(gradients, ctx.extra[1], 7)


vocab_parallel_rows_fwd.register_autograd(_rows_autograd, setup_context=_rows_setup)


@torch.library.custom_op("sftmix_kernels::vocab_parallel_stats", mutates_args=())
def vocab_parallel_stats(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V_r, D)
    bias: Tensor | None,  # (V_r,)
    target: Tensor,  # (N,)
    place: Tensor,  # (2,)
    options: list[float],
    scratch_bytes: int,
    fused: bool,
    group_name: str,
    low: Tensor | None = None,  # (N, r)
    up: Tensor | None = None,  # (V_r, r)
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """nll, lse, entropy and is_top1 of each row."""
    head = head_of(weight, bias, options, up=up)
    none = hidden.new_empty(0, dtype=torch.float32)
    rows = Rows(hidden, own_columns(target, place, weight.shape[0]), none, low)
    s = whole_stats(
        rows, head, place, target >= 0, fused=fused, scratch_bytes=scratch_bytes, group_name=group_name,
        entropy=True,
    )  # fmt: skip
    return s.nll, s.lse, s.entropy, s.is_top1


@vocab_parallel_stats.register_fake
def _(hidden: Tensor, *rest: Any) -> Tensors:
    return fake_stats(hidden)

"""The custom operators ``sftmix_kernels::*``: schema, fake kernels and registered autograd.

Two pairs. ``chunked_fwd`` makes gradients in the forward (its loss is a scalar), ``chunked_bwd`` scales them by the
upstream gradient. ``fused_fwd`` keeps log-sum-exps only, ``fused_bwd`` recomputes logits slice by slice. In all of
them ``target`` is -1 at ignored rows, ``softcap`` 0 means none, ``row_coef`` [N] and ``pair_coef`` [M] are float64 and
hold weights, denominators and the mixup weight; the loss is their float64 sum, rounded once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .chunked import chunked_loss
from .reference import sum_dtype

Tensors = tuple[Tensor, ...]


def _loss(nll: Tensor, mixup_nll: Tensor, row_coef: Tensor, pair_coef: Tensor) -> Tensor:
    return ((nll * row_coef).sum() + (mixup_nll * pair_coef).sum()).to(nll.dtype)


def _refuse_double_backward(ctx: Any, *grads: Tensor | None) -> None:
    raise RuntimeError("sftmix_loss: double backward is not supported; use impl='reference' for it")


# --- chunked -------------------------------------------------------------------------------------------------------


@torch.library.custom_op("sftmix_kernels::chunked_fwd", mutates_args=())
def chunked_fwd(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    target: Tensor,  # (N,)
    lam: Tensor,  # (M,)
    row_coef: Tensor,  # (N,)
    pair_coef: Tensor,  # (M,)
    softcap: float,
    logit_scale: float,
    need_dhidden: bool,
    need_dweight: bool,
    need_dbias: bool,
    scratch_bytes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss, nll, lse, is_top1, mixup_nll, then scale and the gradients of loss / scale for the backward."""
    result = chunked_loss(
        hidden, weight, target, lam, bias=bias, row_coef=row_coef, pair_coef=pair_coef, softcap=softcap,
        logit_scale=logit_scale, needs=(need_dhidden, need_dweight, need_dbias, False), scratch_bytes=scratch_bytes,
    )  # fmt: skip
    loss = _loss(result.nll, result.mixup_nll, row_coef, pair_coef)
    gradients = (result.scale, result.dhidden, result.dweight, result.dbias)
    return (loss, result.nll, result.lse, result.is_top1, result.mixup_nll, *gradients)


@chunked_fwd.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, lam: Tensor, *rest: Any
) -> Tensors:
    need_dhidden, need_dweight, need_dbias = rest[4:7]
    dtype = sum_dtype(hidden.dtype)
    rows, pairs, scalar = ((hidden.shape[0],), (lam.shape[0],), ())
    new = hidden.new_empty
    return (
        new(scalar, dtype=dtype), new(rows, dtype=dtype), new(rows, dtype=dtype), new(rows, dtype=torch.bool),
        new(pairs, dtype=dtype), new(scalar, dtype=dtype), new(hidden.shape if need_dhidden else (0,)),
        new(weight.shape if need_dweight else (0,), dtype=dtype),
        new((weight.shape[0],) if need_dbias else (0,), dtype=dtype),
    )  # fmt: skip


@torch.library.custom_op("sftmix_kernels::chunked_bwd", mutates_args=())
def chunked_bwd(
    grad_loss: Tensor,  # ()
    scale: Tensor,  # ()
    dhidden: Tensor,  # (N, D) or (0,)
    dweight: Tensor,  # (V, D) or (0,)
    dbias: Tensor,  # (V,) or (0,)
    weight_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """The forward's gradients times ``scale * grad_loss``, multiplied in float32 and rounded once."""
    factor = (scale * grad_loss).to(dweight.dtype)
    outputs = (
        torch.empty_like(dhidden),
        torch.empty_like(dweight, dtype=weight_dtype),
        torch.empty_like(dbias, dtype=weight_dtype),
    )
    for gradient, output in zip((dhidden, dweight, dbias), outputs, strict=True):
        _scale_into(gradient, factor, output)
    return outputs


def _scale_into(gradient: Tensor, factor: Tensor, output: Tensor) -> None:
    """output = gradient * factor in factor's dtype, in row blocks so that an upcast copy stays small."""
    if gradient.dtype == factor.dtype:
        torch.mul(gradient, factor, out=output)
        return
    block = 4096
    for start in range(0, gradient.shape[0], block):
        rows = slice(start, start + block)
        torch.mul(gradient[rows].to(factor.dtype), factor, out=output[rows])


@chunked_bwd.register_fake
def _(
    grad_loss: Tensor, scale: Tensor, dhidden: Tensor, dweight: Tensor, dbias: Tensor, weight_dtype: torch.dtype
) -> Tensors:  # fmt: skip
    outputs = tuple(torch.empty_like(t, dtype=weight_dtype) for t in (dweight, dbias))
    return (torch.empty_like(dhidden), *outputs)


def _chunked_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    scale, dhidden, dweight, dbias = output[5:]
    ctx.save_for_backward(scale, dhidden, dweight, dbias)
    ctx.needs = inputs[9:12]
    ctx.weight_dtype = inputs[1].dtype


def _chunked_autograd(ctx: Any, grad_loss: Tensor, *unused: Tensor | None) -> tuple[Tensor | None, ...]:
    gradients = chunked_bwd(grad_loss, *ctx.saved_tensors, ctx.weight_dtype)
    wanted = [g if needed else None for g, needed in zip(gradients, ctx.needs, strict=True)]
    return (*wanted, *(None,) * 10)


chunked_fwd.register_autograd(_chunked_autograd, setup_context=_chunked_setup)
chunked_bwd.register_autograd(_refuse_double_backward)


@torch.library.custom_op("sftmix_kernels::chunked_stats", mutates_args=())
def chunked_stats(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    target: Tensor,  # (N,)
    softcap: float,
    logit_scale: float,
    scratch_bytes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """nll, lse, entropy and is_top1 of each row."""
    none = hidden.new_empty(0, dtype=sum_dtype(hidden.dtype))
    result = chunked_loss(
        hidden, weight, target, none, bias=bias, row_coef=none.new_zeros(hidden.shape[0]), pair_coef=none,
        softcap=softcap, logit_scale=logit_scale, needs=(False, False, False, True), scratch_bytes=scratch_bytes,
    )  # fmt: skip
    return result.nll, result.lse, result.entropy, result.is_top1


@chunked_stats.register_fake
def _(hidden: Tensor, *rest: Any) -> Tensors:
    return _fake_stats(hidden)


def _fake_stats(hidden: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, dtype = hidden.shape[0], sum_dtype(hidden.dtype)
    nll, lse, entropy = (hidden.new_empty(rows, dtype=dtype) for _ in range(3))
    return nll, lse, entropy, hidden.new_empty(rows, dtype=torch.bool)


# --- fused ---------------------------------------------------------------------------------------------------------


@torch.library.custom_op("sftmix_kernels::fused_fwd", mutates_args=())
def fused_fwd(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    target: Tensor,  # (N,)
    lam: Tensor,  # (M,)
    row_coef: Tensor,  # (N,)
    pair_coef: Tensor,  # (M,)
    softcap: float,
    logit_scale: float,
    need_dhidden: bool,
    need_dweight: bool,
    need_dbias: bool,
    scratch_bytes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss, nll, lse, is_top1, mixup_nll, then row_carry [3, N] and pair_carry [4, M] for the backward.

    No logits are in memory. The need_* arguments and ``scratch_bytes`` serve the backward.
    """
    from .fused import fused_forward

    stats = fused_forward(hidden, weight, target, lam, bias=bias, softcap=softcap, logit_scale=logit_scale)
    num_pairs = lam.shape[0]
    valid = (target[:num_pairs] >= 0) & (target[num_pairs : 2 * num_pairs] >= 0)
    cross = lam * stats.nll_xc + (1 - lam) * stats.nll_xu
    mixup_nll = torch.where(valid, cross, torch.zeros_like(cross))
    is_top1 = (target >= 0) & (stats.target_logit >= stats.max_logit)
    loss = _loss(stats.nll, mixup_nll, row_coef, pair_coef)
    return loss, stats.nll, stats.lse, is_top1, mixup_nll, stats.row_carry, stats.pair_carry


@fused_fwd.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, lam: Tensor, *rest: Any
) -> Tensors:
    nll, lse, _, is_top1 = _fake_stats(hidden)
    num_rows, num_pairs = hidden.shape[0], lam.shape[0]
    mixup_nll, pair_carry = nll.new_empty(num_pairs), nll.new_empty(4, num_pairs)
    return nll.new_empty(()), nll, lse, is_top1, mixup_nll, nll.new_empty(3, num_rows), pair_carry


@torch.library.custom_op("sftmix_kernels::fused_bwd", mutates_args=())
def fused_bwd(
    grad_loss: Tensor,  # ()
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    target: Tensor,  # (N,)
    lam: Tensor,  # (M,)
    row_coef: Tensor,  # (N,)
    pair_coef: Tensor,  # (M,)
    row_carry: Tensor,  # (3, N)
    pair_carry: Tensor,  # (4, M)
    softcap: float,
    logit_scale: float,
    need_dhidden: bool,
    need_dweight: bool,
    need_dbias: bool,
    scratch_bytes: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for hidden, weight and bias by the ``recompute`` schedule; empty where not needed."""
    from .fused import fused_backward

    a, b = (row_coef * grad_loss).float(), (pair_coef * grad_loss).float()
    gradients = fused_backward(
        hidden, weight, target, lam, a, b, row_carry, pair_carry, bias=bias, softcap=softcap, logit_scale=logit_scale,
        need_dhidden=need_dhidden, need_dweight=need_dweight, need_dbias=need_dbias,
        scratch_bytes=scratch_bytes or None,
    )  # fmt: skip
    return gradients


@fused_bwd.register_fake
def _(grad_loss: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensors:
    need_dhidden, need_dweight, need_dbias = rest[8:11]
    dhidden = hidden.new_empty(hidden.shape if need_dhidden else (0,))
    dweight = weight.new_empty(weight.shape if need_dweight else (0,))
    return dhidden, dweight, weight.new_empty((weight.shape[0],) if need_dbias else (0,))


def _fused_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:7], *output[5:])
    ctx.options = inputs[7:]


def _fused_autograd(ctx: Any, grad_loss: Tensor, *unused: Tensor | None) -> tuple[Tensor | None, ...]:
    gradients = fused_bwd(grad_loss, *ctx.saved_tensors, *ctx.options)
    wanted = [g if needed else None for g, needed in zip(gradients, ctx.options[2:5], strict=True)]
    return (*wanted, *(None,) * 10)


fused_fwd.register_autograd(_fused_autograd, setup_context=_fused_setup)
fused_bwd.register_autograd(_refuse_double_backward)


@torch.library.custom_op("sftmix_kernels::fused_stats", mutates_args=())
def fused_stats(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    target: Tensor,  # (N,)
    softcap: float,
    logit_scale: float,
    scratch_bytes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """nll, lse, entropy and is_top1 of each row; no logits in memory."""
    from .fused import fused_forward

    none = hidden.new_empty(0, dtype=torch.float32)
    stats = fused_forward(
        hidden, weight, target, none, bias=bias, softcap=softcap, logit_scale=logit_scale, want_entropy=True
    )
    is_top1 = (target >= 0) & (stats.target_logit >= stats.max_logit)
    return stats.nll, stats.lse, stats.entropy, is_top1


@fused_stats.register_fake
def _(hidden: Tensor, *rest: Any) -> Tensors:
    return _fake_stats(hidden)

"""The custom operators ``sftmix_kernels::*``: schema, fake kernels and registered autograd.

Here are those that make gradients in the forward, for a scalar loss: ``chunked_fwd`` and ``stored_fwd``, whose
``chunked_bwd`` scales them by the upstream gradient. row_ops.py has those of one term per row, and of statistics;
fused_ops.py those of the kernels that keep no logits; vocab_parallel.py those of a spread vocabulary. In all of them
``target`` is -1 at ignored rows, ``row_coef`` [N] and ``pair_coef`` [M] are float64 and hold weights, denominators and
the mixup weight (the loss is their float64 sum, rounded once), ``options`` are softcap (0: none), logit_scale,
label_smoothing, z_loss, and ``needs`` says which of hidden, weight, bias, low and up get a gradient. ``low`` [N, r]
and ``up`` [V, r] are there together or not at all: the affine logits are then hidden weight^T + low up^T + bias.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .chunked import ChunkedResult, chunked_loss
from .reference import sum_dtype
from .rows import Head, Needs, head_of, row_term

Tensors = tuple[Tensor, ...]
FiveTensors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
WithGradients = tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor
]  # loss, nll, lse, is_top1, mixup_nll, scale, dhidden, dweight, dbias, dlow, dup


def total_loss(term: Tensor, mixup_nll: Tensor, row_coef: Tensor, pair_coef: Tensor) -> Tensor:
    return ((term * row_coef).sum() + (mixup_nll * pair_coef).sum()).to(term.dtype)


def refuse_double_backward(ctx: Any, *grads: Tensor | None) -> None:
    raise RuntimeError("sftmix_loss: double backward is not supported; use impl='reference' for it")


def wanted(gradients: Tensors, needs: list[bool], num_others: int) -> tuple[Tensor | None, ...]:
    """An operator's input gradients: hidden, weight and bias, ``num_others`` without one, low and up."""
    found = [g if needed else None for g, needed in zip(gradients, Needs(*needs), strict=False)]
    return (*found[:3], *(None,) * num_others, *found[3:])


# --- chunked and stored --------------------------------------------------------------------------------------------


@torch.library.custom_op("sftmix_kernels::chunked_fwd", mutates_args=())
def chunked_fwd(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    target: Tensor,  # (N,)
    lam: Tensor,  # (M,)
    row_coef: Tensor,  # (N,)
    pair_coef: Tensor,  # (M,)
    options: list[float],
    needs: list[bool],
    scratch_bytes: int,
    low: Tensor | None = None,  # (N, r)
    up: Tensor | None = None,  # (V, r)
) -> WithGradients:
    """loss, nll, lse, is_top1, mixup_nll, then scale and the gradients of loss / scale for the backward."""
    return with_gradients(
        chunked_loss, hidden, head_of(weight, bias, options, up=up), target, lam, row_coef=row_coef,
        pair_coef=pair_coef, needs=Needs(*needs), scratch_bytes=scratch_bytes, low=low,
    )  # fmt: skip


@torch.library.custom_op("sftmix_kernels::stored_fwd", mutates_args=())
def stored_fwd(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    target: Tensor,  # (N,)
    lam: Tensor,  # (M,)
    row_coef: Tensor,  # (N,)
    pair_coef: Tensor,  # (M,)
    options: list[float],
    needs: list[bool],
    scratch_bytes: int,
    low: Tensor | None = None,  # (N, r)
    up: Tensor | None = None,  # (V, r)
) -> WithGradients:
    """:func:`chunked_fwd` with one Triton kernel a chunk; ``scratch_bytes`` 0 is its own default."""
    from .fused import stored_loss

    return with_gradients(
        stored_loss, hidden, head_of(weight, bias, options, up=up), target, lam, row_coef=row_coef,
        pair_coef=pair_coef, needs=Needs(*needs), scratch_bytes=scratch_bytes, low=low,
    )  # fmt: skip


def with_gradients(
    run: Callable[..., ChunkedResult], hidden: Tensor, head: Head, target: Tensor, lam: Tensor, *,
    row_coef: Tensor, pair_coef: Tensor, needs: Needs, scratch_bytes: int, low: Tensor | None,
) -> WithGradients:  # fmt: skip
    """What both operators return, from ``run``: ``chunked_loss`` or ``stored_loss``."""
    result = run(
        hidden, head, target, lam, row_coef=row_coef, pair_coef=pair_coef, needs=needs, scratch_bytes=scratch_bytes,
        low=low,
    )  # fmt: skip
    loss = total_loss(
        row_term(head, result.nll, result.lse, result.mean_logit), result.mixup_nll, row_coef, pair_coef
    )
    gradients = (result.scale, result.dhidden, result.dweight, result.dbias, result.dlow, result.dup)
    statistics = (result.nll.clone(), result.lse.clone(), result.is_top1, result.mixup_nll.clone())
    return (loss, *statistics, *gradients)


def fake_with_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, lam: Tensor, row_coef: Tensor,
    pair_coef: Tensor, options: list[float], needs: list[bool], scratch_bytes: int, low: Tensor | None = None,
    up: Tensor | None = None,
) -> Tensors:  # fmt: skip
    dtype = sum_dtype(hidden.dtype)
    nll, lse, _, is_top1 = fake_stats(hidden)
    statistics = (nll.new_empty(()), nll, lse, is_top1, nll.new_empty(lam.shape[0]), nll.new_empty(()))
    dhidden, dweight, dbias, dlow, dup = fake_like(hidden, weight, low, up, needs)
    return (*statistics, dhidden, dweight.to(dtype), dbias.to(dtype), dlow, dup.to(dtype))


chunked_fwd.register_fake(fake_with_gradients)
stored_fwd.register_fake(fake_with_gradients)


def fake_like(
    hidden: Tensor, weight: Tensor, low: Tensor | None, up: Tensor | None, needs: list[bool]
) -> FiveTensors:
    """Gradients in the dtypes of hidden, weight, bias, low and up; empty where not needed."""
    need = Needs(*needs)
    rank = 0 if low is None else low.shape[1]
    rows, vocab_size = hidden.shape[0], weight.shape[0]
    return (
        hidden.new_empty(hidden.shape if need.dhidden else (0,)),
        weight.new_empty(weight.shape if need.dweight else (0,)),
        weight.new_empty((vocab_size if need.dbias else 0,)),
        hidden.new_empty((rows, rank) if need.dlow else (0,)),
        weight.new_empty((vocab_size, rank) if need.dup else (0,)),
    )


@torch.library.custom_op("sftmix_kernels::chunked_bwd", mutates_args=())
def chunked_bwd(
    grad_loss: Tensor,  # ()
    scale: Tensor,  # ()
    dhidden: Tensor,  # (N, D) or (0,), as all that follow
    dweight: Tensor,  # (V, D)
    dbias: Tensor,  # (V,)
    dlow: Tensor,  # (N, r)
    dup: Tensor,  # (V, r)
    weight_dtype: torch.dtype,
) -> FiveTensors:
    """The forward's gradients times ``scale * grad_loss``, multiplied in float32 and rounded once."""
    factor = (scale * grad_loss).to(dweight.dtype)
    outputs = _fake_scaled(grad_loss, scale, dhidden, dweight, dbias, dlow, dup, weight_dtype)
    for gradient, output in zip((dhidden, dweight, dbias, dlow, dup), outputs, strict=True):
        scale_into(gradient, factor, output)
    return outputs


def scale_into(gradient: Tensor, factor: Tensor, output: Tensor) -> None:
    """output = gradient * factor in factor's dtype, in row blocks where dtypes differ, so that copies stay small."""
    if gradient.dtype == factor.dtype == output.dtype:
        torch.mul(gradient, factor, out=output)
        return
    block = 4096
    for start in range(0, gradient.shape[0], block):
        rows = slice(start, start + block)
        torch.mul(gradient[rows].to(factor.dtype), factor, out=output[rows])


@chunked_bwd.register_fake
def _fake_scaled(
    grad_loss: Tensor, scale: Tensor, dhidden: Tensor, dweight: Tensor, dbias: Tensor, dlow: Tensor, dup: Tensor,
    weight_dtype: torch.dtype,
) -> FiveTensors:  # fmt: skip
    def like(gradient: Tensor) -> Tensor:
        return torch.empty_like(gradient, dtype=weight_dtype)

    return torch.empty_like(dhidden), like(dweight), like(dbias), torch.empty_like(dlow), like(dup)


def _chunked_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)  # or autograd makes zeros for every output, the [V, D] ones too
    ctx.save_for_backward(*output[5:])
    ctx.needs, ctx.weight_dtype = inputs[8], inputs[1].dtype


def _is_one(grad_loss: Tensor) -> bool:
    """Whether a CPU tensor, not traced, is 1: then float32 gradients are handed over without a second copy."""
    traced = (
        torch.compiler.is_compiling() or isinstance(grad_loss, FakeTensor) or type(grad_loss) is not Tensor
    )
    return not traced and grad_loss.device.type == "cpu" and bool(grad_loss == 1)


def _chunked_autograd(
    ctx: Any, grad_loss: Tensor | None, *unused: Tensor | None
) -> tuple[Tensor | None, ...]:
    if grad_loss is None:  # an undefined upstream gradient is one of zeros
        return (None,) * 12
    scale, *gradients = ctx.saved_tensors
    same_dtype = ctx.weight_dtype == gradients[1].dtype
    if not (same_dtype and not torch.is_grad_enabled() and _is_one(grad_loss)):
        gradients = chunked_bwd(grad_loss, scale, *gradients, ctx.weight_dtype)
    return wanted(tuple(gradients), ctx.needs, 7)


chunked_fwd.register_autograd(_chunked_autograd, setup_context=_chunked_setup)
stored_fwd.register_autograd(_chunked_autograd, setup_context=_chunked_setup)
chunked_bwd.register_autograd(refuse_double_backward)


def fake_stats(hidden: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """nll, lse, entropy and is_top1 of each row."""
    rows, dtype = hidden.shape[0], sum_dtype(hidden.dtype)
    nll, lse, entropy = (hidden.new_empty(rows, dtype=dtype) for _ in range(3))
    return nll, lse, entropy, hidden.new_empty(rows, dtype=torch.bool)

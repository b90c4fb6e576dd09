"""The custom operators ``sftmix_kernels::*``: schema, fake kernels and registered autograd.

Here are those that make gradients in the forward, for a scalar loss: ``chunked_fwd`` and ``stored_fwd``, whose
``chunked_bwd`` scales them by the upstream gradient; and ``chunked_rows_fwd``, one term per row, whose backward
recomputes because any upstream gradient may come. fused_ops.py has the operators that keep no logits. In all of them
``target`` is -1 at ignored rows, ``row_coef`` [N] and ``pair_coef`` [M] are float64 and hold weights, denominators and
the mixup weight (the loss is their float64 sum, rounded once), and ``options`` are softcap (0: none), logit_scale,
label_smoothing, z_loss.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .chunked import ChunkedResult, Needs, chunked_loss
from .reference import sum_dtype
from .rows import Given, Head, head_of, row_term

Tensors = tuple[Tensor, ...]


def total_loss(term: Tensor, mixup_nll: Tensor, row_coef: Tensor, pair_coef: Tensor) -> Tensor:
    return ((term * row_coef).sum() + (mixup_nll * pair_coef).sum()).to(term.dtype)


def refuse_double_backward(ctx: Any, *grads: Tensor | None) -> None:
    raise RuntimeError("sftmix_loss: double backward is not supported; use impl='reference' for it")


def wanted(gradients: Tensors, needs: tuple[bool, ...]) -> list[Tensor | None]:
    return [gradient if needed else None for gradient, needed in zip(gradients, needs, strict=True)]


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
    needs: list[bool],  # dhidden, dweight, dbias
    scratch_bytes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss, nll, lse, is_top1, mixup_nll, then scale and the gradients of loss / scale for the backward."""
    return with_gradients(
        chunked_loss, hidden, head_of(weight, bias, options), target, lam, row_coef=row_coef, pair_coef=pair_coef,
        needs=Needs(*needs), scratch_bytes=scratch_bytes,
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
    needs: list[bool],  # dhidden, dweight, dbias
    scratch_bytes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """:func:`chunked_fwd` with one Triton kernel a chunk; ``scratch_bytes`` 0 is its own default."""
    from .fused import stored_loss

    return with_gradients(
        stored_loss, hidden, head_of(weight, bias, options), target, lam, row_coef=row_coef, pair_coef=pair_coef,
        needs=Needs(*needs), scratch_bytes=scratch_bytes,
    )  # fmt: skip


def with_gradients(
    run: Callable[..., ChunkedResult], hidden: Tensor, head: Head, target: Tensor, lam: Tensor, *,
    row_coef: Tensor, pair_coef: Tensor, needs: Needs, scratch_bytes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """What both operators return, from ``run``: ``chunked_loss`` or ``stored_loss``."""
    result = run(
        hidden,
        head,
        target,
        lam,
        row_coef=row_coef,
        pair_coef=pair_coef,
        needs=needs,
        scratch_bytes=scratch_bytes,
    )
    loss = total_loss(
        row_term(head, result.nll, result.lse, result.mean_logit), result.mixup_nll, row_coef, pair_coef
    )
    gradients = (result.scale, result.dhidden, result.dweight, result.dbias)
    return (loss, result.nll, result.lse, result.is_top1, result.mixup_nll, *gradients)


def fake_with_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, lam: Tensor, *rest: Any
) -> Tensors:
    need_dhidden, need_dweight, need_dbias = rest[3]
    dtype = sum_dtype(hidden.dtype)
    rows, pairs, scalar = ((hidden.shape[0],), (lam.shape[0],), ())
    new = hidden.new_empty
    return (
        new(scalar, dtype=dtype), new(rows, dtype=dtype), new(rows, dtype=dtype), new(rows, dtype=torch.bool),
        new(pairs, dtype=dtype), new(scalar, dtype=dtype), new(hidden.shape if need_dhidden else (0,)),
        new(weight.shape if need_dweight else (0,), dtype=dtype),
        new((weight.shape[0],) if need_dbias else (0,), dtype=dtype),
    )  # fmt: skip


chunked_fwd.register_fake(fake_with_gradients)
stored_fwd.register_fake(fake_with_gradients)


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
def _(
    grad_loss: Tensor, scale: Tensor, dhidden: Tensor, dweight: Tensor, dbias: Tensor, weight_dtype: torch.dtype
) -> Tensors:  # fmt: skip
    outputs = tuple(torch.empty_like(t, dtype=weight_dtype) for t in (dweight, dbias))
    return (torch.empty_like(dhidden), *outputs)


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


def _chunked_autograd(ctx: Any, grad_loss: Tensor, *unused: Tensor | None) -> tuple[Tensor | None, ...]:
    scale, *gradients = ctx.saved_tensors
    same_dtype = ctx.weight_dtype == gradients[1].dtype
    if not (same_dtype and not torch.is_grad_enabled() and _is_one(grad_loss)):
        gradients = chunked_bwd(grad_loss, scale, *gradients, ctx.weight_dtype)
    return (*wanted(tuple(gradients), ctx.needs), *(None,) * 7)


chunked_fwd.register_autograd(_chunked_autograd, setup_context=_chunked_setup)
stored_fwd.register_autograd(_chunked_autograd, setup_context=_chunked_setup)
chunked_bwd.register_autograd(refuse_double_backward)


def row_stats(
    hidden: Tensor, head: Head, target: Tensor, *, scratch_bytes: int, needs: Needs, lam: Tensor | None = None,
    row_coef: Tensor | None = None, pair_coef: Tensor | None = None, given: Given | None = None,
    main_grad: Tensor | None = None,
) -> ChunkedResult:  # fmt: skip
    """:func:`chunked_loss`, by default without pairs and with coefficients of 0."""
    shares = hidden.new_empty(0, dtype=torch.float32) if lam is None else lam
    zeros = hidden.new_zeros(hidden.shape[0] + shares.shape[0], dtype=sum_dtype(hidden.dtype))
    return chunked_loss(
        hidden, head, target, shares, row_coef=zeros[: hidden.shape[0]] if row_coef is None else row_coef,
        pair_coef=zeros[hidden.shape[0] :] if pair_coef is None else pair_coef, needs=needs,
        scratch_bytes=scratch_bytes, given=given, main_grad=main_grad,
    )  # fmt: skip


def valid_terms(head: Head, result: ChunkedResult, target: Tensor) -> Tensor:
    """Each row's next-token term, 0 at ignored rows."""
    term = row_term(head, result.nll, result.lse, result.mean_logit)
    return torch.where(target >= 0, term, torch.zeros_like(term))


@torch.library.custom_op("sftmix_kernels::chunked_rows_fwd", mutates_args=())
def chunked_rows_fwd(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    target: Tensor,  # (N,)
    options: list[float],
    needs: list[bool],
    scratch_bytes: int,
) -> tuple[Tensor, Tensor]:
    """Each row's next-token term (0 at ignored rows); lse and what rounding took from it [2, N] for the backward."""
    head = head_of(weight, bias, options)
    result = row_stats(hidden, head, target, scratch_bytes=scratch_bytes, needs=Needs())
    return valid_terms(head, result, target), torch.stack([result.lse, result.low])


@torch.library.custom_op("sftmix_kernels::chunked_rows_bwd", mutates_args=())
def chunked_rows_bwd(
    grad_rows: Tensor,  # (N,)
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    target: Tensor,  # (N,)
    row_carry: Tensor,  # (2, N)
    options: list[float],
    needs: list[bool],
    scratch_bytes: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """dhidden, dweight, dbias from logits made again; empty where not needed."""
    coef = torch.where(target >= 0, grad_rows, torch.zeros_like(grad_rows))
    result = row_stats(
        hidden, head_of(weight, bias, options), target, scratch_bytes=scratch_bytes, needs=Needs(*needs),
        row_coef=coef, given=Given(*row_carry, *row_carry[:, :0]),
    )  # fmt: skip
    one = torch.ones_like(result.scale)
    return chunked_bwd(one, result.scale, result.dhidden, result.dweight, result.dbias, weight.dtype)


def _fake_rows(hidden: Tensor, *rest: Any) -> Tensors:
    term = fake_stats(hidden)[0]
    return term, term.new_empty(2, hidden.shape[0])


def fake_gradients(grad: Tensor, hidden: Tensor, weight: Tensor, *rest: Any) -> Tensors:
    need_dhidden, need_dweight, need_dbias = rest[-2]
    dhidden = hidden.new_empty(hidden.shape if need_dhidden else (0,))
    dweight = weight.new_empty(weight.shape if need_dweight else (0,))
    return dhidden, dweight, weight.new_empty((weight.shape[0],) if need_dbias else (0,))


chunked_rows_fwd.register_fake(_fake_rows)
chunked_rows_bwd.register_fake(fake_gradients)


def rows_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)  # or autograd makes zeros for every output, the [V, D] ones too
    ctx.save_for_backward(*inputs[:4], *output[1:])
    ctx.extra = inputs[4:]


def _chunked_rows_autograd(ctx: Any, grad_rows: Tensor, *unused: Tensor | None) -> tuple[Tensor | None, ...]:
    gradients = chunked_rows_bwd(grad_rows, *ctx.saved_tensors, *ctx.extra)
    return (*wanted(gradients, ctx.extra[1]), *(None,) * 4)


chunked_rows_fwd.register_autograd(_chunked_rows_autograd, setup_context=rows_setup)
chunked_rows_bwd.register_autograd(refuse_double_backward)


@torch.library.custom_op("sftmix_kernels::chunked_stats", mutates_args=())
def chunked_stats(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    target: Tensor,  # (N,)
    options: list[float],
    scratch_bytes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """nll, lse, entropy and is_top1 of each row."""
    head = head_of(weight, bias, options)
    result = row_stats(hidden, head, target, scratch_bytes=scratch_bytes, needs=Needs(entropy=True))
    return result.nll, result.lse, result.entropy, result.is_top1


@chunked_stats.register_fake
def _(hidden: Tensor, *rest: Any) -> Tensors:
    return fake_stats(hidden)


def fake_stats(hidden: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, dtype = hidden.shape[0], sum_dtype(hidden.dtype)
    nll, lse, entropy = (hidden.new_empty(rows, dtype=dtype) for _ in range(3))
    return nll, lse, entropy, hidden.new_empty(rows, dtype=torch.bool)

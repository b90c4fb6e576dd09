"""The custom operators of single rows in portable torch: a term per row, and statistics without a gradient.

``chunked_rows_fwd`` keeps log-sum-exps only and ``chunked_rows_bwd`` recomputes the logits, because any upstream
gradient per row may come; ``chunked_stats`` has no backward. Arguments as in ops.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .chunked import ChunkedResult, chunked_loss
from .ops import FiveTensors, Tensors, chunked_bwd, fake_like, fake_stats, refuse_double_backward, wanted
from .reference import sum_dtype
from .rows import Given, Head, Needs, head_of, row_term


def row_stats(
    hidden: Tensor, head: Head, target: Tensor, *, scratch_bytes: int, needs: Needs, lam: Tensor | None = None,
    row_coef: Tensor | None = None, pair_coef: Tensor | None = None, given: Given | None = None,
    main_grad: Tensor | None = None, low: Tensor | None = None,
) -> ChunkedResult:  # fmt: skip
    """:func:`chunked_loss`, by default without pairs and with coefficients of 0."""
    shares = hidden.new_empty(0, dtype=torch.float32) if lam is None else lam
    zeros = hidden.new_zeros(hidden.shape[0] + shares.shape[0], dtype=sum_dtype(hidden.dtype))
    return chunked_loss(
        hidden, head, target, shares, row_coef=zeros[: hidden.shape[0]] if row_coef is None else row_coef,
        pair_coef=zeros[hidden.shape[0] :] if pair_coef is None else pair_coef, needs=needs,
        scratch_bytes=scratch_bytes, given=given, main_grad=main_grad, low=low,
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
    low: Tensor | None = None,  # (N, r)
    up: Tensor | None = None,  # (V, r)
) -> tuple[Tensor, Tensor]:
    """Each row's next-token term (0 at ignored rows); lse and what rounding took from it [2, N] for the backward."""
    head = head_of(weight, bias, options, up=up)
    result = row_stats(hidden, head, target, scratch_bytes=scratch_bytes, needs=Needs(), low=low)
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
    low: Tensor | None = None,  # (N, r)
    up: Tensor | None = None,  # (V, r)
) -> FiveTensors:
    """Gradients for hidden, weight, bias, low and up from logits made again; empty where not needed."""
    coef = torch.where(target >= 0, grad_rows, torch.zeros_like(grad_rows))
    result = row_stats(
        hidden, head_of(weight, bias, options, up=up), target, scratch_bytes=scratch_bytes, needs=Needs(*needs),
        row_coef=coef, given=Given(*row_carry, *row_carry[:, :0]), low=low,
    )  # fmt: skip
    gradients = (result.dhidden, result.dweight, result.dbias, result.dlow, result.dup)
    found: FiveTensors = chunked_bwd(torch.ones_like(result.scale), result.scale, *gradients, weight.dtype)
    return found


@chunked_rows_fwd.register_fake
def _(hidden: Tensor, *rest: Any) -> Tensors:
    term = fake_stats(hidden)[0]
    return term, term.new_empty(2, hidden.shape[0])


@chunked_rows_bwd.register_fake
def _(
    grad_rows: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, row_carry: Tensor,
    options: list[float], needs: list[bool], scratch_bytes: int, low: Tensor | None = None,
    up: Tensor | None = None,
) -> Tensors:  # fmt: skip
    return fake_like(hidden, weight, low, up, needs)


def rows_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """For operators of (hidden, weight, bias, target, options, needs, scratch_bytes, low, up)."""
    ctx.set_materialize_grads(False)  # or autograd makes zeros for every output, the [V, D] ones too
    ctx.save_for_backward(*inputs[:4], *output[1:], *inputs[7:])
    ctx.extra = inputs[4:7]


def _chunked_rows_autograd(
    ctx: Any, grad_rows: Tensor | None, *unused: Tensor | None
) -> tuple[Tensor | None, ...]:
    if grad_rows is None:  # an undefined upstream gradient is one of zeros
        return (None,) * 9
    *inputs, low, up = ctx.saved_tensors
    return wanted(chunked_rows_bwd(grad_rows, *inputs, *ctx.extra, low, up), ctx.extra[1], 4)


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
    low: Tensor | None = None,  # (N, r)
    up: Tensor | None = None,  # (V, r)
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """nll, lse, entropy and is_top1 of each row."""
    head = head_of(weight, bias, options, up=up)
    result = row_stats(hidden, head, target, scratch_bytes=scratch_bytes, needs=Needs(entropy=True), low=low)
    return result.nll.clone(), result.lse.clone(), result.entropy, result.is_top1


@chunked_stats.register_fake
def _(hidden: Tensor, *rest: Any) -> Tensors:
    return fake_stats(hidden)

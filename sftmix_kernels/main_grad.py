"""dweight added straight into a float32 main gradient, so that accumulating gradients needs no second [V, D].

    main_grad += d loss / d weight          in float32, product by product; weight itself gets no .grad

The forward is functional, a backward operator declares the mutation. ``chunked`` and ``recompute`` make the logits
again in the backward and hold nothing of size [V, D]: for ``chunked`` a fourth product per row. ``stored`` keeps the
float32 dweight that its forward made until its backward has added it: it saves the rounded copy only.

main_grad is not saved as autograd saves tensors, because the backward of one micro-batch may change it between forward
and backward of another.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .fused_ops import fused_terms
from .ops import Tensors, fake_stats, fake_with_gradients, scale_into, total_loss, with_gradients
from .row_ops import row_stats, valid_terms
from .rows import Given, Needs, head_of


def main_grad_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, *inputs: Tensor, options: list[float], needs: list[bool],
    scratch_bytes: int, fused: bool, stored: bool,
) -> Tensors:  # fmt: skip
    """loss, nll, lse, is_top1, mixup_nll and each row's next-token term (empty by ``stored``).

    inputs: target, lam, row_coef, pair_coef as the operators have them, main_grad.
    """
    if stored:
        loss, *found = stored_main_grad_fwd(hidden, weight, bias, *inputs, options, needs, scratch_bytes)
        return loss, *found[:4], loss.new_empty(0)
    loss, term, *found = main_grad_fwd(hidden, weight, bias, *inputs, options, needs, scratch_bytes, fused)
    return loss, *found[:4], term


class _AddTo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, main_grad: Tensor) -> Tensor:
        ctx.main_grad = main_grad
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None]:
        ctx.main_grad.add_(grads[0])
        return None, None


def sending_gradient_to(weight: Tensor, main_grad: Tensor) -> Tensor:
    """``weight`` whose gradient is added to ``main_grad``: for the reference."""
    sending: Tensor = _AddTo.apply(weight, main_grad)  # type: ignore[no-untyped-call]  # torch leaves apply untyped
    return sending


@torch.library.custom_op("sftmix_kernels::main_grad_fwd", mutates_args=())
def main_grad_fwd(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    target: Tensor,  # (N,)
    lam: Tensor,  # (M,)
    row_coef: Tensor,  # (N,)
    pair_coef: Tensor,  # (M,)
    main_grad: Tensor,  # (V, D)
    options: list[float],
    needs: list[bool],  # dhidden, dweight, dbias
    scratch_bytes: int,
    fused: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss, each row's next-token term, nll, lse, is_top1, mixup_nll, row_carry [3, N] and pair_carry [4, M].

    ``main_grad``, ``needs`` and ``scratch_bytes`` serve the backward.
    """
    if fused:
        stats, term = fused_terms(hidden, weight, bias, target, lam, options)
        nll, lse, mixup_nll = stats.nll, stats.lse, stats.mixup_nll(target, lam)
        is_top1 = (target >= 0) & (stats.target_logit >= stats.max_logit)
        row_carry, pair_carry = stats.row_carry, stats.pair_carry
    else:
        head = head_of(weight, bias, options)
        found = row_stats(hidden, head, target, lam=lam, scratch_bytes=scratch_bytes, needs=Needs())
        term = valid_terms(head, found, target)
        nll, lse, is_top1, mixup_nll = (
            found.nll.clone(),
            found.lse.clone(),
            found.is_top1,
            found.mixup_nll.clone(),
        )
        row_carry = torch.stack([lse, found.low, nll])
        unused = torch.zeros_like(found.lse_x)
        pair_carry = torch.stack([found.lse_x, found.low_x, unused, unused])
    loss = total_loss(term, mixup_nll, row_coef, pair_coef)
    return loss, term, nll, lse, is_top1, mixup_nll, row_carry, pair_carry


@main_grad_fwd.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, lam: Tensor, *rest: Any
) -> Tensors:
    nll, lse, _, is_top1 = fake_stats(hidden)
    num_rows, num_pairs = hidden.shape[0], lam.shape[0]
    carries = nll.new_empty(3, num_rows), nll.new_empty(4, num_pairs)
    return nll.new_empty(()), torch.empty_like(nll), nll, lse, is_top1, nll.new_empty(num_pairs), *carries


@torch.library.custom_op("sftmix_kernels::main_grad_bwd", mutates_args=("main_grad",))
def main_grad_bwd(
    row_coef: Tensor,  # (N,) upstream gradients included
    pair_coef: Tensor,  # (M,)
    main_grad: Tensor,  # (V, D)
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    target: Tensor,  # (N,)
    lam: Tensor,  # (M,)
    row_carry: Tensor,  # (3, N)
    pair_carry: Tensor,  # (4, M)
    options: list[float],
    needs: list[bool],  # dhidden, dweight, dbias
    scratch_bytes: int,
    fused: bool,
) -> tuple[Tensor, Tensor]:
    """dhidden and dbias, empty where not needed; main_grad += dweight."""
    head = head_of(weight, bias, options)
    if fused:
        from .fused import fused_backward

        dhidden, _, dbias = fused_backward(
            hidden, weight, target, lam, row_coef.float(), pair_coef.float(), row_carry, pair_carry, bias=bias,
            softcap=head.softcap, logit_scale=head.logit_scale, label_smoothing=head.label_smoothing,
            z_loss=head.z_loss, need_dhidden=needs[0], need_dweight=needs[1], need_dbias=needs[2],
            main_grad=main_grad, scratch_bytes=scratch_bytes or None,
        )  # fmt: skip
        return dhidden, dbias
    found = row_stats(
        hidden, head, target, lam=lam, scratch_bytes=scratch_bytes, needs=Needs(*needs), row_coef=row_coef,
        pair_coef=pair_coef, given=Given(row_carry[0], row_carry[1], pair_carry[0], pair_carry[1]),
        main_grad=main_grad,
    )  # fmt: skip
    return _scaled(found.scale, found.dhidden, found.dbias, weight.dtype)


def _scaled(factor: Tensor, dhidden: Tensor, dbias: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """dhidden and dbias times ``factor``, rounded once, to ``dtype``."""
    outputs = torch.empty_like(dhidden), torch.empty_like(dbias, dtype=dtype)
    for gradient, output in zip((dhidden, dbias), outputs, strict=True):
        scale_into(gradient, factor, output)
    return outputs


@main_grad_bwd.register_fake
def _(
    row_coef: Tensor, pair_coef: Tensor, main_grad: Tensor, hidden: Tensor, weight: Tensor, *rest: Any
) -> Tensors:
    need_dhidden, _, need_dbias = rest[-3]
    dhidden = hidden.new_empty(hidden.shape if need_dhidden else (0,))
    return dhidden, weight.new_empty((weight.shape[0],) if need_dbias else (0,))


def _refuse_grad_mode() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "sftmix_loss: double backward is not supported (create_graph=True beside main_grad)"
        )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:7], *output[6:])
    ctx.main_grad, ctx.extra = inputs[7], inputs[8:]


def _autograd(ctx: Any, grad_loss: Tensor | None, grad_term: Tensor | None, *unused: Any) -> tuple[Any, ...]:
    _refuse_grad_mode()
    *inputs, row_coef, pair_coef, row_carry, pair_carry = ctx.saved_tensors
    target = inputs[3]
    a, b = torch.zeros_like(row_coef), torch.zeros_like(pair_coef)
    if grad_loss is not None:
        a, b = row_coef * grad_loss, pair_coef * grad_loss
    if grad_term is not None:
        a = a + torch.where(target >= 0, grad_term, torch.zeros_like(grad_term))
    dhidden, dbias = main_grad_bwd(a, b, ctx.main_grad, *inputs, row_carry, pair_carry, *ctx.extra)
    need_dhidden, _, need_dbias = ctx.extra[1]
    return dhidden if need_dhidden else None, None, dbias if need_dbias else None, *(None,) * 9


main_grad_fwd.register_autograd(_autograd, setup_context=_setup)


# --- stored --------------------------------------------------------------------------------------------------------


@torch.library.custom_op("sftmix_kernels::stored_main_grad_fwd", mutates_args=())
def stored_main_grad_fwd(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    target: Tensor,  # (N,)
    lam: Tensor,  # (M,)
    row_coef: Tensor,  # (N,)
    pair_coef: Tensor,  # (M,)
    main_grad: Tensor,  # (V, D)
    options: list[float],
    needs: list[bool],  # dhidden, dweight, dbias
    scratch_bytes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As ``stored_fwd``; ``main_grad`` serves the backward."""
    from .fused import stored_loss

    return with_gradients(
        stored_loss, hidden, head_of(weight, bias, options), target, lam, row_coef=row_coef, pair_coef=pair_coef,
        needs=Needs(*needs), scratch_bytes=scratch_bytes, low=None,
    )[:9]  # fmt: skip


@stored_main_grad_fwd.register_fake
def _(*inputs: Any) -> Tensors:
    return fake_with_gradients(*inputs[:7], *inputs[8:])[:9]


@torch.library.custom_op("sftmix_kernels::stored_main_grad_bwd", mutates_args=("main_grad",))
def stored_main_grad_bwd(
    factor: Tensor,  # () scale and upstream gradient
    dhidden: Tensor,  # (N, D) or (0,)
    dweight: Tensor,  # (V, D) or (0,)
    dbias: Tensor,  # (V,) or (0,)
    main_grad: Tensor,  # (V, D)
    weight_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """dhidden and dbias times ``factor``; main_grad += dweight times ``factor``."""
    if dweight.numel():
        main_grad.addcmul_(dweight, factor)
    return _scaled(factor, dhidden, dbias, weight_dtype)


@stored_main_grad_bwd.register_fake
def _(factor: Tensor, dhidden: Tensor, dweight: Tensor, dbias: Tensor, *rest: Any) -> Tensors:
    return torch.empty_like(dhidden), torch.empty_like(dbias, dtype=rest[-1])


def _stored_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[5:])
    ctx.main_grad, ctx.needs, ctx.weight_dtype = inputs[7], inputs[9], inputs[1].dtype


def _stored_autograd(ctx: Any, grad_loss: Tensor | None, *unused: Any) -> tuple[Any, ...]:
    if grad_loss is None:  # an undefined upstream gradient is one of zeros
        return (None,) * 11
    _refuse_grad_mode()
    scale, dhidden, dweight, dbias = ctx.saved_tensors
    factor = scale * grad_loss
    dhidden, dbias = stored_main_grad_bwd(factor, dhidden, dweight, dbias, ctx.main_grad, ctx.weight_dtype)
    need_dhidden, _, need_dbias = ctx.needs
    return dhidden if need_dhidden else None, None, dbias if need_dbias else None, *(None,) * 8


stored_main_grad_fwd.register_autograd(_stored_autograd, setup_context=_stored_setup)

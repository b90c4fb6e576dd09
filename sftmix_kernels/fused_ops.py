"""The custom operators of the Triton kernels that keep no logits; what they share with the others is in ops.py.

``fused_fwd`` keeps log-sum-exps only and ``fused_bwd`` recomputes logits slice by slice; ``fused_rows_fwd`` gives one
term per row and shares that backward, ``fused_stats`` has none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .ops import FiveTensors, Tensors, fake_like, fake_stats, refuse_double_backward, total_loss, wanted
from .row_ops import rows_setup
from .rows import Needs, head_of, row_term


@torch.library.custom_op("sftmix_kernels::fused_fwd", mutates_args=())
def fused_fwd(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss, nll, lse, is_top1, mixup_nll, then row_carry [3, N] and pair_carry [4, M] for the backward.

    No logits are in memory. ``needs`` and ``scratch_bytes`` serve the backward.
    """
    stats, term = fused_terms(hidden, weight, bias, target, lam, options, low, up)
    mixup_nll = stats.mixup_nll(target, lam)
    is_top1 = (target >= 0) & (stats.target_logit >= stats.max_logit)
    loss = total_loss(term, mixup_nll, row_coef, pair_coef)
    return loss, stats.nll, stats.lse, is_top1, mixup_nll, stats.row_carry, stats.pair_carry


def fused_terms(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, lam: Tensor, options: list[float],
    low: Tensor | None = None, up: Tensor | None = None,
) -> tuple[Any, Tensor]:  # fmt: skip
    """FusedStats and each row's next-token term, 0 at ignored rows."""
    from .fused import fused_forward

    head = head_of(weight, bias, options)
    stats = fused_forward(
        hidden, weight, target, lam, bias=bias, softcap=head.softcap, logit_scale=head.logit_scale,
        low=low, up=up, want_mean_logit=head.label_smoothing != 0,
    )  # fmt: skip
    term = row_term(head, stats.nll, stats.lse, stats.mean_logit)
    return stats, torch.where(target >= 0, term, torch.zeros_like(term))


@fused_fwd.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, lam: Tensor, *rest: Any
) -> Tensors:
    nll, lse, _, is_top1 = fake_stats(hidden)
    num_rows, num_pairs = hidden.shape[0], lam.shape[0]
    mixup_nll, pair_carry = nll.new_empty(num_pairs), nll.new_empty(4, num_pairs)
    return nll.new_empty(()), nll, lse, is_top1, mixup_nll, nll.new_empty(3, num_rows), pair_carry


@torch.library.custom_op("sftmix_kernels::fused_bwd", mutates_args=())
def fused_bwd(
    grad_loss: Tensor,  # () or (N,): then the rows' own upstream gradients, and there are no pairs
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    target: Tensor,  # (N,)
    lam: Tensor,  # (M,)
    row_coef: Tensor,  # (N,)
    pair_coef: Tensor,  # (M,)
    row_carry: Tensor,  # (3, N)
    pair_carry: Tensor,  # (4, M)
    options: list[float],
    needs: list[bool],
    scratch_bytes: int,
    low: Tensor | None = None,  # (N, r)
    up: Tensor | None = None,  # (V, r)
) -> FiveTensors:
    """Gradients for hidden, weight, bias, low and up by the ``recompute`` schedule; empty where not needed."""
    from .fused import fused_backward

    a = (row_coef * grad_loss).float()
    b = (pair_coef * grad_loss).float() if grad_loss.ndim == 0 else pair_coef.float()
    head = head_of(weight, bias, options)
    gradients = fused_backward(
        hidden, weight, target, lam, a, b, row_carry, pair_carry, bias=bias, softcap=head.softcap,
        logit_scale=head.logit_scale, scratch_bytes=scratch_bytes or None, label_smoothing=head.label_smoothing,
        z_loss=head.z_loss, low=low, up=up, **needed(needs),
    )  # fmt: skip
    return five(gradients)


def needed(needs: list[bool]) -> dict[str, Any]:
    """``fused_backward``'s keywords for the operators' ``needs``."""
    need = Needs(*needs)._asdict()
    return {f"need_{name}": need[name] for name in ("dhidden", "dweight", "dbias", "dlow", "dup")}


def five(gradients: Tensors) -> FiveTensors:
    """With empty gradients of low and up where there are none."""
    dhidden, dweight, dbias, *low_rank = gradients
    dlow, dup = low_rank or (dhidden.new_empty(0), dweight.new_empty(0))
    return dhidden, dweight, dbias, dlow, dup


@fused_bwd.register_fake
def _(
    grad_loss: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, lam: Tensor,
    row_coef: Tensor, pair_coef: Tensor, row_carry: Tensor, pair_carry: Tensor, options: list[float],
    needs: list[bool], scratch_bytes: int, low: Tensor | None = None, up: Tensor | None = None,
) -> Tensors:  # fmt: skip
    return fake_like(hidden, weight, low, up, needs)


def _fused_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)  # or autograd makes zeros for every output, the [V, D] ones too
    ctx.save_for_backward(*inputs[:7], *output[5:], *inputs[10:])
    ctx.extra = inputs[7:10]


def _fused_autograd(ctx: Any, grad_loss: Tensor | None, *unused: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_loss is None:  # an undefined upstream gradient is one of zeros
        return (None,) * 12
    *inputs, low, up = ctx.saved_tensors
    return wanted(fused_bwd(grad_loss, *inputs, *ctx.extra, low, up), ctx.extra[1], 7)


fused_fwd.register_autograd(_fused_autograd, setup_context=_fused_setup)
fused_bwd.register_autograd(refuse_double_backward)


@torch.library.custom_op("sftmix_kernels::fused_rows_fwd", mutates_args=())
def fused_rows_fwd(
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
    """Each row's next-token term (0 at ignored rows) and row_carry [3, N] for the backward."""
    none = hidden.new_empty(0, dtype=torch.float32)
    stats, term = fused_terms(hidden, weight, bias, target, none, options, low, up)
    return term, stats.row_carry


@fused_rows_fwd.register_fake
def _(hidden: Tensor, *rest: Any) -> Tensors:
    term = fake_stats(hidden)[0]
    return term, term.new_empty(3, hidden.shape[0])


def _fused_rows_autograd(
    ctx: Any, grad_rows: Tensor | None, *unused: Tensor | None
) -> tuple[Tensor | None, ...]:
    if grad_rows is None:  # an undefined upstream gradient is one of zeros
        return (None,) * 9
    *inputs, target, row_carry, low, up = ctx.saved_tensors
    none, pair_carry = row_carry.new_empty(0), row_carry.new_empty(4, 0)
    valid = (target >= 0).double()
    gradients = fused_bwd(
        grad_rows, *inputs, target, none, valid, none.double(), row_carry, pair_carry, *ctx.extra, low, up
    )
    return wanted(gradients, ctx.extra[1], 4)


fused_rows_fwd.register_autograd(_fused_rows_autograd, setup_context=rows_setup)


@torch.library.custom_op("sftmix_kernels::fused_stats", mutates_args=())
def fused_stats(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    target: Tensor,  # (N,)
    options: list[float],
    scratch_bytes: int,
    low: Tensor | None = None,  # (N, r)
    up: Tensor | None = None,  # (V, r)
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """nll, lse, entropy and is_top1 of each row; no logits in memory."""
    from .fused import fused_forward

    none = hidden.new_empty(0, dtype=torch.float32)
    stats = fused_forward(
        hidden, weight, target, none, bias=bias, softcap=options[0], logit_scale=options[1], low=low, up=up,
        want_entropy=True,
    )  # fmt: skip
    is_top1 = (target >= 0) & (stats.target_logit >= stats.max_logit)
    return stats.nll, stats.lse, stats.entropy, is_top1


@fused_stats.register_fake
def _(hidden: Tensor, *rest: Any) -> Tensors:
    return fake_stats(hidden)

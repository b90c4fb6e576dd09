"""The public functions: check the arguments, choose the implementation, reduce."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import checks, fused_ops, ops, reference
from . import main_grad as main_grads
from .arguments import HeadOptions, check_rows, coefficients, needs_of, scratch_of
from .autocast import follows_autocast
from .choice import check_schedule, choose, why_not_fused
from .lora_head import LoRA, with_lora
from .reference import SFTMixLoss, TokenStats
from .vocab_parallel import vocab_parallel_fwd
from .vocab_shard import check_implementation, check_target, resolve_shard


@follows_autocast
def sftmix_loss(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    target: Tensor,  # (N,) int64
    lam: Tensor,  # (M,) float32
    *,
    bias: Tensor | None = None,  # (V,)
    mixup_weight: float | Tensor = 0.2,
    row_weight: Tensor | None = None,  # (N,)
    pair_weight: Tensor | None = None,  # (M,)
    ntp_denominator: float | Tensor | None = None,
    mixup_denominator: float | Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    lora: LoRA | None = None,
    vocab_parallel: Any = None,
    main_grad: Tensor | None = None,  # (V, D) float32
    impl: str | None = None,
    schedule: str | None = None,
    scratch_bytes: int | None = None,
) -> SFTMixLoss:
    """Next-token loss of all rows plus ``mixup_weight`` times the Mixup loss of the pairs among them.

    Rows come as M confident rows, their M partners in the same order, then any number of unpaired rows. The mixture
    of a pair is taken between last hidden states and between one-hot targets with the pair's ``lam``; a pair with an
    ignored member adds nothing to it. M = 0, like ``mixup_weight=0``, is plain next-token loss, bit for bit.

    Args:
        hidden: [N, D] last hidden states (after the final norm); float32, float16, bfloat16 or float64.
        weight: [V, D] output embedding, dtype of ``hidden``.
        target: [N] int64, already shifted: the token that row n must predict, or ``ignore_index``.
        lam: [M] float32 in [0, 1], the share of the confident member; 2M at most N.
        bias: [V], dtype of ``hidden``.
        mixup_weight: mu of the paper, a number ≥ 0 or a 0-d tensor. The number 0 skips the mixture (``mixup_nll``
            is then NaN); under ``torch.compile`` pass a value that changes between steps as a tensor.
        row_weight: [N] weights of the rows' next-token terms. pair_weight: [M] weights of the pairs' Mixup terms.
        ntp_denominator, mixup_denominator: what the two sums are divided by, a number > 0 or a 0-d tensor; by
            default the supervised rows and the valid pairs of this call (counts, not weights, at least 1).
        ignore_index: target value of rows that bear no loss.
        softcap: logits become ``softcap * tanh(logits / softcap)``, after mixing. logit_scale: factor before that.
        label_smoothing, z_loss: e in [0, 1) and z ≥ 0; a row's next-token term becomes
            (1 - e) nll + e (lse - mean logit) + z lse². The mixture has neither, and ``nll`` stays -log p.
        lora: (A [r, D], B [V, r], scaling): the output layer is ``weight + scaling * B @ A``, which is not formed;
            A and B get gradients. It costs a copy of the weight [V, D + r], kept until the backward (lora_head.py).
        vocab_parallel: a ProcessGroup or a 1-D DeviceMesh over whose ranks the rows of ``weight`` (and ``bias``, and
            B of ``lora``) are spread: each rank passes its shard [V_r, D], of any size, or a DTensor ``Shard(0)``,
            and the same rows. Every rank gets the same loss and the whole gradient of hidden (vocab_parallel.py).
        main_grad: [V, D] float32 (float64 for float64 inputs): the gradient of weight is added here in the backward,
            unrounded, and ``weight.grad`` stays as it is: no second [V, D] buffer ("stored" keeps its dweight until
            then; "chunked" makes the logits again in the backward, 4 products instead of 3). Not beside lora or
            vocab_parallel, and not under FSDP2, which owns its gradients (main_grad.py).
        impl: "reference", "chunked", "fused"; None takes "fused" on a GPU (where triton is
            installed and has the dtype, otherwise "chunked") and "chunked" on a CPU.
        schedule: how "fused" makes gradients: "recompute" (None) keeps no logits and makes them again in the backward,
            a slice of the vocabulary at a time; "stored" turns a chunk of rows' logits into gradients in the forward,
            one product less, and holds them with a float32 dweight [V, D] until the backward.
        scratch_bytes: bound for the logits held at a time ("chunked": default 64 MiB; "fused": its dlogits slice, or
            the stored schedule's chunk, by default 4096 rows and at most half of all).

    Returns:
        SFTMixLoss: ``loss`` is differentiable in hidden, weight and bias; everything else is detached. With no
        supervised row ``loss`` is 0 and its gradients are 0.

    Raises:
        ValueError: naming the argument, on a wrong shape, dtype, device or value. On a GPU, and under compile, wrong
            values of target, lam and weights raise through ``torch._assert_async`` instead.

    Source: Xiao et al., arXiv 2410.05248, section 3: L = L_NTP + mu * L_Mixup.
    """
    options = HeadOptions(softcap, logit_scale, label_smoothing, z_loss)
    if vocab_parallel is None:
        shard = None
        check_rows(hidden, weight, target, bias, ignore_index, options)
    else:
        shard = resolve_shard(hidden, weight, bias, vocab_parallel)
        weight, bias = shard.weight, shard.bias
        check_target(target, hidden.shape[0], ignore_index, shard)
        options.check()
    if lora is not None:
        hidden, weight = with_lora(hidden, weight, lora)
    checks.check_lam(lam, hidden.shape[0])
    num_pairs = lam.shape[0]
    checks.check_weights("row_weight", row_weight, {"N": hidden.shape[0]})
    checks.check_weights("pair_weight", pair_weight, {"M": num_pairs})
    checks.check_devices(hidden.device, lam=lam, row_weight=row_weight, pair_weight=pair_weight)
    checks.check_scalar("mixup_weight", mixup_weight, positive=False)
    for name, value in (("ntp_denominator", ntp_denominator), ("mixup_denominator", mixup_denominator)):
        if value is not None:
            checks.check_scalar(name, value, positive=True)
    impl = choose(impl, hidden, why_not_fused(hidden))
    check_schedule(schedule, impl)
    checks.check_main_grad(
        main_grad, weight, reference.sum_dtype(hidden.dtype), lora=lora, vocab_parallel=vocab_parallel
    )
    if shard is not None:
        check_implementation(impl, schedule)
    scratch = scratch_of(scratch_bytes, impl)

    plain = not isinstance(mixup_weight, Tensor) and mixup_weight == 0
    if plain:
        lam, pair_weight = lam[:0], None
    if impl == "reference":
        if main_grad is not None:
            weight = main_grads.sending_gradient_to(weight, main_grad)
        result = reference.sftmix_loss(
            hidden, weight, target, lam, bias=bias, mixup_weight=mixup_weight, row_weight=row_weight,
            pair_weight=pair_weight, ntp_denominator=ntp_denominator, mixup_denominator=mixup_denominator,
            ignore_index=ignore_index, **options._asdict(),
        )  # fmt: skip
    else:
        size = lam.shape[0]
        valid = target != ignore_index
        row_coef = coefficients(row_weight, valid, ntp_denominator)
        pair_valid = valid[:size] & valid[size : 2 * size]
        pair_coef = mixup_weight * coefficients(pair_weight, pair_valid, mixup_denominator)
        needs = needs_of(hidden, weight, bias)
        stored = schedule == "stored" and any(needs)  # without gradients the forward needs no logits at all
        inputs = (torch.where(valid, target, -1), lam, row_coef, pair_coef)
        if main_grad is not None:
            loss, *statistics, _ = main_grads.main_grad_loss(
                hidden, weight, bias, *inputs, main_grad, options=options.as_list(), needs=needs,
                scratch_bytes=scratch, fused=impl == "fused", stored=stored,
            )  # fmt: skip
        elif shard is None:
            op = ops.chunked_fwd if impl == "chunked" else ops.stored_fwd if stored else fused_ops.fused_fwd
            loss, *statistics = op(hidden, weight, bias, *inputs, options.as_list(), needs, scratch)[:5]
        else:
            found = vocab_parallel_fwd(
                hidden, weight, bias, *inputs, shard.place, options.as_list(), needs, scratch, impl == "fused",
                shard.group_name,
            )  # fmt: skip
            loss, *statistics = found[:5]
        result = SFTMixLoss(loss, *(statistic.detach() for statistic in statistics))
    if plain:
        return result._replace(
            mixup_nll=torch.full((num_pairs,), float("nan"), device=hidden.device, dtype=result.nll.dtype)
        )
    return result


@follows_autocast
def linear_cross_entropy(
    hidden: Tensor,  # (..., D)
    weight: Tensor,  # (V, D)
    target: Tensor,  # (...) int64
    *,
    bias: Tensor | None = None,  # (V,)
    reduction: str = "mean",
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    main_grad: Tensor | None = None,  # (V, D) float32
    impl: str | None = None,
    schedule: str | None = None,
    scratch_bytes: int | None = None,
) -> Tensor:
    """Cross-entropy of ``hidden @ weight.T + bias`` against ``target``, without the logits: the case M = 0.

    Args as in :func:`sftmix_loss`; ``hidden`` may have any batch dimensions, or none, and ``target`` the same.
    ``reduction`` is "mean" (over rows that are not ignored; 0, not NaN, when all are), "sum" or "none". With "none"
    any upstream gradient per row is right, so the backward recomputes the logits: 4 products instead of 3 where
    ``chunked`` runs, no difference for ``fused``, whose ``schedule`` must then not be "stored".

    Returns: a scalar, or with "none" a tensor of target's shape; float32 (float64 for float64 inputs).
    Raises: ValueError naming the argument.
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction: expected 'mean', 'sum' or 'none', got {reduction!r}")
    if not isinstance(hidden, Tensor) or hidden.ndim < 1:
        raise ValueError(f"hidden: expected a floating tensor [..., D], got {checks.describe(hidden)}")
    checks.check_tensor(
        "target", target, {f"N{i}": n for i, n in enumerate(hidden.shape[:-1])}, (torch.int64,)
    )
    rows, targets = hidden.reshape(-1, hidden.shape[-1]), target.reshape(-1)
    options = HeadOptions(softcap, logit_scale, label_smoothing, z_loss)
    if reduction == "none":
        if schedule == "stored":
            raise ValueError("schedule: expected 'recompute' or None with reduction='none', got 'stored'")
        terms = _row_losses(
            rows, weight, targets, bias=bias, ignore_index=ignore_index, options=options, main_grad=main_grad,
            impl=impl, schedule=schedule, scratch_bytes=scratch_bytes,
        )  # fmt: skip
        return terms.reshape(target.shape)
    lam = torch.empty(0, dtype=torch.float32, device=hidden.device)
    return sftmix_loss(
        rows, weight, targets, lam, bias=bias, ntp_denominator=1 if reduction == "sum" else None,
        mixup_weight=0.0, ignore_index=ignore_index, main_grad=main_grad, impl=impl, schedule=schedule,
        scratch_bytes=scratch_bytes,
        **options._asdict(),
    ).loss  # fmt: skip


def _row_losses(
    hidden: Tensor, weight: Tensor, target: Tensor, *, bias: Tensor | None, ignore_index: int,
    options: HeadOptions, main_grad: Tensor | None, impl: str | None, schedule: str | None,
    scratch_bytes: int | None,
) -> Tensor:  # fmt: skip
    """Each row's next-token term [N], 0 at ignored rows."""
    check_rows(hidden, weight, target, bias, ignore_index, options)
    impl = choose(impl, hidden, why_not_fused(hidden))
    check_schedule(schedule, impl)
    checks.check_main_grad(main_grad, weight, reference.sum_dtype(hidden.dtype))
    scratch = scratch_of(scratch_bytes, impl)
    if impl == "reference":
        if main_grad is not None:
            weight = main_grads.sending_gradient_to(weight, main_grad)
        return reference.row_losses(
            hidden, weight, target, bias=bias, ignore_index=ignore_index, **options._asdict()
        )
    target, needs = torch.where(target != ignore_index, target, -1), needs_of(hidden, weight, bias)
    if main_grad is not None:
        none = torch.empty(0, dtype=torch.float32, device=hidden.device)
        inputs = (target, none, (target >= 0).double(), none.double(), main_grad)
        return main_grads.main_grad_loss(
            hidden, weight, bias, *inputs, options=options.as_list(), needs=needs, scratch_bytes=scratch,
            fused=impl == "fused", stored=False,
        )[-1]  # fmt: skip
    op = ops.chunked_rows_fwd if impl == "chunked" else fused_ops.fused_rows_fwd
    return op(hidden, weight, bias, target, options.as_list(), needs, scratch)[0]


@follows_autocast
def token_stats(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    target: Tensor,  # (N,) int64
    *,
    bias: Tensor | None = None,  # (V,)
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    lora: LoRA | None = None,
    impl: str | None = None,
    scratch_bytes: int | None = None,
) -> TokenStats:
    """Log-probability, log-sum-exp, entropy and top-1 hit of each row, forward only and without the logits.

    Args as in :func:`sftmix_loss`. A tie for the largest logit counts as a hit.

    Returns: TokenStats of [N] tensors, detached; log-probability 0 and no hit at ignored rows.
    Raises: ValueError naming the argument.
    """
    options = HeadOptions(softcap, logit_scale)
    check_rows(hidden, weight, target, bias, ignore_index, options)
    if lora is not None:
        hidden, weight = with_lora(hidden, weight, lora)
    impl = choose(impl, hidden, why_not_fused(hidden))
    scratch = scratch_of(scratch_bytes, impl)
    if impl == "reference":
        return reference.token_stats(
            hidden, weight, target, bias=bias, ignore_index=ignore_index, softcap=softcap, logit_scale=logit_scale
        )  # fmt: skip
    op = ops.chunked_stats if impl == "chunked" else fused_ops.fused_stats
    nll, lse, entropy, is_top1 = op(
        hidden.detach(), weight.detach(), None if bias is None else bias.detach(),
        torch.where(target != ignore_index, target, -1), options.as_list(), scratch,
    )  # fmt: skip
    return TokenStats(-nll, lse, entropy, is_top1)

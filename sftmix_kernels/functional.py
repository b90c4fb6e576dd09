"""The public functions: check the arguments, choose the implementation, reduce."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import checks, fused_ops, ops, reference, row_ops
from . import main_grad as main_grads
from .arguments import HeadOptions, coefficients, scratch_of
from .autocast import follows_autocast
from .choice import check_schedule, choose, why_not_fused
from .default_schedule import resolve_schedule
from .inputs import Inputs, check_inputs
from .lora_head import LoRA
from .reference import SFTMixLoss, TokenStats
from .vocab_parallel import vocab_parallel_fwd, vocab_parallel_rows_fwd, vocab_parallel_stats
from .vocab_shard import check_vocab_schedule


def _choose(
    inputs: Inputs, impl: str | None, schedule: str | None, scratch_bytes: int | None
) -> tuple[str, int]:
    """The implementation, and the operators' ``scratch_bytes``; a named one that cannot serve raises."""
    impl = choose(impl, inputs.hidden, why_not_fused(inputs.hidden))
    check_schedule(schedule, impl)
    if inputs.shard is not None:
        check_vocab_schedule(schedule)
    return impl, scratch_of(scratch_bytes, impl)


def _operator(impl: str, schedule: str | None) -> Any:
    if impl == "chunked":
        return ops.chunked_fwd
    return ops.stored_fwd if schedule == "stored" else fused_ops.fused_fwd


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
    ignored member adds nothing to it. M = 0, like ``mixup_weight=0``, is plain next-token loss, bit for bit. In nats:

        loss = sum_n row_weight_n nll_n / ntp_denominator + mixup_weight sum_m pair_weight_m mixup_m / mixup_denominator
        nll_n = lse z_n - z_n[y_n],   mixup_m = lse x_m - lam_m x_m[y_c] - (1 - lam_m) x_m[y_u]
        z_n = f(a_n),   x_m = f(lam_m a_c + (1 - lam_m) a_u),   a = W h + b,   f scales, then caps

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
            A and B get gradients. The weight is not copied, and costs nothing more where it is frozen (lora_head.py).
        vocab_parallel: a ProcessGroup or a 1-D DeviceMesh over whose ranks the rows of ``weight`` (and ``bias``, and
            B of ``lora``) are spread: each rank passes its shard [V_r, D], of any size, or a DTensor ``Shard(0)``,
            and the same rows. Every rank gets the same loss and the whole gradients of hidden and of A
            (vocab_parallel.py). Not with "stored", which makes gradients before all columns' sums are known.
        main_grad: [V, D] float32 (float64 for float64 inputs): the gradient of weight is added here in the backward,
            unrounded, and ``weight.grad`` stays as it is: no second [V, D] buffer ("stored" keeps its dweight until
            then; "chunked" makes the logits again in the backward, 4 products instead of 3). Not beside lora or
            vocab_parallel, and not under FSDP2, which owns its gradients (main_grad.py).
        impl: "reference", "chunked", "fused"; None takes "fused" on a GPU whose triton has the dtype, else "chunked".
        schedule: how "fused" makes gradients: "recompute" keeps no logits and makes them again in the backward,
            a slice of the vocabulary at a time; "stored" turns a chunk of rows' logits into gradients in the forward,
            one product less, and holds them with a float32 dweight [V, D] until the backward. None takes the faster by
            fused/schedule.py's cost model, on this chip; "recompute" with vocab_parallel, when interpreted, and with
            main_grad, which is asked for to save the memory that "stored" would take.
        scratch_bytes: bound for the logits held at a time ("chunked": default 64 MiB; "fused": its dlogits slice, or
            the stored schedule's chunk, by default 4096 rows and at most half of all). With schedule None "stored"
            is taken only where its float32 dweight fits too, and its chunk gets the rest.

    Returns:
        SFTMixLoss: ``loss`` is differentiable in hidden, weight and bias; everything else is detached. With no
        supervised row ``loss`` is 0 and its gradients are 0.

    Memory above inputs and gradients, with S = ``scratch_bytes`` and O(N + M) of statistics:
        no gradient needed: nothing by "fused", S by "chunked" (CPU: at most 8 MiB); "recompute": S + 4 N D, float32 S;
        "stored" and "chunked": S + 4 V D + N D itemsize, in float32 on a CPU S (the rest is handed over as gradients);
        "chunked", 16 bits without 16-bit products: beside it 8 n D (chunks of n rows) and a slice's 8 MiB or 512 D.
        What is smaller stands with chunked_loss, fused_forward, fused_backward and stored_loss.

    Raises:
        ValueError: naming the argument, on a wrong shape, dtype, device or value. On a GPU, and under compile, wrong
            values of target, lam and weights raise through ``torch._assert_async`` instead.

    Source: Xiao et al., arXiv 2410.05248, section 3: L = L_NTP + mu * L_Mixup.
    """
    options = HeadOptions(softcap, logit_scale, label_smoothing, z_loss)
    inputs = check_inputs(
        hidden, weight, target, bias=bias, ignore_index=ignore_index, options=options, lora=lora,
        vocab_parallel=vocab_parallel,
    )  # fmt: skip
    checks.check_lam(lam, hidden.shape[0])
    num_pairs = lam.shape[0]
    checks.check_weights("row_weight", row_weight, {"N": hidden.shape[0]})
    checks.check_weights("pair_weight", pair_weight, {"M": num_pairs})
    checks.check_devices(hidden.device, lam=lam, row_weight=row_weight, pair_weight=pair_weight)
    checks.check_scalar("mixup_weight", mixup_weight, positive=False)
    for name, value in (("ntp_denominator", ntp_denominator), ("mixup_denominator", mixup_denominator)):
        if value is not None:
            checks.check_scalar(name, value, positive=True)
    checks.check_main_grad(
        main_grad, weight, reference.sum_dtype(hidden.dtype), lora=lora, vocab_parallel=vocab_parallel
    )
    impl, scratch = _choose(inputs, impl, schedule, scratch_bytes)
    plain = not isinstance(mixup_weight, Tensor) and mixup_weight == 0
    if plain:
        lam, pair_weight = lam[:0], None
    if impl == "reference":
        rows, weight, layer = inputs.for_reference(main_grad)
        result = reference.sftmix_loss(
            rows, weight, target, lam, mixup_weight=mixup_weight, row_weight=row_weight,
            pair_weight=pair_weight, ntp_denominator=ntp_denominator, mixup_denominator=mixup_denominator,
            ignore_index=ignore_index, **layer, **options._asdict(),
        )  # fmt: skip
    else:
        size = lam.shape[0]
        valid = target != ignore_index
        row_coef = coefficients(row_weight, valid, ntp_denominator)
        pair_valid = valid[:size] & valid[size : 2 * size]
        pair_coef = mixup_weight * coefficients(pair_weight, pair_valid, mixup_denominator)
        needs = inputs.needs()
        if impl == "fused" and inputs.shard is None:
            preferred = schedule if schedule or main_grad is None else "recompute"
            schedule, scratch = resolve_schedule(preferred, *inputs.head[:2], needs=needs, scratch=scratch)
        arguments = (*inputs.head, torch.where(valid, target, -1), lam, row_coef, pair_coef)
        numbers = (options.as_list(), needs, scratch)
        if main_grad is not None:
            found = main_grads.main_grad_loss(
                *arguments, main_grad, options=options.as_list(), needs=needs[:3], scratch_bytes=scratch,
                fused=impl == "fused", stored=schedule == "stored",
            )  # fmt: skip
        elif inputs.shard is None:
            found = _operator(impl, schedule)(*arguments, *numbers, *inputs.low_rank)
        else:
            place, group = inputs.shard.place, inputs.shard.group_name
            found = vocab_parallel_fwd(*arguments, place, *numbers, impl == "fused", group, *inputs.low_rank)
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
    lora: LoRA | None = None,
    vocab_parallel: Any = None,
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

    Returns: a scalar, or with "none" a tensor of target's shape, in nats; float32 (float64 for float64 inputs).
    Raises: ValueError as :func:`sftmix_loss` does, and on another ``reduction``, or "none" with "stored".
    Memory as of :func:`sftmix_loss`; with "none" nothing of size [V, D] is kept until the backward.
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
        inputs = check_inputs(
            rows, weight, targets, bias=bias, ignore_index=ignore_index, options=options, lora=lora,
            vocab_parallel=vocab_parallel,
        )  # fmt: skip
        checks.check_main_grad(
            main_grad, weight, reference.sum_dtype(hidden.dtype), lora=lora, vocab_parallel=vocab_parallel
        )
        impl, scratch = _choose(inputs, impl, schedule, scratch_bytes)
        terms = _row_losses(
            inputs, targets, ignore_index, options, main_grad=main_grad, impl=impl, scratch=scratch
        )
        return terms.reshape(target.shape)
    lam = torch.empty(0, dtype=torch.float32, device=hidden.device)
    return sftmix_loss(
        rows, weight, targets, lam, bias=bias, ntp_denominator=1 if reduction == "sum" else None,
        mixup_weight=0.0, ignore_index=ignore_index, lora=lora, vocab_parallel=vocab_parallel, main_grad=main_grad,
        impl=impl, schedule=schedule, scratch_bytes=scratch_bytes, **options._asdict(),
    ).loss  # fmt: skip


def _row_losses(
    inputs: Inputs, target: Tensor, ignore_index: int, options: HeadOptions, *, main_grad: Tensor | None, impl: str,
    scratch: int,
) -> Tensor:  # fmt: skip
    """Each row's next-token term [N], 0 at ignored rows."""
    if impl == "reference":
        hidden, weight, layer = inputs.for_reference(main_grad)
        return reference.row_losses(
            hidden, weight, target, ignore_index=ignore_index, **layer, **options._asdict()
        )
    target, needs = torch.where(target != ignore_index, target, -1), inputs.needs()
    if main_grad is not None:
        none = torch.empty(0, dtype=torch.float32, device=target.device)
        rows = (target, none, (target >= 0).double(), none.double(), main_grad)
        return main_grads.main_grad_loss(
            *inputs.head, *rows, options=options.as_list(), needs=needs[:3], scratch_bytes=scratch,
            fused=impl == "fused", stored=False,
        )[-1]  # fmt: skip
    arguments, numbers = (*inputs.head, target), (options.as_list(), needs, scratch)
    if inputs.shard is not None:
        place, group = inputs.shard.place, inputs.shard.group_name
        found = vocab_parallel_rows_fwd(*arguments, place, *numbers, impl == "fused", group, *inputs.low_rank)
        return found[0]
    op = row_ops.chunked_rows_fwd if impl == "chunked" else fused_ops.fused_rows_fwd
    return op(*arguments, *numbers, *inputs.low_rank)[0]


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
    vocab_parallel: Any = None,
    impl: str | None = None,
    scratch_bytes: int | None = None,
) -> TokenStats:
    """Log-probability, log-sum-exp, entropy and top-1 hit of each row, forward only and without the logits.

    Args as in :func:`sftmix_loss`. A tie for the largest logit counts as a hit.

    Returns: TokenStats of [N] tensors, detached, float32 (float64 for float64 inputs) in nats, ``is_top1`` bool;
        log-probability 0 and no hit at ignored rows. Entropy is lse z - sum_j p_j z_j, p = softmax z.
    Raises: ValueError as :func:`sftmix_loss` does.
    Memory: O(N) by "fused"; by "chunked" ``scratch_bytes``, on a CPU at most 8 MiB of it, the entropy's tile included.
    """
    options = HeadOptions(softcap, logit_scale)
    inputs = check_inputs(
        hidden, weight, target, bias=bias, ignore_index=ignore_index, options=options, lora=lora,
        vocab_parallel=vocab_parallel,
    ).detach()  # fmt: skip
    impl, scratch = _choose(inputs, impl, None, scratch_bytes)
    if impl == "reference":
        rows, weight, layer = inputs.for_reference()
        return reference.token_stats(
            rows, weight, target, ignore_index=ignore_index, softcap=softcap, logit_scale=logit_scale, **layer
        )  # fmt: skip
    arguments = (*inputs.head, torch.where(target != ignore_index, target, -1))
    if inputs.shard is None:
        op = row_ops.chunked_stats if impl == "chunked" else fused_ops.fused_stats
        found = op(*arguments, options.as_list(), scratch, *inputs.low_rank)
    else:
        place, group = inputs.shard.place, inputs.shard.group_name
        found = vocab_parallel_stats(
            *arguments, place, options.as_list(), scratch, impl == "fused", group, *inputs.low_rank
        )
    nll, lse, entropy, is_top1 = found
    return TokenStats(-nll, lse, entropy, is_top1)

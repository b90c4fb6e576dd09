"""The public functions: make a call, run it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import checks, reference
from .arguments import HeadOptions, Rows, Ways, for_reference, for_reference_loss, make_call, number_or_tensor
from .autocast import follows_autocast
from .exchange import run as run_exchanged
from .lora_head import LoRA
from .operators import run
from .reference import SFTMixLoss, TokenStats


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
    class_weight: Tensor | None = None,  # (V,)
    ntp_denominator: float | Tensor | None = None,
    mixup_denominator: float | Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    token_scaling: bool = False,
    want_predicted: bool = False,
    lora: LoRA | None = None,
    vocab_parallel: Any = None,
    exchange: Any = None,
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
        lam: [M] float32 or float64 in [0, 1], the share of the confident member; 2M at most N. A member whose share is
            exactly 0 adds exactly nothing to its mixture.
        bias: [V], dtype of ``hidden``.
        mixup_weight: mu of the paper, a number ≥ 0 or a 0-d tensor. The number 0 skips the mixture (``mixup_nll``
            is then NaN); under ``torch.compile`` pass a value that changes between steps as a tensor, and for a CUDA
            graph as a tensor on hidden's device: one of the CPU would be frozen into it, and is refused.
        row_weight: [N] weights of the rows' next-token terms. pair_weight: [M] weights of the pairs' Mixup terms;
            float32, float64, bool or integers.
        class_weight: [V] float32 or float64, at least 0: c of the rows' next-token terms, as torch's cross_entropy has
            it; with ``vocab_parallel`` that of the whole vocabulary. ``nll`` and the mixture have none.
        ntp_denominator, mixup_denominator: what the two sums are divided by, a number or a 0-d tensor (float32, float64
            or integers; not 16 bits, which round counts); by default the supervised rows (with ``class_weight`` the sum
            of their targets') and the valid pairs of this call. 0 / 0 is 0; 0 under something is refused.
        ignore_index: target value of rows that bear no loss: whatever such a row holds, NaN too, changes nothing.
        softcap: logits become ``softcap * tanh(logits / softcap)``, after mixing. logit_scale: factor before that.
        label_smoothing, z_loss: e in [0, 1] and z ≥ 0; a row's next-token term becomes
            (1 - e) c[y] nll + e/V sum_v c_v (lse - z_v) + z lse². The mixture has neither, and ``nll`` stays -log p.
        token_scaling: a row's term is multiplied by its target's probability, detached (DFT, arXiv 2508.05629).
        want_predicted: give the token of each row's largest logit, too.
        lora: (A [r, D], B [V, r], scaling): the output layer is ``weight + scaling * B @ A``, which is not formed;
            A and B get gradients. The weight is not copied, and costs nothing more where it is frozen (lora_head.py).
        vocab_parallel: a ProcessGroup or a 1-D DeviceMesh over whose ranks the rows of ``weight`` (and ``bias``, and
            B of ``lora``) are spread: each rank passes its shard [V_r, D], of any size, or a DTensor ``Shard(0)``,
            and the same rows. Every rank gets the same loss and the whole gradients of hidden and of A
            (vocab_parallel/). Not with "stored", which makes gradients before all columns' sums are known.
        exchange: a ProcessGroup or a 1-D DeviceMesh like ``vocab_parallel``'s, but each rank passes its own rows, any
            number of them, none too, and gets its own loss (default denominators count its own rows). The hidden
            states are gathered, never the weight. The gradient of weight, bias and B is whole on its owner, that of
            the sum over the ranks of each loss times its upstream: what FSDP with summed gradients gives. hidden and A
            get those of this rank's rows. Forward and backward are collective calls: every rank makes both, with the
            same options (target, lam, weights, denominators and mixup_weight may differ); a call that one rank refuses
            all refuse. The host waits once, for the ranks' sizes: no CUDA graph, and a graph break under compile
            (exchange.py). Not with "stored", nor with ``vocab_parallel``.
        main_grad: [V, D] float32 (float64 for float64 inputs): the gradient of weight is added here in the backward,
            unrounded, and ``weight.grad`` stays as it is: no second [V, D] buffer ("stored" keeps its dweight until
            then; "chunked" makes the logits again in the backward, 4 products instead of 3). With ``vocab_parallel``
            or ``exchange`` the shard's, [V_r, D]. Not under FSDP2, which owns its gradients. Under DDP it is not
            reduced over ranks: DDP sees gradients of parameters alone, so all-reduce the buffer after the backward.
        impl: "reference", "chunked", "fused"; None takes "fused" on a GPU whose triton has the dtype, else "chunked".
        schedule: how "fused" makes gradients: "recompute" keeps no logits and makes them again in the backward,
            a slice of the vocabulary at a time; "stored" turns a chunk of rows' logits into gradients in the forward,
            one product less, and holds them with a float32 dweight [V, D] until the backward. None takes the faster by
            fused/schedule.py's cost model, on this chip, "stored" only where that takes at most 1/32 of the GPU's
            memory; "recompute" with vocab_parallel or exchange, when interpreted, and with main_grad. "recompute" and
            "chunked" give the same loss with gradients as without; "stored" rounds each logit of 16-bit inputs once in
            between, so that where None changes schedule with N, a 16-bit loss changes by that rounding.
        scratch_bytes: bound for the logits held at a time ("chunked": default 64 MiB, off a CPU 512; "fused": its
            dlogits slice, or the stored schedule's chunk, by default 4096 rows and at most half of all). With schedule
            None "stored" is taken only where its float32 dweight fits into it too, and its chunk gets the rest.

    Returns:
        SFTMixLoss: ``loss`` is differentiable in hidden, weight and bias; everything else is detached. With no
        supervised row ``loss`` is 0 and its gradients are 0. ``z_loss`` is the part of ``loss`` that the z-loss is.

    Memory above inputs and gradients, with S = ``scratch_bytes`` and O(N + M) of statistics:
        no gradient needed: nothing by "fused", S by "chunked" (CPU: at most 8 MiB); "recompute": S + N D itemsize, and
        with 16 bits 4 N D;
        "stored" and "chunked": S + 4 V D + N D itemsize, in float32 on a CPU S (the rest is handed over as gradients);
        "chunked", 16 bits without 16-bit products: beside it 8 n D (chunks of n rows) and a slice's 8 MiB or 512 D.
        What is smaller stands with the engines' functions.

    Raises:
        ValueError: naming the argument, on a wrong shape, dtype, device or value. On a GPU, and under compile, wrong
            values of target, lam and weights raise through ``torch._assert_async`` instead.

    Source: Xiao et al., arXiv 2410.05248, section 3: L = L_NTP + mu * L_Mixup.
    """
    checks.check_flag("want_predicted", want_predicted)
    rows = Rows(
        lam, row_weight, pair_weight, class_weight, mixup_weight, ntp_denominator, mixup_denominator, None,
        ignore_index, token_scaling,
    )  # fmt: skip
    ways = Ways(
        lora,
        vocab_parallel,
        main_grad,
        impl,
        schedule,
        scratch_bytes,
        predicted=want_predicted,
        exchange=exchange,
    )
    options = HeadOptions(softcap, logit_scale, label_smoothing, z_loss)
    call, choice = make_call(hidden, weight, target, bias, options, rows, ways)
    if choice.impl == "reference":
        names = ("mixup_weight", "ntp_denominator", "mixup_denominator")
        numbers: dict[str, Any] = {name: number_or_tensor(call, name) for name in names}
        result = reference.sftmix_loss(
            lam=call.lam, row_weight=call.row_weight, pair_weight=call.pair_weight, want_predicted=want_predicted,
            **numbers, **for_reference_loss(call, choice.ranks),
        )  # fmt: skip
    else:
        found = run(call, choice.made) if choice.ranks is None else run_exchanged(call, choice.ranks)
        result = SFTMixLoss(
            found.loss, found.nll.detach(), found.lse.detach(), found.is_top1, found.mixup_nll.detach(),
            found.z_loss.detach(), found.predicted if want_predicted else None,
        )  # fmt: skip
    if call.lam.shape[0] == lam.shape[0]:
        return result
    nothing = torch.full((lam.shape[0],), float("nan"), device=hidden.device, dtype=result.nll.dtype)
    return result._replace(mixup_nll=nothing)


@follows_autocast
def linear_cross_entropy(
    hidden: Tensor,  # (..., D)
    weight: Tensor,  # (V, D)
    target: Tensor,  # (...) int64
    *,
    bias: Tensor | None = None,  # (V,)
    class_weight: Tensor | None = None,  # (V,)
    reduction: str = "mean",
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    token_scaling: bool = False,
    shift: int = 0,
    lora: LoRA | None = None,
    vocab_parallel: Any = None,
    exchange: Any = None,
    main_grad: Tensor | None = None,  # (V, D) float32
    impl: str | None = None,
    schedule: str | None = None,
    scratch_bytes: int | None = None,
) -> Tensor:
    """Cross-entropy of ``hidden @ weight.T + bias`` against ``target``, without the logits: the case M = 0.

    Args as in :func:`sftmix_loss`; ``hidden`` may have any batch dimensions, or none, and ``target`` the same.
    ``reduction`` is "mean" (over rows that are not ignored, with ``class_weight`` over the sum of their targets'
    weights; 0, not NaN, when all are), "sum" or "none". ``shift`` k (True is 1): row t of a last dimension of T rows is
    scored against target t + k, without a copy of hidden; "none" then returns T - k of them. With "none"
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
    shift = checks.check_shift(shift, target)
    if shift:  # targets move, not rows: a slice of rows would have to be copied
        target = F.pad(target[..., shift:], (0, shift), value=ignore_index)
    rows = Rows(
        class_weight=class_weight, ntp_denominator=1 if reduction == "sum" else None, ignore_index=ignore_index,
        token_scaling=token_scaling,
    )  # fmt: skip
    ways = Ways(
        lora,
        vocab_parallel,
        main_grad,
        impl,
        schedule,
        scratch_bytes,
        rows=reduction == "none",
        exchange=exchange,
    )
    options = HeadOptions(softcap, logit_scale, label_smoothing, z_loss)
    call, choice = make_call(
        hidden.reshape(-1, hidden.shape[-1]), weight, target.reshape(-1), bias, options, rows, ways
    )
    if choice.impl != "reference":
        found = run(call, choice.made) if choice.ranks is None else run_exchanged(call, choice.ranks)
        if reduction != "none":
            return found.loss
        terms = found.term
    elif reduction != "none":
        denominator = number_or_tensor(call, "ntp_denominator")
        return reference.sftmix_loss(
            lam=call.lam,
            mixup_weight=0.0,
            ntp_denominator=denominator,
            **for_reference_loss(call, choice.ranks),
        ).loss
    else:
        terms = reference.row_losses(**for_reference_loss(call, choice.ranks))
    terms = terms.reshape(target.shape)
    return terms[..., : target.shape[-1] - shift] if shift else terms


@follows_autocast
def token_stats(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    target: Tensor,  # (N,) int64
    *,
    bias: Tensor | None = None,  # (V,)
    tokens: Tensor | None = None,  # (N, K) int64
    differentiable: bool = False,
    want_predicted: bool = False,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    lora: LoRA | None = None,
    vocab_parallel: Any = None,
    exchange: Any = None,
    impl: str | None = None,
    scratch_bytes: int | None = None,
) -> TokenStats:
    """Log-probability, log-sum-exp, entropy and top-1 hit of each row, without the logits.

    Args as in :func:`sftmix_loss`. ``tokens`` [N, K] int64: further tokens of each row whose log-probabilities are
    wanted, ``ignore_index`` where there are fewer. ``differentiable``: log-probabilities, lse and entropy carry
    gradients, right for any upstream; the backward makes the logits again. ``want_predicted``: the token of each row's
    largest logit, too, the first of equals. A tie for the largest logit counts as a hit.

    Returns: TokenStats of [N] tensors, detached but for ``differentiable``, float32 (float64 for float64 inputs) in
        nats, ``is_top1`` bool; log-probability 0 and no hit at ignored rows. Entropy is lse z - sum_j p_j z_j,
        p = softmax z. ``predicted`` [N] and ``token_logprob`` [N, K] are None where they are not asked for.
    Raises: ValueError as :func:`sftmix_loss` does.
    Memory: O(N K) by "fused"; by "chunked" ``scratch_bytes``, on a CPU at most 8 MiB of it, the entropy's tile
        included. The backward of differentiable ones: as of :func:`sftmix_loss`, and the entropy's logits once more.
    """
    checks.check_flag("differentiable", differentiable)
    checks.check_flag("want_predicted", want_predicted)
    rows = Rows(ignore_index=ignore_index, tokens=tokens)
    ways = Ways(
        lora, vocab_parallel, None, impl, None, scratch_bytes, rows=True, detached=not differentiable, entropy=True,
        predicted=want_predicted, exchange=exchange,
    )  # fmt: skip
    call, choice = make_call(hidden, weight, target, bias, HeadOptions(softcap, logit_scale), rows, ways)
    if choice.impl == "reference":
        found = reference.token_stats(
            tokens=tokens, want_predicted=want_predicted, **for_reference(call, choice.ranks)
        )
        if differentiable:
            return found
        # A list: torch 2.11 cannot trace a generator here.
        return TokenStats._make([None if value is None else value.detach() for value in found])
    terms = run(call, choice.made) if choice.ranks is None else run_exchanged(call, choice.ranks)
    return TokenStats(
        -terms.term, terms.lse, terms.entropy, terms.is_top1, terms.predicted if want_predicted else None,
        None if tokens is None else terms.token_logprob,
    )  # fmt: skip

"""The specification: SFTMix in plain differentiable torch, with every logit in memory.

Rows are the M confident rows c, their M partners u in the same order, then unpaired rows. With W [V, D] and b [V]:

    f(h)        = cap * tanh(s * (W h + b) / cap)                       (cap absent: s * (W h + b))
                  with W h + up low in place of W h where h has low-rank features low [r] and up is [V, r]
    nll_i       = lse_i - f(h_i)[y_i],    lse_i = logsumexp f(h_i),    p_i = exp(-nll_i), a constant
    term_i      = ((1 - e) k[y_i] nll_i + (e / V) sum_v k_v (lse_i - f(h_i)_v) + z lse_i^2) * (p_i, if token_scaling)
    z~_j        = lam_j h^c_j + (1 - lam_j) h^u_j
    mixup_nll_j = H(lam_j y^c_j + (1 - lam_j) y^u_j, softmax f(z~_j))
    loss        = sum_i w_i term_i / D_ntp + mu * sum_j v_j mixup_nll_j / D_mix

e is label smoothing, z the z-loss weight, k the class weights (1 unless given), as torch's cross_entropy has them; they
act on the next-token terms alone, as token scaling does. D_ntp is the sum of k[y_i] over supervised rows and D_mix the
number of pairs without an ignored member, unless given; 0 / 0 is 0. A factor of 0 selects 0 and does not multiply, so
that neither a logit of -inf nor what an ignored row holds makes a NaN of it.

Sources: Xiao et al., SFTMix, arXiv 2410.05248, section 3; token scaling: Wu et al., arXiv 2508.05629.
Every other implementation is tested against this one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class SFTMixLoss(NamedTuple):
    """What :func:`sftmix_kernels.sftmix_loss` returns. All but ``loss`` are detached; floats are of loss's dtype.

    loss       scalar float32 (float64 for float64 inputs)
    nll        [N], -log p(target) of each row, unweighted, in nats; 0 at ignored rows
    lse        [N], log-sum-exp of each row's logits, in nats; NaN at an ignored row that is not finite
    is_top1    [N] bool, the target's logit is the row's largest; False at ignored rows
    mixup_nll  [M], cross-entropy of each pair's mixture, unweighted, in nats; 0 at pairs with an ignored member,
               NaN where the number 0 was given as ``mixup_weight`` and no mixture was computed
    z_loss     scalar, the z-loss part of ``loss``
    predicted  [N] int64, the token of each row's largest logit, the first of equals; -1 at ignored rows; None
               unless asked for
    """

    loss: Tensor
    nll: Tensor
    lse: Tensor
    is_top1: Tensor
    mixup_nll: Tensor
    z_loss: Tensor
    predicted: Tensor | None


class TokenStats(NamedTuple):
    """What :func:`sftmix_kernels.token_stats` returns, detached unless asked otherwise; floats as of SFTMixLoss.

    logprob        [N], log p(target), in nats; 0 at ignored rows
    lse            [N], log-sum-exp of the row's logits, in nats; NaN at an ignored row that is not finite
    entropy        [N], entropy of the row's distribution, in nats; likewise
    is_top1        [N] bool, the target's logit is the row's largest; False at ignored rows
    predicted      [N] int64 or None, as of SFTMixLoss
    token_logprob  [N, K], log p of each given token, in nats; 0 at ignored tokens and rows; None without tokens
    """

    logprob: Tensor
    lse: Tensor
    entropy: Tensor
    is_top1: Tensor
    predicted: Tensor | None
    token_logprob: Tensor | None


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which logits are reduced: float64 for float64 inputs, float32 otherwise."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Layer(NamedTuple):
    """What gives the logits of a row: an affine map, then scale and cap."""

    weight: Tensor  # (V, D)
    bias: Tensor | None = None  # (V,)
    softcap: float | None = None
    logit_scale: float = 1.0
    up: Tensor | None = None  # (V, r)
    join: Callable[[Tensor], Tensor] | None = None  # columns of one shard (N, V_r) to those of all (N, V)

    def affine(self, hidden: Tensor, low: Tensor | None = None) -> Tensor:  # (N, D), (N, r) -> (N, V)
        """W h + b of each row: products in the inputs' dtype, everything after them in float32 (float64)."""
        logits = F.linear(hidden, self.weight, self.bias)
        if low is not None and self.up is not None:
            logits = logits + F.linear(low, self.up)
        logits = logits.to(sum_dtype(hidden.dtype))
        return logits if self.join is None else self.join(logits)

    def scaled(self, affine: Tensor) -> Tensor:
        """Final logits from affine ones."""
        logits = affine * self.logit_scale
        return logits if not self.softcap else self.softcap * torch.tanh(logits / self.softcap)

    def logits(
        self, hidden: Tensor, low: Tensor | None, valid: Tensor, *, ignored_too: bool = False
    ) -> Tensor:  # (N, V), float32 or float64
        """Final logits of each row; those of a row outside ``valid`` [N] carry no gradient to anything.

        With ``ignored_too`` they do, where they are finite.
        """
        rows = [hidden] if low is None else [hidden, low]
        keep = valid | torch.stack([row.isfinite().all(dim=1) for row in rows]).all(dim=0)
        # 0 times what such a row holds would be NaN in the gradient of weight.
        affine = self.affine(*(torch.where(keep[:, None], row, 0) for row in rows))
        values = torch.where(keep[:, None], affine.detach(), float("nan"))
        carries = valid | (values < float("inf")).all(dim=1) if ignored_too else valid
        return self.scaled(torch.where(carries[:, None], affine, values))


def _times(factor: Tensor, value: Tensor) -> Tensor:
    """factor * value, but 0 where factor is 0, whatever value is there."""
    return factor * torch.where(factor != 0, value, 0)


def _over(total: Tensor, denominator: float | Tensor) -> Tensor:
    """total / denominator, but 0 over 0 is 0."""
    divisor = torch.as_tensor(denominator, dtype=total.dtype, device=total.device)
    return total / torch.where((total == 0) & (divisor == 0), 1, divisor)


def _target_logit(logits: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """The target's logit of each row [N], that of class 0 outside ``valid``."""
    return logits.gather(1, torch.where(valid, target, 0)[:, None]).squeeze(1)


def _where_valid(weight: Tensor | None, valid: Tensor, dtype: torch.dtype) -> Tensor:
    """The weights, 1 where there are none, and 0 outside ``valid``, of its shape."""
    return valid.to(dtype) if weight is None else torch.where(valid, weight.to(dtype), 0)


def _predicted(logits: Tensor, valid: Tensor) -> Tensor:
    return torch.where(valid, logits.detach().argmax(dim=1), -1)


class RowTerms(NamedTuple):
    """Of each row, [N]; 0 at ignored rows, but for lse."""

    term: Tensor  # its next-token term
    z_loss: Tensor  # the part of it that z lse^2 is
    nll: Tensor
    lse: Tensor
    class_weight: Tensor  # of its target


def row_terms(
    logits: Tensor,  # (N, V)
    target: Tensor,  # (N,)
    valid: Tensor,  # (N,) bool
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    class_weight: Tensor | None = None,  # (V,)
    token_scaling: bool = False,
) -> RowTerms:
    lse = torch.logsumexp(logits, dim=1)
    nll = torch.where(valid, lse - _target_logit(logits, target, valid), 0)
    term = z_term = torch.zeros_like(nll)
    chosen = None if class_weight is None else class_weight[torch.where(valid, target, 0)]
    chosen = _where_valid(chosen, valid, nll.dtype)
    if label_smoothing < 1:
        term = (1 - label_smoothing) * _times(chosen, nll)
    if label_smoothing > 0 and class_weight is None:
        term = term + label_smoothing * (lse - logits.mean(dim=1))
    elif label_smoothing > 0 and class_weight is not None:
        each = _times(class_weight.to(nll.dtype), lse[:, None] - logits)
        term = term + label_smoothing * each.mean(dim=1)
    if z_loss > 0:
        z_term = z_loss * lse.square()
    term = term + z_term
    if token_scaling:
        prob = torch.exp(-nll).detach()
        term, z_term = _times(prob, term), _times(prob, z_term)
    return RowTerms(torch.where(valid, term, 0), torch.where(valid, z_term, 0), nll, lse, chosen)


def _mix(rows: Tensor, lam: Tensor, pair_valid: Tensor) -> Tensor:  # (N, D), (M,), (M,) -> (M, D)
    """lam c + (1 - lam) u of each pair, in the rows' dtype; 0 outside ``pair_valid``."""
    num_pairs, share = lam.shape[0], lam[:, None].to(rows.dtype)
    mixed = _times(share, rows[:num_pairs]) + _times(1 - share, rows[num_pairs : 2 * num_pairs])
    return torch.where(pair_valid[:, None], mixed, 0)


def _mixup_nll(
    layer: Layer, hidden: Tensor, low: Tensor | None, target: Tensor, lam: Tensor, pair_valid: Tensor
) -> Tensor:  # (M,)
    """Cross-entropy of each pair's mixture with the mixed labels; 0 outside ``pair_valid``."""
    num_pairs = lam.shape[0]
    mixed = [_mix(rows, lam, pair_valid) for rows in (hidden, low) if rows is not None]
    logits = layer.scaled(layer.affine(*mixed))
    lse, lam = torch.logsumexp(logits, dim=1), lam.to(logits.dtype)
    nll_c = lse - _target_logit(logits, target[:num_pairs], pair_valid)
    nll_u = lse - _target_logit(logits, target[num_pairs : 2 * num_pairs], pair_valid)
    return torch.where(pair_valid, _times(lam, nll_c) + _times(1 - lam, nll_u), 0)


def sftmix_loss(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    target: Tensor,  # (N,) int64
    lam: Tensor,  # (M,) float32 or float64
    *,
    bias: Tensor | None = None,  # (V,)
    class_weight: Tensor | None = None,  # (V,)
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
    token_scaling: bool = False,
    want_predicted: bool = False,
    low: Tensor | None = None,  # (N, r)
    up: Tensor | None = None,  # (V, r)
    join: Callable[[Tensor], Tensor] | None = None,
) -> SFTMixLoss:
    """The loss of :func:`sftmix_kernels.sftmix_loss`, differentiable by autograd, without argument checks.

    ``join`` gathers the logits of a shard of the vocabulary to those of all its columns.
    """
    layer = Layer(weight, bias, softcap, logit_scale, up, join)
    num_pairs, dtype = lam.shape[0], sum_dtype(hidden.dtype)
    valid = target != ignore_index
    pair_valid = valid[:num_pairs] & valid[num_pairs : 2 * num_pairs]

    logits = layer.logits(hidden, low, valid)
    found = row_terms(
        logits, target, valid, label_smoothing=label_smoothing, z_loss=z_loss, class_weight=class_weight,
        token_scaling=token_scaling,
    )  # fmt: skip
    count = found.class_weight.sum() if ntp_denominator is None else ntp_denominator
    row_weight = _where_valid(row_weight, valid, dtype)
    ntp, z_part = (_over(_times(row_weight, part).sum(), count) for part in (found.term, found.z_loss))

    mixup_nll = _mixup_nll(layer, hidden, low, target, lam, pair_valid)
    count = pair_valid.sum() if mixup_denominator is None else mixup_denominator
    mixup = _over(_times(_where_valid(pair_weight, pair_valid, dtype), mixup_nll).sum(), count)
    loss = ntp + _times(torch.as_tensor(mixup_weight, dtype=dtype, device=hidden.device), mixup)

    is_top1 = (_target_logit(logits, target, valid) >= logits.amax(dim=1)) & valid
    return SFTMixLoss(
        loss, found.nll.detach(), found.lse.detach().clone(), is_top1, mixup_nll.detach(), z_part.detach(),
        _predicted(logits, valid) if want_predicted else None,
    )  # fmt: skip


def row_losses(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    target: Tensor,  # (N,)
    *,
    bias: Tensor | None = None,  # (V,)
    class_weight: Tensor | None = None,  # (V,)
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    token_scaling: bool = False,
    low: Tensor | None = None,  # (N, r)
    up: Tensor | None = None,  # (V, r)
    join: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:  # (N,)
    """The next-token term of each row, differentiable: ``linear_cross_entropy(reduction="none")``."""
    valid = target != ignore_index
    logits = Layer(weight, bias, softcap, logit_scale, up, join).logits(hidden, low, valid)
    return row_terms(
        logits, target, valid, label_smoothing=label_smoothing, z_loss=z_loss, class_weight=class_weight,
        token_scaling=token_scaling,
    ).term  # fmt: skip


def token_stats(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    target: Tensor,  # (N,) int64
    *,
    bias: Tensor | None = None,  # (V,)
    tokens: Tensor | None = None,  # (N, K) int64
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    want_predicted: bool = False,
    low: Tensor | None = None,  # (N, r)
    up: Tensor | None = None,  # (V, r)
    join: Callable[[Tensor], Tensor] | None = None,
) -> TokenStats:
    """The statistics of :func:`sftmix_kernels.token_stats`, differentiable, without argument checks.

    lse and entropy of an ignored row carry gradients where its hidden state and its logits are finite.
    """
    valid = target != ignore_index
    layer = Layer(weight, bias, softcap, logit_scale, up, join)
    logits = layer.logits(hidden, low, valid, ignored_too=True)
    lse, logprobs = torch.logsumexp(logits, dim=1), torch.log_softmax(logits, dim=1)
    target_logit = _target_logit(logits, target, valid)
    entropy = -(logprobs.exp() * torch.where(logits == -float("inf"), 0, logprobs)).sum(dim=1)
    token_logprob = None
    if tokens is not None:
        given = valid[:, None] & (tokens != ignore_index)
        token_logprob = torch.where(given, logits.gather(1, torch.where(given, tokens, 0)) - lse[:, None], 0)
    return TokenStats(
        torch.where(valid, target_logit - lse, 0), lse, entropy,
        (target_logit >= logits.amax(dim=1)) & valid,
        _predicted(logits, valid) if want_predicted else None,
        token_logprob,
    )  # fmt: skip

"""The specification: SFTMix in plain differentiable torch, with every logit in memory.

Rows are the M confident rows c, their M partners u in the same order, then unpaired rows. With W [V, D] and b [V]:

    f(h)        = cap * tanh(s * (W h + b) / cap)                       (cap absent: s * (W h + b))
                  with W h + up low in place of W h where h has low-rank features low [r] and up is [V, r]
    nll_i       = logsumexp f(h_i) - f(h_i)[y_i]
    term_i      = (1 - e) nll_i + e (logsumexp f(h_i) - mean_v f(h_i)_v) + z (logsumexp f(h_i))^2
    z~_j        = lam_j h^c_j + (1 - lam_j) h^u_j
    mixup_nll_j = H(lam_j y^c_j + (1 - lam_j) y^u_j, softmax f(z~_j))
    loss        = sum_i w_i term_i / D_ntp + mu * sum_j v_j mixup_nll_j / D_mix

e is label smoothing, z the z-loss weight, both 0 unless given; they act on the next-token terms alone.
Source: Xiao et al., SFTMix, arXiv 2410.05248, section 3. Every other implementation is tested against this one.
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
    lse        [N], log-sum-exp of each row's logits, in nats
    is_top1    [N] bool, the target's logit is the row's largest; False at ignored rows
    mixup_nll  [M], cross-entropy of each pair's mixture, unweighted, in nats; 0 at pairs with an ignored member,
               NaN where the number 0 was given as ``mixup_weight`` and no mixture was computed
    """

    loss: Tensor
    nll: Tensor
    lse: Tensor
    is_top1: Tensor
    mixup_nll: Tensor


class TokenStats(NamedTuple):
    """What :func:`sftmix_kernels.token_stats` returns; every field is [N] and detached, floats as of SFTMixLoss.

    logprob  log p(target), in nats; 0 at ignored rows
    lse      log-sum-exp of the row's logits, in nats
    entropy  entropy of the row's distribution, in nats
    is_top1  bool, the target's logit is the row's largest; False at ignored rows
    """

    logprob: Tensor
    lse: Tensor
    entropy: Tensor
    is_top1: Tensor


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which logits are reduced: float64 for float64 inputs, float32 otherwise."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Layer(NamedTuple):
    """What gives the logits of a row."""

    weight: Tensor  # (V, D)
    bias: Tensor | None = None  # (V,)
    softcap: float | None = None
    logit_scale: float = 1.0
    up: Tensor | None = None  # (V, r)
    join: Callable[[Tensor], Tensor] | None = None  # columns of one shard (N, V_r) to those of all (N, V)

    def logits(
        self,
        hidden: Tensor,  # (N, D)
        low: Tensor | None = None,  # (N, r)
    ) -> Tensor:  # (N, V), float32 or float64
        """Final logits of each row: products in the inputs' dtype, everything after them in float32 (float64)."""
        logits = F.linear(hidden, self.weight, self.bias)
        if low is not None and self.up is not None:
            logits = logits + F.linear(low, self.up)
        logits = logits.to(sum_dtype(hidden.dtype))
        if self.join is not None:
            logits = self.join(logits)
        logits = logits * self.logit_scale
        return logits if not self.softcap else self.softcap * torch.tanh(logits / self.softcap)


def _target_logit(logits: Tensor, target: Tensor) -> Tensor:
    return logits.gather(1, target.clamp(min=0)[:, None]).squeeze(1)


def row_terms(
    logits: Tensor,  # (N, V)
    target: Tensor,  # (N,)
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """term (smoothed, with z-loss), nll, lse and is_top1 of each row; 0 and False at ignored rows, but for lse."""
    valid = target != ignore_index
    lse = torch.logsumexp(logits, dim=1)
    target_logit = _target_logit(logits, torch.where(valid, target, 0))
    nll = torch.where(valid, lse - target_logit, torch.zeros_like(lse))
    term = (1 - label_smoothing) * nll + label_smoothing * (lse - logits.mean(dim=1)) + z_loss * lse.square()
    is_top1 = (target_logit >= logits.amax(dim=1)) & valid
    return torch.where(valid, term, torch.zeros_like(term)), nll, lse, is_top1


def _mix(rows: Tensor, lam: Tensor) -> Tensor:
    """lam c + (1 - lam) u of each pair, in the rows' dtype."""
    num_pairs, share = lam.shape[0], lam[:, None].to(rows.dtype)
    return share * rows[:num_pairs] + (1 - share) * rows[num_pairs : 2 * num_pairs]


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
    zero = torch.zeros((), dtype=dtype, device=hidden.device)

    logits = layer.logits(hidden, low)
    term, nll, lse, is_top1 = row_terms(logits, target, ignore_index, label_smoothing, z_loss)
    row_weight = torch.ones_like(nll) if row_weight is None else row_weight.to(dtype)
    ntp = (row_weight * term).sum() / (
        valid.sum().clamp(min=1) if ntp_denominator is None else ntp_denominator
    )

    lam = lam.to(dtype)
    target_c, target_u = target[:num_pairs], target[num_pairs : 2 * num_pairs]
    pair_valid = valid[:num_pairs] & valid[num_pairs : 2 * num_pairs]
    mixed = _mix(hidden, lam)
    logits_x = layer.logits(mixed, None if low is None else _mix(low, lam))
    logprob_c = _target_logit(logits_x, torch.where(pair_valid, target_c, 0)) - torch.logsumexp(
        logits_x, dim=1
    )
    logprob_u = _target_logit(logits_x, torch.where(pair_valid, target_u, 0)) - torch.logsumexp(
        logits_x, dim=1
    )
    mixup_nll = torch.where(pair_valid, -(lam * logprob_c + (1 - lam) * logprob_u), zero)
    pair_weight = torch.ones_like(mixup_nll) if pair_weight is None else pair_weight.to(dtype)
    pair_count = pair_valid.sum().clamp(min=1) if mixup_denominator is None else mixup_denominator
    mixup = (pair_weight * mixup_nll).sum() / pair_count

    loss = ntp + mixup_weight * mixup
    return SFTMixLoss(loss, nll.detach(), lse.detach(), is_top1, mixup_nll.detach())


def row_losses(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    target: Tensor,  # (N,)
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    low: Tensor | None = None,  # (N, r)
    up: Tensor | None = None,  # (V, r)
    join: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:  # (N,)
    """The next-token term of each row, differentiable: ``linear_cross_entropy(reduction="none")``."""
    logits = Layer(weight, bias, softcap, logit_scale, up, join).logits(hidden, low)
    return row_terms(logits, target, ignore_index, label_smoothing, z_loss)[0]


def token_stats(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    target: Tensor,  # (N,) int64
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    low: Tensor | None = None,  # (N, r)
    up: Tensor | None = None,  # (V, r)
    join: Callable[[Tensor], Tensor] | None = None,
) -> TokenStats:
    """The statistics of :func:`sftmix_kernels.token_stats` from full logits, without argument checks."""
    valid = target != ignore_index
    with torch.no_grad():
        logits = Layer(weight, bias, softcap, logit_scale, up, join).logits(hidden, low)
        logprobs = torch.log_softmax(logits, dim=1)
        lse = torch.logsumexp(logits, dim=1)
        target_logit = _target_logit(logits, torch.where(valid, target, 0))
        logprob = torch.where(valid, target_logit - lse, torch.zeros_like(lse))
        entropy = -(logprobs.exp() * logprobs).sum(dim=1)
        return TokenStats(logprob, lse, entropy, (target_logit >= logits.amax(dim=1)) & valid)

"""Rows of logits to rows of gradients, in torch: the arithmetic that a chunk of rows needs.

    g   = (1 + 2 z lse) p - (1 - e) 1[y] - e / V        a row's next-token term, p = softmax of its final logits
    g_x = p_x - lam 1[y_c] - (1 - lam) 1[y_u]           a pair's mixture

with label smoothing e and z-loss z. At label columns p - 1 is expm1(log p), so that it is right where p is near 1.
Names that end in an underscore work in place.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Head(NamedTuple):
    """What turns hidden states into row terms."""

    weight: Tensor  # (V, D)
    bias: Tensor | None = None  # (V,)
    softcap: float = 0.0  # 0: none
    logit_scale: float = 1.0
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    total_vocab: int | Tensor | None = None  # columns of all shards; None: this weight's
    up: Tensor | None = None  # (V, r): each row adds low (r,) times it to its logits


class Needs(NamedTuple):
    """What a call must produce beside the statistics."""

    dhidden: bool = False
    dweight: bool = False
    dbias: bool = False
    dlow: bool = False
    dup: bool = False
    entropy: bool = False

    @property
    def gradient(self) -> bool:
        return self.dhidden or self.dweight or self.dbias or self.dlow or self.dup


def head_of(
    weight: Tensor, bias: Tensor | None, options: list[float], total_vocab: int | Tensor | None = None,
    up: Tensor | None = None,
) -> Head:  # fmt: skip
    """A Head from the operators' ``options``: softcap, logit_scale, label_smoothing, z_loss."""
    softcap, logit_scale, label_smoothing, z_loss = options
    return Head(weight, bias, softcap, logit_scale, label_smoothing, z_loss, total_vocab, up)


def unit_scale(row_coef: Tensor, pair_coef: Tensor) -> Tensor:
    """The largest magnitude among the coefficients, 1 if all are zero; 0-d, without a host read."""
    largest = torch.cat([row_coef.abs(), pair_coef.abs(), row_coef.new_zeros(1)]).max()
    return torch.where(largest > 0, largest, torch.ones_like(largest))


def label_residual(logprob: Tensor, mass: Tensor) -> Tensor:
    """p - mass at a column whose label mass is ``mass``, without cancellation where both are near 1."""
    return torch.where(mass >= 0.5, torch.expm1(logprob) + (1 - mass), torch.exp(logprob) - mass)


def row_term(head: Head, nll: Tensor, lse: Tensor, mean_logit: Tensor) -> Tensor:
    """A row's next-token term from its statistics: smoothed, with z-loss."""
    term = nll
    if head.label_smoothing:
        term = (1 - head.label_smoothing) * nll + head.label_smoothing * (lse - mean_logit)
    return term + head.z_loss * lse.square() if head.z_loss else term


def gather_rows(tensor: Tensor, parts: list[slice]) -> Tensor:
    """The rows of ``parts``, run after run; a view of a single run."""
    return tensor[parts[0]] if len(parts) == 1 else torch.cat([tensor[rows] for rows in parts])


def affine(head: Head, hidden: Tensor, low: Tensor | None, out: Tensor) -> None:
    """W h + b (+ up low with ``low`` [n, r]) of the rows ``hidden`` [n, D] into ``out`` [n, V].

    In hidden's dtype: a CPU has no 16-bit product with a float32 result. The low-rank part, small as a rule, is written
    first, so that the last rounding alone is of whole logits.
    """
    first, factor = (hidden, head.weight) if low is None or head.up is None else (low, head.up)
    if head.bias is None:
        torch.mm(first, factor.t(), out=out)
    else:
        torch.addmm(head.bias, first, factor.t(), out=out)
    if low is not None:
        out.addmm_(hidden, head.weight.t())


def finish_logits_(head: Head, logits: Tensor, want_slope: bool = False) -> tuple[Tensor, Tensor | None]:
    """Scale and cap in place; and, if wanted and there is a cap, d(final logit) / d(affine logit).

    The slope s (1 - t)(1 + t) comes from t = tanh(.) itself: from cap * t, which is rounded, it would lose digits near
    the cap.
    """
    if head.logit_scale != 1.0:
        logits.mul_(head.logit_scale)
    if not head.softcap:
        return logits, None
    logits.div_(head.softcap).tanh_()
    slope = (1 - logits).mul_(1 + logits).mul_(head.logit_scale) if want_slope else None
    return logits.mul_(head.softcap), slope


def at_column(logits: Tensor, column: Tensor) -> Tensor:
    """logits [..., V] at ``column`` [...]; at column 0 where that is -1."""
    return logits.gather(-1, column.clamp(min=0)[..., None]).squeeze(-1)


class RowSums(NamedTuple):
    """What ties a row's exponentials to its softmax: p = exp(z - shift) / exp(log_total)."""

    shift: Tensor  # [n] the row's largest logit, or the given log-sum-exp
    log_total: Tensor  # [n] or what rounding took from the given one

    @property
    def lse(self) -> Tensor:
        return self.shift + self.log_total

    @property
    def low(self) -> Tensor:
        """What rounding took from ``lse`` (Knuth's exact sum); 0 where that is not finite."""
        lse = self.lse
        shadow = lse - self.shift
        low = (self.shift - (lse - shadow)) + (self.log_total - shadow)
        return torch.where(lse.isfinite(), low, torch.zeros_like(low))

    def logprob(self, logit: Tensor) -> Tensor:
        """log p of a logit [n]; small differences first, so that it keeps its digits where p is near 1."""
        return (logit - self.shift) - self.log_total


class Given(NamedTuple):
    """Log-sum-exps of all columns from an earlier pass, as float32 has them and what rounding took."""

    lse: Tensor  # (N,)
    low: Tensor  # (N,)
    lse_x: Tensor  # (M,)
    low_x: Tensor  # (M,)


def exponentials_(logits: Tensor, given: RowSums | None) -> tuple[Tensor, RowSums]:
    """exp(z - shift) in place of logits [..., V]; the row maximum and the sums.

    Not torch.softmax: on a CPU it sums a row in sequence, which at V = 49152 loses 6e-6 of the total on real text.
    """
    row_max = logits.amax(dim=-1)
    shift = row_max if given is None else given.shift
    logits.sub_(shift[..., None]).exp_()
    return row_max, RowSums(shift, logits.sum(dim=-1).log()) if given is None else given


def write_label_(gradient: Tensor, target: Tensor, value: Tensor) -> None:
    """gradient[..., target] = value where the target is one of these columns; target and value [...]."""
    column = target.clamp(min=0)[..., None]
    kept = gradient.gather(-1, column).squeeze(-1)
    gradient.scatter_(-1, column, torch.where(target >= 0, value, kept)[..., None])


def next_token_gradient_(head: Head, exponentials: Tensor, coef: Tensor, sums: RowSums) -> None:
    """a (1 + 2 z lse) p - a e / V in place of exp(z - shift): a row's gradient away from its label."""
    factor = coef * (1 + 2 * head.z_loss * sums.lse) if head.z_loss else coef
    exponentials.mul_((factor * torch.exp(-sums.log_total))[..., None])
    if head.label_smoothing:
        exponentials.sub_((coef * uniform_share(head))[..., None])


def uniform_share(head: Head) -> float | Tensor:
    return head.label_smoothing / (head.weight.shape[0] if head.total_vocab is None else head.total_vocab)


def own_label(head: Head, logprob: Tensor, sums: RowSums) -> Tensor:
    """The row's gradient at its own label, divided by a: p - 1 is expm1(log p)."""
    residual = torch.expm1(logprob)
    if head.label_smoothing:  # (p - 1) + e would keep the digits of 1, not those of 1 - e
        e = head.label_smoothing
        residual = (1 - e) * residual + (e * logprob.exp() - uniform_share(head))
    return residual + 2 * head.z_loss * sums.lse * logprob.exp() if head.z_loss else residual


def other_label(head: Head, logprob: Tensor, sums: RowSums) -> Tensor:
    """The row's gradient at its partner's label, divided by a."""
    value = logprob.exp()
    if head.z_loss:
        value = value * (1 + 2 * head.z_loss * sums.lse)
    return value - uniform_share(head) if head.label_smoothing else value


class Pairs(NamedTuple):
    """A block of b pairs: the confident side, then the partners', along the first dimension.

    The logits at labels are of A and B, each at its own target and at its partner's, and of X at both.
    """

    target: Tensor  # (2, b) -1 where it is not one of these columns
    share: Tensor  # (2, b) lam and 1 - lam
    own_logit: Tensor  # (2, b)
    other_logit: Tensor  # (2, b)
    logit_x: Tensor  # (2, b)
    sums: RowSums  # of A and B, (2, b)
    sums_x: RowSums  # (b,)
    slopes: tuple[Tensor, Tensor, Tensor] | None  # at the same three places; None without a cap

    @property
    def logprob_x(self) -> Tensor:
        """log p of the mixture at both targets, (2, b)."""
        return self.sums_x.logprob(self.logit_x)


def add_mixture_gradient_(
    head: Head,
    block: Pairs,
    gradient: Tensor,  # (2, b, V) the next-token gradients
    exponentials_x: Tensor,  # (b, V) of the mixture
    coefs: tuple[Tensor, Tensor],  # of rows (2, b) and of pairs (b,)
) -> None:
    """Add the mixture's gradient to the next-token ones; a scale without a cap is left to the caller.

    The two label columns are computed from log-probabilities on [b] values and written over the bulk result.
    """
    same = block.target[0] == block.target[1]
    residual_x = label_residual(block.logprob_x, torch.where(same, 1.0, block.share))
    row_coef, mixed_coef = coefs[0], block.share * coefs[1]
    gradient.addcmul_(exponentials_x, (mixed_coef * torch.exp(-block.sums_x.log_total))[..., None])
    other = row_coef * other_label(head, block.sums.logprob(block.other_logit), block.sums)
    own = row_coef * own_label(head, block.sums.logprob(block.own_logit), block.sums)
    if block.slopes is not None:
        slope_own, slope_other, slope_x = block.slopes
        own, other, residual_x = own * slope_own, other * slope_other, residual_x * slope_x
    # The row's own label is written last: when both labels are one column, its residual holds both parts.
    write_label_(gradient, block.target.flip(0), other + mixed_coef * residual_x.flip(0))
    write_label_(gradient, block.target, own + mixed_coef * residual_x)

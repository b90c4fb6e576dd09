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


def scatter_rows(out: Tensor, values: Tensor, parts: list[slice]) -> None:
    """The reverse: ``values`` to their places in ``out``."""
    for rows, run in zip(parts, values.split([rows.stop - rows.start for rows in parts]), strict=True):
        out[rows] = run


def affine(head: Head, hidden: Tensor, low: Tensor | None, parts: list[slice], out: Tensor) -> None:
    """W h + b (+ up low with ``low`` [N, r]) of the rows of ``parts``, whose states are ``hidden`` [n, D].

    In hidden's dtype: a CPU has no 16-bit product with a float32 result. The low-rank part, small as a rule, is written
    first, so that the last rounding alone is of whole logits.
    """
    first, factor = hidden, head.weight
    if low is not None and head.up is not None:
        first, factor = gather_rows(low, parts), head.up
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
    return logits.gather(1, column.clamp(min=0)[:, None]).squeeze(1)


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

    def of_rows(self, rows: slice) -> RowSums:
        return RowSums(self.lse[rows], self.low[rows])

    def of_pairs(self, pairs: slice) -> RowSums:
        return RowSums(self.lse_x[pairs], self.low_x[pairs])


def exponentials_(logits: Tensor, given: RowSums | None) -> tuple[Tensor, RowSums]:
    """exp(z - shift) in place; the row maximum and the sums.

    Not torch.softmax: on a CPU it sums a row in sequence, which at V = 49152 loses 6e-6 of the total on real text.
    """
    row_max = logits.amax(dim=1)
    shift = row_max if given is None else given.shift
    logits.sub_(shift[:, None]).exp_()
    return row_max, RowSums(shift, logits.sum(dim=1).log()) if given is None else given


def entropy_of(logits: Tensor) -> Tensor:
    """Entropy of each row: log l - sum(e z) / l with e = exp(z), l its sum. Two blocks of scratch, and a mask."""
    shifted = logits - logits.amax(dim=1, keepdim=True)
    weights = shifted.exp()
    total = weights.sum(dim=1)
    # A column whose exponential underflowed to 0 adds nothing, also at a logit of -inf.
    moment = shifted.masked_fill_(weights == 0, 0.0).mul_(weights).sum(dim=1)
    return total.log() - moment / total


def write_label_(gradient: Tensor, target: Tensor, value: Tensor) -> None:
    """gradient[i, target[i]] = value[i] where the target is one of these columns."""
    column = target.clamp(min=0)[:, None]
    gradient.scatter_(1, column, torch.where(target >= 0, value, at_column(gradient, target))[:, None])


def next_token_gradient_(head: Head, exponentials: Tensor, coef: Tensor, sums: RowSums) -> None:
    """a (1 + 2 z lse) p - a e / V in place of exp(z - shift): a row's gradient away from its label."""
    factor = coef * (1 + 2 * head.z_loss * sums.lse) if head.z_loss else coef
    exponentials.mul_((factor * torch.exp(-sums.log_total))[:, None])
    if head.label_smoothing:
        exponentials.sub_((coef * uniform_share(head))[:, None])


def uniform_share(head: Head) -> float | Tensor:
    return head.label_smoothing / (head.weight.shape[0] if head.total_vocab is None else head.total_vocab)


def own_label(head: Head, logprob: Tensor, lse: Tensor) -> Tensor:
    """The row's gradient at its own label, divided by a: p - 1 is expm1(log p)."""
    residual = torch.expm1(logprob)
    if head.label_smoothing:  # (p - 1) + e would keep the digits of 1, not those of 1 - e
        e = head.label_smoothing
        residual = (1 - e) * residual + (e * logprob.exp() - uniform_share(head))
    return residual + 2 * head.z_loss * lse * logprob.exp() if head.z_loss else residual


def other_label(head: Head, logprob: Tensor, lse: Tensor) -> Tensor:
    """The row's gradient at its partner's label, divided by a."""
    value = logprob.exp()
    if head.z_loss:
        value = value * (1 + 2 * head.z_loss * lse)
    return value - uniform_share(head) if head.label_smoothing else value


class Pairs(NamedTuple):
    """A chunk of n pairs; each tuple holds the confident side, then the partners'."""

    target: tuple[Tensor, Tensor]  # [n] each
    share: tuple[Tensor, Tensor]  # lam and 1 - lam
    gradient: tuple[Tensor, Tensor]  # [n, V], the next-token gradients
    exponentials_x: Tensor  # [n, V], of the mixture
    at_labels: tuple[tuple[Tensor, Tensor], ...]  # logits of A, B and X at both targets, [n] each
    sums: tuple[RowSums, RowSums, RowSums]  # of A, B and X
    slopes: tuple[tuple[Tensor, Tensor], ...]  # of A, B and X at both targets, [n] each; () without a cap

    def logprob_x(self) -> tuple[Tensor, Tensor]:
        """log p of the mixture at both targets."""
        return self.sums[2].logprob(self.at_labels[2][0]), self.sums[2].logprob(self.at_labels[2][1])


def add_mixture_gradient_(
    head: Head, chunk: Pairs, row_coef: tuple[Tensor, Tensor], pair_coef: Tensor
) -> None:
    """Add the mixture's gradient to the next-token ones; a scale without a cap is left to the caller.

    The two label columns are computed from log-probabilities on [n] values and written over the bulk result.
    """
    same = chunk.target[0] == chunk.target[1]
    residual_x = tuple(
        label_residual(logprob, torch.where(same, 1.0, share))
        for logprob, share in zip(chunk.logprob_x(), chunk.share, strict=True)
    )
    per_exponential = torch.exp(-chunk.sums[2].log_total)

    def slope(logits: int, label: int) -> Tensor | float:
        return chunk.slopes[logits][label] if chunk.slopes else 1.0

    for side in (0, 1):
        other, a, b, sums = 1 - side, row_coef[side], chunk.share[side] * pair_coef, chunk.sums[side]
        chunk.gradient[side].addcmul_(chunk.exponentials_x, (b * per_exponential)[:, None])
        # The row's own label is written last: when both labels are one column, its residual holds both parts.
        for label in (other, side):
            logit = chunk.at_labels[side][label]
            part = (own_label if label == side else other_label)(head, sums.logprob(logit), sums.lse)
            value = a * part * slope(side, label) + b * residual_x[label] * slope(2, label)
            write_label_(chunk.gradient[side], chunk.target[label], value)

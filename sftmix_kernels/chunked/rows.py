"""Rows of logits to rows of gradients, in torch: the arithmetic that a chunk of rows needs.

    m   = (1 - e) c[y],  s = e / V sum_v c_v            c class weights, 1 without them
    g_v = (m + s + 2 z lse) p_v - m 1[v = y] - e c_v / V    a row's next-token term, p = softmax of its final logits
    h_v = t p_v - q p_v (z_v - lse + H) + sum_k u_k 1[v = y_k]     of its lse, entropy H and tokens' log-probabilities,
                                                        t = upstream of lse - sum_k u_k, q that of H, u_k of log p[y_k]
    g_x = p_x - lam 1[y_c] - (1 - lam) 1[y_u]           a pair's mixture

with label smoothing e and z-loss z. At label columns p - 1 is expm1(log p), so that it is right where p is near 1.
A coefficient of 0 selects: what it stands before may be anything. Names that end in an underscore work in place.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..call import Call
from ..checks import readable
from ..terms import times


class Head(NamedTuple):
    """What turns hidden states into row terms; the numbers are those of the module's equations."""

    weight: Tensor  # (V, D)
    bias: Tensor | None = None  # (V,)
    softcap: float = 0.0  # 0: none
    logit_scale: float = 1.0
    up: Tensor | None = None  # (V, r): each row adds low (r,) times it to its logits
    label_smoothing: float = 0.0  # e
    z_loss: float = 0.0  # z
    uniform: float | Tensor = 0.0  # e / V, V the whole vocabulary's
    class_weight: Tensor | None = None  # (V,) c of these columns
    spread: float | Tensor = 0.0  # e / V sum of c over the whole vocabulary
    token_scaling: bool = False

    def uniform_at(self, target: Tensor) -> Tensor | float:
        """e c / V at each target among these columns."""
        return (
            self.uniform
            if self.class_weight is None
            else self.uniform * self.class_weight[target.clamp(min=0)]
        )


def head_of(call: Call) -> Head:
    options, e = call.options, call.options.label_smoothing
    total = call.weight.shape[0] if call.place is None else call.place[1].to(call.dtype)
    mean = 1.0 if call.class_weight is None else call.class_weight.double().mean().to(call.dtype)
    return Head(
        call.weight, call.bias, options.softcap, options.logit_scale, call.up, e, options.z_loss,
        e / total, call.column_weight, e * mean, bool(options.token_scaling),
    )  # fmt: skip


def unit_scale(row_coef: Tensor, pair_coef: Tensor) -> Tensor:
    """The largest magnitude among the coefficients, 1 if all are zero; 0-d, without a host read."""
    largest = torch.cat([row_coef.abs(), pair_coef.abs(), row_coef.new_zeros(1)]).max()
    return torch.where(largest > 0, largest, torch.ones_like(largest))


def label_residual(logprob: Tensor, mass: Tensor) -> Tensor:
    """p - mass at a column whose label mass is ``mass``, without cancellation where both are near 1."""
    return torch.where(mass >= 0.5, torch.expm1(logprob) + (1 - mass), torch.exp(logprob) - mass)


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


def mix_(confident: Tensor, partner: Tensor, lam: Tensor, out: Tensor, has_infinities: bool) -> None:
    """out [n, V] = lam c + (1 - lam) u. With infinities a share of 0 takes the other side; no inf - inf."""
    if not has_infinities:
        torch.lerp(partner, confident, lam[:, None], out=out)
        return
    torch.mul(confident, lam[:, None], out=out)
    out.addcmul_(partner, (1 - lam)[:, None])
    for side, edge in ((confident, lam == 1), (partner, lam == 0)):
        torch.where(edge[:, None], side, out, out=out)


def may_be_infinite(head: Head) -> bool:
    """Whether logits of valid rows may be infinite: by a bias that masks columns. Only on a CPU is it looked at."""
    if head.bias is None:
        return False
    return not readable(head.bias) or not bool(head.bias.isfinite().all())


def exponentials_(logits: Tensor, given: RowSums | None) -> tuple[Tensor, RowSums]:
    """exp(z - shift) in place of logits [..., V]; the row maximum and the sums.

    Not torch.softmax: on a CPU it sums a row in sequence, which at V = 49152 loses 6e-6 of the total on real text.
    """
    row_max = logits.amax(dim=-1)
    # A row of -inf alone has a finite shift, so that its exponentials are 0 and not NaN.
    shift = row_max.clamp(min=torch.finfo(row_max.dtype).min) if given is None else given.shift
    logits.sub_(shift[..., None]).exp_()
    return row_max, RowSums(shift, logits.sum(dim=-1).log()) if given is None else given


def write_label_(gradient: Tensor, target: Tensor, value: Tensor) -> None:
    """gradient[..., target] = value where the target is one of these columns; target and value [...]."""
    column = target.clamp(min=0)[..., None]
    kept = gradient.gather(-1, column).squeeze(-1)
    gradient.scatter_(-1, column, torch.where(target >= 0, value, kept)[..., None])


def may_be_zero(coef: Tensor) -> bool:
    """Whether a coefficient is 0, and what it stands before may be NaN: only a CPU looks."""
    return not readable(coef) or not bool(coef.all())


def clear_(rows: Tensor, dead: Tensor, suspects: Tensor) -> None:
    """0 in the ``dead`` [...] rows of [..., V], where products with 0 may have left NaN.

    That is where ``suspects`` [...] are not finite, which only a CPU looks at first.
    """
    if not readable(rows) or bool((dead & ~suspects.isfinite()).any()):
        rows.masked_fill_(dead[..., None], 0)


def next_token_gradient_(
    head: Head, exponentials: Tensor, coef: Tensor, sums: RowSums, weight: Tensor | float, has_dead: bool
) -> None:
    """a (m + s + 2 z lse) p - a e c / V in place of exp(z - shift): a row's gradient away from its label."""
    factor = coef
    if head.class_weight is not None:
        factor = coef * ((1 - head.label_smoothing) * weight + head.spread)
    if head.z_loss:
        factor = factor + times(coef, 2 * head.z_loss * sums.lse)
    exponentials.mul_((factor * torch.exp(-sums.log_total))[..., None])
    if head.label_smoothing:
        share = coef[..., None] * head.uniform
        exponentials.sub_(share if head.class_weight is None else share * head.class_weight)
    if has_dead:
        clear_(exponentials, coef == 0, sums.lse)


def own_label(head: Head, target: Tensor, logprob: Tensor, sums: RowSums, weight: Tensor | float) -> Tensor:
    """The row's gradient at its own label, divided by a: p - 1 is expm1(log p)."""
    residual = torch.expm1(logprob) * weight
    if head.label_smoothing:  # (p - 1) + e would keep the digits of 1, not those of 1 - e
        e = head.label_smoothing
        residual = (1 - e) * residual + (head.spread * logprob.exp() - head.uniform_at(target))
    return residual + 2 * head.z_loss * sums.lse * logprob.exp() if head.z_loss else residual


def other_label(head: Head, target: Tensor, logprob: Tensor, sums: RowSums, weight: Tensor | float) -> Tensor:
    """The row's gradient at its partner's label ``target``, divided by a; ``weight`` is that of its own."""
    factor: Tensor | float = (1 - head.label_smoothing) * weight + head.spread
    if head.z_loss:
        factor = factor + 2 * head.z_loss * sums.lse
    value = logprob.exp() * factor
    return value - head.uniform_at(target) if head.label_smoothing else value


class Pairs(NamedTuple):
    """A block of b pairs: the confident side, then the partners', along the first dimension.

    The logits at labels are of A and B, each at its own target and at its partner's, and of X at both.
    """

    target: Tensor  # (2, b) -1 where it is not one of these columns
    share: Tensor  # (2, b) lam and 1 - lam
    weight: Tensor | float  # (2, b) class weights at the targets
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
    has_dead: bool,
) -> None:
    """Add the mixture's gradient to the next-token ones; a scale without a cap is left to the caller.

    The two label columns are computed from log-probabilities on [b] values and written over the bulk result.
    """
    target, sums, weight = block.target, block.sums, block.weight
    same = target[0] == target[1]
    residual_x = label_residual(block.logprob_x, torch.where(same, 1.0, block.share))
    row_coef, mixed_coef = coefs[0], block.share * coefs[1]
    product = times if has_dead else torch.mul
    if has_dead:
        clear_(exponentials_x, coefs[1] == 0, block.sums_x.lse)
    factor = product(mixed_coef, torch.exp(-block.sums_x.log_total))
    gradient.addcmul_(exponentials_x, factor[..., None])
    other = other_label(head, target.flip(0), sums.logprob(block.other_logit), sums, weight)
    own = own_label(head, target, sums.logprob(block.own_logit), sums, weight)
    if block.slopes is not None:
        slope_own, slope_other, slope_x = block.slopes
        own, other, residual_x = own * slope_own, other * slope_other, residual_x * slope_x
    own, other = product(row_coef, own), product(row_coef, other)
    mixed = product(mixed_coef, residual_x)
    crossed = product(mixed_coef, residual_x.flip(0))
    # The row's own label is written last: when both labels are one column, its residual holds both parts.
    write_label_(gradient, target.flip(0), other + crossed)
    write_label_(gradient, target, own + mixed)

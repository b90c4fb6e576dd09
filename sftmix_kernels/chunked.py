"""The loss in portable torch, a chunk of rows at a time: what a CPU runs.

A chunk's logits A (confident rows), B (partners) and X = lam A + (1 - lam) B (mixed before scale and cap) are turned
in place into the gradients of the scalar loss, so three products per row and no [N, V] tensor:

    G_c = a_c (softmax A - 1[y_c]) + lam b (softmax X - y~),   G_u = a_u (softmax B - 1[y_u]) + (1 - lam) b (...)
    dhidden = G W,   dweight = sum over chunks of G^T hidden,   dbias = sum of G over rows

a = row_coef and b = pair_coef are divided by their largest magnitude ``scale`` first, so that gradients are rounded
to a 16-bit dtype at unit scale; ``scale`` comes back and is applied in float32. Sums over chunks are float32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .reference import sum_dtype

DEFAULT_SCRATCH_BYTES = 64 * 2**20


class ChunkedResult(NamedTuple):
    """Outputs of :func:`chunked_loss`. Gradients are those of the loss divided by ``scale``; empty if not needed."""

    nll: Tensor  # (N,)
    lse: Tensor  # (N,)
    is_top1: Tensor  # (N,) bool
    mixup_nll: Tensor  # (M,)
    entropy: Tensor  # (N,) or (0,)
    scale: Tensor  # ()
    dhidden: Tensor  # (N, D) in hidden's dtype
    dweight: Tensor  # (V, D) float32, float64 for float64
    dbias: Tensor  # (V,) float32, float64 for float64


class _Head(NamedTuple):
    weight: Tensor  # (V, D)
    bias: Tensor | None
    softcap: float  # 0: none
    logit_scale: float


class _Needs(NamedTuple):
    dhidden: bool
    dweight: bool
    dbias: bool
    entropy: bool


def chunk_size(num_groups: int, row_bytes: int, scratch_bytes: int) -> int:
    """Groups (rows, or pairs) per chunk: as many as fit, and at most half of all, so that no chunk is everything."""
    return max(1, min(scratch_bytes // max(row_bytes, 1), (num_groups + 1) // 2))


def unit_scale(row_coef: Tensor, pair_coef: Tensor) -> Tensor:
    """The largest magnitude among the coefficients, 1 if all are zero; 0-d, without a host read."""
    zero = row_coef.new_zeros(1)
    largest = torch.cat([row_coef.abs(), pair_coef.abs(), zero]).max()
    return torch.where(largest > 0, largest, torch.ones_like(largest))


def label_residual(logprob: Tensor, mass: Tensor) -> Tensor:
    """p - mass at a column whose label mass is ``mass``, without cancellation where both are near 1."""
    return torch.where(mass >= 0.5, torch.expm1(logprob) + (1 - mass), torch.exp(logprob) - mass)


def _affine(head: _Head, hidden: Tensor, out: Tensor) -> Tensor:
    """W h + b of a chunk into ``out`` [n, V] float32; a 16-bit product is rounded once, as a CPU has no other."""
    if head.bias is None:
        product = torch.mm(hidden, head.weight.t(), out=out if hidden.dtype == out.dtype else None)
    else:
        product = torch.addmm(
            head.bias, hidden, head.weight.t(), out=out if hidden.dtype == out.dtype else None
        )
    return out if product is out else out.copy_(product)


def _finish_logits(head: _Head, logits: Tensor) -> Tensor:
    """Scale and cap in place."""
    if head.logit_scale != 1.0:
        logits.mul_(head.logit_scale)
    if head.softcap:
        logits.div_(head.softcap).tanh_().mul_(head.softcap)
    return logits


def _cap_slope(head: _Head, logit: Tensor) -> Tensor | float:
    """d(final logit) / d(affine logit) at a final logit."""
    if not head.softcap:
        return head.logit_scale
    return head.logit_scale * (1 - (logit / head.softcap) ** 2)


def _at(logits: Tensor, column: Tensor) -> Tensor:
    return logits.gather(1, column.clamp(min=0)[:, None]).squeeze(1)


def _softmax_(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax in place; returns the row maximum and the log-sum-exp. p at the maximum is at least 1/V: log is safe."""
    row_max, position = logits.max(dim=1, keepdim=True)
    torch.softmax(logits, dim=1, out=logits)
    lse = row_max - logits.gather(1, position).log()
    return row_max.squeeze(1), lse.squeeze(1)


def _entropy(logits: Tensor) -> Tensor:
    """Entropy of each row's softmax, two rows' worth of scratch at a time."""
    logprobs = torch.log_softmax(logits, dim=1)
    return -(logprobs * logprobs.exp()).sum(dim=1)


class _Chunks:
    """The loop's state: inputs, outputs and the buffers that every chunk reuses."""

    def __init__(self, head: _Head, hidden: Tensor, target: Tensor, needs: _Needs) -> None:
        num_rows, dtype = hidden.shape[0], sum_dtype(hidden.dtype)
        self.head, self.hidden, self.target, self.needs, self.dtype = head, hidden, target, needs, dtype
        self.nll, self.lse = (torch.empty(num_rows, dtype=dtype, device=hidden.device) for _ in range(2))
        self.entropy = torch.empty(num_rows if needs.entropy else 0, dtype=dtype, device=hidden.device)
        self.is_top1 = torch.empty(num_rows, dtype=torch.bool, device=hidden.device)
        vocab_size, width = head.weight.shape
        self.dhidden = hidden.new_empty((num_rows, width) if needs.dhidden else (0,))
        shape = (vocab_size, width) if needs.dweight else (0,)
        self.dweight = torch.zeros(shape, dtype=dtype, device=hidden.device)
        self.dbias = torch.zeros(vocab_size if needs.dbias else 0, dtype=dtype, device=hidden.device)

    @property
    def needs_gradient(self) -> bool:
        return self.needs.dhidden or self.needs.dweight or self.needs.dbias

    def write_stats(self, rows: slice, target_logit: Tensor, row_max: Tensor, lse: Tensor) -> None:
        valid = self.target[rows] >= 0
        self.nll[rows] = torch.where(valid, lse - target_logit, torch.zeros_like(lse))
        self.lse[rows] = lse
        self.is_top1[rows] = valid & (target_logit >= row_max)

    def products(self, hidden: Tensor, gradient: Tensor, parts: list[slice]) -> None:
        """dhidden of ``parts`` and the chunk's share of dweight and dbias, from dlogits [n, V]."""
        if self.needs.dbias:
            self.dbias += gradient.sum(dim=0)
        gradient = gradient.to(hidden.dtype)
        if self.needs.dhidden:
            product, start = torch.mm(gradient, self.head.weight), 0
            for rows in parts:
                stop = start + rows.stop - rows.start
                self.dhidden[rows] = product[start:stop]
                start = stop
        if self.needs.dweight and hidden.dtype == self.dtype:
            self.dweight.addmm_(gradient.t(), hidden)
        elif self.needs.dweight:
            self.dweight += torch.mm(gradient.t(), hidden)


def _single_rows(state: _Chunks, rows: slice, row_coef: Tensor, buffer: Tensor) -> None:
    """One chunk of unpaired rows (or of plain next-token loss)."""
    head, target = state.head, state.target[rows]
    hidden, coef = state.hidden[rows], row_coef[rows]
    logits = _finish_logits(head, _affine(head, hidden, buffer[: hidden.shape[0]]))
    if state.needs.entropy:
        state.entropy[rows] = _entropy(logits)
    target_logit = _at(logits, target)
    slope = _cap_slope(head, logits) if head.softcap and state.needs_gradient else head.logit_scale
    row_max, lse = _softmax_(logits)
    state.write_stats(rows, target_logit, row_max, lse)
    if not state.needs_gradient:
        return
    residual = label_residual(target_logit - lse, torch.ones_like(lse))
    logits.scatter_(1, target.clamp(min=0)[:, None], residual[:, None])
    logits.mul_(coef[:, None])
    if isinstance(slope, Tensor) or slope != 1.0:
        logits.mul_(slope)
    state.products(hidden, logits, [rows])


class _Pairs(NamedTuple):
    """A chunk of n pairs after its softmaxes; each tuple holds the confident side, then the partners'."""

    target: tuple[Tensor, Tensor]  # [n] each
    share: tuple[Tensor, Tensor]  # lam and 1 - lam
    probs: tuple[Tensor, Tensor]  # softmax A and B, [n, V]: two halves of one buffer
    probs_x: Tensor  # softmax X, [n, V]
    at_labels: tuple[tuple[Tensor, Tensor], ...]  # logits of A, B and X at both targets, [n] each
    lse: tuple[Tensor, Tensor]
    logprob_x: tuple[Tensor, Tensor]  # of the mixture at both targets


def _pair_rows(
    state: _Chunks, pairs: slice, num_pairs: int, lam: Tensor, coefs: tuple[Tensor, Tensor], buffer: Tensor
) -> Tensor:
    """One chunk of pairs; returns their mixup cross-entropies [n]."""
    head, n = state.head, pairs.stop - pairs.start
    partners = slice(num_pairs + pairs.start, num_pairs + pairs.stop)
    target = (state.target[pairs], state.target[partners])
    hidden = torch.cat([state.hidden[pairs], state.hidden[partners]])
    share = lam[pairs].to(state.dtype)
    both, mixed = _affine(head, hidden, buffer[: 2 * n]), buffer[2 * n : 3 * n]
    torch.lerp(both[n:], both[:n], share[:, None], out=mixed)
    _finish_logits(head, both)
    _finish_logits(head, mixed)

    at_labels = tuple((_at(t, target[0]), _at(t, target[1])) for t in (both[:n], both[n:], mixed))
    capped = bool(head.softcap) and state.needs_gradient
    slopes = (_cap_slope(head, both), _cap_slope(head, mixed)) if capped else (1.0, 1.0)
    row_max, lse = _softmax_(both)
    _, lse_x = _softmax_(mixed)
    state.write_stats(pairs, at_labels[0][0], row_max[:n], lse[:n])
    state.write_stats(partners, at_labels[1][1], row_max[n:], lse[n:])
    logprob_x = (at_labels[2][0] - lse_x, at_labels[2][1] - lse_x)
    valid = (target[0] >= 0) & (target[1] >= 0)
    cross_entropy = -(share * logprob_x[0] + (1 - share) * logprob_x[1])
    if state.needs_gradient:
        if capped:
            both.mul_(slopes[0])
            mixed.mul_(slopes[1])
        chunk = _Pairs(
            target, (share, 1 - share), (both[:n], both[n:]), mixed, at_labels, (lse[:n], lse[n:]), logprob_x
        )
        _pair_gradients(head, chunk, (coefs[0][pairs], coefs[0][partners]), coefs[1][pairs])
        if not capped and head.logit_scale != 1.0:
            both.mul_(head.logit_scale)
        state.products(hidden, both, [pairs, partners])
    return torch.where(valid, cross_entropy, torch.zeros_like(lse_x))


def _pair_gradients(head: _Head, chunk: _Pairs, row_coef: tuple[Tensor, Tensor], pair_coef: Tensor) -> None:
    """Turn softmax A and B into G_c and G_u in place; a logit scale without a cap is left to the caller.

    The two label columns are computed from log-probabilities on [n] values and written over the bulk result.
    """
    same = chunk.target[0] == chunk.target[1]
    residual_x = tuple(
        label_residual(logprob, torch.where(same, 1.0, share))
        for logprob, share in zip(chunk.logprob_x, chunk.share, strict=True)
    )

    def slope(logit: Tensor) -> Tensor | float:
        return _cap_slope(head, logit) if head.softcap else 1.0

    for side in (0, 1):
        other, a, b = 1 - side, row_coef[side], chunk.share[side] * pair_coef
        chunk.probs[side].mul_(a[:, None]).addcmul_(chunk.probs_x, b[:, None])
        # The row's own label is written last: when both labels are one column, its residual holds both parts.
        for label in (other, side):
            logit = chunk.at_labels[side][label]
            logprob = logit - chunk.lse[side]
            part = torch.expm1(logprob) if label == side else logprob.exp()
            value = a * part * slope(logit) + b * residual_x[label] * slope(chunk.at_labels[2][label])
            chunk.probs[side].scatter_(1, chunk.target[label].clamp(min=0)[:, None], value[:, None])


def chunked_loss(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    target: Tensor,  # (N,) int64, -1 at ignored rows
    lam: Tensor,  # (M,) float32
    *,
    bias: Tensor | None,
    row_coef: Tensor,  # (N,)
    pair_coef: Tensor,  # (M,)
    softcap: float,
    logit_scale: float,
    needs: tuple[bool, bool, bool, bool],
    scratch_bytes: int,
) -> ChunkedResult:
    """Statistics of every row and pair and, where ``needs`` asks, the gradients of the loss divided by ``scale``.

    ``needs`` is (dhidden, dweight, dbias, entropy). Peak scratch is about ``scratch_bytes`` (at least one row or
    pair of logits; twice that for 16-bit inputs or a softcap), plus float32 dweight [V, D].
    """
    state = _Chunks(_Head(weight, bias, softcap, logit_scale), hidden, target, _Needs(*needs))
    num_rows, num_pairs, vocab_size = hidden.shape[0], lam.shape[0], weight.shape[0]
    scale = unit_scale(row_coef, pair_coef).to(state.dtype)
    coefs = (row_coef.to(state.dtype) / scale, pair_coef.to(state.dtype) / scale)
    mixup_nll = torch.empty(num_pairs, dtype=state.dtype, device=hidden.device)
    row_bytes = vocab_size * torch.finfo(state.dtype).bits // 8
    num_single = num_rows - 2 * num_pairs
    size_pairs = chunk_size(num_pairs, 3 * row_bytes, scratch_bytes) if num_pairs else 0
    size_rows = chunk_size(num_single, row_bytes, scratch_bytes) if num_single else 0
    buffer = torch.empty(max(3 * size_pairs, size_rows), vocab_size, dtype=state.dtype, device=hidden.device)
    for start in range(0, num_pairs, max(size_pairs, 1)):
        pairs = slice(start, min(start + size_pairs, num_pairs))
        mixup_nll[pairs] = _pair_rows(state, pairs, num_pairs, lam, coefs, buffer)
    for start in range(2 * num_pairs, num_rows, max(size_rows, 1)):
        _single_rows(state, slice(start, min(start + size_rows, num_rows)), coefs[0], buffer)
    return ChunkedResult(
        state.nll,
        state.lse,
        state.is_top1,
        mixup_nll,
        state.entropy,
        scale,
        state.dhidden,
        state.dweight,
        state.dbias,
    )

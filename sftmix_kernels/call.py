"""One call of the loss, checked: made once at the door, and what every station after it is given.

A :class:`Call` is flat (tensors, numbers, whole numbers, a name), because the custom operators take it as it is. What
an engine makes of it: :class:`Coefficients` of rows and pairs, :class:`Statistics` of rows and mixtures, and
:class:`Gradients`. What a backward recomputes from is :class:`Kept`, what it is asked for :class:`Upstream`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .reference import sum_dtype

NONE = float("nan")  # a number that is not given: the default, or a tensor in its place


class Options(NamedTuple):
    """The numbers of a call; ``NONE`` where a denominator is a count and where a tensor stands in for one."""

    softcap: float = 0.0  # 0: none
    logit_scale: float = 1.0
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    token_scaling: float = 0.0  # 1: each row's term times its target's probability, detached
    mixup_weight: float = NONE
    ntp_denominator: float = NONE
    mixup_denominator: float = NONE


class Needs(NamedTuple):
    """Which inputs get a gradient."""

    dhidden: bool = False
    dweight: bool = False
    dbias: bool = False
    dlow: bool = False
    dup: bool = False


class Plan(NamedTuple):
    """The whole numbers of a call: what it needs, and how it runs."""

    dhidden: int = 0
    dweight: int = 0
    dbias: int = 0
    dlow: int = 0
    dup: int = 0
    entropy: int = 0  # of each row, in a forward pass
    predicted: int = 0  # the column of each row's largest logit
    ignore_index: int = -100
    scratch_bytes: int = 0  # 0: the engine's default

    @property
    def needs(self) -> Needs:
        return Needs(*(bool(value) for value in self[:5]))


class Call(NamedTuple):
    """The rows, the layer, the options and what is needed; local parts where the vocabulary is spread."""

    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    low: (
        Tensor | None
    )  # (N, r) low-rank rows, with up: the affine logits are hidden weight^T + low up^T + bias
    up: Tensor | None  # (V, r)
    main_grad: Tensor | None  # (V, D) float32: dweight is added here
    target: Tensor  # (N,) int64
    lam: Tensor  # (M,)
    row_weight: Tensor | None  # (N,)
    pair_weight: Tensor | None  # (M,)
    class_weight: Tensor | None  # (V,) of the whole vocabulary
    mixup_weight: Tensor | None  # ()
    ntp_denominator: Tensor | None  # ()
    mixup_denominator: Tensor | None  # ()
    tokens: Tensor | None  # (N, K) columns whose log-probabilities are wanted, -1: none
    place: Tensor | None  # (2,) the first column of this shard, and V
    numbers: list[float]  # Options
    plan: list[int]  # Plan
    engine: str  # "chunked", "fused"
    group_name: str  # of the shards' process group

    @property
    def options(self) -> Options:
        return Options(*self.numbers)

    @property
    def wanted(self) -> Plan:
        return Plan(*self.plan)

    @property
    def needs(self) -> Needs:
        return self.wanted.needs

    @property
    def dtype(self) -> torch.dtype:
        """Of sums and statistics."""
        return sum_dtype(self.hidden.dtype)

    @property
    def sizes(self) -> tuple[int, int, int]:
        """N, V (of these columns) and M."""
        return self.hidden.shape[0], self.weight.shape[0], self.lam.shape[0]

    @property
    def column_weight(self) -> Tensor | None:
        """Class weights of these columns (V,), in the dtype of sums, contiguous."""
        whole, place = self.class_weight, self.place
        if whole is None:
            return None
        if place is not None:
            whole = whole.index_select(0, place[0] + torch.arange(self.weight.shape[0], device=whole.device))
        return whole.to(self.dtype).contiguous()


# Of the operators. torch keeps compiled graphs from one process to the next and knows an operator by its name alone, so
# the number grows with every change of a schema, of an autograd formula or of what a result is shaped like: a graph of
# the release before is then compiled anew, not run.
NAMESPACE = "sftmix_kernels_2"
# As the operators take it.
SCHEMA = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor? low, Tensor? up, Tensor{mutated}? main_grad, Tensor target, "
    "Tensor lam, Tensor? row_weight, Tensor? pair_weight, Tensor? class_weight, Tensor? mixup_weight, "
    "Tensor? ntp_denominator, Tensor? mixup_denominator, Tensor? tokens, Tensor? place, float[] numbers, int[] plan, "
    "str engine, str group_name"
)
TENSORS = Call._fields.index("numbers")
DIFFERENTIABLE = ("hidden", "weight", "bias", "low", "up")  # the first fields, as Needs has them


class Coefficients(NamedTuple):
    """What terms of rows and pairs are multiplied by in the loss: weights over denominators, mu; 0 where ignored."""

    column: Tensor  # (N,) int64: the target's column in the whole vocabulary, -1 at ignored rows
    row: Tensor  # (N,) float64
    pair: Tensor  # (M,) float64


class Statistics(NamedTuple):
    """What a forward pass knows of N rows and M mixtures, of the columns it was given; natural logarithms.

    ``row_carry`` is lse, what rounding took from it, nll; ``pair_carry`` the first two of the mixture, then its
    -log p at both targets. Where a target is elsewhere, its logit and nll are 0.
    """

    max_logit: Tensor  # (N,)
    target_logit: Tensor  # (N,)
    mean_logit: Tensor  # (N,) class-weighted; (0,) without label smoothing
    entropy: Tensor  # (N,) or (0,)
    predicted: Tensor  # (N,) int64 or (0,)
    token_logit: Tensor  # (N, K) or (0, 0)
    logit_x: Tensor  # (2, M) mixed logits at both targets
    row_carry: Tensor  # (3, N)
    pair_carry: Tensor  # (4, M)

    @property
    def lse(self) -> Tensor:
        return self.row_carry[0]

    @property
    def nll(self) -> Tensor:
        return self.row_carry[2]


class Upstream(NamedTuple):
    """What the loss's outputs are multiplied by where a gradient is asked for; None is 0."""

    row: Tensor  # (N,) of each row's term, float64
    pair: Tensor  # (M,) of each mixture's
    lse: Tensor | None = None  # (N,)
    entropy: Tensor | None = None  # (N,)
    token: Tensor | None = None  # (N, K) of the tokens' log-probabilities


class Kept(NamedTuple):
    """What a backward recomputes the logits' gradients from: statistics of all columns."""

    row_carry: Tensor  # (3, N) as Statistics has them
    pair_carry: Tensor  # (4, M)
    entropy: Tensor  # (N,) or (0,)


class Gradients(NamedTuple):
    """Gradients of hidden, weight, bias, low and up; (0,) where not needed."""

    dhidden: Tensor
    dweight: Tensor
    dbias: Tensor
    dlow: Tensor
    dup: Tensor


def empty_gradients(call: Call, dtype: torch.dtype | None = None) -> Gradients:
    """In the inputs' dtypes; those of weight, bias and up in ``dtype`` where it is given."""
    needs, hidden, weight = call.needs, call.hidden, call.weight
    rank = 0 if call.low is None else call.low.shape[1]

    def new(like: Tensor, needed: bool, *shape: int, kind: torch.dtype | None = None) -> Tensor:
        return like.new_empty(shape if needed else (0,), dtype=kind or like.dtype)

    num_rows, vocab_size, _ = call.sizes
    return Gradients(
        new(hidden, needs.dhidden, *hidden.shape),
        new(weight, needs.dweight and call.main_grad is None, *weight.shape, kind=dtype),
        new(weight, needs.dbias, vocab_size, kind=dtype),
        new(hidden, needs.dlow, num_rows, rank),
        new(weight, needs.dup, vocab_size, rank, kind=dtype),
    )

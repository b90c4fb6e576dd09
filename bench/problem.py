"""The inputs of a benchmark, and the true values that every provider must reproduce before it is timed."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from bench.shapes import Shape
from sftmix_kernels import SFTMixLoss, sftmix_loss

MIXUP_WEIGHT = 0.2
BATCH_LAM = 0.375
# Largest relative error of the loss, and of the gradients (as norms), of a provider that is timed.
TOLERANCE = {"float32": (1e-5, 1e-3), "bfloat16": (3e-3, 3e-2), "float16": (1e-3, 1e-2)}
# A peer's loss that is wrong by no more than this (relative) is timed all the same, and marked.
INEXACT = 5e-3
_REFERENCE_PAIRS = 512
_SAMPLE_PAIRS = 32


@dataclass
class Problem:
    """Random, nowhere zero inputs of one shape, all N rows supervised and paired."""

    shape: Shape
    dtype: str
    device: str
    hidden: Tensor = field(init=False)  # (N, D)
    weight: Tensor = field(init=False)  # (V, D), scaled so that logits have standard deviation 2
    target: Tensor = field(init=False)  # (N,) int64
    lam: Tensor = field(init=False)  # (M,) float32, from Beta(0.5, 0.5)

    def __post_init__(self) -> None:
        generator = torch.Generator(self.device).manual_seed(0)
        dtype = getattr(torch, self.dtype)
        N, V, D = self.shape.N, self.shape.V, self.shape.D
        self.hidden = torch.randn(N, D, generator=generator, device=self.device).to(dtype).requires_grad_()
        weight = torch.randn(V, D, generator=generator, device=self.device).mul_(2 / D**0.5)
        self.weight = weight.to(dtype).requires_grad_()
        self.target = torch.randint(V, (N,), generator=generator, device=self.device)
        # Beta(1/2, 1/2) is the law of sin^2 of a uniform angle.
        angle = torch.rand(self.shape.M, generator=generator, device=self.device) * (torch.pi / 2)
        self.lam = angle.sin().square()

    @classmethod
    def on_meta(cls, shape: Shape, dtype: str) -> Problem:
        """The same sizes without values, for counting."""
        problem = cls.__new__(cls)
        problem.shape, problem.dtype, problem.device = shape, dtype, "meta"
        kind = {"dtype": getattr(torch, dtype), "device": "meta", "requires_grad": True}
        problem.hidden = torch.empty(shape.N, shape.D, **kind)
        problem.weight = torch.empty(shape.V, shape.D, **kind)
        problem.target = torch.empty(shape.N, dtype=torch.int64, device="meta")
        problem.lam = torch.empty(shape.M, device="meta")
        return problem

    @property
    def tensors(self) -> list[Tensor]:
        return [self.hidden, self.weight, self.target, self.lam]

    def kept_rows(self) -> Tensor:
        """What a row plan keeps of the rows where 40 % are prompt tokens: the first 60 % of the pairs, both halves."""
        pairs = torch.arange(self.shape.num_kept_pairs, device=self.device)
        return torch.cat([pairs, pairs + self.shape.M])

    def planned(self) -> Problem:
        """The kept rows as a problem of their own."""
        problem = Problem.__new__(Problem)
        rows = self.kept_rows()
        problem.shape, problem.dtype, problem.device = (
            Shape(len(rows), self.shape.V, self.shape.D), self.dtype, self.device
        )  # fmt: skip
        problem.hidden, problem.weight = self.hidden.detach()[rows], self.weight.detach()
        problem.target, problem.lam = self.target[rows], self.lam[: len(rows) // 2]
        return problem

    def clear_gradients(self) -> None:
        self.hidden.grad = self.weight.grad = None

    def lam_of(self, kind: str) -> Tensor:
        """The Mixup weights [M] of kind "row" (all different), "batch" (one number) or "" (no pairs)."""
        if kind == "row":
            return self.lam
        return torch.full_like(self.lam, BATCH_LAM) if kind == "batch" else self.lam[:0]


def true_value(problem: Problem, kind: str) -> float:
    """The loss in float32 by the specification, a slice of pairs with their partners at a time."""
    lam, shape = problem.lam_of(kind), problem.shape
    ntp = mixup = 0.0
    with torch.no_grad():
        weight = problem.weight.float()
        for start in range(0, shape.M, _REFERENCE_PAIRS):
            part = _slice_loss(problem, problem.hidden, weight, lam, slice(start, start + _REFERENCE_PAIRS))
            ntp += float(part.nll.double().sum())
            mixup += float(part.mixup_nll.double().sum())
    return ntp / shape.N + (MIXUP_WEIGHT * mixup / shape.M if len(lam) else 0.0)


def true_dhidden(problem: Problem, kind: str) -> tuple[Tensor, Tensor]:
    """Rows of the first pairs, and their float32 gradient by the specification's autograd."""
    pairs = slice(0, min(_SAMPLE_PAIRS, problem.shape.M))
    rows = _rows(problem.shape, pairs)
    hidden = problem.hidden.detach().float().requires_grad_()
    part = _slice_loss(problem, hidden, problem.weight.detach().float(), problem.lam_of(kind), pairs)
    (gradient,) = torch.autograd.grad(part.loss, hidden)
    return rows, gradient[rows]


def true_gradients(problem: Problem) -> tuple[Tensor, Tensor]:
    """dhidden [N, D] and dweight [V, D] of the mean next-token loss in float64, a slice of rows at a time."""
    hidden, weight = problem.hidden.detach(), problem.weight.detach().double()
    dhidden = torch.empty(hidden.shape, dtype=torch.float64, device=hidden.device)
    dweight = torch.zeros_like(weight)
    for start in range(0, problem.shape.N, _REFERENCE_PAIRS):
        rows = slice(start, start + _REFERENCE_PAIRS)
        part = hidden[rows].double()
        dlogits = torch.softmax(part @ weight.t(), dim=1)
        dlogits[torch.arange(len(part), device=part.device), problem.target[rows]] -= 1
        dlogits /= problem.shape.N
        dhidden[rows] = dlogits @ weight
        dweight.addmm_(dlogits.t(), part)
    return dhidden, dweight


def gradient_errors(problem: Problem, truth: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """Relative errors, as norms, of the gradients that the last backward left in hidden and weight."""
    errors = []
    for gradient, true in zip((problem.hidden.grad, problem.weight.grad), truth, strict=True):
        assert gradient is not None
        blocks = zip(gradient.split(8192), true.split(8192), strict=True)
        squares = sum(float((part.double() - rest).square().sum()) for part, rest in blocks)
        errors.append((squares / float(true.square().sum())) ** 0.5)
    return errors[0], errors[1]


class InexactLossError(ArithmeticError):
    """A loss outside the tolerance, but within :data:`INEXACT` of the true one."""


def check_loss(problem: Problem, loss: Tensor, expected: float) -> None:
    """Raise ``ArithmeticError`` if the loss is not the true one within rounding."""
    error = abs(float(loss.detach()) - expected) / abs(expected)
    if not error <= TOLERANCE[problem.dtype][0]:
        kind = InexactLossError if error <= INEXACT else ArithmeticError
        raise kind(f"loss {float(loss.detach()):.7g} where {expected:.7g} is right")


def check_gradients(problem: Problem, rows: Tensor, expected: Tensor) -> None:
    """Raise ``ArithmeticError`` if hidden's gradient is wrong on ``rows`` or weight's disagrees with it.

    The loss depends on W h only, so <dhidden, hidden> = <dweight, weight>: dweight is checked by one number.
    """
    dhidden, dweight = problem.hidden.grad, problem.weight.grad
    if dhidden is None or dweight is None:
        raise ArithmeticError("no gradient of hidden or of weight")
    bound = TOLERANCE[problem.dtype][1]
    error = float((dhidden[rows].float() - expected).norm() / expected.norm())
    if not error <= bound:
        raise ArithmeticError(f"dhidden off by {error:.2g}")
    by_hidden = float((dhidden.float() * problem.hidden.detach().float()).sum())
    by_weight = sum(
        float((part.float() * rest.detach().float()).sum())
        for part, rest in zip(dweight.split(8192), problem.weight.split(8192), strict=True)
    )
    if not abs(by_hidden - by_weight) <= bound * abs(by_hidden):
        raise ArithmeticError(
            f"dweight: <dweight, weight> is {by_weight:.6g}, <dhidden, hidden> is {by_hidden:.6g}"
        )


def _rows(shape: Shape, pairs: slice) -> Tensor:
    """Row numbers of a slice of pairs: its confident rows, then their partners."""
    chosen = torch.arange(shape.M)[pairs]
    return torch.cat([chosen, chosen + shape.M])


def _slice_loss(problem: Problem, hidden: Tensor, weight: Tensor, lam: Tensor, pairs: slice) -> SFTMixLoss:
    rows = _rows(problem.shape, pairs).to(hidden.device)
    return sftmix_loss(
        hidden[rows].float(),
        weight,
        problem.target[rows],
        lam[pairs] if len(lam) else lam,
        mixup_weight=MIXUP_WEIGHT,
        ntp_denominator=problem.shape.N,
        mixup_denominator=problem.shape.M,
        impl="reference",
    )

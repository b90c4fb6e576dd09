"""The only tolerance code: three results, one rule.

``truth`` is the reference in float64 on the same (rounded) inputs, ``torch`` the reference in the inputs' dtype,
``ours`` the implementation under test. For the value and each gradient, in the root mean square and in the maximum:

    error(ours) <= 2 * error(torch) + one rounding

An error is one draw of an implementation's roundings, and of few numbers one side's may be half the other's by luck:
torch misses its own bound when it sums in another order. ``orders`` draws both sides several times, over orders of the
rows, classes and hidden columns, which change roundings and nothing else, and compares root mean squares over them.

The scalar loss is one draw, and torch's error in it may be near zero by luck; there error(torch) is at least what its
per-row errors give for a mean of independent rows: their root mean square, relative to the rows', over sqrt(rows).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sftmix_kernels import sftmix_loss
from sftmix_kernels.reference import sum_dtype


@dataclass
class Case:
    """Inputs of one loss call; tensors on the CPU."""

    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    target: Tensor  # (N,)
    lam: Tensor  # (M,)
    bias: Tensor | None = None  # (V,)
    options: dict[str, Any] = field(default_factory=dict)
    upstream: float = 1.0


def make_case(
    num_rows: int, vocab_size: int, width: int, *, num_pairs: int = 0, dtype: torch.dtype = torch.float32,
    lam: float | None = None, ignored: tuple[int, ...] = (), bias: bool = False, logit_std: float = 2.0,
    seed: int = 0, upstream: float = 1.0, **options: Any,
) -> Case:  # fmt: skip
    """Random rows whose logits have standard deviation ``logit_std``; ``lam`` None draws it uniformly."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num_rows, width, generator=g)
    weight = torch.randn(vocab_size, width, generator=g) * (logit_std / max(width, 1) ** 0.5)
    target = torch.randint(0, vocab_size, (num_rows,), generator=g)
    shares = torch.rand(num_pairs, generator=g) if lam is None else torch.full((num_pairs,), float(lam))
    b = torch.randn(vocab_size, generator=g).to(dtype) if bias else None
    target[list(ignored)] = options.get("ignore_index", -100)
    return Case(hidden.to(dtype), weight.to(dtype), target, shares, b, options, upstream)


def run(
    case: Case, *, impl: str, dtype: torch.dtype | None = None, device: str = "cpu", **extra: Any
) -> dict[str, Tensor]:
    """The loss's value, statistics and gradients as a dict of CPU tensors."""

    def leaf(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.detach().to(device, dtype or t.dtype).clone().requires_grad_()

    def to_device(v: Any) -> Any:
        return v.to(device) if isinstance(v, Tensor) else v

    hidden, weight, bias = leaf(case.hidden), leaf(case.weight), leaf(case.bias)
    options = {k: to_device(v) for k, v in {**case.options, **extra}.items()}
    out = sftmix_loss(
        hidden, weight, case.target.to(device), case.lam.to(device), bias=bias, impl=impl, **options
    )
    out.loss.backward(torch.full_like(out.loss, case.upstream))
    result = {**out._asdict(), "dhidden": hidden.grad, "dweight": weight.grad}
    if bias is not None:
        result["dbias"] = bias.grad
    return {k: v.detach().cpu() for k, v in result.items() if v is not None}


Draw = tuple[Tensor, Tensor, Tensor]  # ours, same_dtype, truth


def assert_within_contract(name: str, *draw: Tensor) -> None:
    """error(ours) <= 2 error(torch) + one rounding of the result's dtype, in rms and in maximum; ours, torch, truth."""
    ours, same_dtype, truth = draw
    assert_draws_within_contract(name, [(ours, same_dtype, truth)])


def assert_draws_within_contract(name: str, draws: list[Draw]) -> None:
    """The same inequality between root mean squares over ``draws``."""
    sizes: list[Tensor] = []
    for ours, same_dtype, truth in draws:
        assert ours.shape == truth.shape, f"{name}: shape {list(ours.shape)} instead of {list(truth.shape)}"
        nan = truth.isnan()
        assert torch.equal(ours.isnan(), nan), f"{name}: NaN where there should be none (or the reverse)"
        values = torch.stack([ours.double() - truth, same_dtype.double() - truth, truth])[:, ~nan].flatten(1)
        if values.numel():
            sizes.append(torch.stack([values.square().mean(dim=1).sqrt(), values.abs().amax(dim=1)]))
    if not sizes:
        return
    rounding = torch.finfo(draws[0][0].dtype).eps
    for kind, found in zip(("rms", "max"), torch.stack(sizes).square().mean(dim=0).sqrt(), strict=True):
        error, torch_error, value = found
        bound = 2 * torch_error + rounding * value
        assert error <= bound, f"{name}: {kind} error {error:.3e} above {bound:.3e}"


def reordered(case: Case, seed: int) -> Case:
    """The same rows, pairs, classes and hidden columns in another order."""
    g = torch.Generator().manual_seed(seed)
    (num_rows, width), num_pairs, vocab_size = case.hidden.shape, len(case.lam), len(case.weight)
    sizes = (num_pairs, num_rows - 2 * num_pairs, vocab_size, width)
    pairs, single, classes, columns = (torch.randperm(size, generator=g) for size in sizes)
    rows = torch.cat([pairs, num_pairs + pairs, 2 * num_pairs + single])
    target = case.target[rows]
    inside = (target >= 0) & (target < vocab_size)
    target = torch.where(inside, classes.argsort()[target.clamp(0, vocab_size - 1)], target)
    options = dict(case.options)
    for name, order in (("row_weight", rows), ("pair_weight", pairs), ("class_weight", classes)):
        if name in options:
            options[name] = options[name][order]
    hidden, weight = case.hidden[rows][:, columns], case.weight[classes][:, columns]
    bias = None if case.bias is None else case.bias[classes]
    return Case(hidden, weight, target, case.lam[pairs], bias, options, case.upstream)


def expected_loss_error(same_dtype: dict[str, Tensor], truth: dict[str, Tensor]) -> Tensor:
    """The larger of torch's error in the scalar and the one its rows' errors lead to expect, float64 []."""
    rows = [(same_dtype[k].double() - truth[k], truth[k]) for k in ("nll", "mixup_nll")]
    error, value = (torch.cat(t) for t in zip(*rows, strict=True))
    keep = value != 0
    keep &= ~value.isnan()
    drawn = (same_dtype["loss"].double() - truth["loss"]).abs()
    if not keep.any():
        return drawn
    relative = error[keep].square().mean().sqrt() / value[keep].square().mean().sqrt()
    return torch.maximum(drawn, truth["loss"].abs() * relative / keep.sum() ** 0.5)


def assert_parity(
    case: Case, *, impl: str, device: str = "cpu", orders: int = 1, **extra: Any
) -> dict[str, Tensor]:
    """Value, statistics and every gradient of ``impl`` within the contract; returns them."""
    draws: dict[str, list[Draw]] = {}
    results: list[dict[str, Tensor]] = []
    for each in (case, *(reordered(case, seed) for seed in range(1, orders))):
        truth = run(each, impl="reference", dtype=torch.float64)
        same_dtype = run(each, impl="reference")
        ours = run(each, impl=impl, device=device, **extra)
        same_dtype["loss"] = truth["loss"] + expected_loss_error(same_dtype, truth)
        results.append(ours)
        for name in ours.keys() - {"is_top1", "predicted"}:
            draws.setdefault(name, []).append((ours[name], same_dtype[name], truth[name]))
    for name, found in draws.items():
        assert_draws_within_contract(name, found)
    first = results[0]
    assert first["loss"].dtype == sum_dtype(case.hidden.dtype)
    assert first["dhidden"].dtype == case.hidden.dtype and first["dweight"].dtype == case.weight.dtype
    return first

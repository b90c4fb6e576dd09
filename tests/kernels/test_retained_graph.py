"""A retained graph: what autograd keeps is never what a user may write to, so every backward adds the true gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sftmix_kernels import SFTMixLoss, linear_cross_entropy, sftmix_loss, token_stats
from tests.kernels.ways import every_way, impls, leaf, leaves
from tests.parity import Case, make_case

F32, BF16 = torch.float32, torch.bfloat16
dtypes = pytest.mark.parametrize("dtype", [F32, BF16], ids=["float32", "bfloat16"])
# The loss's own gradient is handed over without a product where the upstream is 1.
upstreams = pytest.mark.parametrize("upstream", [1.0, 3.0])
cases = pytest.mark.parametrize(
    "dtype,upstream", [(F32, 1.0), (F32, 3.0), (BF16, 1.0)], ids=["float32-1", "float32-3", "bfloat16-1"]
)


def small_case(dtype: torch.dtype = F32, seed: int = 0) -> Case:
    return make_case(14, 40, 12, num_pairs=5, dtype=dtype, bias=True, ignored=(3,), seed=seed)


def output_of(case: Case, inputs: list[Tensor], way: dict[str, Any], **options: Any) -> SFTMixLoss:
    return sftmix_loss(*inputs[:2], case.target, case.lam, bias=inputs[2], **way, **options)


def true_gradients(case: Case, way: dict[str, Any], upstream: float) -> list[Tensor]:
    inputs = leaves(case)
    loss = output_of(case, inputs, way).loss
    return [g.clone() for g in torch.autograd.grad(loss, inputs, torch.full_like(loss, upstream))]


@every_way
@cases
def test_three_backwards_add_three_gradients(
    way: dict[str, Any], dtype: torch.dtype, upstream: float
) -> None:
    case = small_case(dtype)
    inputs, expected = leaves(case), true_gradients(case, way, upstream)
    loss = output_of(case, inputs, way).loss
    for _ in range(3):
        loss.backward(torch.full_like(loss, upstream), retain_graph=True)
    for one, gradient in zip(inputs, expected, strict=True):
        assert (
            one.grad is not None and gradient.any() and torch.equal(one.grad, gradient + gradient + gradient)
        )


@every_way
@cases
def test_what_a_user_makes_of_a_gradient_does_not_reach_the_next(
    way: dict[str, Any], dtype: torch.dtype, upstream: float
) -> None:
    """A clipped, then a zeroed ``.grad``, in place and behind autograd's back, and the same graph again."""
    case = small_case(dtype)
    inputs, expected = leaves(case), true_gradients(case, way, upstream)
    loss = output_of(case, inputs, way).loss
    loss.backward(torch.full_like(loss, upstream), retain_graph=True)
    for factor in (0.5, 0.0):
        before = [one.grad.clone() for one in inputs if one.grad is not None]
        for one in inputs:
            assert one.grad is not None
            one.grad.data.mul_(factor)
        loss.backward(torch.full_like(loss, upstream), retain_graph=True)
        for one, last, gradient in zip(inputs, before, expected, strict=True):
            assert one.grad is not None and torch.equal(one.grad, last * factor + gradient)


@every_way
@cases
def test_gradients_share_no_memory_with_the_graph(
    way: dict[str, Any], dtype: torch.dtype, upstream: float
) -> None:
    """Of hidden, weight, bias and both factors: NaN written into the first ones is not in the second ones."""
    case = small_case(dtype)
    assert case.bias is not None
    factors = torch.randn(3, 12).to(dtype), torch.randn(40, 3).to(dtype)
    inputs = leaf(case.hidden, case.weight, case.bias, *factors)
    loss = output_of(case, inputs, way, lora=(inputs[3], inputs[4], 0.5)).loss
    given = torch.full_like(loss, upstream)
    first = torch.autograd.grad(loss, inputs, given, retain_graph=True)
    expected = [g.clone() for g in first]
    for gradient in first:
        gradient.data.fill_(float("nan"))
    second = torch.autograd.grad(loss, inputs, given, retain_graph=True)
    places = [g.untyped_storage().data_ptr() for g in (*first, *second, *inputs)]
    assert len(set(places)) == len(places)
    for gradient, right in zip(second, expected, strict=True):
        assert right.any() and torch.equal(gradient, right)


@every_way
def test_statistics_share_no_memory_with_the_graph(way: dict[str, Any]) -> None:
    """NaN written into every statistic of the result, and into the loss itself, changes no gradient."""
    case = small_case()
    inputs, expected = leaves(case), true_gradients(case, way, 1.0)
    out = output_of(case, inputs, way, want_predicted=True)
    for value in out:
        if value is not None:
            value.data.fill_(float("nan") if value.is_floating_point() else 1)
    for gradient, right in zip(torch.autograd.grad(out.loss, inputs), expected, strict=True):
        assert torch.equal(gradient, right)


@every_way
@dtypes
def test_batched_gradients(way: dict[str, Any], dtype: torch.dtype) -> None:
    """``is_grads_batched``: one gradient for each upstream, among them 1, 0 and a negative one."""
    case, given = small_case(dtype), torch.tensor([1.0, 3.0, 0.0, -2.0])
    inputs = leaves(case)
    loss = output_of(case, inputs, way).loss
    batched = torch.autograd.grad(loss, inputs, given, is_grads_batched=True, retain_graph=True)
    for index, upstream in enumerate(given):
        for found, right in zip(
            batched, torch.autograd.grad(loss, inputs, upstream, retain_graph=True), strict=True
        ):
            torch.testing.assert_close(found[index], right)


@impls
def test_batched_gradients_of_rows_and_of_statistics(impl: str) -> None:
    case, given = small_case(), torch.randn(3, 14)
    inputs = leaves(case)
    rows = linear_cross_entropy(*inputs[:2], case.target, bias=inputs[2], reduction="none", impl=impl)
    entropy = token_stats(*inputs[:2], case.target, bias=inputs[2], differentiable=True, impl=impl).entropy
    for output in (rows, entropy):
        batched = torch.autograd.grad(output, inputs, given, is_grads_batched=True, retain_graph=True)
        for index, upstream in enumerate(given):
            each = torch.autograd.grad(output, inputs, upstream, retain_graph=True)
            for found, right in zip(batched, each, strict=True):
                torch.testing.assert_close(found[index], right)


@impls
@pytest.mark.parametrize("kind", ["rows", "statistics"])
def test_any_upstream_again_and_again(impl: str, kind: str) -> None:
    """Each row's own upstream, twice, with NaN written into what the first backward gave."""
    case = small_case()
    inputs = leaves(case)

    def output() -> Tensor:
        if kind == "rows":
            return linear_cross_entropy(
                *inputs[:2], case.target, bias=inputs[2], reduction="none", impl=impl, z_loss=0.01
            )
        found = token_stats(*inputs[:2], case.target, bias=inputs[2], differentiable=True, impl=impl)
        return found.entropy - 2 * found.logprob

    for upstream in (torch.ones(14), torch.linspace(-1, 2, 14)):
        expected = torch.autograd.grad(output(), inputs, upstream)
        kept = output()
        for _ in range(2):
            found = torch.autograd.grad(kept, inputs, upstream, retain_graph=True)
            for gradient, right in zip(found, expected, strict=True):
                assert right.any() and torch.equal(gradient, right)
                gradient.data.fill_(float("nan"))


@every_way
@upstreams
def test_main_gradient_is_added_each_time(way: dict[str, Any], upstream: float) -> None:
    """Also after a user scaled it between two backwards of one graph."""
    case = small_case()
    once, total, inputs = torch.zeros(40, 12), torch.zeros(40, 12), leaves(case)
    given = torch.tensor(upstream)
    output_of(case, leaves(case), way, main_grad=once).loss.backward(given)
    loss = output_of(case, inputs, way, main_grad=total).loss
    loss.backward(given, retain_graph=True)
    total.data.mul_(0.5)
    for _ in range(2):
        loss.backward(given, retain_graph=True)
    assert once.any() and inputs[1].grad is None
    torch.testing.assert_close(total, 2.5 * once, rtol=1e-5, atol=1e-6)


@every_way
@dtypes
def test_two_losses_of_one_weight(way: dict[str, Any], dtype: torch.dtype) -> None:
    """Both graphs retained, taken in turns, and their sum: each adds its own gradient."""
    cases = small_case(dtype), small_case(dtype, seed=1)
    expected = [true_gradients(case, way, 1.0)[1] for case in cases]
    weight = leaf(cases[0].weight)[0]
    cases[1].weight = cases[0].weight
    expected[1] = true_gradients(cases[1], way, 1.0)[1]
    losses = []
    for case in cases:
        hidden, bias = leaf(case.hidden, case.bias)
        losses.append(output_of(case, [hidden, weight, bias], way).loss)
    for loss, gradient in zip((*losses, *losses), (*expected, *expected), strict=True):
        weight.grad = None
        loss.backward(retain_graph=True)
        assert weight.grad is not None and torch.equal(weight.grad, gradient)
        torch.nn.utils.clip_grad_norm_([weight], 1e-3)
    weight.grad = None
    (losses[0] + losses[1]).backward()
    total = expected[0] + expected[1]  # the reference adds its products in another order
    assert weight.grad is not None and total.any()
    atol = 4 * torch.finfo(dtype).eps * total.abs().max().item()
    torch.testing.assert_close(weight.grad, total, rtol=0, atol=atol)

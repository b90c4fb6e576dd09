"""An ignored row contributes nothing, whatever its hidden state holds: the rest is the same bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sftmix_kernels import linear_cross_entropy, sftmix_loss, token_stats
from tests.kernels.ways import every_way, impls, leaf, leaves
from tests.parity import Case, make_case, run

F32, F16, F64 = torch.float32, torch.float16, torch.float64
IGNORED = [0, 6, 9, 14]  # a confident member, a partner, two rows without a pair; their partners are 5 and 1
GARBAGE = {"NaN": float("nan"), "inf": float("inf"), "largest": None}
garbage = pytest.mark.parametrize("value", GARBAGE.values(), ids=GARBAGE.keys())
OPTIONS: list[dict[str, Any]] = [
    {},
    {"label_smoothing": 0.1, "z_loss": 0.02},
    {"softcap": 4.0, "label_smoothing": 0.2},
    {"token_scaling": True, "class_weight": torch.linspace(0, 2, 37), "z_loss": 0.02},
]


def clean_case(dtype: torch.dtype = F32, **options: Any) -> Case:
    return make_case(
        16, 37, 12, num_pairs=5, dtype=dtype, bias=True, ignored=tuple(IGNORED), logit_scale=0.8, **options
    )


def soiled(case: Case, value: float | None) -> Case:
    """The same call with ``value`` in its ignored rows; None: the largest number of the dtype."""
    hidden = case.hidden.clone()
    hidden[IGNORED] = torch.finfo(hidden.dtype).max if value is None else value
    return Case(hidden, case.weight, case.target, case.lam, case.bias, case.options, case.upstream)


def assert_the_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """All but the ignored rows' own log-sum-exp."""
    keep = torch.ones(16, dtype=torch.bool)
    keep[IGNORED] = False
    for name, value in expected.items():
        ours = found[name]
        if name == "lse":
            ours, value = ours[keep], value[keep]
        assert torch.equal(ours, value), name
    assert not found["dhidden"][IGNORED].any()


@every_way
@pytest.mark.parametrize(
    "value,options",
    [*((value, OPTIONS[1]) for value in GARBAGE.values()), *((float("nan"), each) for each in OPTIONS)],
    ids=[*(f"{name}-smoothed" for name in GARBAGE), *(f"NaN-{', '.join(o) or 'plain'}" for o in OPTIONS)],
)
def test_loss_statistics_and_gradients(
    way: dict[str, Any], value: float | None, options: dict[str, Any]
) -> None:
    case = clean_case(want_predicted=True, **options)
    expected = run(case, **way)
    assert expected["dhidden"][[5, 1]].any(dim=1).all()  # their own terms stay, without a mixture
    assert_the_same(run(soiled(case, value), **way), expected)


@every_way
@garbage
def test_float16_and_weights_of_rows(way: dict[str, Any], value: float | None) -> None:
    case = clean_case(F16, z_loss=0.02, row_weight=torch.rand(16), pair_weight=torch.rand(5))
    assert_the_same(run(soiled(case, value), **way), run(case, **way))


@every_way
@garbage
def test_no_gradient_needed(way: dict[str, Any], value: float | None) -> None:
    """The forward alone has code of its own."""
    case = clean_case(label_smoothing=0.1, z_loss=0.02)

    def loss(case: Case) -> Tensor:
        inputs = (case.hidden, case.weight, case.target, case.lam)
        return sftmix_loss(*inputs, bias=case.bias, **way, **case.options).loss

    found, expected = loss(soiled(case, value)), loss(case)
    assert expected.isfinite() and torch.equal(found, expected)


@every_way
@pytest.mark.parametrize("frozen", [0, 1], ids=["hidden", "weight"])
def test_one_gradient_alone(way: dict[str, Any], frozen: int) -> None:
    case = clean_case(label_smoothing=0.1, z_loss=0.02)
    results = []
    for each in (case, soiled(case, float("nan"))):
        inputs = leaves(each)
        inputs[frozen].requires_grad_(False)
        loss = sftmix_loss(*inputs[:2], each.target, each.lam, bias=inputs[2], **way, **each.options).loss
        results.append(torch.autograd.grad(loss, [t for t in inputs if t.requires_grad]))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@every_way
@garbage
def test_low_rank_factors(way: dict[str, Any], value: float | None) -> None:
    """The factors' gradients too, and hidden's through them."""
    case = clean_case(label_smoothing=0.1, z_loss=0.02)
    factors = torch.randn(3, 12), torch.randn(37, 3)
    results = []
    for each in (case, soiled(case, value)):
        inputs = leaf(each.hidden, each.weight, *factors)
        lora = (inputs[2], inputs[3], 0.5)
        loss = sftmix_loss(*inputs[:2], each.target, each.lam, lora=lora, **way, **each.options).loss
        results.append([loss, *torch.autograd.grad(loss, inputs)])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@every_way
@garbage
def test_main_gradient(way: dict[str, Any], value: float | None) -> None:
    case = clean_case(z_loss=0.02)
    totals = []
    for each in (case, soiled(case, value)):
        inputs, total = leaves(each), torch.ones(37, 12)
        sftmix_loss(
            *inputs[:2], each.target, each.lam, bias=inputs[2], main_grad=total, **way, **each.options
        ).loss.backward()
        totals.append(total)
    assert torch.equal(*totals) and not torch.equal(totals[0], torch.ones(37, 12))


@impls
@garbage
def test_rows_of_their_own_upstream(impl: str, value: float | None) -> None:
    case = clean_case(label_smoothing=0.1, z_loss=0.02)
    upstream, results = torch.linspace(-2, 3, 16), []
    for each in (case, soiled(case, value)):
        inputs = leaves(each)
        rows = linear_cross_entropy(
            *inputs[:2], each.target, bias=inputs[2], reduction="none", impl=impl, **each.options
        )
        assert not rows[IGNORED].any()
        results.append([rows, *torch.autograd.grad(rows, inputs, upstream)])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@impls
@garbage
def test_statistics(impl: str, value: float | None) -> None:
    """0, False and -1 at ignored rows; what carries gradients takes none from a row without an upstream."""
    case = clean_case()
    tokens, upstream = torch.randint(0, 37, (16, 2)), torch.linspace(-1, 2, 16)
    upstream[IGNORED] = 0
    results = []
    for each in (case, soiled(case, value)):
        inputs = leaves(each)
        found = token_stats(
            *inputs[:2], each.target, bias=inputs[2], tokens=tokens, differentiable=True, want_predicted=True,
            impl=impl, logit_scale=0.8,
        )  # fmt: skip
        assert found.token_logprob is not None and found.predicted is not None
        assert not found.logprob[IGNORED].any() and not found.token_logprob[IGNORED].any()
        assert not found.is_top1[IGNORED].any() and (found.predicted[IGNORED] == -1).all()
        outputs = [found.logprob, found.lse, found.entropy, found.token_logprob]
        given = [torch.ones(16), upstream, upstream, upstream[:, None].expand(-1, 2)]
        by_all = torch.autograd.grad(outputs, inputs, given, retain_graph=True)
        by_some = torch.autograd.grad(outputs[::3], inputs, given[::3])  # lse and entropy have no upstream
        keep = upstream != 0
        results.append([outputs[0], outputs[1][keep], outputs[2][keep], outputs[3], *by_all, *by_some])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@impls
def test_finite_ignored_rows_have_a_log_sum_exp_with_a_gradient(impl: str) -> None:
    case = clean_case()
    inputs = leaves(case)
    found = token_stats(*inputs[:2], case.target, bias=inputs[2], differentiable=True, impl=impl)
    logits = torch.nn.functional.linear(*inputs)
    torch.testing.assert_close(found.lse, logits.logsumexp(1))
    for one, other in zip(
        torch.autograd.grad(found.lse.sum(), inputs),
        torch.autograd.grad(logits.logsumexp(1).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(one, other)

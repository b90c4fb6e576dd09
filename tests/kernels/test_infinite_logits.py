"""Logits of -inf, the usual mask of a vocabulary: what torch's cross-entropy gives, and never 0 times infinity."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sftmix_kernels import linear_cross_entropy, sftmix_loss, token_stats
from tests.kernels.ways import WAYS, engines, every_way, impls, leaves
from tests.parity import Case, assert_parity, assert_within_contract, make_case, run

F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
INF = float("inf")
V = 300
# Whole tiles and blocks of columns at -inf, the first ones too, where a running maximum starts at -inf.
MASKED = {
    "last": torch.arange(V) >= 290,
    "first tiles": torch.arange(V) < 270,
    "scattered": torch.arange(V) % 3 == 1,
    "all but one": torch.arange(V) != 17,
}
SERVED = [("chunked", F32), ("chunked", BF16)]
SERVED += [(name, dtype) for name in ("recompute", "stored") for dtype in (F32, F16)]
served = pytest.mark.parametrize("name,dtype", SERVED, ids=[f"{n}-{str(d)[6:]}" for n, d in SERVED])


def masked_case(
    columns: Tensor, *, num_rows: int = 11, num_pairs: int = 4, dtype: torch.dtype = F32, **options: Any
) -> Case:
    """No target is masked; one row is ignored."""
    case = make_case(num_rows, V, 8, num_pairs=num_pairs, dtype=dtype, bias=True, ignored=(2,), **options)
    assert case.bias is not None
    case.bias[columns] = -INF
    allowed = (~columns).nonzero()[:, 0]
    case.target = torch.where(case.target >= 0, allowed[case.target % len(allowed)], case.target)
    return case


@served
@pytest.mark.parametrize("columns", MASKED)
def test_contract(name: str, dtype: torch.dtype, columns: str) -> None:
    """Shares of 0, 1 and between; the masked columns get no gradient at all.

    Many pairs: 16-bit products of 8 numbers do not change with their order, so the errors of 3 mixtures are one draw.
    """
    case = masked_case(MASKED[columns], num_rows=43, num_pairs=20, dtype=dtype)
    case.lam = torch.tensor([0.0, 0.3, 1.0, 0.6]).repeat(5)
    found = assert_parity(case, **WAYS[name])
    assert all(value.isfinite().all() for value in found.values())
    assert not found["dweight"][MASKED[columns]].any() and not found["dbias"][MASKED[columns]].any()
    assert columns == "all but one" or found["dbias"].any()


@engines
@pytest.mark.parametrize("options", [{"softcap": 4.0}, {"z_loss": 0.1, "token_scaling": True}], ids=str)
def test_contract_of_options(way: dict[str, Any], options: dict[str, Any]) -> None:
    """A cap makes -inf finite, so its column has a probability and its bias a derivative of 0."""
    found = assert_parity(masked_case(MASKED["first tiles"], **options), **way)
    assert found["loss"].isfinite()


@engines
@pytest.mark.parametrize("label_smoothing", [0.2, 1.0])
def test_smoothing_leaves_out_masked_classes_of_weight_0(way: dict[str, Any], label_smoothing: float) -> None:
    weights = torch.where(MASKED["scattered"], 0, torch.linspace(0.5, 2, V))
    case = masked_case(MASKED["scattered"], class_weight=weights, label_smoothing=label_smoothing)
    assert assert_parity(case, **way)["loss"].isfinite()


def torchs(case: Case, **options: Any) -> tuple[Tensor, list[Tensor]]:
    """torch's rows in float64 and the gradients of their sum."""
    inputs = [t.double() for t in leaves(case)]
    rows = F.cross_entropy(F.linear(*inputs), case.target, reduction="none", **options)
    return rows.detach(), list(torch.autograd.grad(rows.sum(), inputs))


@every_way
@pytest.mark.parametrize("case_of", ["smoothing", "target"])
def test_where_torch_is_infinite(way: dict[str, Any], case_of: str) -> None:
    """A masked target, or smoothing over a masked class: a loss of inf, whose gradients are torch's, and finite."""
    case = masked_case(MASKED["last"], num_pairs=0)
    options = {"label_smoothing": 0.1} if case_of == "smoothing" else {}
    if case_of == "target":
        case.target[5] = 295
    rows, expected = torchs(case, **options)
    assert rows[5] == INF
    inputs = leaves(case)
    loss = linear_cross_entropy(*inputs[:2], case.target, bias=inputs[2], reduction="sum", **way, **options)
    assert loss == INF
    for found, right in zip(torch.autograd.grad(loss, inputs), expected, strict=True):
        torch.testing.assert_close(found.double(), right, rtol=1e-5, atol=1e-6)


@impls
def test_rows_of_their_own_upstream(impl: str) -> None:
    case = masked_case(MASKED["first tiles"], num_pairs=0)
    case.target[5] = 3
    rows, expected = torchs(case)
    inputs = leaves(case)
    found = linear_cross_entropy(*inputs[:2], case.target, bias=inputs[2], reduction="none", impl=impl)
    assert found[5] == INF and rows[5] == INF
    torch.testing.assert_close(found.double(), rows, rtol=1e-5, atol=1e-6)
    for gradient, right in zip(torch.autograd.grad(found.sum(), inputs), expected, strict=True):
        torch.testing.assert_close(gradient.double(), right, rtol=1e-5, atol=1e-6)


@every_way
def test_weights_of_0_leave_infinite_terms_out(way: dict[str, Any]) -> None:
    """Of a row, of a pair, of a class, of the mixture; the loss is that of the other rows."""
    case = masked_case(MASKED["last"])
    case.target[9] = 295  # a row without a pair
    row_weight = torch.ones(11)
    row_weight[9] = 0
    by_row = run(case, **way, row_weight=row_weight)
    class_weight = torch.ones(V)
    class_weight[295] = 0
    by_class = run(case, **way, class_weight=class_weight, ntp_denominator=10)
    case.target[9] = -100
    expected = run(case, **way, ntp_denominator=10)
    for found in (by_row, by_class):
        assert found["loss"].isfinite() and found["nll"][9] == INF
        for name in ("loss", "dhidden", "dweight", "dbias"):
            torch.testing.assert_close(found[name], expected[name], rtol=1e-6, atol=1e-7)
    case.target[5] = 295  # the partner in the second pair
    row_weight[5] = 0
    weights = {"row_weight": row_weight, "pair_weight": torch.tensor([1.0, 0.0, 1.0, 1.0])}
    case.lam = torch.full((4,), 0.5)
    assert run(case, **way, **weights)["loss"].isfinite()
    assert run(case, **way, row_weight=row_weight)["loss"] == INF
    muted = run(case, **way, row_weight=row_weight, mixup_weight=torch.tensor(0.0))
    assert muted["loss"].isfinite() and muted["mixup_nll"][1] == INF


@every_way
def test_token_scaling_of_a_masked_target_is_0(way: dict[str, Any]) -> None:
    case = masked_case(MASKED["last"], num_pairs=0)
    case.target[5] = 295
    found = run(case, **way, token_scaling=True, ntp_denominator=10)
    case.target[5] = -100
    expected = run(case, **way, token_scaling=True, ntp_denominator=10)
    for name in ("loss", "dhidden", "dweight"):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-6, atol=1e-7)


@every_way
def test_a_share_of_0_takes_nothing_of_a_masked_label(way: dict[str, Any]) -> None:
    """lam 1 with a masked label of the partner, lam 0 with one of the confident member: the other member alone."""
    case = masked_case(MASKED["last"])
    case.lam = torch.tensor([1.0, 0.0, 0.5, 1.0])
    case.target[4], case.target[1] = 295, 296
    out = sftmix_loss(case.hidden, case.weight, case.target, case.lam, bias=case.bias, **way)
    torch.testing.assert_close(out.mixup_nll[:2], out.nll[[0, 5]], rtol=1e-5, atol=1e-6)
    weights = torch.ones(11)
    weights[[4, 1]] = 0
    found = run(case, **way, row_weight=weights)
    assert all(found[name].isfinite().all() for name in ("loss", "dhidden", "dweight", "dbias"))
    assert not found["dhidden"][4].any() and not found["dhidden"][1].any()


@impls
@pytest.mark.parametrize("columns", MASKED)
def test_statistics(impl: str, columns: str) -> None:
    """Entropy, log-sum-exp and log-probabilities are those of the classes that are left."""
    case = masked_case(MASKED[columns], num_pairs=0)
    allowed = (~MASKED[columns]).nonzero()[:, 0]
    arguments = (case.hidden, case.weight, case.target)
    ours = token_stats(*arguments, bias=case.bias, impl=impl)
    wide = [t.double() for t in (case.hidden, case.weight)]
    assert case.bias is not None
    truth = token_stats(*wide, case.target, bias=case.bias.double(), impl="reference")
    same = token_stats(*arguments, bias=case.bias, impl="reference")
    logprobs = F.linear(wide[0], wide[1][allowed], case.bias[allowed].double()).log_softmax(1)
    torch.testing.assert_close(truth.entropy, -(logprobs.exp() * logprobs).sum(1))
    for name in ("logprob", "lse", "entropy"):
        assert getattr(ours, name).isfinite().all()
        assert_within_contract(name, *(getattr(result, name) for result in (ours, same, truth)))


@impls
def test_statistics_that_carry_gradients(impl: str) -> None:
    case = masked_case(MASKED["first tiles"], num_pairs=0)
    tokens = torch.tensor([[270, 299, 3]]).expand(11, 3)

    def found(name: str, dtype: torch.dtype) -> list[Tensor]:
        inputs = [t.detach().to(dtype).requires_grad_() for t in leaves(case)]
        out = token_stats(
            *inputs[:2], case.target, bias=inputs[2], tokens=tokens, differentiable=True, impl=name
        )
        assert out.token_logprob is not None and (out.token_logprob[case.target >= 0, 2] == -INF).all()
        total = out.entropy.sum() + 2 * out.lse.sum() - out.token_logprob[:, :2].sum()
        return list(torch.autograd.grad(total, inputs))

    for ours, same, truth in zip(
        found(impl, F32), found("reference", F32), found("reference", F64), strict=True
    ):
        assert_within_contract("gradient", ours, same, truth)

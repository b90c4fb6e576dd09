"""The specification where a factor is 0, a logit infinite or a row ignored: it selects, it does not multiply."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sftmix_kernels import reference
from tests.kernels.test_reference import F64, INF, classes, leaves, with_masked_columns
from tests.parity import Case, make_case

NAN = float("nan")


def test_a_class_of_weight_0_at_minus_infinity_contributes_nothing() -> None:
    """torch multiplies: 0 * inf is NaN there. Selected, it is torch's loss of the other classes over all V."""
    case = with_masked_columns(make_case(8, 11, 6, dtype=F64, bias=True), 10)
    case.target.clamp_(max=9)
    weights = classes(10)
    logits = F.linear(*leaves(case))
    assert F.cross_entropy(logits, case.target, weight=weights, label_smoothing=0.2).isnan()
    logprobs = logits[:, :10].log_softmax(1)
    rows = -0.8 * weights[case.target] * logprobs.gather(1, case.target[:, None])[:, 0]
    rows = rows - 0.2 / 11 * (weights[:10] * logprobs).sum(1)
    found = reference.row_losses(
        case.hidden, case.weight, case.target, bias=case.bias, class_weight=weights, label_smoothing=0.2
    )
    torch.testing.assert_close(found, rows, rtol=1e-12, atol=0)
    case.target[2] = 10  # (1 - e) * 0 * inf
    row = reference.row_losses(
        case.hidden, case.weight, case.target, bias=case.bias, class_weight=weights, label_smoothing=0.2
    )[2]
    assert row.item() == pytest.approx(-0.2 / 11 * (weights[:10] * logprobs[2]).sum().item(), rel=1e-12)


def test_a_share_of_0_or_1_selects_the_other_member() -> None:
    """Its label's logit may be -inf, its hidden state infinite: the mixture is the member with share 1, exactly."""
    case = with_masked_columns(make_case(7, 11, 6, num_pairs=3, dtype=F64, bias=True), 4)
    case.target = torch.tensor([1, 4, 2, 4, 5, 4, 6])
    case.lam = torch.tensor([1.0, 0.0, 0.5])
    case.hidden[3, 2] = INF  # the partner of the first pair
    inputs = leaves(case)
    out = reference.sftmix_loss(*inputs[:2], case.target, case.lam, bias=inputs[2])
    assert torch.equal(out.mixup_nll[:2], out.nll[[0, 4]]) and out.mixup_nll[2] == INF
    case.hidden[3] = 0
    inputs = leaves(case)
    weights = {"row_weight": (case.target != 4).double(), "pair_weight": torch.tensor([1.0, 1.0, 0.0])}
    out = reference.sftmix_loss(*inputs[:2], case.target, case.lam, bias=inputs[2], **weights)
    counted = [0, 2, 4, 6]
    expected = out.nll[counted].sum() / 7 + 0.2 * out.nll[[0, 4]].sum() / 3
    assert out.loss.isfinite() and out.loss.item() == pytest.approx(expected.item(), rel=1e-12)
    gradients = torch.autograd.grad(out.loss, inputs)
    assert all(g.isfinite().all() for g in gradients)
    assert not gradients[0][[1, 3, 5]].any() and gradients[0][counted].any(dim=1).all()


def test_a_mixup_weight_of_0_selects() -> None:
    case = with_masked_columns(make_case(4, 11, 6, num_pairs=2, dtype=F64, bias=True), 10)
    case.target[3] = 10
    options: dict[str, Any] = {"bias": case.bias, "row_weight": torch.tensor([1.0, 1.0, 1.0, 0.0])}
    for zero in (torch.tensor(0.0), 0):
        out = reference.sftmix_loss(
            case.hidden, case.weight, case.target, case.lam, mixup_weight=zero, **options
        )
        assert out.mixup_nll[1] == INF
        assert out.loss.item() == pytest.approx(out.nll[:3].sum().item() / 4, rel=1e-12)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("garbage", [NAN, INF, -INF, 1.7e308])
def test_ignored_rows_give_nothing_whatever_they_hold(garbage: float, softcap: float | None) -> None:
    """A confident member (0), a partner (4), a single row (7), with every option; their partners give no mixture."""
    case = make_case(9, 11, 6, num_pairs=3, dtype=F64, bias=True, ignored=(0, 4, 7))
    low, up = torch.randn(9, 2, dtype=F64), torch.randn(11, 2, dtype=F64)
    options: dict[str, Any] = {
        "label_smoothing": 0.1,
        "z_loss": 0.2,
        "softcap": softcap,
        "token_scaling": True,
    }

    def gradients(case: Case, low: Tensor) -> tuple[reference.SFTMixLoss, tuple[Tensor, ...]]:
        inputs = leaves(case, low, up)
        out = reference.sftmix_loss(
            *inputs[:2], case.target, case.lam, bias=inputs[2], low=inputs[3], up=inputs[4], **options
        )
        return out, torch.autograd.grad(out.loss, inputs)

    expected, right = gradients(case, low)
    case.hidden[[0, 4, 7]] = garbage
    low[[0, 4, 7]] = garbage
    out, found = gradients(case, low)
    keep = case.target >= 0
    for name in ("loss", "nll", "mixup_nll", "is_top1", "z_loss"):
        assert torch.equal(getattr(out, name), getattr(expected, name)), name
    assert torch.equal(out.lse[keep], expected.lse[keep])
    assert not out.lse[~keep].isfinite().any() or (softcap and garbage == 1.7e308)
    assert not found[0][~keep].any() and not found[3][~keep].any()
    for one, other in zip(found, right, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("garbage", [NAN, INF, 1.7e308])
def test_statistics_of_an_ignored_row_carry_gradients_where_they_are_finite(garbage: float) -> None:
    case = make_case(5, 11, 6, dtype=F64, bias=True, ignored=(1, 3))
    case.hidden[3] = garbage
    inputs = leaves(case)
    tokens = torch.zeros(5, 2, dtype=torch.int64)
    found = reference.token_stats(
        *inputs[:2], case.target, bias=inputs[2], tokens=tokens, want_predicted=True
    )
    assert found.token_logprob is not None and found.predicted is not None
    assert not found.lse[3].isfinite() and not found.entropy[3].isfinite()
    assert not found.logprob[[1, 3]].any() and not found.token_logprob[[1, 3]].any()
    assert (found.predicted[[1, 3]] == -1).all()
    upstream = torch.tensor([1.0, 2.0, 3.0, 0.0, 1.0], dtype=F64)
    total = (found.logprob + found.token_logprob.sum(1)).sum()
    given = [found.lse, found.entropy, total]
    gradients = torch.autograd.grad(given, inputs, [upstream, upstream, torch.ones_like(total)])
    assert all(g.isfinite().all() for g in gradients)
    assert gradients[0][1].any() and not gradients[0][3].any()


def test_nothing_over_nothing_is_nothing() -> None:
    """A denominator of 0, given or by class weights, without anything to divide: loss 0 and gradients 0."""
    case = make_case(4, 11, 6, num_pairs=2, dtype=F64, bias=True, ignored=(0, 1, 2, 3))
    given: list[dict[str, Any]] = [
        {}, {"ntp_denominator": 0, "mixup_denominator": torch.tensor(0)},
        {"ntp_denominator": torch.tensor(0.0), "z_loss": 0.1},
    ]  # fmt: skip
    for options in given:
        inputs = leaves(case)
        loss = reference.sftmix_loss(*inputs[:2], case.target, case.lam, bias=inputs[2], **options).loss
        assert loss == 0 and not any(g.any() for g in torch.autograd.grad(loss, inputs))
    case.target[:] = 3
    inputs = leaves(case)
    out = reference.sftmix_loss(
        *inputs[:2], case.target, case.lam[:0], bias=inputs[2], class_weight=classes(3)
    )
    assert out.loss == 0 and not any(g.any() for g in torch.autograd.grad(out.loss, inputs))

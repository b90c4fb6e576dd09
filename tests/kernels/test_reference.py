"""The specification itself: by hand, by finite differences, and against torch's own cross-entropies."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sftmix_kernels import reference
from tests.parity import Case, make_case

INF, F64 = float("inf"), torch.float64


def leaves(case: Case, *more: Tensor) -> list[Tensor]:
    """hidden, weight, bias and ``more``, requiring gradients."""
    tensors = [case.hidden, case.weight, *([] if case.bias is None else [case.bias]), *more]
    return [t.detach().clone().requires_grad_() for t in tensors]


def with_masked_columns(case: Case, *columns: int) -> Case:
    assert case.bias is not None
    case.bias[list(columns)] = -INF
    return case


def classes(*zero: int, size: int = 11) -> Tensor:
    weights = torch.linspace(0.2, 1.9, size, dtype=F64)
    weights[list(zero)] = 0
    return weights


def test_one_pair_computed_by_hand() -> None:
    """D = V = 2, W the identity: hidden states are the logits, and every number below is arithmetic on paper.

    h_c = (ln 3, 0), y_c = 0:  p = 3/4,  nll = ln(4/3).    h_u = (0, ln 3), y_u = 0:  p = 1/4,  nll = ln 4.
    lam = 3/4: x = (3/4 ln 3, 1/4 ln 3), so x_0 - x_1 = ln(3)/2 and p_0 = r / (1 + r) with r = sqrt 3; both labels
    are class 0, so the mixture's cross-entropy is ln((1 + r) / r).
    loss = (ln(4/3) + ln 4) / 2 + 0.2 ln((1 + r) / r).
    """
    log3, r = math.log(3.0), math.sqrt(3.0)
    hidden = torch.tensor([[log3, 0.0], [0.0, log3]], dtype=F64, requires_grad=True)
    out = reference.sftmix_loss(
        hidden, torch.eye(2, dtype=F64), torch.tensor([0, 0]), torch.tensor([0.75]), want_predicted=True
    )
    assert out.nll.tolist() == pytest.approx([math.log(4 / 3), math.log(4)], rel=1e-14)
    assert out.mixup_nll.tolist() == pytest.approx([math.log((1 + r) / r)], rel=1e-14)
    assert out.loss.item() == pytest.approx(
        (math.log(4 / 3) + math.log(4)) / 2 + 0.2 * math.log((1 + r) / r), rel=1e-14
    )
    assert out.is_top1.tolist() == [True, False] and out.z_loss == 0
    assert out.predicted is not None and out.predicted.tolist() == [0, 1]
    out.loss.backward()
    # dx = p - y; the next-token part is halved by its two rows, the mixture's is shared 3/4 : 1/4.
    mixed = 0.2 * (r / (1 + r) - 1)
    assert hidden.grad is not None
    assert hidden.grad[:, 0].tolist() == pytest.approx(
        [-1 / 8 + 0.75 * mixed, -3 / 8 + 0.25 * mixed], rel=1e-14
    )


def test_every_option_of_a_row_computed_by_hand() -> None:
    """p = (3/4, 1/4), y = 0, k = (2, 5), e = 0.4, z = 0.1; lse = ln 4.

    smoothed = 0.6 * 2 ln(4/3) + 0.2 (2 ln(4/3) + 5 ln 4); z-loss 0.1 (ln 4)^2; token scaling times 3/4.
    """
    hidden, weight = torch.tensor([[math.log(3.0), 0.0]], dtype=F64), torch.eye(2, dtype=F64)
    options: dict[str, Any] = {
        "class_weight": torch.tensor([2.0, 5.0]),
        "label_smoothing": 0.4,
        "z_loss": 0.1,
    }
    nll = math.log(4 / 3)
    smoothed, z = 0.6 * 2 * nll + 0.2 * (2 * nll + 5 * math.log(4)), 0.1 * math.log(4) ** 2
    target, none = torch.tensor([0]), torch.empty(0)
    for scaling, factor in ((False, 1.0), (True, 0.75)):
        found = reference.sftmix_loss(hidden, weight, target, none, token_scaling=scaling, **options)
        assert found.loss.item() == pytest.approx(factor * (smoothed + z) / 2, rel=1e-14)  # over k[y] = 2
        assert found.z_loss.item() == pytest.approx(factor * z / 2, rel=1e-14)
        assert found.nll.item() == pytest.approx(nll, rel=1e-14)
        rows = reference.row_losses(hidden, weight, target, token_scaling=scaling, **options)
        assert rows.tolist() == pytest.approx([factor * (smoothed + z)], rel=1e-14)


OPTIONS: list[dict[str, Any]] = [
    {}, {"softcap": 3.0}, {"label_smoothing": 0.1, "z_loss": 0.02, "softcap": 4.0}, {"label_smoothing": 1.0},
    {"class_weight": classes(2, 7)}, {"class_weight": classes(2, 7), "label_smoothing": 0.3, "z_loss": 0.05},
]  # fmt: skip


@pytest.mark.parametrize("masked", [(), (9, 10)], ids=["finite", "-inf"])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: ", ".join(o) or "plain")
def test_gradients_agree_with_finite_differences(options: dict[str, Any], masked: tuple[int, ...]) -> None:
    """Of hidden, weight, bias and both factors, with columns at -inf too where the loss is finite there."""
    case = make_case(7, 11, 5, num_pairs=3, dtype=F64, bias=True, ignored=(4,))
    case.target = torch.where(case.target > 8, 1, case.target)  # no target is masked
    case.target[0] = case.target[3]  # one pair whose labels agree
    assert case.bias is not None
    low, up, weights = (
        torch.randn(7, 2, dtype=F64),
        torch.randn(11, 2, dtype=F64),
        options.get("class_weight"),
    )
    if masked and options.get("label_smoothing"):  # finite where the masked classes have weight 0
        weights = torch.ones(11) if weights is None else weights
        options = {**options, "class_weight": torch.where(torch.arange(11) < 9, weights, 0)}
    mask = torch.zeros(11, dtype=F64)
    mask[list(masked)] = -INF

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor, low: Tensor, up: Tensor) -> Tensor:
        return reference.sftmix_loss(
            hidden, weight, case.target, torch.tensor([0.0, 0.3, 1.0]), bias=bias + mask, logit_scale=0.7,
            row_weight=torch.linspace(0.5, 2, 7), pair_weight=torch.tensor([1.0, 0.3, 2.0]), low=low, up=up,
            **options,
        ).loss  # fmt: skip

    inputs = tuple(leaves(case, low, up))
    assert torch.autograd.gradcheck(loss, inputs)
    assert torch.autograd.gradcheck(loss, inputs, check_forward_ad=True, fast_mode=True)
    if masked:
        assert torch.autograd.gradgradcheck(loss, inputs, fast_mode=True)


@pytest.mark.parametrize("masked", [(), (9, 10)], ids=["finite", "-inf"])
def test_statistics_agree_with_finite_differences(masked: tuple[int, ...]) -> None:
    """logprob, lse, entropy and the log-probabilities of given tokens, one token twice, an ignored row's lse too."""
    case = make_case(6, 11, 5, dtype=F64, bias=True, ignored=(4,))
    case.target = torch.where(case.target > 8, 1, case.target)
    tokens = torch.tensor([[0, 3, 3], [1, 2, -100], [5, 5, 5], [8, 7, 6], [1, 2, 3], [-100, -100, 4]])
    mask = torch.zeros(11, dtype=F64)
    mask[list(masked)] = -INF

    def statistics(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        found = reference.token_stats(
            hidden, weight, case.target, bias=bias + mask, tokens=tokens, softcap=None
        )
        assert found.token_logprob is not None
        return found.logprob, found.lse, found.entropy, found.token_logprob

    assert torch.autograd.gradcheck(statistics, tuple(leaves(case)), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(statistics, tuple(leaves(case)), fast_mode=True)


def test_token_scaling_is_a_constant_weight() -> None:
    """Gradients are those of the loss with each row's probability as its row weight."""
    case = make_case(9, 11, 5, dtype=F64, bias=True, ignored=(4,))
    options = {"label_smoothing": 0.1, "z_loss": 0.02}
    ours, theirs = leaves(case), leaves(case)
    scaled = reference.sftmix_loss(
        *ours[:2], case.target, case.lam, bias=ours[2], token_scaling=True, **options
    )
    weights = torch.exp(-scaled.nll)
    weighed = reference.sftmix_loss(
        *theirs[:2], case.target, case.lam, bias=theirs[2], row_weight=weights, **options
    )
    torch.testing.assert_close(scaled.loss, weighed.loss, rtol=1e-13, atol=0)
    for one, other in zip(
        torch.autograd.grad(scaled.loss, ours), torch.autograd.grad(weighed.loss, theirs), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.15, 1.0])
@pytest.mark.parametrize("weights", [None, classes(), classes(3, 6)], ids=["no", "all", "some 0"])
@pytest.mark.parametrize("masked", [(), (9,)], ids=["finite", "-inf"])
def test_it_is_torchs_cross_entropy(
    weights: Tensor | None, label_smoothing: float, masked: tuple[int, ...]
) -> None:
    """Mean, sum and each row, and gradients, with class weights, smoothing, ignored rows and a column at -inf."""
    case = with_masked_columns(make_case(20, 11, 6, dtype=F64, bias=True, ignored=(3, 8)), *masked)
    if label_smoothing < 1:  # torch multiplies 0 by infinity there
        case.target[7] = 9  # a target that is masked, where one is
    elif masked:
        case.target = torch.where(case.target == 9, 8, case.target)
    options = {"class_weight": weights, "label_smoothing": label_smoothing}
    ours, theirs = leaves(case), leaves(case)
    logits = F.linear(*theirs)
    rows = reference.row_losses(*ours[:2], case.target, bias=ours[2], **options)
    mean = reference.sftmix_loss(*ours[:2], case.target, case.lam, bias=ours[2], **options).loss
    expected = F.cross_entropy(
        logits, case.target, weight=weights, label_smoothing=label_smoothing, reduction="none"
    )
    torch.testing.assert_close(rows, expected, rtol=1e-12, atol=1e-14)
    assert masked or rows.isfinite().all()
    expected_mean = F.cross_entropy(logits, case.target, weight=weights, label_smoothing=label_smoothing)
    torch.testing.assert_close(mean, expected_mean, rtol=1e-12, atol=0)
    upstream = torch.linspace(-1, 2, 20, dtype=F64)
    for one, other in (((rows * upstream).nansum(), (expected * upstream).nansum()), (mean, expected_mean)):
        gradients = torch.autograd.grad(one, ours, retain_graph=True)
        for found, right in zip(
            gradients, torch.autograd.grad(other, theirs, retain_graph=True), strict=True
        ):
            assert found.isfinite().all()
            torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-14)


def test_z_loss_is_the_squared_log_sum_exp_and_apart() -> None:
    case = make_case(10, 13, 6, dtype=F64, ignored=(3,))
    logits, weights = case.hidden @ case.weight.T, torch.linspace(0, 2, 10, dtype=F64)
    arguments = (case.hidden, case.weight, case.target, case.lam)
    out = reference.sftmix_loss(*arguments, z_loss=0.3, row_weight=weights)
    plain = reference.sftmix_loss(*arguments, row_weight=weights)
    keep = case.target >= 0
    expected = 0.3 * (weights * logits.logsumexp(1).square())[keep].sum() / 9
    assert out.z_loss.item() == pytest.approx(expected.item(), rel=1e-12) and not out.z_loss.requires_grad
    assert (out.loss - plain.loss).item() == pytest.approx(expected.item(), rel=1e-12)
    assert out.nll.sum().item() == pytest.approx(F.cross_entropy(logits, case.target, reduction="sum").item())


def test_equals_next_token_plus_soft_label_cross_entropy() -> None:
    """Against torch's own cross_entropy with probability targets on explicitly mixed hidden states."""
    case = make_case(10, 13, 6, num_pairs=4, dtype=F64)
    logits = case.hidden @ case.weight.T
    lam = case.lam.double()[:, None]
    mixed = (lam * case.hidden[:4] + (1 - lam) * case.hidden[4:8]) @ case.weight.T
    soft = lam * F.one_hot(case.target[:4], 13) + (1 - lam) * F.one_hot(case.target[4:8], 13)
    expected = F.cross_entropy(logits, case.target) + 0.2 * F.cross_entropy(mixed, soft)
    out = reference.sftmix_loss(case.hidden, case.weight, case.target, case.lam)
    assert out.loss.item() == pytest.approx(expected.item(), rel=1e-12)


def test_token_stats_are_those_of_the_full_distribution() -> None:
    case = with_masked_columns(make_case(9, 17, 6, dtype=F64, bias=True, ignored=(2,)), 16)
    case.target.clamp_(max=15)
    tokens = torch.randint(0, 16, (9, 3))
    stats = reference.token_stats(case.hidden, case.weight, case.target, bias=case.bias, tokens=tokens)
    full = torch.distributions.Categorical(logits=F.linear(*leaves(case))[:, :16])
    keep = case.target >= 0
    torch.testing.assert_close(stats.entropy, full.entropy(), rtol=1e-12, atol=1e-12)
    expected = full.log_prob(case.target.clamp(min=0))
    torch.testing.assert_close(stats.logprob[keep], expected[keep], rtol=1e-12, atol=1e-12)
    assert torch.equal(stats.is_top1[keep], (full.logits.argmax(1) == case.target)[keep])
    assert stats.logprob[2] == 0 and not stats.is_top1[2] and stats.token_logprob is not None
    each = full.logits.gather(1, tokens)[keep]
    torch.testing.assert_close(stats.token_logprob[keep], each, rtol=1e-12, atol=1e-12)


def test_the_first_of_equal_logits_is_predicted() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0], [2.0, 2.0, 2.0], [0.0, 1.0, 5.0]])
    target = torch.tensor([2, 0, -100])
    found = reference.token_stats(logits, torch.eye(3), target, want_predicted=True)
    assert found.predicted is not None and found.predicted.tolist() == [1, 0, -1]
    assert found.is_top1.tolist() == [True, True, False]


def test_it_compiles_whole() -> None:
    case = with_masked_columns(make_case(7, 11, 6, num_pairs=3, bias=True, ignored=(4,)), 10)
    case.target.clamp_(max=9)
    options: dict[str, Any] = {"token_scaling": True, "z_loss": 0.1, "class_weight": classes(2)}

    def call(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        loss = reference.sftmix_loss(hidden, weight, case.target, case.lam, bias=bias, **options).loss
        stats = reference.token_stats(hidden, weight, case.target, bias=bias, tokens=case.target[:, None])
        return loss, stats.entropy.sum()

    results = []
    for function in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        inputs = leaves(case)
        values = function(*inputs)
        results.append([*values, *torch.autograd.grad(sum(values), inputs)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)

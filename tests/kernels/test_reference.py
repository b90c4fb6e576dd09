"""The specification itself: by hand, by finite differences, and against three separate cross-entropies."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from sftmix_kernels import sftmix_loss, token_stats
from tests.parity import make_case


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_one_pair_computed_by_hand(impl: str) -> None:
    """D = V = 2, W the identity: hidden states are the logits, and every number below is arithmetic on paper.

    h_c = (ln 3, 0), y_c = 0:  p = 3/4,  nll = ln(4/3).    h_u = (0, ln 3), y_u = 0:  p = 1/4,  nll = ln 4.
    lam = 3/4: x = (3/4 ln 3, 1/4 ln 3), so x_0 - x_1 = ln(3)/2 and p_0 = r / (1 + r) with r = sqrt 3; both labels
    are class 0, so the mixture's cross-entropy is ln((1 + r) / r).
    loss = (ln(4/3) + ln 4) / 2 + 0.2 ln((1 + r) / r).
    """
    log3 = math.log(3.0)
    hidden = torch.tensor([[log3, 0.0], [0.0, log3]], dtype=torch.float64, requires_grad=True)
    weight = torch.eye(2, dtype=torch.float64)
    out = sftmix_loss(hidden, weight, torch.tensor([0, 0]), torch.tensor([0.75]), impl=impl)
    r = math.sqrt(3.0)
    assert out.nll.tolist() == pytest.approx([math.log(4 / 3), math.log(4)], rel=1e-14)
    assert out.mixup_nll.tolist() == pytest.approx([math.log((1 + r) / r)], rel=1e-14)
    assert out.loss.item() == pytest.approx(
        (math.log(4 / 3) + math.log(4)) / 2 + 0.2 * math.log((1 + r) / r), rel=1e-14
    )
    assert out.is_top1.tolist() == [True, False]
    out.loss.backward()
    # dx = p - y; the next-token part is halved by its two rows, the mixture's is shared 3/4 : 1/4.
    mixed = 0.2 * (r / (1 + r) - 1)
    assert hidden.grad is not None
    assert hidden.grad[:, 0].tolist() == pytest.approx(
        [-1 / 8 + 0.75 * mixed, -3 / 8 + 0.25 * mixed], rel=1e-14
    )


@pytest.mark.parametrize("impl", ["reference", "chunked"])
@pytest.mark.parametrize(
    "options", [{}, {"softcap": 3.0}, {"label_smoothing": 0.1, "z_loss": 0.02, "softcap": 4.0}], ids=str
)
def test_gradients_agree_with_finite_differences(impl: str, options: dict[str, float]) -> None:
    case = make_case(7, 11, 5, num_pairs=3, dtype=torch.float64, bias=True, ignored=(4,))
    case.target[0] = case.target[3]  # one pair whose labels agree

    def loss(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return sftmix_loss(
            hidden, weight, case.target, case.lam, bias=bias, logit_scale=0.7, impl=impl, **options,
            row_weight=torch.linspace(0.5, 2, 7), pair_weight=torch.tensor([1.0, 0.3, 2.0]), scratch_bytes=300,
        ).loss  # fmt: skip

    assert case.bias is not None
    assert torch.autograd.gradcheck(
        loss, tuple(t.requires_grad_() for t in (case.hidden, case.weight, case.bias))
    )


def test_smoothing_is_torchs_and_z_loss_is_the_squared_log_sum_exp() -> None:
    case = make_case(10, 13, 6, dtype=torch.float64, ignored=(3,))
    logits = case.hidden @ case.weight.T
    out = sftmix_loss(
        case.hidden, case.weight, case.target, case.lam, label_smoothing=0.15, z_loss=0.3, impl="reference"
    )
    keep = case.target >= 0
    expected = F.cross_entropy(logits, case.target, label_smoothing=0.15)
    expected = expected + 0.3 * logits.logsumexp(1)[keep].square().mean()
    assert out.loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert out.nll.sum().item() == pytest.approx(F.cross_entropy(logits, case.target, reduction="sum").item())


def test_equals_next_token_plus_soft_label_cross_entropy() -> None:
    """Against torch's own cross_entropy with probability targets on explicitly mixed hidden states."""
    case = make_case(10, 13, 6, num_pairs=4, dtype=torch.float64)
    logits = case.hidden @ case.weight.T
    lam = case.lam.double()[:, None]
    mixed = (lam * case.hidden[:4] + (1 - lam) * case.hidden[4:8]) @ case.weight.T
    soft = lam * F.one_hot(case.target[:4], 13) + (1 - lam) * F.one_hot(case.target[4:8], 13)
    expected = F.cross_entropy(logits, case.target) + 0.2 * F.cross_entropy(mixed, soft)
    out = sftmix_loss(case.hidden, case.weight, case.target, case.lam, impl="reference")
    assert out.loss.item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("impl", ["chunked", "reference"])
def test_token_stats_are_those_of_the_full_distribution(impl: str) -> None:
    case = make_case(9, 17, 6, dtype=torch.float64, ignored=(2,))
    stats = token_stats(case.hidden, case.weight, case.target, impl=impl, scratch_bytes=17 * 8 * 2)
    full = torch.distributions.Categorical(logits=case.hidden @ case.weight.T)
    keep = case.target >= 0
    torch.testing.assert_close(stats.entropy, full.entropy(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        stats.logprob[keep], full.log_prob(case.target.clamp(min=0))[keep], rtol=1e-12, atol=1e-12
    )
    assert torch.equal(stats.is_top1[keep], (full.logits.argmax(1) == case.target)[keep])
    assert stats.logprob[2] == 0 and not stats.is_top1[2]

"""The same call with and without gradients gives the same loss, whichever schedule makes the gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sftmix_kernels import SFTMixLoss, sftmix_loss
from tests.kernels.ways import WAYS, leaves
from tests.parity import Case, make_case

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
DTYPES = [F32, F16, BF16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
OPTIONS: list[dict[str, Any]] = [{}, {"softcap": 30.0}, {"label_smoothing": 0.1, "z_loss": 1e-3}]
cases = pytest.mark.parametrize(
    "dtype,options", [*((dtype, OPTIONS[0]) for dtype in DTYPES), *((F16, o) for o in OPTIONS[1:])], ids=str
)


def steep_case(dtype: torch.dtype, **options: Any) -> Case:
    """Logits of standard deviation 10, where a 16-bit logit is off by up to an eighth."""
    return make_case(
        48, 200, 16, num_pairs=20, dtype=dtype, bias=True, ignored=(3, 45), logit_std=10.0, **options
    )


def evaluated(case: Case, name: str, **options: Any) -> SFTMixLoss:
    """Without gradients: nothing requires one."""
    tensors = (case.hidden, case.weight, case.target, case.lam)
    return sftmix_loss(*tensors, bias=case.bias, **WAYS[name], **case.options, **options)


def trained(case: Case, name: str, which: str = "hidden weight bias", **options: Any) -> SFTMixLoss:
    """With gradients of the tensors named in ``which``."""
    inputs = leaves(case)
    for tensor, label in zip(inputs, ("hidden", "weight", "bias"), strict=True):
        tensor.requires_grad_(label in which)
    found = sftmix_loss(
        *inputs[:2], case.target, case.lam, bias=inputs[2], **WAYS[name], **case.options, **options
    )
    assert found.loss.requires_grad
    return found


STATISTICS = ("loss", "nll", "lse", "mixup_nll", "is_top1")


@pytest.mark.parametrize("name", ["reference", "chunked", "recompute"])
@cases
def test_bit_for_bit(name: str, dtype: torch.dtype, options: dict[str, Any]) -> None:
    case = steep_case(dtype, **options)
    # torch's tanh of a vector and of a tile's last few numbers differ by a unit, and tiles are cut in two ways.
    units = 2 if name == "chunked" and "softcap" in options else 0
    expected = evaluated(case, name)
    for which in ("hidden weight bias", "weight"):
        found = trained(case, name, which)
        for field in STATISTICS:
            one, other = getattr(found, field), getattr(expected, field)
            torch.testing.assert_close(one, other, rtol=units * torch.finfo(F32).eps, atol=0)
    with torch.no_grad():
        assert torch.equal(evaluated(case, name).loss, expected.loss)


def assert_one_rounding(found: SFTMixLoss, expected: SFTMixLoss, case: Case) -> None:
    """A row's log-sum-exp is off by at most one rounding of its largest logit, its nll by one of the target's more.

    A capped logit is rounded before the cap, whose slope is at most 1. float32 sums add some units. Roundings have no
    sign in common, so the mean over rows is off by at most four standard deviations of the mean of as many.
    """
    assert case.bias is not None
    sizes = (case.hidden.double() @ case.weight.double().T + case.bias.double()).abs()
    largest, target = sizes.amax(1), sizes.gather(1, case.target.clamp(min=0)[:, None])[:, 0]
    rounding, sums = 0.5 * torch.finfo(case.hidden.dtype).eps, 16 * torch.finfo(F32).eps
    keep = case.target >= 0
    lse = (found.lse.double() - expected.lse.double()).abs()
    assert (lse <= (rounding + sums) * largest).all(), f"{(lse / largest).max():.2e} of the largest logit"
    nll = (found.nll.double() - expected.nll.double())[keep]
    both = (largest + target)[keep]
    assert (nll.abs() <= (rounding + sums) * both).all(), f"{(nll.abs() / both).max():.2e} of both logits"
    deviation = rounding * (largest.square() + target.square())[keep].sum().sqrt() / 3**0.5 / len(nll)
    assert nll.mean().abs() <= 4 * deviation + sums * both.mean(), f"{nll.mean():.2e} on the average"


@cases
def test_stored_is_within_one_rounding_of_a_logit(dtype: torch.dtype, options: dict[str, Any]) -> None:
    case = steep_case(dtype, **options)
    found, expected = trained(case, "stored"), evaluated(case, "stored")
    assert_one_rounding(found, expected, case)
    # A mixed logit is made of two rounded ones: no larger than the larger, and the label's part likewise.
    assert case.bias is not None
    largest = (case.hidden.double() @ case.weight.double().T + case.bias.double()).abs().amax(1)
    larger = torch.maximum(largest[:20], largest[20:40])
    error = (found.mixup_nll - expected.mixup_nll).double().abs()
    assert (error <= (torch.finfo(dtype).eps + 16 * torch.finfo(F32).eps) * larger).all()


@dtypes
def test_schedules_agree_within_one_rounding(dtype: torch.dtype) -> None:
    """``schedule=None`` takes one or the other by the number of rows: the loss must not jump with it."""
    case = steep_case(dtype)
    assert_one_rounding(trained(case, "stored"), trained(case, "recompute"), case)
    assert torch.equal(evaluated(case, "stored").nll, evaluated(case, "recompute").nll)


@pytest.mark.parametrize("name", ["chunked", "recompute"])
@dtypes
def test_a_smaller_scratch_changes_no_statistic_by_more_than_a_float32_sum(
    name: str, dtype: torch.dtype
) -> None:
    case = steep_case(dtype)
    one, other = trained(case, name, scratch_bytes=200 * 4 * 9), trained(case, name)
    torch.testing.assert_close(one.nll, other.nll, rtol=1e-5, atol=2e-5)

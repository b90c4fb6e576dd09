"""Strange layouts in memory: transposed, cut out, every second element, expanded. What lies beside is NaN."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.kernels.test_shapes_edge import contiguous, outputs, served
from tests.parity import Case, assert_within_contract, make_case, run


def assert_strides_do_not_matter(
    case: Case, *, impl: str, without: tuple[str, ...] = ("loss", "is_top1", "predicted")
) -> dict[str, Tensor]:
    """``case`` as it lies in memory, against the contract that a contiguous copy of it sets."""
    plain = contiguous(case)
    truth, same_dtype = run(plain, impl="reference", dtype=torch.float64), run(plain, impl="reference")
    ours = outputs(case, impl=impl)
    for name in ours.keys() - set(without):
        assert_within_contract(name, ours[name], same_dtype[name], truth[name])
    return ours


@served
@pytest.mark.parametrize("layout", ["transposed", "every second column", "every second row", "one column in"])
def test_strided_hidden_and_weight(impl: str, dtype: torch.dtype, layout: str) -> None:
    def strided(t: Tensor) -> Tensor:
        if layout == "transposed":
            return t.t().contiguous().t()
        if layout == "every second column":
            return torch.stack([t, torch.full_like(t, float("nan"))], dim=2).flatten(1)[:, ::2]
        if layout == "every second row":
            return torch.stack([t, torch.full_like(t, float("nan"))], dim=1).flatten(0, 1)[::2]
        return torch.nn.functional.pad(t, (1, 2), value=float("nan"))[:, 1:-2]  # rows unaligned and apart

    case = make_case(33, 70, 24, num_pairs=13, dtype=dtype, bias=True)
    case.hidden, case.weight = strided(case.hidden), strided(case.weight)
    assert not case.hidden.is_contiguous() and not case.weight.is_contiguous()
    assert_strides_do_not_matter(case, impl=impl)


@served
def test_strided_vectors(impl: str, dtype: torch.dtype) -> None:
    case = make_case(33, 70, 24, num_pairs=13, dtype=dtype, bias=True)
    assert case.bias is not None
    weights = {"row_weight": torch.rand(33), "pair_weight": torch.rand(13)}

    def every_second(t: Tensor) -> Tensor:
        return torch.stack([t, torch.full_like(t, 1 << 40 if t.dtype == torch.int64 else float("nan"))], 1)[
            :, 0
        ]

    strided = Case(
        case.hidden, case.weight, every_second(case.target), every_second(case.lam), every_second(case.bias),
        {k: every_second(v) for k, v in weights.items()},
    )  # fmt: skip
    assert strided.target.stride() == (2,)
    ours = assert_strides_do_not_matter(strided, impl=impl)
    plain = outputs(Case(case.hidden, case.weight, case.target, case.lam, case.bias, weights), impl=impl)
    assert all(torch.equal(ours[k], plain[k]) for k in plain)


@served
def test_expanded_inputs(impl: str, dtype: torch.dtype) -> None:
    """Stride 0: one hidden state for all rows, one lam, one weight per row; then one weight row for all classes."""
    case = make_case(33, 70, 24, num_pairs=13, dtype=dtype)
    case.hidden = case.hidden[:1].expand(33, 24)
    case.lam, case.options = torch.tensor(0.3).expand(13), {"row_weight": torch.tensor(0.5).expand(33)}
    assert_strides_do_not_matter(case, impl=impl)

    # Equal classes: p = 1/V, and dhidden is (sum of dlogits) w = 0 but for the rounding of dlogits.
    case = make_case(33, 70, 24, num_pairs=13, dtype=dtype)
    one_row, one_column = case.weight[:1].expand(70, 24), case.weight[:, :1].expand(70, 24)
    case.weight = one_row
    out = assert_strides_do_not_matter(case, impl=impl, without=("loss", "is_top1", "dhidden"))
    for name in ("nll", "mixup_nll"):
        torch.testing.assert_close(out[name], torch.full_like(out[name], math.log(70)), rtol=1e-5, atol=0)
    assert out["dweight"].shape == (70, 24)
    assert out["dhidden"].abs().max() <= torch.finfo(dtype).eps * case.weight.abs().max()

    case.weight = one_column
    assert_strides_do_not_matter(case, impl=impl)

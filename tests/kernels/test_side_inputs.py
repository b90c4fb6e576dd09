"""What stands beside the rows: weights, shares, denominators; the types taken, those refused, and what 0 means."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sftmix_kernels import LossHead, linear_cross_entropy, sftmix_loss
from tests.kernels.ways import WAYS, every_way, leaves, widened
from tests.parity import Case, assert_parity, make_case, run

F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
N, M, V, D = 14, 5, 30, 12


def small_case(**options: Any) -> Case:
    return make_case(N, V, D, num_pairs=M, bias=True, ignored=(3,), **options)


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


# --- 16 bits: a module boundary under FSDP rounds what passes through it ---------------------------------------------

ROUNDED: dict[str, Tensor] = {
    "row_weight": torch.ones(N), "pair_weight": torch.ones(M), "ntp_denominator": torch.tensor(1001.0),
    "mixup_denominator": torch.tensor(1001.0), "mixup_weight": torch.tensor(0.3), "lam": torch.full((M,), 0.5),
}  # fmt: skip


@every_way
@pytest.mark.parametrize("dtype", [F16, BF16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("name", ROUNDED)
def test_16_bits_are_refused_by_name_with_the_remedy(
    way: dict[str, Any], dtype: torch.dtype, name: str
) -> None:
    """Of hidden's dtype or not, and through a head too: 1001 in bfloat16 is 1000."""
    case = small_case(dtype=dtype)
    lam = ROUNDED[name].to(dtype) if name == "lam" else case.lam
    options = {} if name == "lam" else {name: ROUNDED[name].to(dtype)}
    kind = str(dtype).removeprefix("torch.")
    with pytest.raises(ValueError, match=rf"^{name}: expected .*cast_forward_inputs=False.*got {kind}"):
        sftmix_loss(case.hidden, case.weight, case.target, lam, bias=case.bias, **options, **way)
    head = LossHead(D, V, dtype=dtype)
    with pytest.raises(ValueError, match=rf"^{name}: .*cast_forward_inputs=False"):
        head(case.hidden, case.target, lam, **options, **way)


@every_way
def test_16_bit_class_weights_are_refused(way: dict[str, Any]) -> None:
    case = small_case()
    with pytest.raises(ValueError, match=r"^class_weight: expected .*got bfloat16"):
        linear_cross_entropy(
            case.hidden, case.weight, case.target, class_weight=torch.ones(V).bfloat16(), **way
        )


@every_way
@pytest.mark.parametrize(
    "weights",
    [
        torch.ones(V + 1), torch.ones(V, 1), torch.full((V,), -1.0), torch.full((V,), float("nan")),
        torch.full((V,), float("inf")), torch.ones(V, requires_grad=True),
    ],
    ids=["a class too many", "two dimensions", "negative", "NaN", "infinite", "trained"],
)  # fmt: skip
def test_class_weights_that_are_none(way: dict[str, Any], weights: Tensor) -> None:
    case = small_case()
    with pytest.raises(ValueError, match=r"^class_weight: expected .*got "):
        sftmix_loss(case.hidden, case.weight, case.target, case.lam, class_weight=weights, **way)


# --- types that are numbers ------------------------------------------------------------------------------------------

WEIGHT_TYPES = [F64, torch.bool, torch.uint8, torch.int32, torch.int64]


@every_way
@pytest.mark.parametrize("dtype", WEIGHT_TYPES, ids=lambda d: str(d)[6:])
def test_weights_of_rows_and_pairs_are_masks_or_counts_too(way: dict[str, Any], dtype: torch.dtype) -> None:
    case = small_case()
    rows, pairs = torch.arange(N) % 3, torch.tensor([0, 1, 2, 1, 0])
    if dtype == torch.bool:
        rows, pairs = rows.clamp(max=1), pairs.clamp(max=1)
    expected = run(case, **way, row_weight=rows.float(), pair_weight=pairs.float())
    same(run(case, **way, row_weight=rows.to(dtype), pair_weight=pairs.to(dtype)), expected)
    assert expected["dhidden"].any()


NUMBERS: dict[str, Any] = {
    "float": 7.0, "numpy int64": np.int64(7), "numpy uint8": np.uint8(7), "numpy float32": np.float32(7),
    "float32": torch.tensor(7.0), "float64": torch.tensor(7.0, dtype=F64), "int32": torch.tensor(7, dtype=torch.int32),
}  # fmt: skip


@every_way
@pytest.mark.parametrize("number", NUMBERS.values(), ids=NUMBERS.keys())
def test_denominators_and_the_mixup_weight_are_numbers_of_any_kind(way: dict[str, Any], number: Any) -> None:
    case = small_case()
    names = ("ntp_denominator", "mixup_denominator", "mixup_weight")
    same(run(case, **way, **dict.fromkeys(names, number)), run(case, **way, **dict.fromkeys(names, 7)))


@every_way
@pytest.mark.parametrize("name", ["ntp_denominator", "mixup_denominator", "mixup_weight"])
def test_what_is_no_number(way: dict[str, Any], name: str) -> None:
    case = small_case()
    wrong: tuple[Any, ...] = (
        -1, float("nan"), float("inf"), True, np.bool_(True), "7", np.float64(-1), torch.tensor(-1),
        torch.tensor(True), torch.tensor(1j), torch.ones(1), np.ones(2),
    )  # fmt: skip
    for value in wrong:
        with pytest.raises(ValueError, match=f"^{name}: expected .*got "):
            sftmix_loss(case.hidden, case.weight, case.target, case.lam, **{name: value}, **way)


# --- lam -------------------------------------------------------------------------------------------------------------


@every_way
@pytest.mark.parametrize("dtype", [F32, F16], ids=["float32", "float16"])
def test_lam_in_float64_is_used_in_the_dtype_of_sums(way: dict[str, Any], dtype: torch.dtype) -> None:
    """Beside float32 and 16-bit rows it is the float32 number nearest to it."""
    case = small_case(dtype=dtype)
    lam = torch.tensor([0.0, 1.0, 0.1, 0.3, 0.7], dtype=F64)
    results = []
    for shares in (lam, lam.float()):
        case.lam = shares
        results.append(run(case, **way))
    same(*results)


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_lam_in_float64_keeps_its_digits_beside_float64_rows(impl: str) -> None:
    """0.1 in float32 is off by 1e-9, which these losses show."""
    case = small_case(dtype=F64)
    case.lam = torch.full((M,), 0.1, dtype=F64)
    found = run(case, impl=impl)
    pairs = case.hidden[:M] * 0.1 + case.hidden[M : 2 * M] * 0.9
    logprobs = (pairs @ case.weight.T + case.bias).log_softmax(1)
    y_c, y_u = case.target[:M].clamp(min=0)[:, None], case.target[M : 2 * M][:, None]
    expected = -(0.1 * logprobs.gather(1, y_c) + 0.9 * logprobs.gather(1, y_u))[:, 0]
    expected[3] = 0  # its confident member is ignored
    torch.testing.assert_close(found["mixup_nll"], expected, rtol=1e-14, atol=1e-14)
    case.lam = case.lam.float()
    assert (run(case, impl=impl)["mixup_nll"] - expected).abs().max() > 1e-10


# --- denominators of 0 -----------------------------------------------------------------------------------------------

ZEROS: dict[str, Any] = {
    "0": 0, "numpy": np.float64(0), "int64": torch.tensor(0), "float32": torch.tensor(0.0),
}  # fmt: skip
zeros = pytest.mark.parametrize("zero", ZEROS.values(), ids=ZEROS.keys())


@every_way
@zeros
def test_nothing_over_nothing_is_nothing(way: dict[str, Any], zero: Any) -> None:
    """A step without supervised tokens: loss 0, gradients 0, as with the default denominators."""
    case = small_case(label_smoothing=0.1, z_loss=0.1)
    case.target[:] = -100
    found = run(case, **way, ntp_denominator=zero, mixup_denominator=zero)
    assert found["loss"] == 0 and found["z_loss"] == 0 and not found["mixup_nll"].any()
    for name in ("dhidden", "dweight", "dbias"):
        assert found[name].shape == run(case, **way)[name].shape and not found[name].any()


@every_way
@zeros
def test_no_valid_pair_among_supervised_rows(way: dict[str, Any], zero: Any) -> None:
    case = small_case()
    case.target[:M] = -100
    found = run(case, **way, mixup_denominator=zero)
    same(found, run(case, **way))
    assert found["loss"] > 0 and found["dhidden"][M : 2 * M].any()


@every_way
@zeros
def test_something_over_nothing_is_refused(way: dict[str, Any], zero: Any) -> None:
    case = small_case()
    for name in ("ntp_denominator", "mixup_denominator"):
        with pytest.raises(ValueError, match=f"^{name}: expected .*got "):
            sftmix_loss(case.hidden, case.weight, case.target, case.lam, **{name: zero}, **way)


@every_way
def test_all_targets_of_class_weight_0(way: dict[str, Any]) -> None:
    """The default denominator is then 0, and so is every term."""
    case = small_case()
    case.lam = case.lam[:0]
    case.target[:] = 4
    weights = torch.ones(V)
    weights[4] = 0
    found = run(case, **way, class_weight=weights)
    assert found["loss"] == 0 and not found["dhidden"].any() and not found["dweight"].any()


@pytest.mark.parametrize("way", [WAYS["chunked"], WAYS["recompute"]], ids=["chunked", "recompute"])
def test_denominators_of_0_in_tensors_compile(way: dict[str, Any]) -> None:
    """One graph for steps with and without supervised tokens; something over 0 raises from it too."""
    case = small_case()

    def loss(hidden: Tensor, weight: Tensor, target: Tensor, count: Tensor) -> Tensor:
        return sftmix_loss(hidden, weight, target, case.lam[:0], ntp_denominator=count, **way).loss

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    inputs, none = leaves(case)[:2], torch.full_like(case.target, -100)
    nothing = compiled(*inputs, none, torch.tensor(0))
    assert nothing == 0 and not any(g.any() for g in torch.autograd.grad(nothing, inputs))
    torch.testing.assert_close(
        compiled(*inputs, case.target, torch.tensor(13)), loss(*inputs, case.target, torch.tensor(13))
    )
    with pytest.raises(RuntimeError, match="ntp_denominator: expected"):
        compiled(*inputs, case.target, torch.tensor(0))


@every_way
def test_types_together_are_within_the_contract(way: dict[str, Any]) -> None:
    """A mask of rows, counts of pairs, float64 shares, an integer count and a numpy number in one call."""
    case = small_case(
        row_weight=torch.arange(N) % 2 == 0, pair_weight=torch.arange(M), ntp_denominator=torch.tensor(11),
        mixup_denominator=np.float32(3), mixup_weight=torch.tensor(0.25, dtype=F64),
    )  # fmt: skip
    case.lam = widened(case.lam)
    assert_parity(case, **way)

"""What acts on each row's own term: class weights, smoothing to 1, z-loss apart, token scaling, prediction, shift."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sftmix_kernels import linear_cross_entropy, sftmix_loss, token_stats
from tests.kernels.ways import WAYS, engines, every_way, gradients, impls, leaf, leaves, widened
from tests.parity import Case, assert_parity, assert_within_contract, make_case, run

F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
# N, V, D, M: full tiles; nothing a multiple of anything; more classes than a tile, no pairs.
SHAPES = [(32, 64, 32, 16), (33, 131, 50, 13), (21, 300, 9, 0)]
DTYPES = {"chunked": (F32, BF16), "recompute": (F32, F16), "stored": (F32, F16)}
SERVED = [(name, dtype) for name, dtypes in DTYPES.items() for dtype in dtypes]
served = pytest.mark.parametrize("name,dtype", SERVED, ids=[f"{n}-{str(d)[6:]}" for n, d in SERVED])
WEIGHTED = {"class_weight": True}  # replaced by weights of V classes, some of them 0
OPTIONS: dict[str, dict[str, Any]] = {
    "class weights": WEIGHTED,
    "class weights, smoothing": {**WEIGHTED, "label_smoothing": 0.2},
    "class weights, smoothing 1, cap": {**WEIGHTED, "label_smoothing": 1.0, "softcap": 4.0},
    "smoothing 1": {"label_smoothing": 1.0},
    "token scaling": {"token_scaling": True},
    "token scaling, z-loss, cap": {"token_scaling": True, "z_loss": 0.02, "softcap": 3.0, "logit_scale": 0.7},
    "all": {**WEIGHTED, "label_smoothing": 0.1, "z_loss": 0.01, "token_scaling": True},
}
options_of = pytest.mark.parametrize("options", OPTIONS)


def class_weights(vocab_size: int) -> Tensor:
    weights = torch.linspace(0.1, 2, vocab_size)
    weights[::7] = 0
    return weights


def optional_case(
    shape: tuple[int, int, int, int], options: str, dtype: torch.dtype = F32, **more: Any
) -> Case:
    """Two rows ignored, one of them in a pair; one pair's labels agree."""
    num_rows, vocab_size, width, num_pairs = shape
    named = dict(OPTIONS[options]) if options else {}
    if named.get("class_weight") is True:
        named["class_weight"] = class_weights(vocab_size)
    case = make_case(
        num_rows,
        vocab_size,
        width,
        num_pairs=num_pairs,
        dtype=dtype,
        bias=True,
        ignored=(3, 18),
        **named,
        **more,
    )
    case.target[5] = case.target[5 + num_pairs]
    return case


@served
@pytest.mark.parametrize(
    "shape,options",
    [*((SHAPES[1], each) for each in OPTIONS), (SHAPES[0], "all"), (SHAPES[2], "all")],
    ids=str,
)
def test_contract(name: str, dtype: torch.dtype, shape: tuple[int, int, int, int], options: str) -> None:
    """Value, the z-loss part, statistics and gradients; chunks and slices of a few rows and columns."""
    case = optional_case(shape, options, dtype)
    scratch = 4 * dtype.itemsize * shape[1] if shape is SHAPES[1] else None
    found = assert_parity(case, **WAYS[name], scratch_bytes=scratch)
    assert found["dweight"].any() and (found["z_loss"] > 0) == ("z_loss" in OPTIONS[options])


@every_way
def test_computed_by_hand(way: dict[str, Any]) -> None:
    """p = (3/4, 1/4), y = 0, k = (2, 5), e = 0.4, z = 0.1, scaled by p; two equal rows over 2 + 2."""
    hidden, weight = torch.tensor([[math.log(3.0), 0.0]]).expand(2, 2), torch.eye(2)
    nll = math.log(4 / 3)
    term = 0.6 * 2 * nll + 0.2 * (2 * nll + 5 * math.log(4))
    z = 0.1 * math.log(4) ** 2
    out = sftmix_loss(
        hidden, weight, torch.zeros(2, dtype=torch.int64), torch.empty(0), label_smoothing=0.4, z_loss=0.1,
        class_weight=torch.tensor([2.0, 5.0]), token_scaling=True, want_predicted=True, **way,
    )  # fmt: skip
    assert out.loss.item() == pytest.approx(0.75 * 2 * (term + z) / 4, rel=1e-6)
    assert out.z_loss.item() == pytest.approx(0.75 * 2 * z / 4, rel=1e-6) and not out.z_loss.requires_grad
    assert out.nll.tolist() == pytest.approx([nll, nll], rel=1e-6)
    assert out.predicted is not None and out.predicted.tolist() == [0, 0]


@options_of
def test_chunked_gradients_agree_with_finite_differences(options: str) -> None:
    case = make_case(7, 11, 5, num_pairs=3, dtype=F64, bias=True, ignored=(4,))
    named = {**OPTIONS[options], "token_scaling": False}  # a constant for autograd, not for a difference
    if "class_weight" in named:
        named["class_weight"] = class_weights(11)

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return sftmix_loss(
            hidden, weight, case.target, case.lam, bias=bias, impl="chunked", scratch_bytes=300,
            row_weight=torch.linspace(0.5, 2, 7), pair_weight=torch.tensor([1.0, 0.3, 2.0]), **named,
        ).loss  # fmt: skip

    assert torch.autograd.gradcheck(loss, tuple(leaves(case)))


@every_way
@pytest.mark.parametrize("label_smoothing", [0.0, 0.3, 1.0])
def test_it_is_torchs_weighted_cross_entropy(way: dict[str, Any], label_smoothing: float) -> None:
    """Mean over the sum of the targets' weights, and each row."""
    case = optional_case(SHAPES[1], "")
    weights = class_weights(131)
    logits = F.linear(*(t.double() for t in leaves(case)))
    options: dict[str, Any] = {"label_smoothing": label_smoothing}
    inputs = (case.hidden, case.weight, case.target)
    for reduction in ("mean", "sum", "none"):
        named = {**way, **({"schedule": None} if reduction == "none" else {})}
        found = linear_cross_entropy(
            *inputs, bias=case.bias, reduction=reduction, class_weight=weights, **options, **named
        )
        expected = F.cross_entropy(
            logits, case.target, weight=weights.double(), reduction=reduction, **options
        )
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl,dtype", [("chunked", F32), ("chunked", BF16), ("fused", F32), ("fused", F16)])
@options_of
def test_rows_of_any_upstream(impl: str, dtype: torch.dtype, options: str) -> None:
    """Each row's own, also 0 and negative; with low-rank factors."""
    case = optional_case((23, 131, 20, 0), options, dtype)
    assert case.bias is not None
    factors = torch.randn(3, 20) / 4, torch.randn(131, 3)
    upstream = torch.linspace(-2, 3, 23)
    upstream[9] = 0

    def results(name: str, wide: torch.dtype) -> list[Tensor]:
        def rows(hidden: Tensor, weight: Tensor, bias: Tensor, down: Tensor, up: Tensor) -> Tensor:
            return linear_cross_entropy(
                hidden, weight, case.target, bias=bias, lora=(down, up, 0.5), reduction="none", impl=name,
                **case.options,
            )  # fmt: skip

        tensors = [t.to(dtype).to(wide) for t in (case.hidden, case.weight, case.bias, *factors)]
        inputs = leaf(*tensors)
        return [rows(*inputs).detach(), *gradients(rows, inputs, [upstream])]

    ours, same, truth = results(impl, dtype), results("reference", dtype), results("reference", F64)
    for name, *draw in zip(
        ("rows", "dhidden", "dweight", "dbias", "dA", "dB"), ours, same, truth, strict=True
    ):
        assert_within_contract(name, *draw)
    assert not ours[1][[3, 9, 18]].any() and not ours[0][[3, 18]].any()


@engines
def test_token_scaling_weighs_by_the_probability(way: dict[str, Any]) -> None:
    """Gradients of the loss whose row weights are the rows' probabilities; pairs are as they were."""
    case = optional_case(SHAPES[0], "")
    scaled = run(case, **way, token_scaling=True)
    weighed = run(case, **way, row_weight=torch.exp(-scaled["nll"]))
    for name in ("loss", "dhidden", "dweight", "dbias", "mixup_nll"):
        torch.testing.assert_close(scaled[name], weighed[name], rtol=1e-5, atol=1e-6)


@every_way
def test_smoothing_up_to_1_and_no_further(way: dict[str, Any]) -> None:
    case = optional_case(SHAPES[0], "")
    for value in (-0.1, 1.1, float("nan"), True):
        with pytest.raises(ValueError, match=r"^label_smoothing: expected"):
            linear_cross_entropy(case.hidden, case.weight, case.target, label_smoothing=value, **way)
    case.target[:] = 7  # at 1 the target is one class of many: any other gives the same
    found = run(case, **way, label_smoothing=1.0, mixup_weight=0)
    case.target[:] = 40
    other = run(case, **way, label_smoothing=1.0, mixup_weight=0)
    torch.testing.assert_close(found["loss"], other["loss"], rtol=1e-6, atol=0)
    torch.testing.assert_close(found["dhidden"], other["dhidden"], rtol=1e-5, atol=1e-7)


# --- the predicted token ---------------------------------------------------------------------------------------------


@every_way
def test_the_first_of_equal_logits_is_predicted(way: dict[str, Any]) -> None:
    """Ties within a tile and across tiles, all equal, the last column; None unless asked for."""
    hidden, target = torch.eye(6), torch.tensor([0, 5, 299, 7, -100, 3])
    weight = torch.zeros(300, 6)
    weight[[9, 10, 200], 0] = 3.0  # the first of three, in two tiles
    weight[[40, 299], 1] = 1.0
    weight[299, 2] = 2.0
    weight[:, 3] = -1.0  # all of them
    weight[[20, 30], 4] = 1.0
    weight[128:, 5] = 5.0  # from a tile's first column on
    out = sftmix_loss(hidden, weight, target, torch.empty(0), want_predicted=True, **way)
    stats = token_stats(hidden, weight, target, want_predicted=True, impl=way["impl"])
    for found in (out.predicted, stats.predicted):
        assert found is not None and found.dtype == torch.int64 and found.tolist() == [9, 40, 299, 0, -1, 128]
    assert sftmix_loss(hidden, weight, target, torch.empty(0), **way).predicted is None
    assert token_stats(hidden, weight, target, impl=way["impl"]).predicted is None


@every_way
def test_predicted_beside_pairs_and_gradients(way: dict[str, Any]) -> None:
    """With a cap and a negative bias, while training: the argmax of full logits; asking changes nothing else."""
    case = optional_case(SHAPES[1], "", softcap=5.0)
    found, plain = run(case, **way, want_predicted=True), run(case, **way)
    assert case.bias is not None
    logits = F.linear(*(widened(t) for t in (case.hidden, case.weight, case.bias)))
    expected = torch.where(case.target >= 0, logits.argmax(1), -1)
    assert torch.equal(found["predicted"], expected)
    for name, value in plain.items():
        assert torch.equal(found[name], value), name


# --- shift -----------------------------------------------------------------------------------------------------------


@every_way
@pytest.mark.parametrize("shift", [1, True, 2])
@pytest.mark.parametrize("leading", [(), (3,), (2, 2)], ids=str)
def test_shift_scores_a_row_against_a_later_target(
    way: dict[str, Any], shift: int, leading: tuple[int, ...]
) -> None:
    """Row t against target t + k, within each sequence; the last k rows get no gradient."""
    hidden, target = torch.randn(*leading, 6, 12), torch.randint(0, 30, (*leading, 6))
    target[..., 2] = -100
    weight, k = torch.randn(30, 12), int(shift)
    for reduction in ("mean", "sum", "none"):
        named = {**way, **({"schedule": None} if reduction == "none" else {}), "reduction": reduction}
        ours, theirs = leaf(hidden, weight), leaf(hidden, weight)
        found = linear_cross_entropy(*ours, target, shift=shift, **named)
        expected = linear_cross_entropy(theirs[0][..., :-k, :], theirs[1], target[..., k:], **named)
        assert found.shape == ((*leading, 6 - k) if reduction == "none" else ())
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
        pairs = zip(
            torch.autograd.grad(found.sum(), ours), torch.autograd.grad(expected.sum(), theirs), strict=True
        )
        for one, other in pairs:
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
            assert one.any()
    assert torch.equal(
        linear_cross_entropy(hidden, weight, target, shift=0, **way),
        linear_cross_entropy(hidden, weight, target, **way),
    )


@impls
def test_refused_by_name(impl: str) -> None:
    """A shift that is none; targets with more dimensions, or that are probabilities."""
    hidden, weight = torch.randn(2, 6, 12), torch.randn(30, 12)
    target = torch.randint(0, 30, (2, 6))
    for shift in (-1, 1.5, "1", torch.tensor(1)):
        with pytest.raises(ValueError, match=r"^shift: expected"):
            linear_cross_entropy(hidden, weight, target, shift=shift, impl=impl)
    with pytest.raises(ValueError, match=r"^(shift|hidden|target): expected"):
        linear_cross_entropy(torch.randn(12), weight, torch.tensor(3), shift=1, impl=impl)
    for wrong in (torch.randint(0, 30, (2, 6, 4)), torch.rand(2, 6, 30), torch.rand(2, 6)):
        with pytest.raises(ValueError, match=r"^target: expected"):
            linear_cross_entropy(hidden, weight, wrong, impl=impl)

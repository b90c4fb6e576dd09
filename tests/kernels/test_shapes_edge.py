"""The edges: smallest sizes, rows that bear no loss, strange strides, offsets past 2^31, neighbours, repetition."""

from __future__ import annotations

import math
import mmap
from typing import Any

import pytest
import torch
from torch import Tensor

from sftmix_kernels import linear_cross_entropy, sftmix_loss, token_stats
from tests.parity import Case, assert_parity, assert_within_contract, make_case, run

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
# bfloat16 products are wrong in Triton's interpreter, so fused bfloat16 is a GPU test (tests/gpu).
SERVED = [("chunked", F32), ("chunked", F16), ("chunked", BF16), ("fused", F32), ("fused", F16)]
served = pytest.mark.parametrize("impl,dtype", SERVED, ids=[f"{i}-{str(d)[6:]}" for i, d in SERVED])
implementations = pytest.mark.parametrize("impl", ["chunked", "fused"])


def outputs(case: Case, *, impl: str, **extra: Any) -> dict[str, Tensor]:
    """As parity.run, but on the very tensors given: a copy would not keep their strides."""
    leaves = [t.detach().requires_grad_() for t in (case.hidden, case.weight, case.bias) if t is not None]
    bias = leaves[2] if case.bias is not None else None
    out = sftmix_loss(
        leaves[0], leaves[1], case.target, case.lam, bias=bias, impl=impl, **{**case.options, **extra}
    )
    gradients = torch.autograd.grad(out.loss, leaves)
    return {**out._asdict(), **dict(zip(("dhidden", "dweight", "dbias"), gradients, strict=False))}


def contiguous(case: Case) -> Case:
    def copy(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.clone(memory_format=torch.contiguous_format)

    options = {k: copy(v) if isinstance(v, Tensor) else v for k, v in case.options.items()}
    hidden, weight, target, lam = (
        t.contiguous().clone() for t in (case.hidden, case.weight, case.target, case.lam)
    )
    return Case(hidden, weight, target, lam, copy(case.bias), options)


def assert_strides_do_not_matter(
    case: Case, *, impl: str, without: tuple[str, ...] = ("loss", "is_top1")
) -> dict[str, Tensor]:
    """``case`` as it lies in memory, against the contract that a contiguous copy of it sets."""
    plain = contiguous(case)
    truth, same_dtype = run(plain, impl="reference", dtype=torch.float64), run(plain, impl="reference")
    ours = outputs(case, impl=impl)
    for name in ours.keys() - set(without):
        assert_within_contract(name, ours[name], same_dtype[name], truth[name])
    return ours


# --- smallest sizes ------------------------------------------------------------------------------------------------

# N, V, D, M, and why this shape.
SMALL = [
    (1, 40, 16, 0, "one row"),
    (2, 40, 16, 1, "one pair and nothing else"),
    (3, 40, 16, 1, "one pair, one row"),
    (24, 40, 1, 9, "hidden states of one number"),
    (24, 2, 16, 9, "two classes"),
    (48, 40, 16, 24, "every row in a pair"),
    (49, 40, 16, 24, "every row in a pair but one"),
    (48, 40, 16, 0, "no pair: lam is empty"),
]


@served
@pytest.mark.parametrize("shape", SMALL, ids=[s[4] for s in SMALL])
@pytest.mark.parametrize("rows_per_chunk", [1, 1000])
def test_small_sizes(
    impl: str, dtype: torch.dtype, shape: tuple[int, int, int, int, str], rows_per_chunk: int
) -> None:
    num_rows, vocab_size, width, num_pairs, _ = shape
    case = make_case(num_rows, vocab_size, width, num_pairs=num_pairs, dtype=dtype, bias=True)
    assert_parity(case, impl=impl, scratch_bytes=4 * vocab_size * rows_per_chunk)


@served
@pytest.mark.parametrize("num_pairs", [0, 5])
@pytest.mark.parametrize("width", [1, 9])
def test_one_class_has_no_loss_and_no_gradient(
    impl: str, dtype: torch.dtype, num_pairs: int, width: int
) -> None:
    """p = 1 whatever the logit: exact zeros, not small numbers."""
    out = run(make_case(13, 1, width, num_pairs=num_pairs, dtype=dtype, bias=True), impl=impl)
    for name in ("loss", "nll", "mixup_nll", "dhidden", "dweight", "dbias"):
        assert not out[name].any(), name
    assert out["is_top1"].all()


@served
def test_no_rows(impl: str, dtype: torch.dtype) -> None:
    hidden, weight = torch.empty(0, 8, dtype=dtype), torch.randn(5, 8).to(dtype)
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    target, lam = torch.empty(0, dtype=torch.int64), torch.empty(0)
    loss = sftmix_loss(hidden, weight, target, lam, impl=impl).loss + linear_cross_entropy(
        hidden.view(0, 3, 8), weight, target.view(0, 3), impl=impl
    )
    assert loss == 0
    loss.backward()
    assert weight.grad is not None and not weight.grad.any() and weight.grad.shape == (5, 8)
    assert hidden.grad is not None and hidden.grad.shape == (0, 8)
    stats = token_stats(hidden, weight, target, impl=impl)
    assert [t.shape for t in stats] == [(0,)] * 4


# --- rows that bear no loss ----------------------------------------------------------------------------------------


@served
@pytest.mark.parametrize("place", ["first", "last", "spread"])
def test_long_rows_of_ignored_tokens(impl: str, dtype: torch.dtype, place: str) -> None:
    """1,500 rows, 20 of them supervised: the loss and dweight are those of the 20, the others' gradients zero."""
    num_rows, kept = 1500, 20
    case = make_case(num_rows, 50, 16, dtype=dtype)
    supervised = {
        "first": torch.arange(kept), "last": torch.arange(num_rows - kept, num_rows),
        "spread": torch.arange(kept) * 75 + 31,
    }[place]  # fmt: skip
    target = torch.full_like(case.target, -100)
    target[supervised] = case.target[supervised]
    case.target = target
    out = assert_parity(case, impl=impl, scratch_bytes=50 * 4 * 40)
    ignored = torch.ones(num_rows, dtype=torch.bool)
    ignored[supervised] = False
    assert not out["dhidden"][ignored].any() and not out["nll"][ignored].any()
    assert out["dhidden"][supervised].any(dim=1).all()
    only = run(Case(case.hidden[supervised], case.weight, target[supervised], case.lam), impl=impl)
    torch.testing.assert_close(out["loss"], only["loss"], rtol=1e-6, atol=0)
    torch.testing.assert_close(out["nll"][supervised], only["nll"], rtol=1e-6, atol=1e-6)


@served
def test_pairs_whose_partners_are_all_ignored_are_plain_rows(impl: str, dtype: torch.dtype) -> None:
    case = make_case(40, 50, 16, num_pairs=20, dtype=dtype, ignored=tuple(range(20, 40)))
    out = assert_parity(case, impl=impl)
    assert not out["mixup_nll"].any() and not out["dhidden"][20:].any()
    plain = run(Case(case.hidden[:20], case.weight, case.target[:20], case.lam[:0]), impl=impl)
    torch.testing.assert_close(out["loss"], plain["loss"], rtol=1e-6, atol=0)


# --- neighbours and repetition -------------------------------------------------------------------------------------


@served
@pytest.mark.parametrize("num_pairs", [0, 12])
def test_a_row_does_not_feel_its_neighbours(impl: str, dtype: torch.dtype, num_pairs: int) -> None:
    """32 rows alone, and among 37 unpaired rows of logits near 10^4: each row's numbers stay within the contract."""
    case = make_case(32, 70, 24, num_pairs=num_pairs, dtype=dtype)
    case.options = {"ntp_denominator": 32, "mixup_denominator": 12}
    loud = make_case(37, 70, 24, dtype=dtype, seed=1)
    crowd = Case(
        torch.cat([case.hidden, loud.hidden * 3000]), case.weight, torch.cat([case.target, loud.target]),
        case.lam, None, case.options,
    )  # fmt: skip
    truth, same_dtype = run(case, impl="reference", dtype=torch.float64), run(case, impl="reference")
    ours = run(crowd, impl=impl, scratch_bytes=70 * 4 * 12)
    for name in ("nll", "lse", "dhidden"):
        assert_within_contract(name, ours[name][:32], same_dtype[name], truth[name])
    assert_within_contract("mixup_nll", ours["mixup_nll"], same_dtype["mixup_nll"], truth["mixup_nll"])


@served
@pytest.mark.parametrize("num_pairs", [0, 12])
def test_nan_in_one_row_stays_in_that_row(impl: str, dtype: torch.dtype, num_pairs: int) -> None:
    """A broken row must show in the loss and in dweight, and nowhere in another row's statistics or gradient."""
    case = make_case(32, 70, 24, num_pairs=num_pairs, dtype=dtype)
    case.hidden[29] = float("nan")
    out = run(case, impl=impl, scratch_bytes=70 * 4 * 12)
    others = torch.arange(32) != 29
    assert out["loss"].isnan() and out["nll"][29].isnan() and out["dhidden"][29].isnan().all()
    assert out["dweight"].isnan().all()
    for name in ("nll", "lse", "dhidden"):
        assert out[name][others].isfinite().all(), name
    assert out["mixup_nll"].isfinite().all()


@served
def test_runs_are_bitwise_equal_whatever_ran_between(impl: str, dtype: torch.dtype) -> None:
    """Every output, all options on, three times with other shapes between them."""
    case = make_case(
        61, 131, 50, num_pairs=23, dtype=dtype, bias=True, ignored=(0, 30, 60), softcap=8.0, logit_scale=0.7,
        row_weight=torch.rand(61), pair_weight=torch.rand(23),
    )  # fmt: skip
    results = []
    for other in (3, 200, 17):
        results.append(run(case, impl=impl, scratch_bytes=131 * 4 * 10))
        run(make_case(other, other + 5, other, num_pairs=1, dtype=dtype), impl=impl)
    for name, first in results[0].items():
        assert all(torch.equal(first, later[name]) for later in results[1:]), name


# --- strides -------------------------------------------------------------------------------------------------------


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


# --- offsets past 2^31 ---------------------------------------------------------------------------------------------


def far_apart(t: Tensor, stride: int) -> Tensor:
    """``t`` [rows, columns] with rows ``stride`` elements apart, in address space of which only its pages are used.

    As much lies below as above, so that an offset wrapped to 32 bits reads zeros and not another process's nothing.
    """
    reserve = getattr(mmap, "MAP_NORESERVE", 0x4000)
    half = (t.shape[0] * stride + 4096) * t.element_size()
    memory = mmap.mmap(-1, 2 * half, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | reserve)
    flat = torch.frombuffer(memory, dtype=t.dtype)
    view = flat.as_strided(t.shape, (stride, 1), flat.numel() // 2)
    view.copy_(t)
    return view


# Rows and their distance: a product of two 32-bit numbers that needs 64, and a distance that needs 64 itself.
FAR = pytest.mark.parametrize("rows,stride", [(4, 2**30 + 16), (2, 2**31 + 16)], ids=["2^30", "2^31"])


def assert_as_if_close_together(case: Case, *, impl: str) -> None:
    """The numbers of a contiguous copy; a wrapped offset would have read zeros."""
    far, near = outputs(case, impl=impl), outputs(contiguous(case), impl=impl)
    for name in near:
        torch.testing.assert_close(far[name], near[name], rtol=2e-3, atol=1e-4)


@implementations
@FAR
def test_apple_37_weight_offsets_past_2_31(impl: str, rows: int, stride: int) -> None:
    """V classes whose last lies more than 2^31 elements from the first: V·D as large as it gets, by stride."""
    case = make_case(12, rows, 24, num_pairs=4, dtype=F16, bias=True)
    case.weight = far_apart(case.weight, stride)
    assert (rows - 1) * stride >= 2**31
    assert_as_if_close_together(case, impl=impl)


@implementations
@FAR
def test_apple_37_hidden_offsets_past_2_31(impl: str, rows: int, stride: int) -> None:
    case = make_case(rows, 40, 24, num_pairs=rows // 2, dtype=F16)
    case.hidden = far_apart(case.hidden, stride)
    assert_as_if_close_together(case, impl=impl)
    far, near = (token_stats(c.hidden, c.weight, c.target, impl=impl) for c in (case, contiguous(case)))
    torch.testing.assert_close(far.logprob, near.logprob, rtol=2e-3, atol=1e-4)

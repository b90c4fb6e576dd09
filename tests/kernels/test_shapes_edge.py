"""The edges: smallest sizes, rows that bear no loss, strange strides, offsets past 2^31, neighbours, repetition."""

from __future__ import annotations

import mmap
from typing import Any

import pytest
import torch
from torch import Tensor

from sftmix_kernels import linear_cross_entropy, sftmix_loss, token_stats
from tests.parity import Case, assert_parity, assert_within_contract, make_case, run

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
# One 16-bit type of the interpreted kernels in `make test`, the other in `make slow`.
SERVED = [
    pytest.param(impl, dtype, marks=pytest.mark.slow if impl != "chunked" and dtype is F16 else ())
    for impl in ("chunked", "fused", "stored")
    for dtype in (F32, F16, BF16)
]
served = pytest.mark.parametrize("impl,dtype", SERVED, ids=lambda value: str(value).removeprefix("torch."))
implementations = pytest.mark.parametrize("impl", ["chunked", "fused"])


def way(impl: str) -> dict[str, str]:
    """The arguments for ``impl``, where "stored" is that schedule of "fused"."""
    return {"impl": "fused", "schedule": "stored"} if impl == "stored" else {"impl": impl}


def outputs(case: Case, *, impl: str, **extra: Any) -> dict[str, Tensor]:
    """As parity.run, but on the very tensors given: a copy would not keep their strides."""
    leaves = [t.detach().requires_grad_() for t in (case.hidden, case.weight, case.bias) if t is not None]
    bias = leaves[2] if case.bias is not None else None
    out = sftmix_loss(
        leaves[0], leaves[1], case.target, case.lam, bias=bias, **way(impl), **{**case.options, **extra}
    )
    gradients = torch.autograd.grad(out.loss, leaves)
    found = {name: value for name, value in out._asdict().items() if value is not None}
    return {**found, **dict(zip(("dhidden", "dweight", "dbias"), gradients, strict=False))}


def contiguous(case: Case) -> Case:
    def copy(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.clone(memory_format=torch.contiguous_format)

    options = {k: copy(v) if isinstance(v, Tensor) else v for k, v in case.options.items()}
    hidden, weight, target, lam = (
        t.contiguous().clone() for t in (case.hidden, case.weight, case.target, case.lam)
    )
    return Case(hidden, weight, target, lam, copy(case.bias), options)


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
    assert_parity(case, **way(impl), scratch_bytes=4 * vocab_size * rows_per_chunk)


@served
@pytest.mark.parametrize("num_pairs", [0, 5])
@pytest.mark.parametrize("width", [1, 9])
def test_one_class_has_no_loss_and_no_gradient(
    impl: str, dtype: torch.dtype, num_pairs: int, width: int
) -> None:
    """p = 1 whatever the logit: exact zeros, not small numbers."""
    out = run(make_case(13, 1, width, num_pairs=num_pairs, dtype=dtype, bias=True), **way(impl))
    for name in ("loss", "nll", "mixup_nll", "dhidden", "dweight", "dbias"):
        assert not out[name].any(), name
    assert out["is_top1"].all()


OPTIONS = [{}, {"label_smoothing": 0.1, "z_loss": 1e-2}]
plain_and_smoothed = pytest.mark.parametrize("options", OPTIONS, ids=["plain", "smoothed"])


@served
@plain_and_smoothed
def test_no_rows(impl: str, dtype: torch.dtype, options: dict[str, float]) -> None:
    hidden, weight = torch.empty(0, 8, dtype=dtype), torch.randn(5, 8).to(dtype)
    hidden, weight, bias = (t.requires_grad_() for t in (hidden, weight, torch.randn(5).to(dtype)))
    target, lam = torch.empty(0, dtype=torch.int64), torch.empty(0)
    options = {**options, **way(impl)}
    loss = sftmix_loss(hidden, weight, target, lam, bias=bias, **options).loss + linear_cross_entropy(
        hidden.view(0, 3, 8), weight, target.view(0, 3), **options
    )
    assert loss == 0
    loss.backward()
    assert weight.grad is not None and not weight.grad.any() and weight.grad.shape == (5, 8)
    assert bias.grad is not None and not bias.grad.any() and bias.grad.shape == (5,)
    assert hidden.grad is not None and hidden.grad.shape == (0, 8)
    if impl == "stored":  # neither has schedules to choose from
        return
    rows = linear_cross_entropy(hidden, weight, target, reduction="none", **options)
    assert rows.shape == (0,) and not torch.autograd.grad(rows.sum(), weight)[0].any()
    stats = token_stats(hidden, weight, target, impl=impl)
    assert [t.shape for t in stats if t is not None] == [(0,)] * 4


@served
@plain_and_smoothed
@pytest.mark.parametrize("num_pairs", [0, 5])
def test_every_row_ignored(impl: str, dtype: torch.dtype, options: dict[str, float], num_pairs: int) -> None:
    """No row is supervised, whatever the sums are divided by: exact zeros, not NaN and not e (lse - mean logit)."""
    for denominator in (None, 7):
        case = make_case(
            13, 20, 8, num_pairs=num_pairs, dtype=dtype, ignored=tuple(range(13)), bias=True, **options,
            ntp_denominator=denominator,
        )  # fmt: skip
        out = run(case, **way(impl))
        for name in ("loss", "nll", "mixup_nll", "dhidden", "dweight", "dbias", "is_top1"):
            assert not out[name].any(), name
        assert out["lse"].isfinite().all() and out["dweight"].shape == (20, 8)


# --- rows that bear no loss ----------------------------------------------------------------------------------------


@served
@pytest.mark.parametrize("place", ["first", "last", "spread"])
def test_long_rows_of_ignored_tokens(impl: str, dtype: torch.dtype, place: str) -> None:
    """1,500 rows (300 by stored, a program each), 20 of them supervised: loss and dweight are theirs, the rest zero."""
    num_rows, kept = 300 if impl == "stored" else 1500, 20
    case = make_case(num_rows, 50, 16, dtype=dtype)
    supervised = {
        "first": torch.arange(kept), "last": torch.arange(num_rows - kept, num_rows),
        "spread": (torch.arange(kept) * 2 + 1) * num_rows // (2 * kept),
    }[place]  # fmt: skip
    target = torch.full_like(case.target, -100)
    target[supervised] = case.target[supervised]
    case.target = target
    out = assert_parity(case, **way(impl), scratch_bytes=50 * 4 * 40)
    ignored = torch.ones(num_rows, dtype=torch.bool)
    ignored[supervised] = False
    assert not out["dhidden"][ignored].any() and not out["nll"][ignored].any()
    assert out["dhidden"][supervised].any(dim=1).all()
    only = run(Case(case.hidden[supervised], case.weight, target[supervised], case.lam), **way(impl))
    torch.testing.assert_close(out["loss"], only["loss"], rtol=1e-6, atol=0)
    torch.testing.assert_close(out["nll"][supervised], only["nll"], rtol=1e-6, atol=1e-6)


@served
def test_pairs_whose_partners_are_all_ignored_are_plain_rows(impl: str, dtype: torch.dtype) -> None:
    case = make_case(40, 50, 16, num_pairs=20, dtype=dtype, ignored=tuple(range(20, 40)))
    out = assert_parity(case, **way(impl))
    assert not out["mixup_nll"].any() and not out["dhidden"][20:].any()
    plain = run(Case(case.hidden[:20], case.weight, case.target[:20], case.lam[:0]), **way(impl))
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
    ours = run(crowd, **way(impl), scratch_bytes=70 * 4 * 12)
    for name in ("nll", "lse", "dhidden"):
        assert_within_contract(name, ours[name][:32], same_dtype[name], truth[name])
    assert_within_contract("mixup_nll", ours["mixup_nll"], same_dtype["mixup_nll"], truth["mixup_nll"])


@served
@pytest.mark.parametrize("num_pairs", [0, 12])
def test_nan_in_one_row_stays_in_that_row(impl: str, dtype: torch.dtype, num_pairs: int) -> None:
    """A broken row must show in the loss and in dweight, and nowhere in another row's statistics or gradient."""
    case = make_case(32, 70, 24, num_pairs=num_pairs, dtype=dtype)
    case.hidden[29] = float("nan")
    out = run(case, **way(impl), scratch_bytes=70 * 4 * 12)
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
        results.append(run(case, **way(impl), scratch_bytes=131 * 4 * 10))
        run(make_case(other, other + 5, other, num_pairs=1, dtype=dtype), **way(impl))
    for name, first in results[0].items():
        assert all(torch.equal(first, later[name]) for later in results[1:]), name


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

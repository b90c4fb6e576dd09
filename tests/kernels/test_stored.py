"""The ``stored`` schedule against the reference: one kernel that turns a chunk's logits into gradients in place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sftmix_kernels import LossHead, chunked, linear_cross_entropy, sftmix_loss
from sftmix_kernels.call import Coefficients, Gradients, Statistics
from sftmix_kernels.operators import made_fwd
from tests.kernels.calls import call_of
from tests.parity import Case, assert_parity, assert_within_contract, make_case, run

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("the kernels are compiled where there is a GPU: tests/gpu", allow_module_level=True)

from sftmix_kernels.fused import statistics_with_gradients, stored
from tests.kernels.fused_calls import plain_call
from tests.kernels.test_fused_kernels import long_tail
from tests.kernels.watching import LargestTensor

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
# One 16-bit type in `make test`, the other in `make slow`.
dtypes = pytest.mark.parametrize(
    "dtype", [F32, BF16, pytest.param(F16, marks=pytest.mark.slow)], ids=["float32", "bfloat16", "float16"]
)

# N, V, D, M, options, and why.
CASES: list[tuple[int, int, int, int, dict[str, Any], str]] = [
    (32, 96, 32, 16, {}, "every size a multiple of 16, 2M = N"),
    (53, 101, 40, 19, {"bias": True}, "every size ragged, 15 unpaired rows"),
    (37, 65, 40, 0, {}, "M = 0, one column in the last block"),
    (35, 70, 40, 17, {"softcap": 3.0, "logit_scale": 0.7, "bias": True}, "softcap after scale after bias"),
    (35, 70, 40, 17, {"logit_scale": 1.7}, "scale alone"),
    (35, 70, 40, 17, {"lam": 0.0}, "lam 0"),
    (35, 70, 40, 17, {"lam": 0.5}, "lam 1/2"),
    (35, 70, 40, 17, {"lam": 1.0, "softcap": 30.0}, "lam 1"),
    (35, 70, 40, 17, {"ignored": (0, 18, 2, 19, 34)}, "ignored: a confident row, a partner, both, an unpaired row"),
    (35, 70, 40, 17, {"logit_std": 1e4}, "logits of 10^4"),
    (35, 70, 40, 17, {"upstream": 2.0**16}, "an upstream gradient of 2^16"),
    (35, 70, 40, 17, {"label_smoothing": 0.2}, "label smoothing"),
    (35, 70, 40, 17, {"z_loss": 1e-2, "softcap": 4.0}, "z-loss under a softcap"),
    (
        37, 70, 40, 15,
        {"label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 4.0, "logit_scale": 0.8, "bias": True, "ignored": (3, 18)},
        "all options",
    ),
    (3, 1, 1, 1, {"bias": True}, "one class"),
    (1, 40, 8, 0, {}, "one row"),
]  # fmt: skip


@dtypes
@pytest.mark.parametrize("shape", CASES, ids=[c[5] for c in CASES])
def test_parity(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, shape: tuple[Any, ...]) -> None:
    """Blocks of 32 columns and chunks of a few rows: values, statistics and every gradient."""
    monkeypatch.setattr(stored, "row_block", lambda *_: 32)
    num_rows, vocab_size, width, num_pairs, options, _ = shape
    case = make_case(num_rows, vocab_size, width, num_pairs=num_pairs, dtype=dtype, **options)
    assert_parity(case, impl="fused", schedule="stored", scratch_bytes=vocab_size * dtype.itemsize * 12)


@dtypes
@pytest.mark.parametrize("labels", ["equal in a pair", "in the last column", "peaked"])
def test_parity_of_special_targets(dtype: torch.dtype, labels: str) -> None:
    case = make_case(40, 97, 40, num_pairs=18, dtype=dtype, label_smoothing=0.1, z_loss=1e-3)
    if labels == "equal in a pair":
        case.target[18:36] = case.target[:18]
    elif labels == "in the last column":
        case.target[:] = 96
    else:  # logits 18 on the diagonal and 0 elsewhere: p = 1 - 1e-6 for both members of most pairs, and for X
        case.hidden = (18 * torch.eye(40)[torch.arange(40) % 3]).to(dtype)
        case.weight = torch.eye(97, 40).to(dtype)
        case.target = torch.arange(40) % 3
        case.target[1], case.options = 50, {}
    assert_parity(case, impl="fused", schedule="stored")


@dtypes
def test_two_runs_are_bitwise_equal(dtype: torch.dtype) -> None:
    case = make_case(53, 101, 40, num_pairs=19, dtype=dtype, bias=True)
    first, second = (run(case, impl="fused", schedule="stored") for _ in range(2))
    assert all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize("num_pairs", [0, 1])
def test_float32_sums_keep_what_many_small_blocks_add(
    monkeypatch: pytest.MonkeyPatch, num_pairs: int
) -> None:
    """As test_fused_kernels.py's, of the sums over a row's blocks."""
    monkeypatch.setattr(stored, "row_block", lambda *_: 32)
    case, nll = long_tail(2, num_pairs)
    out = run(case, impl="fused", schedule="stored")
    for found in (out["nll"], out["mixup_nll"]):
        assert (found.double() - nll).abs().le(6.1e-8).all(), found


Made = tuple[Statistics, Tensor, Gradients]


def made(case: Case, **options: Any) -> tuple[Made, Made]:
    """What this schedule and ``chunked`` make of one problem."""
    num_rows, num_pairs = case.hidden.shape[0], case.lam.shape[0]
    call = plain_call(case.hidden, case.weight, case.lam, bias=case.bias, target=case.target, **options)
    column = torch.where(case.target == -1, -1, case.target)
    coefs = (torch.linspace(0.5, 1.5, num_rows).double(), torch.linspace(2, 1, num_pairs).double())
    coef = Coefficients(column, coefs[0] * (column >= 0), coefs[1])
    for pair in range(num_pairs):
        coef.pair[pair] *= bool((column[[pair, pair + num_pairs]] >= 0).all())
    wide = call._replace(plan=list(call.wanted._replace(scratch_bytes=2**20)))
    return statistics_with_gradients(call, coef), chunked.statistics_with_gradients(wide, coef)


@pytest.mark.parametrize(
    "options",
    [{}, {"label_smoothing": 0.1}, {"softcap": 3.0, "logit_scale": 0.5}, {"predicted": True}],
    ids=["plain", "smoothed", "capped", "predicted"],
)
def test_every_field_is_that_of_chunked(options: dict[str, float]) -> None:
    case = make_case(35, 70, 24, num_pairs=16, bias=True, ignored=(1, 20, 33), ignore_index=-1)
    case.target[4] = (case.hidden[4] @ case.weight.T + case.bias).argmax()
    ours, theirs = made(case, dbias=True, **options)
    close = {"rtol": 2e-6, "atol": 3e-6}
    assert torch.equal(ours[1], theirs[1])
    for name, value in ours[2]._asdict().items():
        torch.testing.assert_close(value, getattr(theirs[2], name), **close, msg=name)
    for name, value in ours[0]._asdict().items():
        other = getattr(theirs[0], name)
        if name.endswith(
            "carry"
        ):  # what rounding took is for a backward that recomputes, which this schedule has not
            assert not value[1].any()
            value, other = value[[0, *range(2, len(value))]], other[[0, *range(2, len(value))]]
        torch.testing.assert_close(value, other, **close, msg=name)
    assert ours[0].target_logit[4] == ours[0].max_logit[4] and ours[0].nll[1] == 0
    assert ours[0].predicted.numel() == (35 if "predicted" in options else 0)


@pytest.mark.parametrize("needs", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0)])
def test_what_is_not_needed_is_empty_and_changes_nothing(needs: tuple[int, ...]) -> None:
    case = make_case(21, 70, 24, num_pairs=8, bias=True)
    names = ("dhidden", "dweight", "dbias")
    everything = made(case, dbias=True)[0]
    some = made(case, **dict(zip(names, needs, strict=True)))[0]
    for name, needed in zip(names, needs, strict=True):
        value = getattr(some[2], name)
        assert torch.equal(value, getattr(everything[2], name)) if needed else value.numel() == 0
    assert torch.equal(some[0].nll, everything[0].nll)
    assert torch.equal(some[0].pair_carry, everything[0].pair_carry)


@pytest.mark.parametrize("num_pairs", [0, 26, 32])
@pytest.mark.parametrize("rows", [0, 1, 6])
def test_the_chunk_stays_within_its_scratch_and_below_all_rows(num_pairs: int, rows: int) -> None:
    """No tensor of N V elements, whatever ``scratch_bytes`` allows; with it, no tensor above it."""
    num_rows, vocab_size = 64, 600
    case = make_case(num_rows, vocab_size, 4, num_pairs=num_pairs)
    row_bytes = 608 * 4  # a row takes a multiple of 16 columns
    call = plain_call(case.hidden, case.weight, case.lam, scratch_bytes=rows * row_bytes)
    coef = Coefficients(case.target, torch.ones(num_rows).double(), torch.ones(num_pairs).double())
    with LargestTensor() as seen:
        dweight = statistics_with_gradients(call, coef)[2].dweight
    largest = max(case.weight.numel(), case.hidden.numel(), 5 * num_rows)
    unpaired = num_rows - 2 * num_pairs
    if rows == 0:
        assert seen.nbytes == row_bytes * max(num_pairs, -(-unpaired // 2)) < num_rows * vocab_size * 4
    else:
        assert seen.nbytes <= max(row_bytes * max(rows, 2 if num_pairs else 1), largest * 4)
    assert dweight.any()


def test_a_forward_without_gradients_holds_no_logits() -> None:
    case = make_case(64, 1024, 4, num_pairs=24)
    arguments = (case.hidden, case.weight, case.target, case.lam)
    with LargestTensor() as seen:
        value = sftmix_loss(*arguments, impl="fused", schedule="stored").loss
    assert seen.nbytes <= case.weight.nbytes
    torch.testing.assert_close(value, sftmix_loss(*arguments, impl="chunked").loss)


def test_padding_and_neighbours_are_left_alone() -> None:
    """V = 33: 15 columns of padding are NaN at the start; nothing of them reaches a result."""
    case = make_case(9, 33, 8, num_pairs=3, bias=True, label_smoothing=0.1)
    out = run(case, impl="fused", schedule="stored")
    assert all(torch.as_tensor(v).isfinite().all() for v in out.values())


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_frozen_inputs(frozen: str) -> None:
    case = make_case(20, 50, 16, num_pairs=8)
    tensors = {k: getattr(case, k).clone().requires_grad_(k != frozen) for k in ("hidden", "weight")}
    sftmix_loss(**tensors, target=case.target, lam=case.lam, impl="fused", schedule="stored").loss.backward()
    other = "hidden" if frozen == "weight" else "weight"
    both = run(case, impl="fused", schedule="stored")
    assert tensors[frozen].grad is None and torch.equal(tensors[other].grad, both[f"d{other}"])


def test_float16_gradients_do_not_flush_to_zero() -> None:
    """Divided by 10^6 rows, most dlogits would be under float16's smallest number if they were rounded after it."""
    case = make_case(64, 128, 8, dtype=F16, ntp_denominator=1e6, upstream=2.0**10)
    truth = run(case, impl="reference", dtype=torch.float64)["dweight"]
    error = run(case, impl="fused", schedule="stored")["dweight"].double() - truth
    assert error.norm() / truth.norm() < 1e-3


def test_linear_cross_entropy_and_the_head_pass_it_on() -> None:
    case = make_case(30, 70, 24, bias=True)
    truth = torch.nn.functional.cross_entropy(
        case.hidden.double() @ case.weight.double().T + case.bias.double(), case.target
    )
    hidden = case.hidden.clone().requires_grad_()
    ours = linear_cross_entropy(
        hidden, case.weight, case.target, bias=case.bias, impl="fused", schedule="stored"
    )
    assert_within_contract("loss", ours.detach(), truth.float(), truth)
    head = LossHead(24, 70, bias=False)
    losses = [
        head(case.hidden, case.target, impl="fused", schedule=s).loss for s in ("stored", "recompute", None)
    ]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=0)
    assert losses[1].equal(losses[2])


@dtypes
def test_the_operator_passes_torchs_own_checks(dtype: torch.dtype) -> None:
    case = make_case(12, 40, 8, num_pairs=5, dtype=dtype, bias=True)
    call = call_of(case, impl="fused", label_smoothing=0.1, z_loss=1e-3)
    torch.library.opcheck(made_fwd, tuple(call), atol=1e-3, rtol=1e-3)


def test_double_backward_is_refused() -> None:
    case = make_case(6, 20, 8, num_pairs=2)
    hidden = case.hidden.requires_grad_()
    loss = sftmix_loss(hidden, case.weight, case.target, case.lam, impl="fused", schedule="stored").loss
    (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        gradient.sum().backward()


def test_the_schedule_is_checked() -> None:
    case = make_case(4, 5, 6)
    arguments = (case.hidden, case.weight, case.target)
    for impl in ("chunked", "reference", None):
        with pytest.raises(ValueError, match=r"schedule: expected None where impl '\w+' runs, got 'stored'"):
            sftmix_loss(*arguments, case.lam, impl=impl, schedule="stored")
    with pytest.raises(ValueError, match="schedule: expected one of recompute, stored or None, got 'kept'"):
        sftmix_loss(*arguments, case.lam, impl="fused", schedule="kept")
    with pytest.raises(
        ValueError, match="schedule: expected 'recompute' or None with an upstream for each row"
    ):
        linear_cross_entropy(*arguments, reduction="none", impl="fused", schedule="stored")

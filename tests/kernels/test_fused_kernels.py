"""The Triton kernels cut into many small tiles, splits and slices; test_parity.py runs them at their default sizes.

In the interpreter; tests/gpu has the same on a GPU. Every uninitialised buffer is NaN (conftest.py).
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from sftmix_kernels.call import Gradients, Statistics
from tests.kernels.watching import LargestTensor
from tests.parity import Case, assert_parity, make_case, run

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("the kernels are compiled where there is a GPU: tests/gpu", allow_module_level=True)

from sftmix_kernels.fused import Tile, forward, tiles
from tests.kernels.fused_calls import backward_of, forward_of

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
POINTERS = Tile(16, 32, 16, group_n=2)
DESCRIPTORS = Tile(16, 32, 16, group_n=2, use_descriptors=True)
both_paths = pytest.mark.parametrize("tile", [POINTERS, DESCRIPTORS], ids=["pointers", "descriptors"])
dtypes = pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=["float32", "float16", "bfloat16"])


def cut_small(monkeypatch: pytest.MonkeyPatch, tile: Tile) -> None:
    """Make the public function use ``tile`` in three splits; scratch_bytes=1 then makes slices of one tile."""
    monkeypatch.setattr(tiles, "choose_tile", lambda *_, **__: tile)
    monkeypatch.setattr(forward, "choose_num_splits", lambda *_: 3)


# N, V, D, M, options, and why. D = 40: a tail in K, and rows that descriptors can address in both dtypes.
CASES: list[tuple[int, int, int, int, dict[str, Any], str]] = [
    (32, 96, 32, 16, {}, "every size a multiple of its block, 2M = N"),
    (53, 101, 40, 19, {"bias": True}, "every size ragged, 15 unpaired rows"),
    (37, 65, 40, 0, {}, "M = 0, one column in the last tile"),
    (35, 70, 40, 17, {"softcap": 3.0, "logit_scale": 0.7, "bias": True}, "softcap after scale after bias"),
    (35, 70, 40, 17, {"lam": 0.0}, "lam 0"),
    (35, 70, 40, 17, {"lam": 0.5}, "lam 1/2"),
    (35, 70, 40, 17, {"lam": 1.0, "softcap": 30.0}, "lam 1"),
    (
        35,
        70,
        40,
        17,
        {"ignored": (0, 18, 2, 19, 34)},
        "ignored: a confident row, a partner, both, an unpaired row",
    ),
    (35, 70, 40, 17, {"logit_std": 1e4}, "logits of 10^4"),
    (35, 70, 40, 17, {"upstream": 2.0**16}, "an upstream gradient of 2^16"),
    (3, 1, 1, 1, {"bias": True}, "one class"),
    (35, 70, 40, 17, {"label_smoothing": 0.1, "ignored": (3, 20)}, "label smoothing, a ragged last tile"),
    (
        35,
        70,
        40,
        17,
        {"z_loss": 1e-2, "softcap": 3.0, "label_smoothing": 0.2, "bias": True},
        "z-loss beside it",
    ),
]


@pytest.mark.parametrize(
    "tile,dtype",
    [(POINTERS, F32), (DESCRIPTORS, F16), (DESCRIPTORS, BF16)],
    ids=["pointers-f32", "descriptors-f16", "descriptors-bf16"],
)
@pytest.mark.parametrize("shape", CASES, ids=[c[5] for c in CASES])
def test_parity_in_small_tiles(
    monkeypatch: pytest.MonkeyPatch, tile: Tile, dtype: torch.dtype, shape: tuple[Any, ...]
) -> None:
    cut_small(monkeypatch, tile)
    num_rows, vocab_size, width, num_pairs, options, _ = shape
    case = make_case(num_rows, vocab_size, width, num_pairs=num_pairs, dtype=dtype, **options)
    assert_parity(case, impl="fused", scratch_bytes=1)


@dtypes
@pytest.mark.parametrize("labels", ["equal in a pair", "in the last column", "peaked"])
def test_parity_of_special_targets(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, labels: str) -> None:
    cut_small(monkeypatch, DESCRIPTORS)
    case = make_case(40, 97, 40, num_pairs=18, dtype=dtype)
    if labels == "equal in a pair":
        case.target[18:36] = case.target[:18]
    elif labels == "in the last column":
        case.target[:] = 96
    else:  # logits 18 on the diagonal and 0 elsewhere: p = 1 - 1e-6 for both members of most pairs, and for X
        case.hidden = (18 * torch.eye(40)[torch.arange(40) % 3]).to(dtype)
        case.weight = torch.eye(97, 40).to(dtype)
        case.target = torch.arange(40) % 3
        case.target[1] = 50
    assert_parity(case, impl="fused", scratch_bytes=1)


@dtypes
def test_both_load_paths_and_two_runs_are_bitwise_equal(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    case = make_case(53, 101, 40, num_pairs=19, dtype=dtype, bias=True)
    results = []
    for tile in (POINTERS, DESCRIPTORS, DESCRIPTORS):
        cut_small(monkeypatch, tile)
        results.append(run(case, impl="fused", scratch_bytes=1))
    for other in results[1:]:
        assert all(torch.equal(results[0][k], other[k]) for k in other)


def exact_stats(case: Case) -> dict[str, Tensor]:
    """The statistics in float64 from the logits."""
    size = case.lam.numel()
    logits = case.hidden.double() @ case.weight.double().T
    lam = case.lam.double()[:, None]
    mixed = lam * logits[:size] + (1 - lam) * logits[size : 2 * size]

    def at(z: Tensor, target: Tensor) -> Tensor:
        return torch.where(target >= 0, z.gather(1, target.clamp(min=0)[:, None])[:, 0], 0)

    log_p, target = logits.log_softmax(1), case.target
    log_x = mixed.log_softmax(1)
    return {
        "lse": logits.logsumexp(1), "max_logit": logits.amax(1), "target_logit": at(logits, target),
        "logit_x": torch.stack([at(mixed, target[:size]), at(mixed, target[size : 2 * size])]),
        "entropy": -(log_p.exp() * log_p).sum(1), "nll": -at(log_p, target), "lse_x": mixed.logsumexp(1),
        "nll_x": torch.stack([-at(log_x, target[:size]), -at(log_x, target[size : 2 * size])]),
    }  # fmt: skip


def of_stats(stats: Statistics, name: str) -> Tensor:
    """A statistic by exact_stats' name."""
    carried = {"lse_x": stats.pair_carry[0], "nll_x": stats.pair_carry[2:]}
    return carried[name] if name in carried else getattr(stats, name)


@both_paths
@pytest.mark.parametrize("num_splits", [1, 2, 7])
def test_every_statistic_of_the_forward(tile: Tile, num_splits: int) -> None:
    case = make_case(53, 219, 40, num_pairs=19, logit_std=3.0, ignored=(1, 20, 52), ignore_index=-1)
    arguments = (case.hidden, case.weight, case.target, case.lam)
    stats = forward_of(*arguments, entropy=True, tile=tile, num_splits=num_splits)
    for name, truth in exact_stats(case).items():
        torch.testing.assert_close(of_stats(stats, name).double(), truth, rtol=2e-6, atol=3e-6)
    assert not stats.row_carry.isnan().any() and not stats.pair_carry.isnan().any()
    means = forward_of(*arguments, label_smoothing=0.1, tile=tile, num_splits=num_splits)
    truth = (case.hidden.double() @ case.weight.double().T).mean(1)
    torch.testing.assert_close(means.mean_logit.double(), truth, rtol=2e-6, atol=3e-6)
    assert torch.equal(means.lse, stats.lse) and means.entropy.shape == stats.mean_logit.shape == (0,)
    assert forward_of(*arguments).entropy.shape == (0,)


@both_paths
def test_a_target_at_the_top_equals_the_maximum_bit_for_bit(tile: Tile) -> None:
    case = make_case(48, 130, 40, num_pairs=16)
    case.target = (case.hidden @ case.weight.T).argmax(1)
    stats = forward_of(case.hidden, case.weight, case.target, case.lam, tile=tile, num_splits=3)
    assert torch.equal(stats.target_logit, stats.max_logit)


@pytest.mark.parametrize("num_pairs", [0, 1])
def test_the_carry_holds_what_rounding_took_from_lse(num_pairs: int) -> None:
    """Logits 9999, 10000, 9997.5, exact in float32, whose ulp there is 1e-3; both rows of the pair are the same."""
    hidden, weight = torch.ones(2, 1), torch.tensor([[9999.0], [10000.0], [9997.5]])
    target, lam = torch.zeros(2, dtype=torch.int64), torch.full((num_pairs,), 0.5)
    stats = forward_of(hidden, weight, target, lam, tile=POINTERS)
    truth = weight[:, 0].double().logsumexp(0)
    assert (stats.lse.double() - truth).abs().min() > 1e-5
    for carry in (stats.row_carry, stats.pair_carry):
        assert ((carry[0].double() + carry[1].double() - truth).abs() < 2e-7).all()
    coefs = (torch.full((2,), 1.0 - num_pairs), torch.ones(num_pairs))
    dweight = backward_of(hidden, weight, target, lam, *coefs, *stats[-2:], tile=POINTERS)[1][:, 0]
    gradient = weight[:, 0].double().softmax(0) - torch.tensor([1.0, 0.0, 0.0])
    torch.testing.assert_close(dweight.double(), gradient * (2 - num_pairs), rtol=1e-6, atol=0)


def test_smoothing_of_a_shard_divides_by_all_columns() -> None:
    """e / V moves every column's gradient by a e (1/V - 1/V_all); V_all is the place's."""
    case = make_case(20, 70, 40)
    arguments = (case.hidden, case.weight, case.target, case.lam)
    stats = forward_of(*arguments)
    coefs = (torch.full((20,), 0.5), torch.empty(0), stats.row_carry, stats.pair_carry)
    own, same, wide = (
        backward_of(*arguments, *coefs, label_smoothing=0.1, place=place, tile=POINTERS)[0]
        for place in (None, torch.tensor([0, 70]), torch.tensor([0, 140]))
    )
    assert torch.equal(own, same)
    moved = 0.5 * 0.1 * (1 / 70 - 1 / 140) * case.weight.sum(0)
    torch.testing.assert_close(wide - own, moved.expand(20, 40), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("coef", [2.0**16, 2.0**-20, 0.0])
def test_float16_coefficients_of_any_size(coef: float) -> None:
    """dlogits are rounded at unit scale: neither past 65504 nor flushed to zero. The gradients fit float16."""
    case = make_case(35, 70, 40, num_pairs=16, dtype=F16)
    size = 2.0**-7 if coef > 1 else 1.0
    arguments = (case.hidden * size, case.weight * size, case.target, case.lam)
    stats = forward_of(*arguments, tile=POINTERS)
    one, scaled = (
        backward_of(
            *arguments,
            torch.full((35,), c),
            torch.full((16,), c),
            *stats[-2:],
            dbias=True,
            tile=POINTERS,
        )
        for c in (1.0, coef)
    )
    for unit, gradient in zip(one[:2], scaled[:2], strict=True):
        torch.testing.assert_close(
            gradient.double(), unit.double() * coef, rtol=1e-3, atol=2.0**-24 * max(coef, 1.0)
        )
    assert scaled[0].any() == (coef != 0)


@both_paths
def test_targets_outside_the_vocabulary_count_as_none(tile: Tile) -> None:
    case = make_case(40, 70, 40, num_pairs=16)
    wild, none = case.target.clone(), case.target.clone()
    wild[torch.tensor([0, 3, 17, 39])] = torch.tensor([70, 2**40 + 5, -7, 95])
    none[torch.tensor([0, 3, 17, 39])] = -1
    left, right = (
        forward_of(case.hidden, case.weight, target, case.lam, tile=tile, num_splits=2)
        for target in (wild, none)
    )
    for name, value in left._asdict().items():
        assert torch.equal(value, getattr(right, name)), name
    assert left.nll[0] == 0 and left.target_logit[39] == 0 and left.pair_carry[3][1] == 0


@both_paths
def test_a_bias_of_minus_infinity_forbids_columns(tile: Tile) -> None:
    """Whole tiles of -inf, the first among them: no NaN, probability and gradient 0 there."""
    case = make_case(40, 101, 40, num_pairs=16)
    allowed = torch.arange(70, 101)
    bias = torch.full((101,), float("-inf"))
    bias[allowed] = 0.0
    case.target = allowed[torch.arange(40) % 31]
    case.lam[:2] = torch.tensor([0.0, 1.0])  # a mixture of one row alone: 0 times -inf
    stats = forward_of(case.hidden, case.weight, case.target, case.lam, bias=bias, tile=tile, entropy=True)
    kept = Case(case.hidden, case.weight[allowed], case.target - 70, case.lam)
    for name, truth in exact_stats(kept).items():
        torch.testing.assert_close(of_stats(stats, name).double(), truth, rtol=2e-6, atol=3e-6)
    dweight = backward_of(
        case.hidden, case.weight, case.target, case.lam, torch.ones(40), torch.ones(16), *stats[-2:],
        bias=bias, tile=tile, scratch_bytes=1,
    )[1]  # fmt: skip
    assert not dweight[:70].any() and dweight[70:].isfinite().all() and dweight[70:].any()


@both_paths
def test_a_member_without_a_share_is_left_out_of_the_mixture_whatever_it_is(tile: Tile) -> None:
    """X is A where lam is 1 and B where it is 0, to the bit: a member of logits +-inf, one of 0 beside large ones."""
    case = make_case(12, 101, 40, num_pairs=4, bias=True)
    case.lam = torch.tensor([1.0, 0.0, 1.0, 0.0])
    case.hidden[:8] *= torch.tensor([1.0, 3e38, 0.0, 1e20, 3e38, 1.0, 1e20, 0.0])[:, None]
    stats = forward_of(
        case.hidden, case.weight, case.target, case.lam, bias=case.bias, tile=tile, num_splits=2
    )
    pairs, members = torch.arange(4), torch.tensor([0, 5, 2, 7])
    assert not stats.lse[[1, 4]].isfinite().any()
    assert torch.equal(stats.pair_carry[0], stats.lse[members])
    sides = (members >= 4).long()
    assert torch.equal(stats.logit_x[sides, pairs], stats.target_logit[members])
    assert torch.equal(stats.pair_carry[2 + sides, pairs], stats.nll[members])


@dtypes
def test_what_is_not_needed_is_empty_and_changes_nothing(dtype: torch.dtype) -> None:
    case = make_case(21, 70, 40, num_pairs=8, dtype=dtype, bias=True)
    arguments = (case.hidden, case.weight, case.target, case.lam)
    stats = forward_of(*arguments, bias=case.bias)
    coefs = (torch.ones(21), torch.ones(8), stats.row_carry, stats.pair_carry)

    def backward(*needs: bool) -> Gradients:
        names = ("dhidden", "dweight", "dbias")
        needed: dict[str, Any] = dict(zip(names, needs, strict=True))
        return backward_of(*arguments, *coefs, bias=case.bias, **needed)

    everything = backward(True, True, True)
    assert [g.dtype for g in everything] == [dtype] * 5 and everything.dlow.shape == (0,)
    for needs in ((True, False, False), (False, True, False), (False, False, True), (False, False, False)):
        for gradient, full, needed in zip(backward(*needs)[:3], everything[:3], needs, strict=True):
            assert torch.equal(gradient, full) if needed else gradient.shape == (0,)


def test_no_rows_give_empty_statistics_and_zero_gradients() -> None:
    hidden, weight = torch.empty(0, 8), torch.randn(5, 8)
    target, lam = torch.empty(0, dtype=torch.int64), torch.empty(0)
    stats = forward_of(hidden, weight, target, lam, entropy=True)
    assert all(t.numel() == 0 for t in stats)
    dhidden, dweight, dbias, *_ = backward_of(
        hidden, weight, target, lam, torch.empty(0), torch.empty(0), *stats[-2:], dbias=True
    )
    assert dhidden.shape == (0, 8) and not dweight.any() and not dbias.any() and dbias.shape == (5,)


@pytest.mark.parametrize("num_pairs", [0, 8])
def test_gradients_keep_their_digits_where_p_is_near_one(num_pairs: int) -> None:
    """dlogits against float64 element by element, p = 1 - 1e-6: no rounding of p or of lse may eat 1 - p."""
    num_rows, vocab_size = 16, 40
    weight = torch.eye(vocab_size)
    target = torch.arange(num_rows) % 4
    hidden = 17.5 * torch.nn.functional.one_hot(target, vocab_size).float()
    lam = torch.linspace(0, 1, num_pairs)
    stats = forward_of(hidden, weight, target, lam, tile=POINTERS, num_splits=2)
    dhidden = backward_of(
        hidden, weight, target, lam, torch.ones(num_rows), torch.zeros(num_pairs), *stats[-2:], tile=POINTERS
    )[0]
    truth = hidden.double().softmax(1)
    rest = -truth.clone().scatter(1, target[:, None], 0).sum(1)
    got = dhidden.double().gather(1, target[:, None])[:, 0]
    # log(1 + 1e-6) in float32 is known to half an ulp of 1.
    assert (rest + 1e-6).abs().max() < 3e-7 and (got - rest).abs().max() <= 6e-8


def long_tail(num_rows: int, num_pairs: int) -> tuple[Case, float]:
    """A column at 21 and 2,047 at 0: tiles of 32 add 2.4e-8 to a sum of 1, under half its last digit. And -log p."""
    weight = torch.zeros(2048, 1)
    weight[0] = 21.0
    target = torch.zeros(num_rows, dtype=torch.int64)
    case = Case(torch.ones(num_rows, 1), weight, target, torch.linspace(0, 1, num_pairs))
    return case, math.log1p(2047 * math.exp(-21))


@pytest.mark.parametrize("num_splits", [1, 64])
@pytest.mark.parametrize("num_pairs", [0, 8])
def test_float32_sums_keep_what_many_small_tiles_add(num_pairs: int, num_splits: int) -> None:
    """A plain running sum would stay at 1 and lose all of -log p = 1.6e-6, over tiles and over splits."""
    case, nll = long_tail(16, num_pairs)
    arguments = (case.hidden, case.weight, case.target, case.lam)
    stats = forward_of(*arguments, tile=POINTERS, num_splits=num_splits)
    for found in (stats.nll, *stats.pair_carry[2:]):
        assert (found.double() - nll).abs().le(6.1e-8).all(), found  # half of 1's last digit


@pytest.mark.parametrize("scratch_bytes", [0, 1, 64 * 64 * 4])
def test_no_logits_are_held(scratch_bytes: int) -> None:
    """The forward holds nothing larger than the weight, the backward one slice: half the vocabulary at most."""
    num_rows, vocab_size, width = 64, 1024, 4
    case = make_case(num_rows, vocab_size, width, num_pairs=24)
    arguments = (case.hidden, case.weight, case.target, case.lam)
    with LargestTensor() as seen:
        stats = forward_of(*arguments)
    assert seen.nbytes <= case.weight.nbytes
    coefs = (torch.ones(num_rows), torch.ones(24), stats.row_carry, stats.pair_carry)
    with LargestTensor() as seen:
        backward_of(*arguments, *coefs, scratch_bytes=scratch_bytes, tile=POINTERS)
    slice_columns = {0: vocab_size // 2, 1: POINTERS.block_v}.get(scratch_bytes, 64)
    assert seen.nbytes == max(num_rows * slice_columns * 4, case.weight.nbytes)


class Recorder:
    """Stands in for a kernel and keeps the grid of its launch."""

    def __init__(self) -> None:
        self.grids: list[tuple[int, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        self.grids.append(grid)
        return lambda **_: None


def test_the_grid_of_millions_of_rows_stays_within_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything on axis 0: the others end at 65535."""
    from sftmix_kernels.fused import recompute, rows, stats

    recorder = Recorder()
    monkeypatch.setattr(rows, "_sftmix_gradient_terms_kernel", recorder)
    monkeypatch.setattr(forward, "_sftmix_fwd_kernel", recorder)
    monkeypatch.setattr(recompute, "_sftmix_recompute_kernel", recorder)
    monkeypatch.setattr(stats, "_sftmix_fwd_combine_kernel", recorder)
    monkeypatch.setattr(tiles, "current_arch", lambda _: "sm_90")
    num_rows, num_pairs = 5_000_000, 1_000_000

    def meta(*shape: int, dtype: torch.dtype = F32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    arguments = (meta(num_rows, 64, dtype=F16), meta(1000, 64, dtype=F16), meta(num_rows, dtype=torch.int64))
    result = forward_of(*arguments, meta(num_pairs))
    backward_of(*arguments, meta(num_pairs), meta(num_rows), meta(num_pairs), *result[-2:])
    assert len(recorder.grids) >= 6
    assert all(len(grid) == 1 and 0 < grid[0] < 2**31 for grid in recorder.grids)


def test_bad_calls_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(4, 5, 6)
    arguments = (case.hidden, case.weight, case.target, case.lam)
    monkeypatch.setattr(tiles, "INTERPRETED", False)
    with pytest.raises(ValueError, match="impl: expected 'chunked' or 'reference' for tensors on the CPU"):
        forward_of(*arguments)
    with pytest.raises(ValueError, match="power of two for block_v, got 96"):
        Tile(64, 96, 64)

"""What a call may ask of the Triton kernels beside the plain loss, under both schedules, against the reference.

Options of rows and columns, logits of -inf, garbage in ignored rows, and statistics that carry gradients.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sftmix_kernels import chunked, linear_cross_entropy, sftmix_loss, token_stats
from sftmix_kernels.call import Gradients, Kept, Statistics, Upstream
from sftmix_kernels.terms import coefficients
from sftmix_kernels.vocab_parallel import own_columns
from tests.kernels.calls import call_of
from tests.kernels.watching import LargestTensor
from tests.parity import Case, assert_draws_within_contract, assert_parity, make_case, run

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("the kernels are compiled where there is a GPU: tests/gpu", allow_module_level=True)

from sftmix_kernels import fused
from sftmix_kernels.fused import Tile, forward, fused_backward, fused_forward, stored, tiles, tokens

F32, F16, F64 = torch.float32, torch.float16, torch.float64
INF, NAN = float("inf"), float("nan")
SMALL = Tile(16, 32, 16, group_n=2)
both_dtypes = pytest.mark.parametrize("dtype", [F32, F16], ids=["float32", "float16"])
both_schedules = pytest.mark.parametrize("schedule", ["recompute", "stored"])


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 16 x 32 in three splits, rows of logits in blocks of 32."""
    monkeypatch.setattr(tiles, "choose_tile", lambda *_, **__: SMALL)
    monkeypatch.setattr(forward, "choose_num_splits", lambda *_: 3)
    monkeypatch.setattr(stored, "row_block", lambda *_: 32)


def class_weights(vocab_size: int) -> Tensor:
    """Between 0 and 2; every fifth is 0."""
    weights = torch.rand(vocab_size, generator=torch.Generator().manual_seed(3)) * 2
    weights[::5] = 0
    return weights


# N, V, D, M, options, and why.
CASES: list[tuple[int, int, int, int, dict[str, Any], str]] = [
    (35, 70, 40, 15, {"class_weight": class_weights(70), "ignored": (0, 18, 34)}, "class weights"),
    (
        35, 70, 40, 15, {"class_weight": class_weights(70), "label_smoothing": 0.2, "z_loss": 1e-2, "bias": True},
        "class weights, smoothing, z-loss",
    ),
    (21, 70, 40, 0, {"class_weight": class_weights(70), "label_smoothing": 1.0}, "class weights, smoothing of 1"),
    (35, 70, 40, 15, {"label_smoothing": 1.0, "softcap": 3.0}, "smoothing of 1 under a softcap"),
    (35, 70, 40, 15, {"token_scaling": True, "ignored": (2, 17)}, "token scaling"),
    (
        35, 70, 40, 15,
        {"token_scaling": True, "class_weight": class_weights(70), "label_smoothing": 0.1, "z_loss": 1e-2,
         "softcap": 4.0, "logit_scale": 0.8, "ignored": (2, 17), "upstream": 3.0},
        "everything",
    ),
    (20, 70, 40, 0, {"token_scaling": True, "z_loss": 1e-2}, "token scaling without pairs"),
]  # fmt: skip


@both_dtypes
@both_schedules
@pytest.mark.parametrize("shape", CASES, ids=[c[5] for c in CASES])
def test_parity(schedule: str, dtype: torch.dtype, shape: tuple[Any, ...]) -> None:
    num_rows, vocab_size, width, num_pairs, options, _ = shape
    case = make_case(num_rows, vocab_size, width, num_pairs=num_pairs, dtype=dtype, **options)
    if num_pairs > 4:
        case.target[num_pairs + 4] = case.target[4]  # one label for both members
    assert_parity(case, impl="fused", schedule=schedule, scratch_bytes=vocab_size * dtype.itemsize * 12)


@both_dtypes
def test_each_row_its_own_upstream(dtype: torch.dtype) -> None:
    """reduction="none" with class weights, smoothing and token scaling: any upstream, zeros and signs among it."""
    case = make_case(29, 70, 40, dtype=dtype, bias=True, ignored=(3,))
    upstream = torch.linspace(-2, 3, 29)
    upstream[7] = 0
    options = {
        "class_weight": class_weights(70),
        "label_smoothing": 0.1,
        "token_scaling": True,
        "z_loss": 1e-2,
    }

    def gradients(impl: str, kind: torch.dtype) -> list[Tensor]:
        leaves = [t.to(kind).requires_grad_() for t in (case.hidden, case.weight, case.bias) if t is not None]
        loss = linear_cross_entropy(
            leaves[0], leaves[1], case.target, bias=leaves[2], reduction="none", impl=impl, **options
        )
        return [loss.detach(), *torch.autograd.grad(loss, leaves, upstream.to(loss.dtype))]

    draws = zip(
        gradients("fused", dtype), gradients("reference", dtype), gradients("reference", F64), strict=True
    )
    for draw in draws:
        assert_draws_within_contract("gradient", [draw])


@both_schedules
@pytest.mark.parametrize("num_pairs", [0, 15])
def test_predicted_is_the_first_of_the_largest(schedule: str, num_pairs: int) -> None:
    """Columns equal in one tile, over tiles and over splits; and at the cap, where unequal logits become equal."""
    case = make_case(35, 219, 8, num_pairs=num_pairs, ignored=(1, 20))
    equal = torch.tensor([3, 4, 9, 40, 101, 217])
    case.weight[equal] = case.weight[equal[0]] * 3
    case.hidden[::2] = case.weight[3].sign()
    logits = case.hidden @ case.weight.T
    truth = logits.argmax(dim=1)
    assert (truth == 3).sum() > 15 and truth.unique().numel() > 5
    truth[[1, 20]] = -1
    ours = run(case, impl="fused", schedule=schedule, want_predicted=True, scratch_bytes=219 * 4 * 8)
    assert torch.equal(ours["predicted"], truth)
    assert torch.equal(
        ours["is_top1"], (ours["predicted"] >= 0) & (truth.eq(case.target) | at_top(logits, case))
    )
    stats = token_stats(case.hidden, case.weight, case.target, want_predicted=True, impl="fused")
    assert torch.equal(stats.predicted, truth)
    case.weight[150] = 2 * case.weight[3]
    ours = run(case, impl="fused", schedule=schedule, want_predicted=True, softcap=0.01)
    capped = 0.01 * torch.tanh(case.hidden @ case.weight.T / 0.01)
    assert (ours["predicted"] <= capped.argmax(dim=1)).all() and ours["predicted"][0] < 150


def at_top(logits: Tensor, case: Case) -> Tensor:
    return logits.gather(1, case.target.clamp(min=0)[:, None])[:, 0] == logits.amax(dim=1)


def masked(case: Case, columns: list[int]) -> Case:
    """A bias of -inf in some columns, which are no row's target."""
    assert case.bias is not None
    case.bias[columns] = -INF
    allowed = torch.tensor([v for v in range(case.weight.shape[0]) if v not in columns])
    case.target = torch.where(case.target >= 0, allowed[case.target % allowed.numel()], case.target)
    return case


@both_dtypes
@both_schedules
@pytest.mark.parametrize("lam", [0.0, 1.0, 0.3, None], ids=str)
def test_a_bias_of_minus_infinity(schedule: str, dtype: torch.dtype, lam: float | None) -> None:
    """Whole tiles of it, the first among them: as without those classes, and gradients of 0 there."""
    case = make_case(35, 101, 40, num_pairs=15, dtype=dtype, bias=True, lam=lam, ignored=(2,), z_loss=1e-3)
    case = masked(case, [*range(66), 80])
    ours = assert_parity(case, impl="fused", schedule=schedule, scratch_bytes=101 * dtype.itemsize * 8)
    assert not ours["dweight"][:66].any() and not ours["dbias"][:66].any() and ours["dweight"][66:].any()
    weights = torch.ones(101)
    weights[[*range(66), 80]] = 0
    options = {"class_weight": weights, "label_smoothing": 0.1}
    case.options |= options
    ours = assert_parity(case, impl="fused", schedule=schedule)
    assert ours["loss"].isfinite() and not ours["dweight"][:66].any()


@both_schedules
@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_member_without_a_share_may_have_a_label_at_minus_infinity(schedule: str, share: float) -> None:
    """Its own next-token term would be infinite and has a weight of 0; the mixture is the other member's alone."""
    case = make_case(24, 70, 40, num_pairs=10, bias=True, lam=share)
    assert case.bias is not None
    other = slice(0, 10) if share == 0 else slice(10, 20)
    case.target[case.target == 5] = 6
    case.bias[5] = -INF
    case.target[other] = 5
    row_weight = torch.ones(24)
    row_weight[other] = 0
    case.options |= {"row_weight": row_weight}
    ours = run(case, impl="fused", schedule=schedule)
    truth = run(case, impl="reference", dtype=F64)
    assert ours["loss"].isfinite() and (ours["nll"][other] == INF).all()
    for name in ("loss", "mixup_nll", "dhidden", "dweight", "dbias"):
        torch.testing.assert_close(ours[name].double(), truth[name], rtol=1e-5, atol=1e-7, msg=name)


def test_a_target_at_minus_infinity_has_an_infinite_loss() -> None:
    """As F.cross_entropy has it; token scaling makes it 0: exp(-inf)."""
    case = make_case(5, 40, 8, bias=True)
    case.bias[7], case.target[2] = -INF, 7
    for schedule in ("recompute", "stored"):
        assert run(case, impl="fused", schedule=schedule)["loss"] == INF
        scaled = run(case, impl="fused", schedule=schedule, token_scaling=True)
        truth = run(case, impl="reference", dtype=F64, token_scaling=True)
        assert scaled["loss"].isfinite() and not scaled["dhidden"][2].any()
        torch.testing.assert_close(scaled["dweight"].double(), truth["dweight"], rtol=1e-5, atol=1e-7)


GARBAGE: list[dict[str, Any]] = [
    {},
    {"label_smoothing": 0.1, "z_loss": 1e-2},
    {"softcap": 3.0, "token_scaling": True, "z_loss": 1e-2},
    {"class_weight": class_weights(70), "label_smoothing": 0.1, "want_predicted": True},
]


@both_dtypes
@both_schedules
@pytest.mark.parametrize("options", GARBAGE, ids=["plain", "smoothed", "capped and scaled", "class weights"])
@pytest.mark.parametrize("what", [NAN, INF], ids=str)
def test_garbage_in_ignored_rows_changes_nothing(
    schedule: str, dtype: torch.dtype, options: dict[str, Any], what: float
) -> None:
    """A confident row, a partner, both members of a pair and an unpaired row: bit for bit as with zeros in them."""
    rows = [0, 17, 2, 18, 34]  # pairs 0 and 2 lose one member, pair 1 its partner, pair 3 both
    case = make_case(35, 70, 40, num_pairs=15, dtype=dtype, bias=True, ignored=(*rows, 3), **options)
    case.hidden[[*rows, 3]] = 0
    clean = run(case, impl="fused", schedule=schedule, scratch_bytes=70 * dtype.itemsize * 12)
    case.hidden[rows] = what
    case.hidden[3, ::2], case.hidden[3, 1::2] = what, -what
    dirty = run(case, impl="fused", schedule=schedule, scratch_bytes=70 * dtype.itemsize * 12)
    for name, value in clean.items():
        if name != "lse":
            assert torch.equal(value, dirty[name]), name
    assert not dirty["dhidden"][rows].any() and dirty["dhidden"][15].any() and dirty["lse"][0].isnan()


@both_schedules
def test_garbage_in_ignored_rows_beside_an_adapter(schedule: str) -> None:
    case = make_case(35, 70, 40, num_pairs=15, ignored=(0, 17, 34))
    found = []
    for what in (0.0, NAN):
        case.hidden[[0, 17, 34]] = what
        leaves = [torch.randn(*s, generator=torch.Generator().manual_seed(1)) for s in ((4, 40), (70, 4))]
        hidden, down, up = (t.clone().requires_grad_() for t in (case.hidden, *leaves))
        loss = sftmix_loss(
            hidden, case.weight, case.target, case.lam, lora=(down, up, 0.5), impl="fused", schedule=schedule
        ).loss
        found.append([loss, *torch.autograd.grad(loss, (hidden, down, up))])
    for clean, dirty in zip(*found, strict=True):
        assert torch.equal(clean, dirty) and dirty.any()


# --- statistics with gradients -------------------------------------------------------------------------------------


def statistics(
    case: Case, impl: str, dtype: torch.dtype, given: Tensor | None, **options: Any
) -> dict[str, Tensor]:
    """Differentiable statistics of each row and the gradients of a sum of all with upstreams of both signs."""
    leaves = {
        name: t.to(dtype).clone().requires_grad_()
        for name, t in {"hidden": case.hidden, "weight": case.weight, "bias": case.bias}.items()
        if t is not None
    }
    found = token_stats(
        **leaves, target=case.target, tokens=given, differentiable=True, impl=impl, **case.options, **options
    )
    used = {name: getattr(found, name) for name in ("logprob", "lse", "entropy", "token_logprob")}
    used = {name: value for name, value in used.items() if value is not None}
    g = torch.Generator().manual_seed(7)
    total = sum(
        (value * torch.randn(value.shape, generator=g).to(value.dtype)).sum() for value in used.values()
    )
    assert isinstance(total, Tensor)
    gradients = torch.autograd.grad(total, list(leaves.values()))
    return {**used, **{f"d{name}": each for name, each in zip(leaves, gradients, strict=True)}}


STATISTICS: list[tuple[dict[str, Any], int, str]] = [
    ({}, 0, "plain"),
    ({"bias": True, "ignored": (3, 20)}, 4, "tokens, bias, ignored rows"),
    ({"softcap": 3.0, "logit_scale": 0.7, "bias": True}, 4, "tokens, softcap after scale after bias"),
    ({"logit_scale": 1.7}, 1, "one token, scale"),
    ({"logit_std": 30.0}, 3, "peaked"),
]


@both_dtypes
@pytest.mark.parametrize("shape", STATISTICS, ids=[s[2] for s in STATISTICS])
def test_statistics_carry_gradients(dtype: torch.dtype, shape: tuple[Any, ...]) -> None:
    """Of log-probability, log-sum-exp, entropy and tokens at once. Tokens: twice the same, the target, none."""
    options, count, _ = shape
    case = make_case(37, 70, 40, dtype=dtype, **options)
    given = None
    if count:
        given = torch.randint(70, (37, count), generator=torch.Generator().manual_seed(1))
        given[::3, -1] = given[::3, 0]
        given[1::3, 0] = case.target[1::3]
        given[2::5, 0] = -100
    results = [statistics(case, impl, kind, given) for impl, kind in (("fused", dtype), ("reference", dtype))]
    truth = statistics(case, "reference", F64, given)
    for name, want in truth.items():
        assert_draws_within_contract(name, [(results[0][name], results[1][name], want)])


@pytest.mark.parametrize("name", ["logprob", "lse", "entropy", "token_logprob"])
def test_each_statistic_alone(name: str) -> None:
    """One has an upstream, the others none: what is not asked for adds nothing, in slices of one tile."""
    case = make_case(20, 70, 40, ignored=(3,))
    given = torch.randint(70, (20, 2), generator=torch.Generator().manual_seed(1))
    found = []
    for impl, dtype in (("fused", F32), ("reference", F64)):
        hidden, weight = (t.to(dtype).requires_grad_() for t in (case.hidden.clone(), case.weight.clone()))
        stats = token_stats(
            hidden, weight, case.target, tokens=given, differentiable=True, impl=impl,
            **({"scratch_bytes": 1} if impl == "fused" else {}),
        )  # fmt: skip
        value = getattr(stats, name)
        upstream = torch.linspace(-1, 2, value.numel()).view_as(value).to(value.dtype)
        found.append(torch.autograd.grad(value, (hidden, weight), upstream))
    for ours, truth in zip(*found, strict=True):
        torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=2e-6)
    assert found[0][0][3].any() == (
        name in ("lse", "entropy")
    )  # defined at an ignored row, where the others are 0


def test_statistics_of_masked_columns_carry_finite_gradients() -> None:
    case = masked(make_case(20, 101, 40, bias=True), [*range(66), 80])
    given = torch.randint(81, 101, (20, 2), generator=torch.Generator().manual_seed(1))
    ours, truth = statistics(case, "fused", F32, given), statistics(case, "reference", F64, given)
    for name, want in truth.items():
        torch.testing.assert_close(ours[name].double(), want, rtol=1e-5, atol=2e-6, msg=name)
    assert not ours["dweight"][:66].any()


def test_an_ignored_row_of_garbage_without_upstream_adds_nothing() -> None:
    case = make_case(20, 70, 40, ignored=(3, 11))
    given = torch.randint(70, (20, 2), generator=torch.Generator().manual_seed(1))
    found = []
    for what in (0.0, NAN):
        case.hidden[[3, 11]] = what
        hidden, weight = (t.clone().requires_grad_() for t in (case.hidden, case.weight))
        stats = token_stats(hidden, weight, case.target, tokens=given, differentiable=True, impl="fused")
        keep = case.target >= 0
        total = stats.logprob.sum() + (stats.lse + stats.entropy)[keep].sum() + stats.token_logprob.sum()
        found.append([total, *torch.autograd.grad(total, (hidden, weight))])
    for clean, dirty in zip(*found, strict=True):
        assert torch.equal(clean, dirty)


def test_tokens_gather_a_bounded_number_of_rows() -> None:
    """64 x 50 tokens of 64 columns: 800 KiB of gathered rows, were they taken at once."""
    case = make_case(64, 70, 64)
    given = torch.randint(70, (64, 50), generator=torch.Generator().manual_seed(1))
    call = call_of(case, impl="fused", rows=True, tokens=given, scratch_bytes=64 * 1024)
    with LargestTensor() as seen:
        bounded = tokens.token_logits(call)
    assert seen.nbytes <= 64 * 1024
    assert torch.equal(bounded, tokens.token_logits(call._replace(plan=[*call.plan[:-1], 0])))
    truth = case.hidden.double() @ case.weight.double().T
    torch.testing.assert_close(bounded.double(), truth.gather(1, given), rtol=1e-5, atol=1e-5)


def every_upstream(case: Case, row: Tensor, pair: Tensor) -> tuple[Upstream, Tensor]:
    """Of terms, mixtures, log-sum-exps, entropies and tokens; and the tokens: labels among them, one of them twice."""
    num_rows, num_pairs = case.hidden.shape[0], case.lam.shape[0]
    given = torch.randint(70, (num_rows, 4), generator=torch.Generator().manual_seed(1))
    given[:, 1] = case.target.clamp(min=0)
    given[: 2 * num_pairs, 2] = given[: 2 * num_pairs, 1].roll(num_pairs)
    given[::3, 3], given[1::3, 3] = given[::3, 0], given[1::3, 1]
    token = torch.linspace(-1, 1.5, 4 * num_rows).view(num_rows, 4)
    return Upstream(row, pair, torch.linspace(-1, 1, num_rows), torch.linspace(2, -1, num_rows), token), given


@pytest.mark.parametrize("options", [{}, {"softcap": 3.0, "logit_scale": 0.7}], ids=["plain", "capped"])
@pytest.mark.parametrize("low_rank", [False, True])
def test_every_upstream_beside_pairs_gives_what_chunked_gives(
    low_rank: bool, options: dict[str, Any]
) -> None:
    case = make_case(35, 70, 40, num_pairs=15, bias=True, ignored=(3,), **options)
    row, pair = torch.linspace(0.5, 1.5, 35, dtype=F64), torch.linspace(2, 1, 15, dtype=F64)
    row[3] = pair[3] = 0
    upstream, given = every_upstream(case, row, pair)
    factors, needs = None, (True, True, True)
    if low_rank:
        g = torch.Generator().manual_seed(2)
        factors, needs = (torch.randn(35, 4, generator=g), torch.randn(70, 4, generator=g)), (True,) * 5
    call = call_of(case, impl="fused", rows=True, entropy=True, tokens=given, factors=factors, needs=needs)
    with torch.no_grad():
        column = coefficients(call).column
        found = fused_forward(call, column)
        kept = Kept(found.row_carry, found.pair_carry, found.entropy)
        ours, theirs = (engine.gradients(call, column, kept, upstream) for engine in (fused, chunked))
    for name, value in ours._asdict().items():
        torch.testing.assert_close(value, getattr(theirs, name), rtol=1e-5, atol=2e-5, msg=name)
        assert value.any() or not low_rank


# --- shards and main gradients -------------------------------------------------------------------------------------


@torch.no_grad()
def of_shards(case: Case, sizes: tuple[int, ...], upstream: Upstream, **options: Any) -> list[Gradients]:
    """Each shard's gradients from the statistics of all columns."""
    whole = call_of(case, impl="fused", rows=True, entropy=not case.options.get("label_smoothing"), **options)
    column = coefficients(whole).column
    found = fused_forward(whole, column)
    kept, start, parts = Kept(found.row_carry, found.pair_carry, found.entropy), 0, []
    for size in sizes:
        own, place = slice(start, start + size), torch.tensor([start, case.weight.shape[0]])
        given = None if whole.tokens is None else own_columns(whole.tokens, place, size)
        bias = None if whole.bias is None else whole.bias[own]
        call = whole._replace(weight=whole.weight[own], bias=bias, place=place, tokens=given)
        parts.append(fused_backward(call, own_columns(column, place, size), kept, upstream))
        start += size
    return [fused_backward(whole, column, kept, upstream), *parts]


@both_dtypes
@pytest.mark.parametrize("kind", ["terms", "statistics"])
def test_gradients_of_shards_add_up(kind: str, dtype: torch.dtype) -> None:
    """Smoothing divides by the whole V, class weights are those of targets elsewhere; dhidden comes unrounded."""
    case = make_case(35, 70, 40, num_pairs=15, dtype=dtype, bias=True, ignored=(3,))
    row, pair = torch.linspace(0.5, 1.5, 35, dtype=F64), torch.linspace(2, 1, 15, dtype=F64)
    row[3] = pair[3] = 0
    upstream, options = Upstream(row, pair), {}
    if kind == "terms":
        case.options = {"class_weight": class_weights(70), "label_smoothing": 0.2, "z_loss": 1e-2}
    else:
        upstream, options["tokens"] = every_upstream(case, row, pair)
    whole, *parts = of_shards(case, (26, 1, 43), upstream, **options)
    assert all(part.dhidden.dtype == F32 for part in parts) and whole.dhidden.dtype == dtype
    tight = {"rtol": 2e-6, "atol": 2e-5} if dtype == F32 else {"rtol": 2e-3, "atol": 6e-3}
    torch.testing.assert_close(sum(part.dhidden for part in parts), whole.dhidden.float(), **tight)
    for name in ("dweight", "dbias"):
        joined = torch.cat([getattr(part, name) for part in parts])
        torch.testing.assert_close(joined, getattr(whole, name), **tight)


@both_dtypes
@both_schedules
def test_a_main_gradient_beside_an_adapter(schedule: str, dtype: torch.dtype) -> None:
    """dweight is added unrounded, and the factors have the gradients they have without it."""
    case = make_case(35, 70, 40, num_pairs=15, dtype=dtype)
    g = torch.Generator().manual_seed(1)
    factors = [torch.randn(*shape, generator=g).to(dtype) for shape in ((4, 40), (70, 4))]
    found = []
    for main in (torch.ones(70, 40), None):
        hidden, weight, down, up = (t.clone().requires_grad_() for t in (case.hidden, case.weight, *factors))
        loss = sftmix_loss(
            hidden,
            weight,
            case.target,
            case.lam,
            lora=(down, up, 0.5),
            main_grad=main,
            impl="fused",
            schedule=schedule,
        ).loss
        loss.backward()
        dweight = weight.grad if main is None else main - 1
        assert dweight is not None and (main is None) != (weight.grad is None)
        found.append([dweight.to(dtype), hidden.grad, down.grad, up.grad])
    for name, one, other in zip(("dweight", "dhidden", "ddown", "dup"), *found, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-3, atol=2e-6, msg=name)


def test_the_schedules_differ_by_one_rounding_of_a_logit() -> None:
    """stored rounds logits to 16 bits, recompute and a forward without gradients do not."""
    case = make_case(64, 500, 64, dtype=F16, logit_std=10.0)
    of: dict[str, Statistics | dict[str, Tensor]] = {}
    alone = sftmix_loss(case.hidden, case.weight, case.target, case.lam, impl="fused")
    of = {schedule: run(case, impl="fused", schedule=schedule) for schedule in ("recompute", "stored")}
    assert torch.equal(of["recompute"]["loss"], alone.loss) and torch.equal(of["recompute"]["nll"], alone.nll)
    largest = (case.hidden.double() @ case.weight.double().T).abs().amax(dim=1)
    rounding = torch.finfo(F16).eps / 2 * largest
    moved = (of["stored"]["nll"].double() - alone.nll).abs()
    assert moved.max() > 1e-4 and (moved <= 2 * rounding + 1e-5).all()
    assert ((of["stored"]["lse"].double() - alone.lse).abs() <= rounding + 1e-5).all()

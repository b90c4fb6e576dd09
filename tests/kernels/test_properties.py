"""The numerical contract over a grid of options and over random draws, and identities that hold for any input.

A draw is a handful of small numbers (:class:`Draw`), so a failure shrinks to a line that can be typed again:
``check(Draw(vocab_size=70, softcap=3.0), impl="chunked")``. Draws are the same in every run (``derandomize``).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sftmix_kernels import sftmix_loss
from tests.parity import Case, assert_parity, make_case, run

F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64

# The interpreter's own cost is per program, so `fused` has fewer examples.
EXAMPLES = {"chunked": 25, "fused": 12}
# Of the slow tests, over four orders: of so many draws one has a maximum above its bound by luck, over one order or two
# and no longer over four, eight and sixteen (seed 2, float32, denominators, mixup_weight 1).
MANY = {"chunked": 200, "fused": 50}
DTYPES = {"chunked": (F32, BF16, F16), "fused": (F32, BF16, F16)}


@dataclass(frozen=True)
class Draw:
    """A loss call in few numbers; the first value of each choice is where shrinking ends."""

    num_pairs: int = 48
    num_single: int = 48  # rows beside the pairs
    vocab_size: int = 64
    width: int = 24
    dtype: torch.dtype = F32
    seed: int = 0
    lam: float | None = 0.5  # None: uniform
    ignored_every: int = 0  # every k-th row; 0: none
    logit_std: float = 2.0
    bias: bool = False
    softcap: float | None = None
    logit_scale: float = 1.0
    weights: bool = False  # per row and per pair
    denominators: bool = False
    mixup_weight: float = 0.2
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    upstream: float = 1.0
    rows_per_chunk: int = 48  # of the scratch

    @property
    def num_rows(self) -> int:
        return 2 * self.num_pairs + self.num_single

    def case(self) -> Case:
        options: dict[str, Any] = {
            "softcap": self.softcap, "logit_scale": self.logit_scale, "mixup_weight": self.mixup_weight,
            "label_smoothing": self.label_smoothing, "z_loss": self.z_loss,
        }  # fmt: skip
        if self.weights:
            g = torch.Generator().manual_seed(self.seed + 1)
            options["row_weight"] = torch.rand(self.num_rows, generator=g)
            options["pair_weight"] = 3 * torch.rand(self.num_pairs, generator=g)
        if self.denominators:
            options |= {"ntp_denominator": 301, "mixup_denominator": torch.tensor(97)}
        ignored = range(0, self.num_rows, self.ignored_every) if self.ignored_every else ()
        return make_case(
            self.num_rows, self.vocab_size, self.width, num_pairs=self.num_pairs, dtype=self.dtype, lam=self.lam,
            ignored=tuple(ignored), bias=self.bias, logit_std=self.logit_std, seed=self.seed,
            upstream=self.upstream, **options,
        )  # fmt: skip


def draws(impl: str, **fixed: Any) -> st.SearchStrategy[Draw]:
    """Any draw; ``fixed`` pins fields.

    No pairs or 48 of them and more, and as many rows: the contract compares root mean squares of rounding errors, and
    of fewer numbers one side's may be half the other's by luck (test_shapes_edge.py has the small sizes).
    """
    fields: dict[str, st.SearchStrategy[Any]] = {
        "num_pairs": st.integers(48, 80) | st.just(0),
        "num_single": st.integers(48, 90),
        "vocab_size": st.integers(64, 300),
        "width": st.integers(24, 80),
        "dtype": st.sampled_from(DTYPES[impl]),
        "seed": st.integers(0, 2**16),
        "lam": st.sampled_from((0.5, None, 0.0, 1.0)),
        "ignored_every": st.sampled_from((0, 5, 3, 2)),
        "logit_std": st.sampled_from((2.0, 0.3, 8.0)),
        "bias": st.booleans(),
        "softcap": st.sampled_from((None, 30.0, 3.0)),
        "logit_scale": st.sampled_from((1.0, 0.25, 2.5)),
        "weights": st.booleans(),
        "denominators": st.booleans(),
        "mixup_weight": st.sampled_from((0.2, 1.0, 0.0)),
        "label_smoothing": st.sampled_from((0.0, 0.1, 0.9)),
        "z_loss": st.sampled_from((0.0, 1e-3, 0.1)),
        "upstream": st.sampled_from((1.0, 0.0078125, 1024.0, -3.0)),
        # Not 1: hundreds of float32 additions to dweight, one after the other, err by up to 1.2 times the bound.
        "rows_per_chunk": st.sampled_from((48, 24, 1000, 8, 4, 2)),
    }
    return st.builds(Draw, **{**fields, **{k: st.just(v) for k, v in fixed.items()}})


def bounded(impl: str, examples: dict[str, int] = EXAMPLES) -> Any:
    return settings(
        max_examples=examples[impl], deadline=None, derandomize=True, database=None,
        phases=(Phase.explicit, Phase.generate, Phase.shrink),
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )  # fmt: skip


def check(draw: Draw, *, impl: str, orders: int = 1) -> None:
    """Chunks of few rows are judged over four orders: torch multiplies up to 3 rows by another kernel than many."""
    scratch_bytes = draw.rows_per_chunk * draw.vocab_size * 4
    orders = 4 if impl == "chunked" and draw.rows_per_chunk < 24 else orders
    assert_parity(draw.case(), impl=impl, orders=orders, scratch_bytes=scratch_bytes)


@given(draws("chunked"))
@bounded("chunked")
def test_contract_on_random_draws_chunked(draw: Draw) -> None:
    check(draw, impl="chunked")


@given(draws("fused"))
@bounded("fused")
def test_contract_on_random_draws_fused(draw: Draw) -> None:
    check(draw, impl="fused")


@pytest.mark.slow
@given(draws("chunked"))
@bounded("chunked", MANY)
def test_contract_on_many_random_draws_chunked(draw: Draw) -> None:
    check(draw, impl="chunked", orders=4)


@pytest.mark.slow
@given(draws("fused"))
@bounded("fused", MANY)
@example(Draw(num_single=50, seed=2, lam=None, denominators=True, mixup_weight=1.0))
def test_contract_on_many_random_draws_fused(draw: Draw) -> None:
    check(draw, impl="fused", orders=4)


# Every option alone, and each two of them together.
FEATURES: dict[str, dict[str, Any]] = {
    "bias": {"bias": True},
    "softcap": {"softcap": 5.0},
    "scale": {"logit_scale": 0.3},
    "weights": {"weights": True},
    "denominators": {"denominators": True},
    "smoothing": {"label_smoothing": 0.2},
    "zloss": {"z_loss": 0.01},
    "ignored": {"ignored_every": 3},
    "plain": {"mixup_weight": 0.0},
}
GRID = (
    [()] + [names for size in (1, 2) for names in itertools.combinations(FEATURES, size)] + [tuple(FEATURES)]
)


@pytest.mark.parametrize("names", GRID, ids=lambda names: "+".join(names) or "none")
@pytest.mark.parametrize("impl", ["chunked", "fused"])
def test_contract_on_the_grid_of_options(impl: str, names: tuple[str, ...]) -> None:
    fields = {k: v for name in names for k, v in FEATURES[name].items()}
    for dtype in DTYPES[impl]:
        draw = Draw(vocab_size=67, width=24, lam=None, dtype=dtype, **fields)
        check(draw, impl=impl)


@pytest.mark.parametrize("schedule", [None, "recompute", "stored"], ids=["chunked", "recompute", "stored"])
def test_strong_smoothing_leaves_the_label_its_digits(schedule: str | None) -> None:
    """At its label a row of even logits has -(1 - e)(1 - 1/V): p - 1 + e - e/V would err by a rounding of 1."""
    torch.manual_seed(0)
    hidden, target = 0.01 * torch.randn(64, 64), torch.randint(0, 64, (64,))
    case = Case(hidden, torch.eye(64), target, torch.rand(24), None, {"label_smoothing": 0.999})
    case.options |= {"mixup_weight": 1e-6}
    assert_parity(case, impl="fused" if schedule else "chunked", schedule=schedule)


# --- identities, in float64 so that only a wrong formula can break them -------------------------------------------

exact = {"dtype": F64, "upstream": 1.0}


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-11)


@given(draws("chunked", **exact))
@bounded("fused")
def test_swapping_the_members_of_every_pair_changes_nothing(draw: Draw) -> None:
    """c and u are names: with rows swapped and lam become 1 - lam, the loss is the same and gradients follow rows."""
    case, m = draw.case(), draw.num_pairs
    lam = (case.lam * 256).round() / 256  # so that 1 - lam is exact
    order = torch.cat([torch.arange(m, 2 * m), torch.arange(m), torch.arange(2 * m, draw.num_rows)])
    options = dict(case.options)
    if "row_weight" in options:
        options["row_weight"] = options["row_weight"][order]
    one = run(Case(case.hidden, case.weight, case.target, lam, case.bias, case.options), impl="chunked")
    other = run(
        Case(case.hidden[order], case.weight, case.target[order], 1 - lam, case.bias, options), impl="chunked"
    )
    close(other["loss"], one["loss"])
    close(other["dweight"], one["dweight"])
    close(other["dhidden"], one["dhidden"][order])
    close(other["nll"], one["nll"][order])


@given(draws("chunked", **exact))
@bounded("fused")
def test_renaming_the_vocabulary_changes_nothing(draw: Draw) -> None:
    case = draw.case()
    order = torch.randperm(draw.vocab_size, generator=torch.Generator().manual_seed(draw.seed))
    target = torch.where(case.target >= 0, order.argsort()[case.target.clamp(min=0)], case.target)
    bias = None if case.bias is None else case.bias[order]
    one = run(case, impl="chunked")
    other = run(Case(case.hidden, case.weight[order], target, case.lam, bias, case.options), impl="chunked")
    close(other["loss"], one["loss"])
    close(other["dhidden"], one["dhidden"])
    close(other["dweight"], one["dweight"][order])


@given(draws("chunked", **exact, lam=1.0, mixup_weight=1.0))
@bounded("fused")
def test_lam_one_is_the_confident_rows_own_loss(draw: Draw) -> None:
    """At lam = 1 the mixture is the confident row: its cross-entropy is that row's, where both are supervised."""
    case, m = draw.case(), draw.num_pairs
    out = run(case, impl="chunked")
    supervised = (case.target[:m] >= 0) & (case.target[m : 2 * m] >= 0)
    close(out["mixup_nll"][supervised], out["nll"][:m][supervised])
    assert not out["mixup_nll"][~supervised].any()


@given(draws("chunked", **exact, bias=True, softcap=None, z_loss=0.0))
@bounded("fused")
def test_dbias_sums_to_zero(draw: Draw) -> None:
    """Softmax and every label distribution sum to 1, so a row's dlogits sum to 0, and so does their sum."""
    out = run(draw.case(), impl="chunked")
    close(out["dbias"].sum(), torch.zeros((), dtype=F64))


@given(draws("chunked", **exact), st.integers(1, 7))
@bounded("fused")
def test_micro_batches_with_common_denominators_add_up(draw: Draw, cut: int) -> None:
    """Unpaired rows cut anywhere: the two calls' losses and dweights sum to the one call's."""
    case, at = draw.case(), 2 * draw.num_pairs + cut
    common: dict[str, Any] = {"ntp_denominator": 17, "mixup_denominator": 5}
    options = {**case.options, **common}
    weights = options.pop("row_weight", torch.ones(draw.num_rows))
    parts = [(slice(0, at), case.lam), (slice(at, None), case.lam[:0])]
    losses, gradients = [], []
    for rows, lam in parts:
        if "pair_weight" in options:
            options["pair_weight"] = case.options["pair_weight"][: len(lam)]
        part = Case(case.hidden[rows], case.weight, case.target[rows], lam, case.bias, dict(options))
        out = run(part, impl="chunked", row_weight=weights[rows])
        losses.append(out["loss"])
        gradients.append(out["dweight"])
    whole = run(case, impl="chunked", **common)
    close(losses[0] + losses[1], whole["loss"])
    close(gradients[0] + gradients[1], whole["dweight"])


@given(draws("chunked", **exact), st.integers(-6, 6))
@bounded("fused")
def test_gradient_is_linear_in_the_upstream_gradient(draw: Draw, power: int) -> None:
    """Exactly so for a power of two."""
    case = draw.case()
    one = run(case, impl="chunked")
    case.upstream = 2.0**power
    many = run(case, impl="chunked")
    assert torch.equal(many["dhidden"], one["dhidden"] * 2.0**power)
    assert torch.equal(many["dweight"], one["dweight"] * 2.0**power)


def test_a_draw_prints_as_something_that_can_be_typed() -> None:
    draw = Draw(num_pairs=5, dtype=BF16)
    assert eval(repr(draw), {"Draw": Draw, "torch": torch}) == draw
    assert sftmix_loss(
        *(getattr(draw.case(), k) for k in ("hidden", "weight", "target", "lam"))
    ).loss.isfinite()

"""The kernels of [N]-sized numbers say what terms.py and row_terms.py say in torch of float64, to one rounding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from sftmix_kernels import terms
from sftmix_kernels.call import Call, Coefficients, Kept, Statistics
from sftmix_kernels.fused import row_terms, rows
from tests.kernels.fused_calls import plain_call

V, INF, ONE_ROUNDING = 11, float("inf"), 2.0**-23
OPTIONS: list[dict[str, Any]] = [
    {},
    {"label_smoothing": 0.1, "z_loss": 1e-3, "logit_scale": 0.7},
    {"label_smoothing": 1.0},
    {"token_scaling": 1, "z_loss": 0.1},
    {"mixup_weight": 0.3, "ntp_denominator": 7.0, "mixup_denominator": 0.3, "predicted": True},
    {"ntp_denominator": 0.0, "mixup_denominator": 0.0},
]
options = pytest.mark.parametrize("options", OPTIONS, ids=str)
sizes = pytest.mark.parametrize(
    "num_rows,num_pairs", [(0, 0), (1, 0), (2, 1), (9, 3), (5000, 0), (9001, 4500)]
)


def call_of(num_rows: int, num_pairs: int, *, dtype: torch.dtype = torch.float32, **options: Any) -> Call:
    target = torch.randint(0, V, (num_rows,))
    target[torch.rand(num_rows) < 0.2] = -100
    if options.get("ntp_denominator") == 0.0:
        target[:] = -100
    lam = torch.rand(num_pairs)
    lam[::3] = torch.tensor([0.0, 1.0])[torch.randint(0, 2, lam[::3].shape)]
    hidden, weight = torch.randn(num_rows, 4, dtype=dtype), torch.randn(V, 4, dtype=dtype)
    return plain_call(hidden, weight, lam, target=target, **options)


def statistics_of(call: Call, column: Tensor) -> Statistics:
    """Plausible numbers: -log p from 1e-8 to infinite, a lse of either sign; NaN at ignored rows' lse."""
    num_rows, _, num_pairs = call.sizes
    nll = torch.rand(num_rows) * 10 ** torch.randint(-8, 2, (num_rows,)).float()
    nll[torch.rand(num_rows) < 0.05] = INF
    nll[column < 0] = 0
    lse, low = torch.randn(num_rows) * 10, torch.randn(num_rows) * 1e-6
    lse[column < 0] = float("nan")
    top, at = torch.randn(num_rows), torch.randn(num_rows)
    at[::2] = top[::2]
    x = torch.rand(2, num_pairs) * 10 ** torch.randint(-8, 2, (2, num_pairs)).float()
    x[:, (call.lam == 0) | (call.lam == 1)] = INF  # the member without a share; the other's too
    pair_carry = torch.cat([torch.randn(2, num_pairs) * torch.tensor([[10.0], [1e-6]]), x])
    mean = torch.randn(num_rows) if call.options.label_smoothing else torch.empty(0)
    predicted = torch.randint(0, V, (num_rows if call.wanted.predicted else 0,))
    return Statistics(
        top, at, mean, torch.empty(0), predicted, torch.empty(0, 0), torch.zeros(2, num_pairs),
        torch.stack([lse, low, nll]), pair_carry,
    )  # fmt: skip


def doubled(found: Any) -> Any:
    return type(found)(*(t.double() if t.is_floating_point() else t for t in found))


def same(got: tuple[Any, ...], want: tuple[Any, ...], rtol: float) -> None:
    for one, other in zip(got, want, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert one.shape == other.shape
            torch.testing.assert_close(one, other.to(one.dtype), rtol=rtol, atol=0, equal_nan=True)


def weighted(call: Call, kind: str) -> Call:
    """``kind``: the weights' dtype, and that of the numbers that stand in tensors; "" for none."""
    if not kind:
        return call
    dtype, (num_rows, _, num_pairs) = getattr(torch, kind), call.sizes
    numbers = {name: torch.tensor(2, dtype=torch.int64 if dtype == torch.bool else dtype) for name in (
        "mixup_weight", "ntp_denominator", "mixup_denominator")}  # fmt: skip
    return call._replace(
        row_weight=(torch.rand(2 * num_rows) * 3).to(dtype)[::2], pair_weight=(torch.rand(num_pairs) * 3).to(dtype),
        **numbers,
    )  # fmt: skip


@sizes
@options
@pytest.mark.parametrize("kind", ["", "float32", "float64", "bool", "int64", "uint8"])
def test_coefficients(num_rows: int, num_pairs: int, options: dict[str, Any], kind: str) -> None:
    if "mixup_weight" in options and kind:
        options = {"predicted": True}
    call = weighted(call_of(num_rows, num_pairs, **options), kind)
    same(rows.coefficients(call), terms.coefficients(call), 0)


@sizes
@options
def test_finish(num_rows: int, num_pairs: int, options: dict[str, Any]) -> None:
    call = call_of(num_rows, num_pairs, **options)
    coef = terms.coefficients(call)
    found = statistics_of(call, coef.column)
    found.row_carry[2][coef.row != 0] = found.row_carry[2][coef.row != 0].clamp(max=50)  # a finite loss
    got, want = (
        rows.finish(call, coef, found),
        terms.finish(call._replace(lam=call.lam.double()), coef, doubled(found)),
    )
    assert [t.dtype for t in got] == [t.dtype for t in terms.finish(call, coef, found)]
    same(got, want, ONE_ROUNDING)
    if not call.options.label_smoothing and not call.options.z_loss:
        same(got[1:8], want[1:8], 0)  # nothing is computed here


def gradients_of(
    call: Call, term: Tensor | None, loss: Tensor | None
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """(row, pair, planes, scale, living rows) by the kernels and by torch."""
    coef = terms.coefficients(call)
    found = statistics_of(call, coef.column)
    kept, nll = Kept(found.row_carry, found.pair_carry, found.entropy), found.row_carry[2]
    grads = (loss, term, None, None, None)
    results = []
    for upstream_of in (rows.upstream_of, terms.upstream_of):
        results.append(upstream_of(call, coef, nll, grads))
    living, planes = rows.living_terms(call, coef.column, kept, results[1])
    dead = row_terms.dead_rows(call, results[1])
    wide = row_terms.living(call._replace(lam=call.lam.double()), dead)
    want = row_terms.gradient_terms(wide, coef.column, doubled(kept), results[1])
    got = (*results[0][:2], planes.rows, planes.pairs, planes.scale, living.hidden)
    return got, (*results[1][:2], *want[:3], row_terms.living(call, dead).hidden)


@pytest.mark.parametrize("num_rows,num_pairs", [(1, 0), (2, 1), (9, 3), (5000, 0), (9001, 4500)])
@options
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("upstream", ["loss", "term", "both", "zero", "none"])
def test_gradient_terms(
    num_rows: int, num_pairs: int, options: dict[str, Any], dtype: torch.dtype, upstream: str
) -> None:
    call = call_of(num_rows, num_pairs, dtype=dtype, **options)
    call.hidden[call.target == -100] = float("nan")
    loss = torch.tensor(0.0 if upstream == "zero" else 0.37) if upstream in ("loss", "both", "zero") else None
    term = torch.ones(()).expand(num_rows) * 2 if upstream == "both" else None
    if upstream == "term":
        term = torch.randn(2 * num_rows)[::2]
    got, want = gradients_of(call, term, loss)
    same(got, want, ONE_ROUNDING)


BAD: list[tuple[str, Any]] = [
    ("target", torch.tensor([0, V, 1, 2])), ("target", torch.tensor([-1, 3, 1, 2])), ("lam", torch.tensor([1.5])),
    ("lam", torch.tensor([-0.1])), ("lam", torch.tensor([float("nan")])), ("row_weight", torch.tensor([1, 1, INF, 1])),
    ("row_weight", torch.tensor([float("nan"), 1, 1, 1])), ("pair_weight", torch.tensor([-INF])),
    ("mixup_weight", torch.tensor(-1.0)), ("mixup_weight", torch.tensor(float("nan"))),
    ("ntp_denominator", torch.tensor(0)), ("ntp_denominator", torch.tensor(INF)), ("ntp_denominator", 0.0),
    ("mixup_denominator", torch.tensor(0.0)), ("mixup_denominator", torch.tensor(-2)), ("mixup_denominator", 0.0),
]  # fmt: skip


@pytest.mark.parametrize("name,value", [("none", 0), *BAD], ids=lambda v: str(v))
def test_wrong_values_raise_where_the_kernel_reads_them(
    monkeypatch: pytest.MonkeyPatch, name: str, value: Any
) -> None:
    """As on a GPU: nothing is read before, and one assertion names the arguments."""
    given: dict[str, Any] = {"target": torch.tensor([0, 4, -100, 2]), "row_weight": torch.ones(4)}
    call = plain_call(torch.randn(4, 4), torch.randn(V, 4), torch.tensor([0.5]), **given)
    if isinstance(value, Tensor):
        call = call._replace(**{name: value})
    elif name != "none":
        call = call._replace(numbers=list(call.options._replace(**{name: value})))
    monkeypatch.setattr(rows, "left_to_kernels", lambda *_, **__: True)
    if name == "none":
        assert isinstance(rows.coefficients(call), Coefficients)
        return
    with pytest.raises(RuntimeError, match=f"{name}.* expected class indices"):
        rows.coefficients(call)

"""The work: matrix products counted one by one, in units of one product of all rows with the weight (N·V·D).

    forward      1 unit: the logits
    backward     1 unit for each of dhidden and dweight that is needed, none for dbias
                 and 1 more where logits are made again: `recompute`, and any schedule but `stored` that adds to a main
                 gradient or has reduction="none"

Pairs cost nothing: three losses come from the products of one.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sftmix_kernels import linear_cross_entropy, sftmix_loss, token_stats
from tests.kernels.watching import Products
from tests.parity import Case, make_case

# Every size fills whole tiles of the interpreter's kernels, pairs and unpaired rows alike.
N, V, D, M = 64, 64, 32, 16
SCHEDULES = [("chunked", None), ("fused", "recompute"), ("fused", "stored")]
schedules = pytest.mark.parametrize("impl,schedule", SCHEDULES, ids=["chunked", "recompute", "stored"])
needs_interpreter = pytest.mark.skipif(torch.cuda.is_available(), reason="counts in Triton's interpreter")
# Two chunks of pairs and more, two slices of the vocabulary: a product in pieces is still one product.
SCRATCH = 16 * V * 2


def units(products: Products) -> float:
    return products.multiply_adds / (N * V * D)


def expected(schedule: str | None, gradients: int, *, trained: bool = True) -> tuple[int, int]:
    """Units of forward and backward when ``gradients`` of dhidden and dweight are needed."""
    if not trained:
        return 1, 0
    return (1, 1 + gradients) if schedule == "recompute" else (1 + gradients, 0)


def leaves(case: Case, trained: str) -> tuple[Tensor, Tensor, Tensor]:
    """hidden, weight and bias; those whose first letter is in ``trained`` require a gradient."""
    assert case.bias is not None
    hidden, weight, bias = (t.detach() for t in (case.hidden, case.weight, case.bias))
    hidden.requires_grad_("h" in trained)
    weight.requires_grad_("w" in trained)
    bias.requires_grad_("b" in trained)
    return hidden, weight, bias


def count(monkeypatch: pytest.MonkeyPatch, loss: Callable[[], Tensor]) -> tuple[float, float]:
    """Units of the forward, and of the backward where there is one."""
    with Products(monkeypatch) as products:
        value = loss()
        forward = units(products)
        if value.requires_grad:
            value.backward(torch.full_like(value, 0.5))
    return forward, units(products) - forward


@needs_interpreter
@schedules
@pytest.mark.parametrize("num_pairs", [0, M], ids=["next-token", "pairs"])
@pytest.mark.parametrize("trained", ["hwb", "h", "w", "b", "wb", ""], ids=lambda t: t or "frozen")
def test_products(
    monkeypatch: pytest.MonkeyPatch, impl: str, schedule: str | None, num_pairs: int, trained: str
) -> None:
    """Each gradient that is not needed saves its product, whatever the pairs."""
    case = make_case(N, V, D, num_pairs=num_pairs, dtype=torch.float16, bias=True)
    hidden, weight, bias = leaves(case, trained)

    options = {"bias": bias, "impl": impl, "schedule": schedule, "scratch_bytes": SCRATCH}

    def loss() -> Tensor:
        return sftmix_loss(hidden, weight, case.target, case.lam, **options).loss

    gradients = ("h" in trained) + ("w" in trained)
    assert count(monkeypatch, loss) == expected(schedule, gradients, trained=bool(trained))
    assert [t.grad is not None for t in (hidden, weight, bias)] == [name in trained for name in "hwb"]


@needs_interpreter
@schedules
@pytest.mark.parametrize("trained", ["hwb", "w"])
def test_products_into_a_main_gradient(
    monkeypatch: pytest.MonkeyPatch, impl: str, schedule: str | None, trained: str
) -> None:
    """`chunked` makes the logits again in the backward, as `recompute` does: it keeps no dweight."""
    case = make_case(N, V, D, num_pairs=M, bias=True)
    hidden, weight, bias = leaves(case, trained)
    options = {"bias": bias, "impl": impl, "schedule": schedule, "scratch_bytes": SCRATCH}
    main_grad = torch.zeros(V, D)
    work = count(
        monkeypatch,
        lambda: sftmix_loss(hidden, weight, case.target, case.lam, main_grad=main_grad, **options).loss,
    )
    assert work == expected("stored" if schedule == "stored" else "recompute", len(set(trained) & {"h", "w"}))
    assert main_grad.any()


@needs_interpreter
@schedules
def test_products_without_autograd(monkeypatch: pytest.MonkeyPatch, impl: str, schedule: str | None) -> None:
    """Under no_grad trained inputs cost what frozen ones do."""
    case = make_case(N, V, D, num_pairs=M, bias=True)
    hidden, weight, bias = leaves(case, "hwb")
    options = {"bias": bias, "impl": impl, "schedule": schedule, "scratch_bytes": SCRATCH}
    with torch.no_grad(), Products(monkeypatch) as products:
        sftmix_loss(hidden, weight, case.target, case.lam, **options)
    assert units(products) == 1


@needs_interpreter
@pytest.mark.parametrize("impl", ["chunked", "fused"])
@pytest.mark.parametrize("trained", ["hwb", "h", "w", "b"])
def test_products_of_reduction_none(monkeypatch: pytest.MonkeyPatch, impl: str, trained: str) -> None:
    """Four units for both gradients: no upstream is known in the forward, so logits are made again."""
    case = make_case(N, V, D, bias=True)
    hidden, weight, bias = leaves(case, trained)
    work = count(
        monkeypatch,
        lambda: linear_cross_entropy(
            hidden, weight, case.target, bias=bias, impl=impl, reduction="none", scratch_bytes=SCRATCH
        ),
    )
    assert work == (1, 1 + ("h" in trained) + ("w" in trained))


@needs_interpreter
@pytest.mark.parametrize("impl", ["chunked", "fused"])
def test_products_of_the_statistics(monkeypatch: pytest.MonkeyPatch, impl: str) -> None:
    case = make_case(N, V, D, bias=True)
    hidden, weight, bias = leaves(case, "hwb")
    with Products(monkeypatch) as products:
        token_stats(hidden, weight, case.target, bias=bias, impl=impl, scratch_bytes=SCRATCH)
    assert units(products) == 1


@needs_interpreter
def test_the_reference_multiplies_mixed_rows_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the schedules above save: 3 units of N rows and 3 of M mixed rows."""
    case = make_case(N, V, D, num_pairs=M, bias=True)
    hidden, weight, bias = leaves(case, "hwb")
    work = count(
        monkeypatch,
        lambda: sftmix_loss(hidden, weight, case.target, case.lam, bias=bias, impl="reference").loss,
    )
    assert work == (1 + M / N, 2 + 2 * M / N)

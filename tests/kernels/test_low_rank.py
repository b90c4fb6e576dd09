"""Low-rank factors beside the weight, not in a copy of it: parity, memory and products of every implementation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sftmix_kernels import linear_cross_entropy, operators, sftmix_loss, token_stats
from sftmix_kernels.call import DIFFERENTIABLE
from tests.kernels.calls import call_of
from tests.parity import Case, assert_within_contract, expected_loss_error, make_case

SCALING = 0.5
NAMES = ("hidden", "weight", "bias", "down", "up")
IMPLEMENTATIONS: dict[str, dict[str, Any]] = {
    "reference": {"impl": "reference"},
    "chunked": {"impl": "chunked"},
    "recompute": {"impl": "fused"},
    "stored": {"impl": "fused", "schedule": "stored"},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias, cap, scale": {"bias": True, "softcap": 4.0, "logit_scale": 0.7},
    "smoothing, z-loss": {"label_smoothing": 0.1, "z_loss": 0.01},
}
implementations = pytest.mark.parametrize("name", IMPLEMENTATIONS)


def inputs(case: Case, rank: int, dtype: torch.dtype | None = None) -> dict[str, Tensor | None]:
    """hidden, weight, bias and both factors as leaves that want gradients."""
    g = torch.Generator().manual_seed(1)
    (vocab_size, width), own = case.weight.shape, case.weight.dtype
    down = torch.randn(rank, width, generator=g) / width**0.5
    up = torch.randn(vocab_size, rank, generator=g) / rank**0.5
    found = (case.hidden, case.weight, case.bias, down.to(own), up.to(own))
    leaves = (None if t is None else t.to(dtype or own).clone().requires_grad_() for t in found)
    return dict(zip(NAMES, leaves, strict=True))


def run(case: Case, rank: int, dtype: torch.dtype | None = None, **options: Any) -> dict[str, Tensor]:
    """Value, statistics and the gradient of every input."""
    t: Any = inputs(case, rank, dtype)
    out = sftmix_loss(
        t["hidden"], t["weight"], case.target, case.lam, bias=t["bias"], lora=(t["down"], t["up"], SCALING),
        **case.options, **options,
    )  # fmt: skip
    out.loss.backward(torch.full_like(out.loss, case.upstream))
    gradients = {f"d{name}": leaf.grad for name, leaf in t.items() if leaf is not None}
    return {
        name: value.detach() for name, value in {**out._asdict(), **gradients}.items() if value is not None
    }


def check(case: Case, rank: int, **options: Any) -> None:
    truth = run(case, rank, torch.float64, impl="reference")
    same_dtype = run(case, rank, impl="reference")
    same_dtype["loss"] = truth["loss"] + expected_loss_error(same_dtype, truth)
    ours = run(case, rank, **options)
    assert ours.keys() == truth.keys()
    for name in ours.keys() - {"is_top1"}:
        assert_within_contract(name, ours[name], same_dtype[name], truth[name])


@implementations
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("rank, num_pairs", [(3, 14), (20, 14), (16, 0), (70, 17)])
def test_parity(name: str, options: str, rank: int, num_pairs: int) -> None:
    """Ranks below, above and of a step of the kernels' second loop, and past its longest; pairs, rows, both."""
    case = make_case(
        34, 53, 24, num_pairs=num_pairs, ignored=(2, 33), upstream=2.0, scratch_bytes=53 * 4 * 16, **OPTIONS[options]
    )  # fmt: skip
    if name == "reference":
        del case.options["scratch_bytes"]
    check(case, rank, **IMPLEMENTATIONS[name])


@pytest.mark.parametrize("name", ["chunked", "recompute", "stored"])
def test_parity_over_slices_and_chunks(name: str) -> None:
    """Three slices of the vocabulary, several chunks of rows: what is summed over them and what is written once."""
    case = make_case(34, 1100, 24, num_pairs=14, bias=True, scratch_bytes=1100 * 4 * 16)
    check(case, 20, **IMPLEMENTATIONS[name])


@pytest.mark.parametrize("name", ["chunked", "recompute", "stored"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("num_pairs", [0, 20])
def test_parity_in_16_bits(name: str, dtype: torch.dtype, num_pairs: int) -> None:
    case = make_case(48, 61, 40, num_pairs=num_pairs, dtype=dtype, bias=True, ignored=(1,))
    check(case, 20, **IMPLEMENTATIONS[name])


@implementations
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_linear_cross_entropy_takes_the_factors(name: str, reduction: str) -> None:
    """Value and gradients are those of the summed weight, with an upstream gradient of its own for each row."""
    if reduction == "none" and name == "stored":
        return  # refused: test_stored.py
    case = make_case(15, 29, 12, ignored=(3,), label_smoothing=0.1, softcap=5.0)
    upstream = torch.linspace(-1, 2, 15) if reduction == "none" else torch.tensor(3.0)
    found: list[dict[str, Tensor]] = []
    for summed in (False, True):
        t: Any = inputs(case, 3, torch.float64 if summed else None)
        weight = t["weight"] + SCALING * t["up"] @ t["down"] if summed else t["weight"]
        how = (
            {"impl": "reference"}
            if summed
            else {"lora": (t["down"], t["up"], SCALING), **IMPLEMENTATIONS[name]}
        )
        loss = linear_cross_entropy(
            t["hidden"], weight, case.target, reduction=reduction, **case.options, **how
        )
        loss.backward(upstream.to(loss.dtype))
        found.append({"loss": loss.detach(), **{k: v.grad for k, v in t.items() if v is not None}})
    for key, value in found[0].items():
        torch.testing.assert_close(value.double(), found[1][key], rtol=2e-5, atol=2e-6, msg=key)


@implementations
def test_statistics_take_the_factors(name: str) -> None:
    if name == "stored":
        return  # a schedule of gradients
    case = make_case(15, 29, 12, ignored=(3,))
    t: Any = {k: v if v is None else v.detach() for k, v in inputs(case, 20).items()}
    lora = (t["down"], t["up"], SCALING)
    found = token_stats(t["hidden"], t["weight"], case.target, lora=lora, **IMPLEMENTATIONS[name])
    summed = t["weight"].double() + SCALING * t["up"].double() @ t["down"].double()
    expected = token_stats(t["hidden"].double(), summed, case.target, impl="reference")
    for field, value in expected._asdict().items():
        if value is not None:
            torch.testing.assert_close(
                getattr(found, field).to(value.dtype), value, rtol=1e-5, atol=1e-5, msg=field
            )


# --- memory and products --------------------------------------------------------------------------------------------


class Watch(TorchDispatchMode):
    """Runs operators by their bodies; keeps the elements of every new storage and the shape of every product."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.known = {t.untyped_storage().data_ptr() for t in known}
        self.elements: list[int] = []
        self.products: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        own = OPDEFS.get(func.name().split(".")[0])
        if own is None:
            out = func(*args, **kwargs)
        else:
            with self:
                out = own._init_fn(*args, **kwargs)
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in self.known:
                self.elements.append(t.untyped_storage().nbytes() // t.element_size())
        if func.name().split("::")[1].split(".")[0].rstrip("_") in ("mm", "addmm"):
            self.products.append(tuple(out.shape))
        return out


N, V, D, R = 24, 400, 128, 5


def watch(name: str, frozen: tuple[str, ...]) -> Watch:
    """Forward and backward of one call; its chunk or slice is a tenth of V D elements."""
    case = make_case(N, V, D, num_pairs=8)
    t: Any = inputs(case, R)
    for key in frozen:
        t[key].requires_grad_(False)
    tensors = [v for v in t.values() if v is not None]
    with Watch(tensors) as seen:
        out = sftmix_loss(
            t["hidden"], t["weight"], case.target, case.lam, lora=(t["down"], t["up"], SCALING),
            scratch_bytes=V * D // 10 * 4, **IMPLEMENTATIONS[name],
        )  # fmt: skip
        out.loss.backward()
    assert all((v.grad is None) == (key in frozen) for key, v in t.items() if v is not None)
    assert seen.products, "no product seen"
    return seen


@pytest.mark.parametrize("name", ["chunked", "recompute", "stored"])
def test_nothing_of_the_weights_size_is_made_beside_a_frozen_weight(name: str) -> None:
    """Not a copy of it, not a gradient; with a trained weight its gradient is, which shows that the watch sees."""
    assert max(watch(name, ("weight",)).elements) < V * D
    assert max(watch(name, ()).elements) >= V * D


@pytest.mark.parametrize("name", ["chunked", "recompute", "stored"])
def test_products_without_a_taker_are_not_made(name: str) -> None:
    """Of a frozen weight, of hidden states that want no gradient, of a factor that is not trained."""

    def made(*frozen: str) -> set[str]:
        """The gradients that products are made for; A's own comes from the small product outside."""
        shapes = [s for s in watch(name, frozen).products if s[1] in (D, R) and s != (R, D)]
        shapes.remove((N, R))  # s A h itself
        wide = {D: ("dhidden", "dweight"), R: ("dlow", "dup")}
        return {wide[columns][rows > N] for rows, columns in shapes}

    everything = {"dhidden", "dweight", "dlow", "dup"}
    assert made() == everything
    assert made("weight") == everything - {"dweight"}
    assert made("weight", "up") == everything - {"dweight", "dup"}
    assert made("weight", "hidden") == {"dlow", "dup"}
    assert made("weight", "hidden", "down") == {"dup"}


# --- operators ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("needs", [(True,) * 5, (True, False, False, True, True), (False,) * 5], ids=str)
def test_opcheck_with_factors(needs: tuple[bool, ...]) -> None:
    case = make_case(20, 33, 16, num_pairs=6, bias=True)
    factors = torch.randn(20, 5), torch.randn(33, 5)
    for impl in ("chunked", "fused"):
        call = call_of(case, needs=needs, factors=factors, impl=impl)
        for op in (operators.terms_fwd, operators.made_fwd):
            torch.library.opcheck(op, tuple(call), atol=1e-3, rtol=1e-3)
        with torch.no_grad():
            kept = operators.terms_fwd(*call)[operators.NUM_TERMS :]
        plain = call._replace(**{name: getattr(call, name).detach() for name in DIFFERENTIABLE})
        torch.library.opcheck(operators.terms_bwd, (torch.tensor(2.0), *(None,) * 4, *plain, *kept))

"""Forward-mode and functional derivatives: the right value, or an error that names what has it. Never a silent zero."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor

from sftmix_kernels import linear_cross_entropy, sftmix_loss, token_stats
from tests.kernels.ways import WAYS
from tests.parity import Case, make_case

Function = Callable[[Tensor, Tensor], Tensor]  # of hidden and weight
NAMED = r"impl=['\"]reference['\"]"


def small_case() -> Case:
    return make_case(7, 11, 6, num_pairs=2, ignored=(4,))


def losses(case: Case, way: dict[str, Any]) -> dict[str, Function]:
    """Scalars of hidden and weight by the three public functions."""
    rows = {"impl": way["impl"], "reduction": "none"}
    upstream = torch.linspace(-1, 2, 7)
    return {
        "mean": lambda h, w: linear_cross_entropy(h, w, case.target, **way),
        "rows": lambda h, w: (linear_cross_entropy(h, w, case.target, **rows) * upstream).sum(),
        "pairs": lambda h, w: sftmix_loss(h, w, case.target, case.lam, **way).loss,
        "entropy": lambda h, w: (
            token_stats(h, w, case.target, differentiable=True, impl=way["impl"]).entropy * upstream
        ).sum(),
    }


def logits_of(case: Case) -> dict[str, Function]:
    """The same four in plain torch, without this package."""
    upstream, lam, y = torch.linspace(-1, 2, 7), case.lam[:, None], case.target

    def pairs(h: Tensor, w: Tensor) -> Tensor:
        mixed = F.linear(lam * h[:2] + (1 - lam) * h[2:4], w)
        soft = lam * F.one_hot(y[:2], 11) + (1 - lam) * F.one_hot(y[2:4], 11)
        return F.cross_entropy(F.linear(h, w), y) + torch.tensor(0.2) * F.cross_entropy(mixed, soft)

    def entropy(h: Tensor, w: Tensor) -> Tensor:
        logprobs = F.linear(h, w).log_softmax(1)
        return (-(logprobs.exp() * logprobs).sum(1) * upstream).sum()

    return {
        "mean": lambda h, w: F.cross_entropy(F.linear(h, w), y),
        "rows": lambda h, w: (F.cross_entropy(F.linear(h, w), y, reduction="none") * upstream).sum(),
        "pairs": pairs,
        "entropy": entropy,
    }


def by_jvp(f: Function, h: Tensor, w: Tensor, dh: Tensor, dw: Tensor) -> Any:
    return torch.func.jvp(f, (h, w), (dh, dw))[1]


def by_jvp_of_hidden(f: Function, h: Tensor, w: Tensor, dh: Tensor, dw: Tensor) -> Any:
    return torch.func.jvp(lambda x: f(x, w), (h,), (dh,))[1]


def by_jvp_of_weight(f: Function, h: Tensor, w: Tensor, dh: Tensor, dw: Tensor) -> Any:
    return torch.func.jvp(lambda x: f(h, x), (w,), (dw,))[1]


def by_forward_ad(f: Function, h: Tensor, w: Tensor, dh: Tensor, dw: Tensor) -> Any:
    with forward_ad.dual_level():
        value = f(forward_ad.make_dual(h, dh), forward_ad.make_dual(w, dw))
        return forward_ad.unpack_dual(value).tangent


def by_forward_ad_while_training(f: Function, h: Tensor, w: Tensor, dh: Tensor, dw: Tensor) -> Any:
    with forward_ad.dual_level():
        value = f(forward_ad.make_dual(h.clone().requires_grad_(), dh), w.clone().requires_grad_())
        return forward_ad.unpack_dual(value).tangent


def by_func_grad(f: Function, h: Tensor, w: Tensor, dh: Tensor, dw: Tensor) -> Any:
    return torch.func.grad(f, argnums=(0, 1))(h, w)


def by_vjp(f: Function, h: Tensor, w: Tensor, dh: Tensor, dw: Tensor) -> Any:
    return torch.func.vjp(f, h, w)[1](torch.tensor(2.0))


def by_jacrev(f: Function, h: Tensor, w: Tensor, dh: Tensor, dw: Tensor) -> Any:
    return torch.func.jacrev(f, argnums=(0, 1))(h, w)


def by_functional_jvp(f: Function, h: Tensor, w: Tensor, dh: Tensor, dw: Tensor) -> Any:
    return torch.autograd.functional.jvp(f, (h, w), (dh, dw))[1]


def by_hessian(f: Function, h: Tensor, w: Tensor, dh: Tensor, dw: Tensor) -> Any:
    return torch.autograd.functional.hessian(lambda x: f(x, w), h)


def by_hvp(f: Function, h: Tensor, w: Tensor, dh: Tensor, dw: Tensor) -> Any:
    return torch.autograd.functional.hvp(lambda x: f(h, x), w, dw)[1]


def by_func_hessian(f: Function, h: Tensor, w: Tensor, dh: Tensor, dw: Tensor) -> Any:
    return torch.func.hessian(lambda x: f(h, x))(w)


DERIVATIVES = [
    by_jvp, by_jvp_of_hidden, by_jvp_of_weight, by_forward_ad, by_forward_ad_while_training, by_func_grad, by_vjp,
    by_jacrev, by_functional_jvp, by_hessian, by_hvp, by_func_hessian,
]  # fmt: skip


def value_or_refusal(call: Callable[[], Any]) -> Any:
    """What ``call`` returns, or the text of its error."""
    try:
        return call()
    except (ValueError, RuntimeError, NotImplementedError) as error:
        return str(error)


# Rows and statistics have no schedule to choose.
CASES = [(loss, name) for loss in ("mean", "pairs") for name in WAYS]
CASES += [(loss, name) for loss in ("rows", "entropy") for name in ("reference", "chunked", "recompute")]


@pytest.mark.parametrize("loss,name", CASES, ids=["-".join(case) for case in CASES])
@pytest.mark.parametrize("derivative", DERIVATIVES, ids=lambda f: f.__name__)
def test_right_or_refused_by_name(name: str, derivative: Callable[..., Any], loss: str) -> None:
    case, way = small_case(), WAYS[name]
    arguments = (case.hidden, case.weight, torch.randn(7, 6), torch.randn(11, 6))
    expected = derivative(logits_of(case)[loss], *arguments)
    found = value_or_refusal(lambda: derivative(losses(case, way)[loss], *arguments))
    if isinstance(found, str):
        assert name != "reference", f"refused: {found}"
        assert re.search(NAMED, found), f"it does not say what works: {found}"
        return
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert any(part.any() for part in (found if isinstance(found, tuple) else (found,)))

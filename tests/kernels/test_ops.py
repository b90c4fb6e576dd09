"""The custom operators: opcheck, compile, double backward, memory."""

from __future__ import annotations

import hashlib
import shutil
from typing import Any

import pytest
import torch
import torch._dynamo.testing

from sftmix_kernels import linear_cross_entropy, operators, sftmix_loss, token_stats
from sftmix_kernels.call import NAMESPACE
from tests.kernels.calls import call_of, made_gradients
from tests.parity import make_case

# Inductor needs a C++ compiler for CPU code; without one the same graph runs through aot_eager.
NO_COMPILER = not (shutil.which("g++") or shutil.which("clang++"))
SKIP = pytest.mark.skipif(NO_COMPILER, reason="no C++ compiler: compiled by aot_eager only")
BACKENDS = ["aot_eager", pytest.param("inductor", marks=SKIP)]


@pytest.mark.parametrize("impl", ["chunked", "fused"])
@pytest.mark.parametrize("needs", [(True, True, True), (True, False, False), (False, False, False)], ids=str)
def test_opcheck_of_the_forwards(impl: str, needs: tuple[bool, bool, bool]) -> None:
    case = make_case(20, 33, 16, num_pairs=6, bias=True)
    for op in (operators.terms_fwd, operators.made_fwd):
        torch.library.opcheck(op, tuple(call_of(case, needs=needs, impl=impl)))
    torch.library.opcheck(operators.terms_fwd, tuple(call_of(case, needs=needs, impl=impl, entropy=True)))


@pytest.mark.parametrize("impl", ["chunked", "fused"])
def test_opcheck_of_the_backwards(impl: str) -> None:
    case = make_case(20, 33, 16, num_pairs=6, bias=True)
    call = call_of(case, impl=impl)
    with torch.no_grad():
        kept = operators.terms_fwd(*call)[operators.NUM_TERMS :]
    upstream = (torch.tensor(2.0), torch.rand(20), None, None, None)
    plain = call._replace(**{name: getattr(call, name).detach() for name in ("hidden", "weight", "bias")})
    torch.library.opcheck(operators.terms_bwd, (*upstream, *plain, *kept))
    into = plain._replace(main_grad=torch.zeros(33, 16))
    torch.library.opcheck(operators.terms_bwd_into, (*upstream, *into, *kept))
    made = made_gradients(call)
    torch.library.opcheck(operators.made_bwd, (torch.tensor(2.0), *made, torch.float32, impl))
    into = (torch.tensor(2.0), *made, torch.zeros(33, 16), torch.float32, impl)
    torch.library.opcheck(operators.made_bwd_into, into)


def operator_names() -> list[str]:
    names = torch._C._dispatch_get_all_op_names()
    return sorted(name for name in names if name.startswith("sftmix_kernels"))


def test_operators_that_change_take_another_namespace() -> None:
    """torch's kept graphs go by name: one of the release before would be run with operators it was not made for.

    Whoever changes this fingerprint of the schemas raises the number in NAMESPACE, too.
    """
    schemas = [str(torch._C._get_schema(name, "")) for name in operator_names()]
    fingerprint = hashlib.sha256("".join(schemas).encode()).hexdigest()[:12]
    assert (NAMESPACE, fingerprint) == ("sftmix_kernels_2", "4e65b2c1882e")


def test_there_are_at_most_eight_operators() -> None:
    names = operator_names()
    assert len(names) <= 8 and f"{NAMESPACE}::terms_fwd" in names


@pytest.mark.parametrize("impl", ["chunked", "fused"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_function_is_one_graph_and_bitwise_equal(impl: str, backend: str) -> None:
    case = make_case(20, 33, 16, num_pairs=6, bias=True, ignored=(3,))

    def step(hidden: torch.Tensor, weight: torch.Tensor, denominator: torch.Tensor) -> Any:
        out = sftmix_loss(
            hidden * 2, weight, case.target, case.lam, bias=case.bias, ntp_denominator=denominator, impl=impl
        )
        stats = token_stats(hidden, weight, case.target, impl=impl)
        return out.loss * 3, out.nll, out.is_top1, out.mixup_nll, stats.entropy

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    results = []
    for function in (step, compiled):
        hidden, weight = (t.detach().clone().requires_grad_() for t in (case.hidden, case.weight))
        out = function(hidden, weight, torch.tensor(12))
        out[0].backward()
        results.append((*out, hidden.grad, weight.grad))
    for eager, other in zip(*results, strict=True):
        assert torch.equal(eager, other)


def test_a_changing_denominator_does_not_recompile() -> None:
    case = make_case(20, 33, 16, num_pairs=6)
    counter = torch._dynamo.testing.CompileCounter()
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend=counter)
    def loss(denominator: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return sftmix_loss(
            case.hidden, case.weight, case.target, case.lam, ntp_denominator=denominator, mixup_weight=weight
        ).loss

    values = [loss(torch.tensor(n), torch.tensor(0.1 * n)).item() for n in range(1, 6)]
    assert counter.frame_count == 1 and len(set(values)) == 5


@pytest.mark.parametrize("impl", ["chunked", "fused"])
def test_double_backward_is_refused(impl: str) -> None:
    case = make_case(8, 9, 4, num_pairs=2)
    hidden = case.hidden.requires_grad_()
    loss = sftmix_loss(hidden, case.weight, case.target, case.lam, impl=impl).loss
    (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("impl", ["chunked", "fused"])
def test_retained_graph_gives_the_same_gradient_twice(impl: str) -> None:
    """Not scaled twice, and linear in the upstream gradient: exactly so, for a power of two."""
    case = make_case(8, 9, 4, num_pairs=2)
    hidden = case.hidden.requires_grad_()
    loss = sftmix_loss(hidden, case.weight, case.target, case.lam, impl=impl).loss
    first = torch.autograd.grad(loss, hidden, grad_outputs=torch.tensor(4.0), retain_graph=True)[0]
    second = torch.autograd.grad(loss, hidden, retain_graph=True)[0]
    third = torch.autograd.grad(loss, hidden)[0]
    assert torch.equal(first, 4 * second) and torch.equal(second, third)


def test_statistics_are_detached() -> None:
    case = make_case(8, 9, 4, num_pairs=2)
    out = sftmix_loss(case.hidden.requires_grad_(), case.weight, case.target, case.lam)
    assert out.loss.requires_grad
    assert not any(t.requires_grad for t in (out.nll, out.lse, out.is_top1, out.mixup_nll))


class Drops(torch.autograd.Function):
    """Whose backward gives no gradient at all."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> None:
        return None


@pytest.mark.parametrize(
    "options", [{"impl": "chunked"}, {"impl": "fused"}, {"impl": "fused", "schedule": "stored"}]
)
@pytest.mark.parametrize("name", ["loss", "rows", "main_grad"])
def test_an_undefined_upstream_gradient_gives_none(options: dict[str, Any], name: str) -> None:
    case = make_case(8, 9, 4, num_pairs=2)
    weight, main_grad = case.weight.requires_grad_(), None
    if name == "rows":
        options = {**options, "schedule": None}
        value = linear_cross_entropy(case.hidden, weight, case.target, reduction="none", **options)
    else:
        main_grad = torch.zeros(9, 4) if name == "main_grad" else None
        value = sftmix_loss(case.hidden, weight, case.target, case.lam, main_grad=main_grad, **options).loss
    Drops.apply(value).sum().backward()
    assert weight.grad is None or not weight.grad.any()
    assert main_grad is None or not main_grad.any()


def test_the_references_statistics_are_traced() -> None:
    """torch 2.11 could not trace a generator that a named tuple was made of."""
    case = make_case(20, 33, 16, num_pairs=6)
    torch._dynamo.reset()
    traced = torch.compile(token_stats, fullgraph=True, backend="eager")
    for one, other in zip(
        traced(case.hidden, case.weight, case.target, impl="reference"),
        token_stats(case.hidden, case.weight, case.target, impl="reference"),
        strict=True,
    ):
        assert one is other or torch.equal(one, other)

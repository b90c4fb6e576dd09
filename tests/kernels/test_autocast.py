"""Under torch.autocast the loss does what autocast promises for a linear layer, and rounds nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sftmix_kernels import LossHead, linear_cross_entropy, operators, sftmix_loss, token_stats
from sftmix_kernels.call import Call
from sftmix_kernels.terms import coefficients
from tests.parity import Case, make_case

IMPLS = ("reference", "chunked")
DTYPES = (torch.bfloat16, torch.float16)


def gradients(case: Case, hidden: Tensor, weight: Tensor, bias: Tensor, **options: Any) -> tuple[Any, ...]:
    leaves = [t.detach().clone().requires_grad_() for t in (hidden, weight, bias)]
    out = sftmix_loss(leaves[0], leaves[1], case.target, case.lam, bias=leaves[2], **options)
    return (*(value for value in out if value is not None), *torch.autograd.grad(out.loss, leaves))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_it_is_the_call_with_everything_cast(
    impl: str, dtype: torch.dtype, hidden_dtype: torch.dtype
) -> None:
    """Bit for bit: hidden of any 16-bit or 32-bit dtype, a float32 weight and bias; gradients in their dtypes."""
    case = make_case(13, 17, 6, num_pairs=4, bias=True, ignored=(2,))
    assert case.bias is not None
    hidden = case.hidden.to(hidden_dtype)
    options: dict[str, Any] = {"impl": impl, "softcap": 5.0}
    with torch.autocast("cpu", dtype=dtype):
        *values, dhidden, dweight, dbias = gradients(case, hidden, case.weight, case.bias, **options)
    cast = [t.to(dtype) for t in (hidden, case.weight, case.bias)]
    *expected, dh, dw, db = gradients(case, *cast, **options)
    assert all(torch.equal(a, b) for a, b in zip(values, expected, strict=True))
    assert dhidden.dtype == hidden_dtype and dweight.dtype == dbias.dtype == torch.float32
    assert torch.equal(dweight, dw.float()) and torch.equal(dbias, db.float())
    assert torch.equal(dhidden, dh.to(hidden_dtype))


def test_lam_and_weights_are_not_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16 has no 0.123456789 and no 3001; a rule registered on the operator would have rounded lam."""
    case = make_case(8, 11, 6, num_pairs=2)
    seen: list[Any] = []
    case.lam = torch.tensor([0.123456789, 0.987654321])
    inner = operators.terms_fwd

    def record(*args: Any) -> Any:
        seen.extend(args)
        return inner(*args)

    monkeypatch.setattr(operators, "terms_fwd", record)
    row_weight = torch.rand(8)
    options: dict[str, Any] = {"row_weight": row_weight, "ntp_denominator": 3001, "impl": "chunked"}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        sftmix_loss(case.hidden, case.weight, case.target, case.lam, **options)
    found = Call(*seen)
    assert found.hidden.dtype == found.weight.dtype == torch.bfloat16
    assert torch.equal(found.lam, case.lam) and found.row_weight is row_weight
    assert torch.equal(coefficients(found).row, row_weight.double() * (1 / 3001))


def test_nothing_inside_is_rounded_again() -> None:
    """float64 stays float64 in autocast, and with it every product of the call."""
    case = make_case(8, 11, 6, num_pairs=2, dtype=torch.float64)
    for impl in IMPLS:
        expected = sftmix_loss(case.hidden, case.weight, case.target, case.lam, impl=impl)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = sftmix_loss(case.hidden, case.weight, case.target, case.lam, impl=impl)
        assert torch.equal(found.loss, expected.loss) and found.loss.dtype == torch.float64


def test_every_public_function_follows() -> None:
    case, head = make_case(8, 11, 6), LossHead(6, 11, bias=True)
    hidden, weight = case.hidden.bfloat16(), case.weight.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mean = linear_cross_entropy(hidden=case.hidden, weight=case.weight, target=case.target)
        rows = linear_cross_entropy(case.hidden, case.weight, case.target, reduction="none")
        stats = token_stats(case.hidden, case.weight, case.target)
        out = head(hidden, case.target, case.lam)
        logits = head(hidden)
    assert torch.equal(mean, linear_cross_entropy(hidden, weight, case.target))
    assert torch.equal(rows, linear_cross_entropy(hidden, weight, case.target, reduction="none"))
    assert torch.equal(stats.logprob, token_stats(hidden, weight, case.target).logprob)
    assert logits.dtype == torch.bfloat16
    out.loss.backward()
    assert head.weight.grad is not None and head.weight.grad.dtype == torch.float32


def test_without_autocast_a_mismatch_is_an_error() -> None:
    case = make_case(8, 11, 6)
    with pytest.raises(ValueError, match=r"weight: expected bfloat16 \[V=11, D=6\], got float32"):
        sftmix_loss(case.hidden.bfloat16(), case.weight, case.target, case.lam)
    with torch.autocast("cpu", enabled=False), pytest.raises(ValueError, match="weight: expected bfloat16"):
        sftmix_loss(case.hidden.bfloat16(), case.weight, case.target, case.lam)
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(ValueError, match="weight: expected flo"):
        sftmix_loss(case.hidden.double(), case.weight, case.target, case.lam)


@pytest.mark.parametrize("outside", [True, False])
def test_it_compiles_whole_with_autocast_outside_and_inside(outside: bool) -> None:
    case = make_case(12, 11, 6, num_pairs=5)
    torch._dynamo.reset()

    def plain(hidden: Tensor, weight: Tensor) -> Tensor:
        return sftmix_loss(hidden, weight, case.target, case.lam).loss

    def inside(hidden: Tensor, weight: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return plain(hidden, weight)

    leaves = [case.hidden.bfloat16().requires_grad_(), case.weight.requires_grad_()]
    expected = inside(*leaves)
    function = torch.compile(plain if outside else inside, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=outside):
        found = function(*leaves)
    assert torch.equal(found, expected)
    pairs = zip(torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves), strict=True)
    for leaf, (gradient, other) in zip(leaves, pairs, strict=True):
        assert torch.equal(gradient, other) and gradient.dtype == leaf.dtype

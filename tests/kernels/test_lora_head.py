"""Low-rank adapters on the output layer, as factors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sftmix_kernels import sftmix_loss
from tests.parity import Case, make_case

R, SCALING = 3, 0.5
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "cap, scale": {"softcap": 4.0, "logit_scale": 0.7},
    "smoothing, z-loss": {"label_smoothing": 0.1, "z_loss": 0.01},
}


def factors(case: Case) -> tuple[Tensor, Tensor]:
    dtype, (vocab_size, width) = case.weight.dtype, case.weight.shape
    return torch.randn(R, width, dtype=dtype) / width**0.5, torch.randn(vocab_size, R, dtype=dtype)


def leaf(*tensors: Tensor) -> list[Tensor]:
    return [t.detach().clone().requires_grad_() for t in tensors]


@pytest.mark.parametrize("impl", ["reference", "chunked", "fused"])
@pytest.mark.parametrize("options", OPTIONS)
def test_factors_give_the_loss_of_the_summed_weight(impl: str, options: str) -> None:
    """Value, statistics and the gradients of hidden, weight, A and B, from float64 where there is no rounding."""
    if impl == "fused":
        pytest.importorskip("triton")
    dtype = torch.float32 if impl == "fused" else torch.float64
    case = make_case(13, 17, 6, num_pairs=4, ignored=(2,), dtype=dtype, **OPTIONS[options])
    down, up = factors(case)
    ours, theirs = leaf(case.hidden, case.weight, down, up), leaf(case.hidden, case.weight, down, up)
    lora = (ours[2], ours[3], SCALING)
    found = sftmix_loss(*ours[:2], case.target, case.lam, lora=lora, impl=impl, **case.options)
    summed = theirs[1] + SCALING * theirs[3] @ theirs[2]
    expected = sftmix_loss(theirs[0], summed, case.target, case.lam, impl="reference", **case.options)
    for name, value in expected._asdict().items():
        torch.testing.assert_close(getattr(found, name), value, msg=lambda text, name=name: f"{name}: {text}")
    pairs = zip(
        torch.autograd.grad(found.loss, ours), torch.autograd.grad(expected.loss, theirs), strict=True
    )
    for gradient, other in pairs:
        torch.testing.assert_close(gradient, other)


def test_a_frozen_weight_gets_no_gradient_and_the_factors_do() -> None:
    case = make_case(13, 17, 6, num_pairs=4)
    down, up = leaf(*factors(case))
    out = sftmix_loss(case.hidden, case.weight, case.target, case.lam, lora=(down, up, SCALING))
    out.loss.backward()
    assert down.grad is not None and up.grad is not None and down.grad.any() and up.grad.any()
    assert case.weight.grad is None and case.hidden.grad is None


def test_factors_of_zero_change_nothing() -> None:
    """B starts at zero in training: the first loss is the model's own."""
    case = make_case(13, 17, 6, num_pairs=4)
    down, up = factors(case)
    options: dict[str, Any] = {"lora": (down, torch.zeros_like(up), SCALING)}
    found = sftmix_loss(case.hidden, case.weight, case.target, case.lam, **options)
    expected = sftmix_loss(case.hidden, case.weight, case.target, case.lam)
    torch.testing.assert_close(found.loss, expected.loss)
    torch.testing.assert_close(found.lse, expected.lse)


@pytest.mark.parametrize("impl", ["chunked", "fused"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_float32_factors_beside_a_16_bit_weight(dtype: torch.dtype, impl: str) -> None:
    """As recipes keep them: the factors' gradients are float32, within the rounding of the 16-bit product."""
    if impl == "fused":
        pytest.importorskip("triton")
    case = make_case(64, 17, 32, num_pairs=20)
    down, up = factors(case)
    ours = leaf(case.hidden.to(dtype), down, up)
    found = sftmix_loss(
        ours[0], case.weight.to(dtype), case.target, case.lam, lora=(ours[1], ours[2], SCALING), impl=impl
    )
    theirs = leaf(case.hidden.to(dtype).float(), down, up)
    summed = case.weight.to(dtype).float() + SCALING * theirs[2] @ theirs[1]
    expected = sftmix_loss(theirs[0], summed, case.target, case.lam, impl="reference")
    gradients = torch.autograd.grad(found.loss, ours)
    assert [g.dtype for g in gradients] == [dtype, torch.float32, torch.float32]
    for gradient, other in zip(gradients, torch.autograd.grad(expected.loss, theirs), strict=True):
        error = (gradient.float() - other).square().mean().sqrt() / other.square().mean().sqrt()
        assert error < 8 * torch.finfo(dtype).eps


def test_it_compiles_whole() -> None:
    case = make_case(12, 11, 6, num_pairs=5)
    leaves = leaf(case.hidden, *factors(case))
    torch._dynamo.reset()

    def loss(hidden: Tensor, down: Tensor, up: Tensor) -> Tensor:
        return sftmix_loss(hidden, case.weight, case.target, case.lam, lora=(down, up, SCALING)).loss

    found = torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves)
    expected = loss(*leaves)
    assert torch.equal(found, expected)
    pairs = zip(torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda a, b: (a, b), r"lora: expected \(A \[r, D\], B \[V, r\], scaling\)"),
        (lambda a, b: (b, a, 1.0), r"lora A: expected .* \[r=11, D=6\], got float32 \[11, 3\]"),
        (lambda a, b: (a[:, :5], b, 1.0), r"lora A: expected .* \[r=3, D=6\], got float32 \[3, 5\]"),
        (lambda a, b: (a, b[:, :2], 1.0), r"lora B: expected .* \[V=11, r=3\], got float32 \[11, 2\]"),
        (lambda a, b: (a, b.long(), 1.0), r"lora B: expected float32 or .*, got int64 \[11, 3\]"),
        (lambda a, b: (a, b, float("nan")), "lora scaling: expected a finite number, got nan"),
        (lambda a, b: (a, b, torch.ones(())), r"lora: expected \(A \[r, D\]"),
    ],
)  # fmt: skip
def test_wrong_factors_are_refused(change: Any, message: str) -> None:
    case = make_case(8, 11, 6)
    with pytest.raises(ValueError, match=message):
        sftmix_loss(case.hidden, case.weight, case.target, case.lam, lora=change(*factors(case)))

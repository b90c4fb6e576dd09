"""What users of other losses reported since: each report tried on every implementation, with the right value."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sftmix_kernels import LossHead, choice, linear_cross_entropy, sftmix_loss
from tests.kernels.ways import engines, every_way
from tests.parity import assert_parity, make_case

F64, BF16 = torch.float64, torch.bfloat16


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [t.detach().clone().requires_grad_() for t in tensors]


@every_way
@pytest.mark.parametrize("offset", [1e3, -1e4, 3e4])
def test_pytorch_195829_a_large_common_offset_of_the_logits(way: dict[str, Any], offset: float) -> None:
    """lse - z must be taken in an order that does not add the offset to the loss first."""
    case = make_case(13, 37, 8, num_pairs=4, bias=True)
    assert case.bias is not None
    case.bias += offset
    exact = F.linear(case.hidden.double(), case.weight.double(), case.bias.double())
    expected = F.cross_entropy(exact, case.target, reduction="none")
    found = sftmix_loss(case.hidden, case.weight, case.target, case.lam, bias=case.bias, **way).nll
    # float32 logits of this size are multiples of offset * 2^-24; two of them make an nll.
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2 * abs(offset) * 2**-23)


@every_way
def test_apple_52_a_loss_with_a_bias_is_never_negative(way: dict[str, Any]) -> None:
    case = make_case(64, 300, 16, num_pairs=20, bias=True, logit_std=8.0)
    found = sftmix_loss(case.hidden, case.weight, case.target, case.lam, bias=case.bias, **way)
    assert (found.nll >= 0).all() and (found.mixup_nll >= 0).all()
    assert_parity(case, **way)


@every_way
def test_apple_14_many_rows_and_few_classes_in_bfloat16(way: dict[str, Any]) -> None:
    """The classifier's gradient is a sum over thousands of rows."""
    assert_parity(make_case(2048, 32, 16, dtype=BF16), **way)


def test_apple_41_a_gpu_that_the_kernels_do_not_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    """An old GPU takes the portable implementation, and says why when the kernels are named."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (6, 1))
    assert "compute capability 6.1" in str(choice.why_not_chip(torch.device("cuda")))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    assert choice.why_not_chip(torch.device("cuda")) is None


@pytest.mark.parametrize("impl", ["chunked", "fused"])
def test_pytorch_136662_functional_derivatives_under_compile(impl: str) -> None:
    """The right value, or an error; never another value."""
    case = make_case(8, 11, 6)

    def loss(hidden: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, case.weight, case.target, impl=impl)

    torch._dynamo.reset()
    (hidden,) = leaves(case.hidden)
    (expected,) = torch.autograd.grad(loss(hidden), hidden)
    try:
        found = torch.compile(lambda h: torch.func.grad(loss)(h), backend="aot_eager")(case.hidden)
    except Exception as raised:  # torch wraps what a traced function raises
        refusal = str(raised)
    else:
        torch.testing.assert_close(found, expected)
        return
    assert "reference" in refusal or "setup_context" in refusal


@every_way
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_pytorch_69339_weights_smoothing_and_ignored_rows_at_once(
    way: dict[str, Any], smoothing: float, reduction: str
) -> None:
    """pytorch 69339, 91383 and 104776: torch's own numbers for hard targets, outside of V too."""
    if reduction == "none" and way.get("schedule") == "stored":
        return
    case = make_case(23, 19, 8, ignored=(0, 7, 22))
    weights = torch.linspace(0, 3, 19)
    options: dict[str, Any] = {"reduction": reduction, "label_smoothing": smoothing}
    hidden, weight = leaves(case.hidden, case.weight)
    ours = linear_cross_entropy(hidden, weight, case.target, class_weight=weights, **options, **way)
    other = [t.double() for t in leaves(case.hidden, case.weight)]
    theirs = F.cross_entropy(F.linear(*other), case.target, weight=weights.double(), **options)
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-6)
    upstream = torch.linspace(-1, 2, ours.numel()).reshape(ours.shape)
    gradients = torch.autograd.grad(ours, (hidden, weight), upstream)
    expected = torch.autograd.grad(theirs, other, upstream.double())
    for one, two in zip(gradients, expected, strict=True):
        torch.testing.assert_close(one.double(), two, rtol=1e-4, atol=1e-5)


@every_way
def test_liger_272_what_others_saved_is_not_written_to(way: dict[str, Any]) -> None:
    """exp saves its output, which is our input: 254 and 272."""
    case = make_case(13, 17, 6, num_pairs=4)
    raw, weight = leaves(case.hidden * 0.3, case.weight)
    before = raw.exp().detach()
    activations = raw.exp()
    sftmix_loss(activations, weight, case.target, case.lam, **way).loss.backward()
    assert torch.equal(activations, before) and torch.equal(weight, case.weight)
    exact, other = (t.double().requires_grad_() for t in (case.hidden * 0.3, case.weight))
    sftmix_loss(exact.exp(), other, case.target, case.lam, impl="reference").loss.backward()
    assert raw.grad is not None and exact.grad is not None
    torch.testing.assert_close(raw.grad.double(), exact.grad, rtol=1e-4, atol=1e-6)


@engines
@pytest.mark.parametrize("compiled", [False, True])
def test_pytorch_197887_an_input_changed_before_the_backward(way: dict[str, Any], compiled: bool) -> None:
    """The gradient of the forward that ran, or autograd's error; never that of the changed input."""
    case = make_case(13, 17, 6, num_pairs=4)
    buffer, weight = case.hidden.clone(), case.weight.clone().requires_grad_()

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return sftmix_loss(hidden, weight, case.target, case.lam, **way).loss

    (expected,) = torch.autograd.grad(loss(buffer, weight), weight)
    torch._dynamo.reset()
    value = (torch.compile(loss, backend="aot_eager") if compiled else loss)(buffer, weight)
    buffer.mul_(3)
    try:
        value.backward()
    except RuntimeError as raised:
        refusal = str(raised)
    else:
        assert weight.grad is not None
        torch.testing.assert_close(weight.grad, expected)
        return
    assert "modified by an inplace operation" in refusal


@every_way
def test_pytorch_26546_results_changed_in_place(way: dict[str, Any]) -> None:
    """A loss divided in place, and statistics written to before the backward."""
    case = make_case(13, 17, 6, num_pairs=4)
    gradients = []
    for in_place in (False, True):
        hidden, weight = leaves(case.hidden, case.weight)
        out = sftmix_loss(hidden, weight, case.target, case.lam, **way)
        loss = out.loss.div_(4) if in_place else out.loss / 4
        if in_place:
            for value in (out.nll, out.lse, out.mixup_nll, out.z_loss):
                value.fill_(float("nan"))
        loss.backward()
        gradients.append((hidden.grad, weight.grad))
    for one, two in zip(*gradients, strict=True):
        assert torch.equal(one, two)


@every_way
def test_directml_740_rows_weighted_by_hand(way: dict[str, Any]) -> None:
    """Each row's loss times a weight of the user's: the gradient is that of ``row_weight``, and not 0."""
    if way.get("schedule") == "stored":
        return
    case = make_case(13, 17, 6, ignored=(2,))
    weights = torch.linspace(0, 2, 13)
    found = []
    for by_hand in (True, False):
        hidden, weight = leaves(case.hidden, case.weight)
        if by_hand:
            rows = linear_cross_entropy(hidden, weight, case.target, reduction="none", **way)
            loss = (rows * weights).sum() / 12
        else:
            none = torch.empty(0)
            loss = sftmix_loss(
                hidden, weight, case.target, none, row_weight=weights, ntp_denominator=12, **way
            ).loss
        loss.backward()
        found.append((loss.detach(), hidden.grad, weight.grad))
    for one, two in zip(*found, strict=True):
        assert one is not None and one.abs().sum() > 0
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-7)


@engines
def test_transformers_style_head_called_twice_in_one_step(way: dict[str, Any]) -> None:
    """pytorch 65536: two losses of one weight, the first graph kept, accumulate the sum of both gradients."""
    case, head = make_case(13, 17, 6, num_pairs=4), LossHead(6, 17)
    first = head(case.hidden, case.target, case.lam, **way).loss
    second = head(case.hidden * 2, case.target, case.lam, **way).loss
    first.backward(retain_graph=True)
    second.backward()
    first.backward()
    assert head.weight.grad is not None
    once = head.weight.grad.clone()
    head.weight.grad = None
    total = 2 * head(case.hidden, case.target, case.lam, **way).loss
    (total + head(case.hidden * 2, case.target, case.lam, **way).loss).backward()
    torch.testing.assert_close(once, head.weight.grad, rtol=1e-5, atol=1e-7)

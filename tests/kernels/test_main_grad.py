"""dweight added into an existing float32 main gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import fully_shard

from sftmix_kernels import LossHead, linear_cross_entropy, operators, sftmix_loss
from tests.kernels.calls import call_of
from tests.kernels.test_ops import BACKENDS
from tests.kernels.watching import LargestTensor
from tests.parity import Case, assert_within_contract, make_case, run

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
WAYS: list[tuple[str, str | None, torch.dtype]] = [
    ("reference", None, F32), ("chunked", None, F32), ("chunked", None, BF16), ("chunked", None, F16),
    ("fused", "recompute", F32), ("fused", "recompute", BF16), ("fused", "stored", F32), ("fused", "stored", BF16),
    ("fused", "recompute", F16), ("fused", "stored", F16),
]  # fmt: skip
# Of the interpreted kernels one 16-bit type in `make test`, the other in `make slow`.
ways = pytest.mark.parametrize(
    "way",
    [
        pytest.param(way, marks=pytest.mark.slow if way[0] == "fused" and way[2] is F16 else ())
        for way in WAYS
    ],
    ids=lambda w: f"{w[0]}-{w[1]}-{str(w[2])[6:]}",
)


def leaves(case: Case) -> list[Tensor]:
    assert case.bias is not None
    return [t.detach().clone().requires_grad_() for t in (case.hidden, case.weight, case.bias)]


def loss_of(case: Case, inputs: list[Tensor], way: tuple[Any, ...], **options: Any) -> Tensor:
    hidden, weight, bias = inputs
    named = {"impl": way[0], "schedule": way[1], **case.options, **options}
    return sftmix_loss(hidden, weight, case.target, case.lam, bias=bias, **named).loss


@ways
@pytest.mark.parametrize(
    "options",
    [{}, {"softcap": 3.0, "logit_scale": 0.7}, {"label_smoothing": 0.1, "z_loss": 1e-2}],
    ids=["plain", "capped", "smoothed"],
)
def test_contract(way: tuple[Any, ...], options: dict[str, Any]) -> None:
    """The gradient that arrives is within the contract, in float32, and the other gradients are what they were."""
    case = make_case(
        96, 70, 24, num_pairs=40, bias=True, dtype=way[2], ignored=(3, 90), upstream=0.5, **options
    )
    scratch = {} if way[0] == "reference" else {"scratch_bytes": 70 * way[2].itemsize * 64}
    truth, same = (run(case, impl="reference", dtype=d) for d in (torch.float64, None))
    inputs, total = leaves(case), torch.zeros_like(case.weight, dtype=F32)
    loss_of(case, inputs, way, main_grad=total, **scratch).backward(torch.tensor(case.upstream))
    assert inputs[1].grad is None
    for name, ours in (("dweight", total), ("dhidden", inputs[0].grad), ("dbias", inputs[2].grad)):
        assert ours is not None
        assert_within_contract(name, ours, same[name], truth[name])


@ways
def test_it_is_added_micro_batch_by_micro_batch(way: tuple[Any, ...]) -> None:
    """Both forwards before both backwards, a graph used twice, and what was there before stays."""
    cases = [make_case(30, 50, 16, num_pairs=10, bias=True, dtype=way[2], seed=s) for s in (0, 1)]
    cases[1].weight = cases[0].weight
    base = torch.randn(50, 16)
    parts = []
    for case in cases:
        part, inputs = torch.zeros(50, 16), leaves(case)
        loss_of(case, inputs, way, main_grad=part).backward()
        parts.append(part)
    total = base.clone()
    losses = [loss_of(case, leaves(case), way, main_grad=total) for case in cases]
    losses[0].backward(retain_graph=True)
    losses[1].backward()
    losses[0].backward(torch.tensor(2.0))
    expected = base + 3 * parts[0] + parts[1]
    torch.testing.assert_close(total, expected, rtol=1e-6, atol=2e-6)
    assert not torch.equal(total, base)


@ways
def test_frozen_hidden_still_sends_the_gradient(way: tuple[Any, ...]) -> None:
    case = make_case(20, 33, 16, num_pairs=6, bias=True, dtype=way[2])
    both, head_only = torch.zeros(33, 16), torch.zeros(33, 16)
    loss_of(case, leaves(case), way, main_grad=both).backward()
    inputs = leaves(case)
    inputs[0].requires_grad_(False)
    inputs[2].requires_grad_(False)
    loss_of(case, inputs, way, main_grad=head_only).backward()
    assert torch.equal(both, head_only) and both.abs().sum() > 0


@ways
def test_nothing_is_added_for_ignored_rows_or_none(way: tuple[Any, ...]) -> None:
    for size, pairs in ((20, 6), (0, 0)):
        case = make_case(size, 33, 16, num_pairs=pairs, bias=True, dtype=way[2], ignored=tuple(range(size)))
        total = torch.randn(33, 16)
        before, inputs = total.clone(), leaves(case)
        loss = loss_of(case, inputs, way, main_grad=total)
        loss.backward()
        assert loss == 0 and torch.equal(total, before)
        assert inputs[0].grad is not None and not inputs[0].grad.any()


@pytest.mark.parametrize("impl", ["reference", "chunked", "fused"])
def test_reduction_none_and_any_upstream(impl: str) -> None:
    case = make_case(40, 50, 16, bias=True, ignored=(7,))
    upstream = torch.randn(40)
    plain, inputs, total = leaves(case), leaves(case), torch.zeros(50, 16)
    options: dict[str, Any] = {"reduction": "none", "impl": impl, "z_loss": 1e-2, "label_smoothing": 0.1}
    expected = linear_cross_entropy(plain[0], plain[1], case.target, bias=plain[2], **options)
    ours = linear_cross_entropy(inputs[0], inputs[1], case.target, bias=inputs[2], main_grad=total, **options)
    expected.backward(upstream)
    ours.backward(upstream)
    assert torch.equal(ours, expected) and inputs[1].grad is None
    for one, other in (
        (total, plain[1].grad),
        (inputs[0].grad, plain[0].grad),
        (inputs[2].grad, plain[2].grad),
    ):
        torch.testing.assert_close(one, other, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("way", [WAYS[1], WAYS[2], WAYS[4], WAYS[5]], ids=lambda w: f"{w[0]}-{str(w[2])[6:]}")
def test_no_second_weight_gradient_is_made(way: tuple[Any, ...]) -> None:
    """By chunked and recompute no tensor of V * D elements appears, neither forward nor backward."""
    case = make_case(24, 10_000, 64, num_pairs=8, bias=True, dtype=way[2])
    total, inputs = torch.zeros(10_000, 64), leaves(case)
    with LargestTensor() as seen:
        loss_of(case, inputs, way, main_grad=total, scratch_bytes=10_000 * 4 * 6).backward()
    assert 0 < seen.nbytes < 10_000 * 64 * min(2, way[2].itemsize)


@pytest.mark.parametrize("way", [WAYS[1], WAYS[4], WAYS[6]], ids=lambda w: f"{w[0]}-{w[1]}")
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_is_one_graph_and_adds_the_same(way: tuple[Any, ...], backend: str) -> None:
    case = make_case(20, 33, 16, num_pairs=6, bias=True, ignored=(3,))

    def step(hidden: Tensor, weight: Tensor, bias: Tensor, total: Tensor) -> Tensor:
        return loss_of(case, [hidden * 2, weight, bias], way, main_grad=total)

    torch._dynamo.reset()
    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend=backend)):
        inputs, total = leaves(case), torch.ones(33, 16)
        for _ in range(2):
            function(*inputs, total).backward()
        assert inputs[1].grad is None
        results.append((total, inputs[0].grad, inputs[2].grad))
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)


@pytest.mark.parametrize("impl", ["chunked", "fused"])
def test_opcheck(impl: str) -> None:
    """The forwards take it along, and only a backward declares that it changes (test_ops.py)."""
    case = make_case(20, 33, 16, num_pairs=6, bias=True)
    call = call_of(case, impl=impl, main_grad=torch.zeros(33, 16))
    for op in (operators.terms_fwd, operators.made_fwd):
        torch.library.opcheck(op, tuple(call))


@pytest.mark.parametrize("way", [WAYS[1], WAYS[4], WAYS[6]], ids=lambda w: f"{w[0]}-{w[1]}")
def test_double_backward_is_refused(way: tuple[Any, ...]) -> None:
    case = make_case(8, 9, 4, num_pairs=2, bias=True)
    inputs, total = leaves(case), torch.zeros(9, 4)
    loss = loss_of(case, inputs, way, main_grad=total)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        torch.autograd.grad(loss, inputs[0], create_graph=True)
    assert not total.any()


def test_autocast_leaves_it_float32() -> None:
    case = make_case(20, 33, 16, num_pairs=6)
    weight = case.weight.clone().requires_grad_()
    total = torch.zeros(33, 16)
    with torch.autocast("cpu", dtype=BF16):
        sftmix_loss(case.hidden, weight, case.target, case.lam, main_grad=total).loss.backward()
    expected = case.weight.to(BF16).requires_grad_()
    sftmix_loss(case.hidden.to(BF16), expected, case.target, case.lam).loss.backward()
    assert weight.grad is None and expected.grad is not None
    torch.testing.assert_close(total, expected.grad.float(), rtol=2**-8, atol=1e-4)


WITH_FACTORS: list[dict[str, Any]] = [
    {"impl": "reference"}, {"impl": "chunked"}, {"impl": "fused"}, {"impl": "fused", "schedule": "stored"},
]  # fmt: skip

BAD: list[tuple[Any, str]] = [
    (torch.zeros(33, 15), "expected float32 [V=33, D=16], got float32 [33, 15] on cpu"),
    (torch.zeros(33, 16, dtype=BF16), "expected float32 [V=33, D=16], got bfloat16"),
    (torch.zeros(33, 16, device="meta"), "expected a tensor on cpu like hidden, got one on meta"),
    (torch.zeros(1, 16).expand(33, 16), "expected memory of its own for every element, got strides [0, 1]"),
    (torch.zeros(33, 16, requires_grad=True), "expected a tensor that requires no gradient"),
    (3.0, "expected a tensor float32 [V=33, D=16], got float 3.0"),
]


@pytest.mark.parametrize(("value", "message"), BAD, ids=[str(i) for i in range(len(BAD))])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_bad_main_grad(value: Any, message: str, reduction: str) -> None:
    case = make_case(20, 33, 16)
    weight = case.weight.requires_grad_()
    with pytest.raises(ValueError) as error:
        linear_cross_entropy(case.hidden, weight, case.target, main_grad=value, reduction=reduction)
    assert str(error.value).startswith("main_grad: ") and message in str(error.value)


def test_what_it_does_not_go_with() -> None:
    case = make_case(20, 33, 16)
    total, frozen = torch.zeros(33, 16), case.weight
    with pytest.raises(
        ValueError, match="main_grad: expected None beside a weight that requires no gradient"
    ):
        linear_cross_entropy(case.hidden, frozen, case.target, main_grad=total)


@pytest.mark.parametrize("options", WITH_FACTORS, ids=lambda o: "-".join(map(str, o.values())))
def test_beside_low_rank_factors(options: dict[str, Any]) -> None:
    """The weight's gradient goes to the buffer, the factors' where they go without it; all as without a buffer."""
    case = make_case(20, 33, 16, num_pairs=6, ignored=(3,))
    found = []
    for total in (None, torch.full((33, 16), 0.5)):
        g = torch.Generator().manual_seed(1)
        down, up = (torch.randn(s, generator=g).requires_grad_() for s in ((3, 16), (33, 3)))
        hidden, weight = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()
        sftmix_loss(
            hidden, weight, case.target, case.lam, lora=(down, up, 0.5), main_grad=total, **options
        ).loss.backward()
        dweight = weight.grad if total is None else total - 0.5
        assert total is None or weight.grad is None
        found.append((hidden.grad, down.grad, up.grad, dweight))
    for plain, beside in zip(*found, strict=True):
        torch.testing.assert_close(beside, plain, rtol=1e-5, atol=1e-6)


def test_refused_under_fsdp2() -> None:
    """FSDP2 owns the gradients: the other ranks' shares would never meet."""
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        case, total = make_case(20, 33, 16), torch.zeros(33, 16)

        class Model(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.head = LossHead(16, 33)

            def forward(self, hidden: Tensor, main_grad: Tensor | None) -> Any:
                return self.head(hidden, case.target, main_grad=main_grad).loss

        model = fully_shard(Model(), mesh=dist.init_device_mesh("cpu", (1,)))
        model(case.hidden, None).backward()  # without it the same call is served
        with pytest.raises(ValueError, match="main_grad: expected None under FSDP2"):
            model(case.hidden, total)
        assert not total.any()
    finally:
        dist.destroy_process_group()

"""Nothing in the loss makes the host wait: fake tensors have no values, so reading one raises; export; dynamic sizes.

The bodies of the custom operators run on fake tensors too (their registered fakes would hide them), with Triton's
launches left out: a launch takes no value from the host.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)

from sftmix_kernels import LossHead, SFTMixLoss, checks, linear_cross_entropy, sftmix_loss, token_stats
from sftmix_kernels.call import NAMESPACE
from tests.kernels.watching import Bodies
from tests.parity import make_case

implementations = pytest.mark.parametrize("impl", ["reference", "chunked", "fused"])
own_operators = pytest.mark.parametrize("impl", ["chunked", "fused"])
OPERATOR = {"chunked": "made_fwd", "fused": "terms_fwd"}
# What reads a tensor on the host, or sizes a tensor by one's values.
WAITS = (
    "_local_scalar_dense",
    "item",
    "is_nonzero",
    "equal",
    "nonzero",
    "masked_select",
    "unique",
    "bincount",
)


@pytest.fixture
def no_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", lambda *_, **__: None)


def loss(hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor, lam: Tensor, impl: str) -> Tensor:
    out = sftmix_loss(
        hidden, weight, target, lam, bias=bias, impl=impl, mixup_weight=lam.new_tensor(0.3), softcap=20.0,
        row_weight=hidden.detach()[:, 0].float(), pair_weight=lam, ntp_denominator=target.sum(), label_smoothing=0.1,
        z_loss=1e-3,
    )  # fmt: skip
    return out.loss + out.nll.sum()


def plain(hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor, lam: Tensor, impl: str) -> Tensor:
    return linear_cross_entropy(hidden, weight, target, bias=bias, impl=impl)


def per_row(hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor, lam: Tensor, impl: str) -> Tensor:
    return linear_cross_entropy(hidden, weight, target, bias=bias, impl=impl, reduction="none").sum()


def statistics(
    hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor, lam: Tensor, impl: str
) -> Tensor:
    return token_stats(hidden, weight, target, bias=bias, impl=impl).entropy.sum()


def low_rank(hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor, lam: Tensor, impl: str) -> Tensor:
    lora = (weight[:5] * 2, weight[:, :5] * 2, 0.5)
    return sftmix_loss(hidden, weight, target, lam, bias=bias, lora=lora, impl=impl).loss


FUNCTIONS = [loss, plain, per_row, statistics, low_rank]


@implementations
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_host_never_waits(
    impl: str, function: Callable[..., Tensor], dtype: torch.dtype, no_launches: None
) -> None:
    """A host read of a fake tensor raises by itself; the names are looked at as well, and that bodies did run."""
    with FakeTensorMode(), Bodies() as bodies:
        hidden, weight, bias = (
            torch.empty(shape, dtype=dtype, requires_grad=True) for shape in ((20, 16), (33, 16), (33,))
        )
        out = function(hidden, weight, bias, torch.empty(20, dtype=torch.int64), torch.empty(6), impl)
        if out.requires_grad:
            (out * 3).backward()
            assert all(t.grad is not None for t in (hidden, weight, bias))
        else:
            assert function is statistics
    assert not set(bodies.called) & set(WAITS)
    checked = function in (loss, plain, low_rank)
    assert ("_assert_async" if checked else "empty") in bodies.called
    if impl != "reference":
        assert any(name.startswith(f"{NAMESPACE}::") for name in bodies.called)
    if impl == "chunked":
        assert "mm" in bodies.called or "addmm" in bodies.called or "addmm_" in bodies.called


READS: list[Callable[[Tensor], Any]] = [
    lambda t: t.max().item(), lambda t: t.nonzero(), lambda t: t.tolist(), lambda t: t[t > 0], lambda t: bool(t.any()),
]  # fmt: skip


@pytest.mark.parametrize("read", READS, ids=["item", "nonzero", "tolist", "mask", "bool"])
def test_a_host_read_would_be_seen(read: Callable[[Tensor], Any]) -> None:
    with (
        FakeTensorMode(),
        Bodies() as bodies,
        pytest.raises((DataDependentOutputException, DynamicOutputShapeException)),
    ):
        read(torch.empty(4))
    assert {*WAITS, "index"} & set(bodies.called)


# --- capture of a CUDA graph ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mixup_weight", "ntp_denominator", "mixup_denominator"])
def test_a_number_of_the_cpu_is_not_frozen_into_a_graph(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A graph would replay a copy of its present value; what is on the rows' device, or a number, is not copied."""
    cuda, value = torch.device("cuda", 0), torch.tensor(0.3)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(
        ValueError, match=f"^{name}: expected a number or a 0-d tensor on cuda:0 while a CUDA graph"
    ):
        checks.scalar(name, value, cuda)
    assert checks.scalar(name, 0.3, cuda) == (None, 0.3)
    kept, _ = checks.scalar(name, value, torch.device("cpu"))
    assert kept is not None and kept.data_ptr() == value.data_ptr()


def test_meta_tensors_take_the_portable_loss_beside_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """``fused`` runs on CPUs' and CUDA's tensors alone; named, it is refused by the device's name."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    hidden, weight = (torch.empty(n, 16, device="meta", requires_grad=True) for n in (20, 33))
    target, lam = torch.empty(20, dtype=torch.int64, device="meta"), torch.empty(6, device="meta")
    with Bodies() as bodies:
        sftmix_loss(hidden, weight, target, lam).loss.backward()
    assert f"{NAMESPACE}::made_fwd" in bodies.called and hidden.grad is not None and hidden.grad.is_meta
    with pytest.raises(ValueError, match=r"^impl: expected .*got 'fused': its kernels do not run on meta"):
        sftmix_loss(hidden, weight, target, lam, impl="fused")


# --- export --------------------------------------------------------------------------------------------------------


class Step(torch.nn.Module):
    def __init__(self, impl: str) -> None:
        super().__init__()
        self.head, self.impl = LossHead(16, 33, bias=True, softcap=20.0), impl

    def forward(self, hidden: Tensor, target: Tensor, lam: Tensor) -> SFTMixLoss:
        return self.head(hidden * 2, target, lam, impl=self.impl)


@own_operators
@pytest.mark.parametrize("strict", [False, True])
def test_export(impl: str, strict: bool) -> None:
    """One program for any N and M, with our operator in it as one node; run at sizes it was not exported at."""
    step = Step(impl)
    n, m = torch.export.Dim.DYNAMIC, torch.export.Dim.DYNAMIC
    case = make_case(20, 33, 16, num_pairs=6)
    program = torch.export.export(
        step, (case.hidden, case.target, case.lam), dynamic_shapes=({0: n}, {0: n}, {0: m}), strict=strict
    )
    names = [str(node.target) for node in program.graph.nodes]
    assert sum(f"{NAMESPACE}.{OPERATOR[impl]}" in name for name in names) == 1
    for num_rows, num_pairs in ((20, 6), (31, 9), (50, 25)):
        case = make_case(num_rows, 33, 16, num_pairs=num_pairs, ignored=(3,))
        want = step(case.hidden, case.target, case.lam)
        got = program.module()(case.hidden, case.target, case.lam)
        assert all(a is b if a is None else torch.equal(a, b) for a, b in zip(got, want, strict=True))


# --- dynamic sizes -------------------------------------------------------------------------------------------------

SIZES = [(20, 6), (31, 9), (50, 25), (64, 2), (27, 13)]


@own_operators
@pytest.mark.parametrize("how", ["dynamic=True", "mark_dynamic", "automatic"])
def test_changing_sizes_do_not_recompile(impl: str, how: str) -> None:
    """What the first sizes compile serves all others; where torch must find out that sizes change, the first two."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def step(hidden: Tensor, weight: Tensor, target: Tensor, lam: Tensor) -> Tensor:
        return sftmix_loss(hidden, weight, target, lam, impl=impl).loss

    compiled = torch.compile(
        step, fullgraph=True, backend=counter, dynamic=True if how == "dynamic=True" else None
    )
    frames = []
    for num_rows, num_pairs in SIZES:
        case = make_case(num_rows, 33, 16, num_pairs=num_pairs)
        leaves = [case.hidden.requires_grad_(), case.weight.requires_grad_()]
        if how == "mark_dynamic":
            for tensor in (case.hidden, case.target, case.lam):
                torch._dynamo.mark_dynamic(tensor, 0)
        results = []
        for function in (step, compiled):
            value = function(case.hidden, case.weight, case.target, case.lam)
            results.append((value, *torch.autograd.grad(value, leaves)))
        assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
        frames.append(counter.frame_count)
    learned = 1 if how == "automatic" else 0
    assert frames[-1] == frames[learned] <= 2


@own_operators
def test_changing_sizes_of_the_drop_in_and_the_statistics_do_not_recompile(impl: str) -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter, dynamic=True)
    def step(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows = linear_cross_entropy(hidden, weight, target, impl=impl, reduction="none")
        stats = token_stats(hidden.flatten(0, 1), weight, target.flatten(), impl=impl)
        return linear_cross_entropy(hidden, weight, target, impl=impl), rows, stats.logprob

    frames = []
    for batch, length in ((2, 10), (3, 7), (4, 25)):
        case = make_case(batch * length, 33, 16)
        hidden, target = case.hidden.view(batch, length, 16), case.target.view(batch, length)
        mean, rows, logprob = step(hidden, case.weight, target)
        torch.testing.assert_close(rows.mean(), mean)
        torch.testing.assert_close(-logprob, rows.flatten())
        frames.append(counter.frame_count)
    assert frames[-1] == frames[0] <= 2

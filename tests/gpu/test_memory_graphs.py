"""On a GPU: peak bytes against the formulas of tests/kernels/test_memory.py, and steps captured in CUDA graphs."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sftmix_kernels import sftmix_loss, token_stats
from tests.parity import make_case

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
dtypes = pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=["bfloat16", "float16", "float32"])
schedules = pytest.mark.parametrize("schedule", ["recompute", "stored"])
N, V, D, M = 4096, 65536, 512, 2048
# As on the CPU; the allocator rounds each of some dozens of tensors up to 512 bytes.
STATISTICS = 160 * (N + M) + 2**16


def peak_bytes(call: Callable[[], object]) -> int:
    """Peak of the second call above what was there: the first pays for the library's workspace.

    What other tests left in cycles is freed first: freed during the call, it would be taken off the peak.
    """
    call()
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - held


def problem(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    hidden = torch.randn(N, D, device="cuda", dtype=dtype).requires_grad_()
    weight = (torch.randn(V, D, device="cuda", dtype=dtype) / D**0.5).requires_grad_()
    return hidden, weight, torch.randint(V, (N,), device="cuda"), torch.rand(M, device="cuda")


def splits_seen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What the forward chooses, call by call."""
    from sftmix_kernels.fused import forward

    seen: list[int] = []
    choose = forward.choose_num_splits

    def kept(*args: Any) -> int:
        seen.append(choose(*args))
        return seen[-1]

    monkeypatch.setattr(forward, "choose_num_splits", kept)
    return seen


@dtypes
@schedules
def test_peak_of_a_step(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, schedule: str) -> None:
    """Above inputs and gradients; ``recompute`` has no float32 dweight, ``stored`` no more than a chunk's logits."""
    hidden, weight, target, lam = problem(dtype)
    splits, size, scratch = splits_seen(monkeypatch), dtype.itemsize, 2**26

    def step() -> tuple[Tensor, ...]:
        loss = sftmix_loss(
            hidden, weight, target, lam, impl="fused", schedule=schedule, scratch_bytes=scratch
        ).loss
        return torch.autograd.grad(loss, (hidden, weight))

    extra = peak_bytes(step) - hidden.nbytes - weight.nbytes
    wide = size < 4
    if schedule == "recompute":
        columns = scratch // (N * size)
        # hidden's copy is gone before a 16-bit dhidden is made, which was taken off
        bound = scratch + 4 * N * D + (dtype is F16) * 4 * columns * D
    else:
        rows = scratch // (V * size)
        bound = (
            scratch + rows * D * size + (4 * V * D + N * D * size if wide else weight.nbytes + hidden.nbytes)
        )
    bound += STATISTICS + 12 * max(splits, default=0) * (N + M)
    assert 0.5 * bound <= extra <= bound
    assert bound < N * V * size


@dtypes
def test_peak_of_a_forward_and_of_statistics(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    hidden, weight, target, lam = problem(dtype)
    splits = splits_seen(monkeypatch)
    with torch.no_grad():
        loss = peak_bytes(lambda: sftmix_loss(hidden, weight, target, lam, impl="fused"))
        stats = peak_bytes(lambda: token_stats(hidden, weight, target, impl="fused"))
    for peak in (loss, stats):
        assert 16 * N <= peak <= STATISTICS + 12 * max(splits) * (N + M) < N * V * dtype.itemsize / 4


def captured(call: Callable[[], tuple[Tensor, ...]]) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...]]:
    """A graph of ``call`` and the tensors that each replay fills; warmed up on a side stream, as torch asks."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    return graph, results


def assert_replays(
    call: Callable[[], tuple[Tensor, ...]], inputs: tuple[Tensor, ...], others: tuple[Tensor, ...]
) -> None:
    """Bitwise what an eager call gives, on the inputs of the capture and on others copied over them."""
    graph, results = captured(call)
    for values in (tuple(t.clone() for t in inputs), others):
        with torch.no_grad():
            for tensor, value in zip(inputs, values, strict=True):
                tensor.copy_(value)
        graph.replay()
        torch.cuda.synchronize()
        replayed = [t.clone() for t in results]
        assert all(torch.equal(one, other) for one, other in zip(replayed, call(), strict=True))


def tensors(seed: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    case = make_case(301, 1009, 136, num_pairs=110, dtype=dtype, seed=seed, ignored=(3, 200))
    return tuple(t.cuda() for t in (case.hidden, case.weight, case.target, case.lam))


@dtypes
@schedules
def test_a_step_is_captured_and_replays(dtype: torch.dtype, schedule: str) -> None:
    """Forward and backward of the public function, the mixup weight a tensor that changes between replays."""
    inputs = (*tensors(0, dtype), torch.tensor(0.2, device="cuda"))
    others = (*tensors(1, dtype), torch.tensor(0.5, device="cuda"))
    hidden, weight, target, lam, mu = inputs
    leaves = (hidden.requires_grad_(), weight.requires_grad_())

    def step() -> tuple[Tensor, ...]:
        out = sftmix_loss(
            hidden,
            weight,
            target,
            lam,
            mixup_weight=mu,
            impl="fused",
            schedule=schedule,
            scratch_bytes=40_000,
        )
        return (*(t.detach() for t in out if t is not None), *torch.autograd.grad(out.loss, leaves))

    assert_replays(step, inputs, others)


@dtypes
def test_statistics_are_captured_and_replay(dtype: torch.dtype) -> None:
    inputs, others = tensors(0, dtype)[:3], tensors(1, dtype)[:3]
    assert_replays(
        lambda: tuple(t for t in token_stats(*inputs, impl="fused") if t is not None), inputs, others
    )


@dtypes
@schedules
def test_the_host_never_waits_in_a_step(dtype: torch.dtype, schedule: str) -> None:
    hidden, weight, target, lam = tensors(0, dtype)
    hidden.requires_grad_()

    def step() -> None:
        sftmix_loss(hidden, weight, target, lam, impl="fused", schedule=schedule).loss.backward()
        token_stats(hidden.detach(), weight, target, impl="fused")

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")

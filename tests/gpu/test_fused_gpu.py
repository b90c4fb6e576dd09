"""The compiled kernels on a GPU: parity as in the interpreter, and what only a GPU can show."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from sftmix_kernels import sftmix_loss
from tests.parity import Case, assert_parity, make_case, run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
dtypes = pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=["bfloat16", "float16", "float32"])


@pytest.fixture(autouse=True)
def poisoned_buffers() -> Iterator[None]:
    """torch.empty returns NaN, so that an unwritten element shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


# N, V, D, M, options, and why.
CASES: list[tuple[int, int, int, int, dict[str, Any], str]] = [
    (512, 2048, 256, 256, {}, "every size a multiple of its block, 2M = N"),
    (301, 1009, 136, 110, {"bias": True}, "ragged N, V, D; rows that descriptors can address"),
    (301, 1009, 131, 110, {"bias": True}, "an odd D: pointers"),
    (300, 1000, 136, 0, {}, "M = 0"),
    (3, 300, 64, 1, {}, "one pair and an unpaired row"),
    (5, 1, 1, 2, {}, "one class"),
    (
        301,
        1009,
        136,
        110,
        {"softcap": 5.0, "logit_scale": 0.7, "bias": True},
        "softcap after scale after bias",
    ),
    (300, 1009, 136, 0, {"softcap": 5.0, "bias": True}, "softcap, M = 0"),
    (301, 1009, 136, 150, {"lam": 0.0}, "lam 0"),
    (301, 1009, 136, 150, {"lam": 0.5}, "lam 1/2"),
    (301, 1009, 136, 150, {"lam": 1.0}, "lam 1"),
    (301, 1009, 136, 150, {"ignored": (0, 151, 2, 152, 300)}, "ignored on either side of a pair"),
    (301, 1009, 136, 110, {"logit_std": 1e4}, "logits of 10^4"),
    (301, 1009, 136, 110, {"upstream": 2.0**16}, "an upstream gradient of 2^16"),
    (
        301,
        1009,
        136,
        110,
        {"label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 5.0},
        "label smoothing and z-loss",
    ),
]


@dtypes
@pytest.mark.parametrize("scratch_bytes", [None, 1], ids=["two slices", "slices of one tile"])
@pytest.mark.parametrize("shape", CASES, ids=[c[5] for c in CASES])
def test_parity(dtype: torch.dtype, scratch_bytes: int | None, shape: tuple[Any, ...]) -> None:
    num_rows, vocab_size, width, num_pairs, options, _ = shape
    case = make_case(num_rows, vocab_size, width, num_pairs=num_pairs, dtype=dtype, **options)
    assert_parity(case, impl="fused", schedule="recompute", device="cuda", scratch_bytes=scratch_bytes)


@dtypes
@pytest.mark.parametrize("scratch_bytes", [None, 40_000], ids=["two chunks", "chunks of a few rows"])
@pytest.mark.parametrize("shape", CASES, ids=[c[5] for c in CASES])
def test_parity_of_the_stored_schedule(
    dtype: torch.dtype, scratch_bytes: int | None, shape: tuple[Any, ...]
) -> None:
    num_rows, vocab_size, width, num_pairs, options, _ = shape
    case = make_case(num_rows, vocab_size, width, num_pairs=num_pairs, dtype=dtype, **options)
    assert_parity(case, impl="fused", schedule="stored", device="cuda", scratch_bytes=scratch_bytes)


@dtypes
@pytest.mark.parametrize("labels", ["equal in a pair", "in the last column", "peaked"])
def test_parity_of_special_targets(dtype: torch.dtype, labels: str) -> None:
    case = make_case(200, 1009, 136, num_pairs=80, dtype=dtype)
    if labels == "equal in a pair":
        case.target[80:160] = case.target[:80]
    elif labels == "in the last column":
        case.target[:] = 1008
    else:
        case.hidden = (21 * torch.eye(136)[torch.arange(200) % 3]).to(dtype)
        case.weight = torch.eye(1009, 136).to(dtype)
        case.target = torch.arange(200) % 3
        case.target[1] = 50
    for schedule in ("recompute", "stored"):
        assert_parity(case, impl="fused", schedule=schedule, device="cuda")


@dtypes
@pytest.mark.parametrize("schedule", ["recompute", "stored"])
def test_two_runs_are_bitwise_equal(dtype: torch.dtype, schedule: str) -> None:
    case = make_case(700, 5003, 264, num_pairs=300, dtype=dtype, bias=True)
    first, second = (run(case, impl="fused", schedule=schedule, device="cuda") for _ in range(2))
    assert all(torch.equal(first[k], second[k]) for k in first)


def on_gpu(case: Case) -> tuple[Tensor, ...]:
    return tuple(t.cuda() for t in (case.hidden, case.weight, case.target, case.lam))


def forward_and_backward(arguments: tuple[Tensor, ...], **options: Any) -> tuple[Tensor, ...]:
    from tests.kernels.fused_calls import backward_of, forward_of

    stats = forward_of(*arguments, entropy=True)
    coefs = (torch.ones_like(arguments[2], dtype=F32), torch.ones_like(arguments[3]))
    return (*stats, *backward_of(*arguments, *coefs, stats.row_carry, stats.pair_carry, **options))


@dtypes
def test_descriptors_and_pointers_agree(dtype: torch.dtype) -> None:
    """The same products by either load path; a base off by one element turns descriptors off."""
    arguments = on_gpu(make_case(301, 1009, 136, num_pairs=110, dtype=dtype))
    shifted = tuple(torch.nn.functional.pad(t.flatten(), (1, 0))[1:].view_as(t) for t in arguments[:2])
    described, pointed = forward_and_backward(arguments), forward_and_backward((*shifted, *arguments[2:]))
    for left, right in zip(described, pointed, strict=True):
        torch.testing.assert_close(left, right)


@dtypes
def test_the_host_never_waits_and_a_graph_replays(dtype: torch.dtype) -> None:
    arguments = on_gpu(make_case(301, 1009, 136, num_pairs=110, dtype=dtype))
    eager = forward_and_backward(arguments)
    torch.cuda.set_sync_debug_mode("error")
    try:
        forward_and_backward(arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = forward_and_backward(arguments)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(left, right) for left, right in zip(eager, captured, strict=True))


def test_memory_stays_far_below_the_logits() -> None:
    """Extra memory of forward and backward, beside the results, at a size where the logits take 1 GiB."""
    from tests.kernels.fused_calls import backward_of, forward_of

    num_rows, vocab_size, width = 4096, 131072, 512
    hidden = torch.randn(num_rows, width, device="cuda", dtype=BF16)
    weight = torch.randn(vocab_size, width, device="cuda", dtype=BF16)
    target, lam = torch.randint(0, vocab_size, (num_rows,), device="cuda"), torch.rand(2048, device="cuda")
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    stats = forward_of(hidden, weight, target, lam)
    assert torch.cuda.max_memory_allocated() - before < 64 * 2**20
    coefs = (torch.ones(num_rows, device="cuda"), torch.ones_like(lam), stats.row_carry, stats.pair_carry)
    dweight = backward_of(hidden, weight, target, lam, *coefs)[1]
    assert torch.cuda.max_memory_allocated() - before - dweight.nbytes < 128 * 2**20


def test_offsets_past_two_to_the_31() -> None:
    """A weight of 2.1e9 elements (4.3 GB): the last rows lie past what 32 bits address."""
    from tests.kernels.fused_calls import forward_of

    width = 8192
    vocab_size = 2**31 // width + 1000
    if torch.cuda.mem_get_info()[0] < 16 * 2**30:
        pytest.skip("needs 16 GiB of GPU memory")
    weight = torch.zeros(vocab_size, width, device="cuda", dtype=BF16)
    weight[-1000:] = torch.randn(1000, width, device="cuda", dtype=BF16) / width**0.5
    hidden = torch.randn(128, width, device="cuda", dtype=BF16)
    target = torch.arange(vocab_size - 128, vocab_size, device="cuda")
    for start in (0, 1):  # descriptors, then pointers: a base off by one element
        h, w = hidden[:, start:], weight[:, start:]
        truth = (h.double() * w[target].double()).sum(1)
        stats = forward_of(h, w, target, torch.empty(0, device="cuda"))
        torch.testing.assert_close(stats.target_logit.double(), truth, rtol=1e-4, atol=1e-3)


def last_rows(schedule: str, device: str, *, num_rows: int, vocab_size: int, scratch_bytes: int) -> None:
    """Loss and gradient of the last rows of many against float64 of those alone."""
    g = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(num_rows, 64, device=device, generator=g).to(F16)
    weight = (torch.randn(vocab_size, 64, device=device, generator=g) / 8).to(F16)
    target = torch.randint(vocab_size, (num_rows,), device=device, generator=g)
    hidden.requires_grad_()
    lam = torch.empty(0, device=device)
    options: dict[str, Any] = {"impl": "fused", "schedule": schedule, "scratch_bytes": scratch_bytes}
    out = sftmix_loss(hidden, weight, target, lam, ntp_denominator=1, **options)
    out.loss.backward()
    assert hidden.grad is not None
    last = slice(num_rows - 16, num_rows)
    rows = hidden.detach()[last].double().requires_grad_()
    nll = torch.nn.functional.cross_entropy(rows @ weight.double().T, target[last], reduction="none")
    nll.sum().backward()
    assert rows.grad is not None
    torch.testing.assert_close(out.nll[last].double(), nll.detach(), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(hidden.grad[last].double(), rows.grad, rtol=1e-2, atol=2e-3)


@pytest.mark.parametrize("schedule", ["recompute", "stored"])
def test_dlogits_offsets_past_two_to_the_31(schedule: str) -> None:
    """A slice, or a chunk, of 2.1e9 dlogits (4.3 GB)."""
    if torch.cuda.mem_get_info()[0] < 16 * 2**30:
        pytest.skip("needs 16 GiB of GPU memory")
    last_rows(schedule, "cuda", num_rows=16512, vocab_size=262144, scratch_bytes=9 * 2**29)


def test_a_second_gpu_is_launched_on() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    arguments = tuple(t.to("cuda:1") for t in on_gpu(make_case(64, 100, 64, num_pairs=20)))
    for left, right in zip(
        forward_and_backward(arguments),
        forward_and_backward(tuple(t.to("cuda:0") for t in arguments)),
        strict=True,
    ):
        assert torch.equal(left.cpu(), right.cpu())

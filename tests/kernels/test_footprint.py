"""``loss_bytes`` against what calls hold: real ones on a CPU, those of GPUs traced on meta tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.model import counts
from bench.shapes import Shape
from bench.trace import Trace
from sftmix_kernels import loss_bytes, sftmix_loss

BOUND = 0.15


def near(found: int, expected: int) -> None:
    assert abs(found - expected) <= BOUND * expected, (found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "pairs", "vocab", "hidden"), [(512, 128, 4096, 128), (512, 0, 8192, 256), (384, 150, 8192, 64)]
)
def test_a_call_on_a_cpu_holds_what_is_said(
    dtype: torch.dtype, rows: int, pairs: int, vocab: int, hidden: int
) -> None:
    states, weight = (torch.randn(n, hidden).to(dtype).requires_grad_() for n in (rows, vocab))
    target, lam = torch.randint(vocab, (rows,)), torch.rand(pairs)
    trace = Trace()
    trace.ignore(states, weight, target, lam)
    with trace:
        loss = sftmix_loss(states, weight, target, lam).loss
        forward, trace.peak_bytes = trace.peak_bytes, 0
        loss.backward()
    found = loss_bytes(rows, vocab, hidden, dtype, num_pairs=pairs)
    near(found.forward, forward)
    near(found.backward, trace.peak_bytes)


@pytest.mark.parametrize("schedule", ["stored", "recompute"])
@pytest.mark.parametrize("rows", [2048, 16384])
def test_a_call_on_a_gpu_holds_what_is_said(schedule: str, rows: int) -> None:
    shape = Shape(rows, 128256, 4096)
    peak = counts(shape, "bfloat16", f"ours:{schedule}", "sftmix", "fwd_bwd", "sm_90").peak_bytes
    found = loss_bytes(
        shape.N, shape.V, shape.D, torch.bfloat16, num_pairs=shape.M, arch="sm_90", memory_bytes=10**12,
        schedule=schedule,
    )  # fmt: skip
    near(max(found.forward, found.backward), peak)


def test_the_way_is_the_one_that_a_call_would_take() -> None:
    told: dict[str, Any] = {"arch": "sm_90", "memory_bytes": 141 * 10**9}
    assert loss_bytes(256, 128256, 4096, torch.bfloat16, **told).way == "recompute"
    assert loss_bytes(8192, 128256, 4096, torch.bfloat16, **told).way == "stored"
    told["memory_bytes"] = 24 * 10**9  # a 32nd of it holds no float32 dweight
    assert loss_bytes(8192, 128256, 4096, torch.bfloat16, **told).way == "recompute"
    assert loss_bytes(8, 32, 16, torch.float32).way == "chunked"
    assert loss_bytes(8, 32, 16, torch.float32, impl="reference").way == "reference"


def test_a_frozen_head_has_no_gradient() -> None:
    whole, frozen = (loss_bytes(64, 4096, 64, torch.float32, dweight=dweight) for dweight in (True, False))
    assert whole.kept - frozen.kept == 4 * 4096 * 64


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_pairs": 9}, "num_pairs"),
        ({"impl": "fused"}, "impl"),
        ({"impl": "fast"}, "impl"),
        ({"schedule": "x"}, "schedule"),
    ],
)
def test_bad_input_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"{message}: expected"):
        loss_bytes(8, 32, 16, torch.float32, **changes)

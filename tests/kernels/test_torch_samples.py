"""torch's own samples of ``nn.functional.linear_cross_entropy`` run against ours: the same numbers, or a refusal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from sftmix_kernels import linear_cross_entropy

if not hasattr(torch.nn.functional, "linear_cross_entropy"):
    pytest.skip("torch has linear_cross_entropy from 2.13 on", allow_module_level=True)

pytest.importorskip("expecttest", reason="torch's operator database needs the package expecttest")
from torch.testing._internal.common_methods_invocations import op_db

NAME = "nn.functional.linear_cross_entropy"
OPS = [op for op in op_db if op.name == NAME]
DTYPES = {"chunked": (torch.float64, torch.float32), "fused": (torch.float32,)}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6}


def samples(dtype: torch.dtype) -> Iterator[tuple[Any, Any]]:
    """(torch's operator, sample) of every variant: its plain path and its chunked ones."""
    for op in OPS:
        for sample in op.sample_inputs("cpu", dtype, requires_grad=True):
            yield op, sample


def why_not_served(sample: Any) -> str | None:
    """What of ``sample`` ours has not, None where it has all."""
    weight, target = sample.args
    if weight.ndim > 2:
        return "K-dimensional classes"
    if target.dtype != torch.int64:
        return "probability targets"
    return "class weights" if "weight" in sample.kwargs else None


def ours(sample: Any, impl: str) -> Tensor:
    """torch's arguments by our names; its ``options`` choose a chunk, which ``scratch_bytes`` does here."""
    options = {k: v for k, v in sample.kwargs.items() if k not in ("linear_bias", "options")}
    bias = sample.kwargs.get("linear_bias")
    return linear_cross_entropy(
        sample.input, *sample.args, bias=bias, impl=impl, scratch_bytes=4 * sample.args[0].shape[0], **options
    )


def gradients(loss: Tensor, sample: Any) -> list[Tensor]:
    leaves = [sample.input, sample.args[0], sample.kwargs.get("linear_bias")]
    upstream = torch.linspace(0.5, 2, loss.numel(), dtype=loss.dtype).reshape(loss.shape)
    return list(torch.autograd.grad(loss, [t for t in leaves if t is not None], upstream))


@pytest.mark.parametrize("impl", ["chunked", "fused"])
def test_samples_that_are_served_give_torchs_values_and_gradients(impl: str) -> None:
    reductions: dict[str, int] = {}
    for dtype in DTYPES[impl]:
        for op, sample in samples(dtype):
            if why_not_served(sample):
                continue
            got, want = ours(sample, impl), op(sample.input, *sample.args, **sample.kwargs)
            rtol = TOLERANCE[dtype]
            torch.testing.assert_close(got, want, rtol=rtol, atol=rtol)
            for one, other in zip(gradients(got, sample), gradients(want, sample), strict=True):
                torch.testing.assert_close(one, other, rtol=10 * rtol, atol=10 * rtol)
            reduction = sample.kwargs.get("reduction", "mean")
            reductions[reduction] = reductions.get(reduction, 0) + 1
    assert reductions.keys() == {"mean", "sum", "none"}
    assert sum(reductions.values()) >= 30 * len(DTYPES[impl])


@pytest.mark.parametrize("impl", ["chunked", "fused"])
def test_samples_that_are_not_served_raise(impl: str) -> None:
    """Never a number that silently differs: each raises, and each of the three reasons occurs."""
    reasons = set()
    for _, sample in samples(torch.float32):
        reason = why_not_served(sample)
        if reason is None:
            continue
        reasons.add(reason)
        with pytest.raises((ValueError, TypeError), match=r"weight|target"):
            ours(sample, impl)
    assert reasons == {"K-dimensional classes", "probability targets", "class weights"}


def test_torchs_error_inputs_are_errors_here() -> None:
    count = 0
    for op in OPS:
        for error in op.error_inputs("cpu"):
            count += 1
            with pytest.raises(ValueError, match=r"hidden|weight|target|bias"):
                ours(error.sample_input, "chunked")
    assert count >= 6


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("impl", ["chunked", "fused"])
def test_label_smoothing_is_torchs(impl: str, reduction: str) -> None:
    """The samples leave label smoothing out; torch's function has it."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(9, 6, generator=g), torch.randn(7, 6, generator=g)
    target = torch.tensor([0, 6, 2, -100, 4, 1, 1, 3, 5])
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    results = []
    for function in (linear_cross_entropy, torch.nn.functional.linear_cross_entropy):
        extra: dict[str, Any] = {"impl": impl} if function is linear_cross_entropy else {}
        loss = function(hidden, weight, target, reduction=reduction, label_smoothing=0.3, **extra)
        upstream = torch.linspace(0.5, 2, loss.numel()).reshape(loss.shape)
        results.append((loss.detach(), *torch.autograd.grad(loss, leaves, upstream)))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-6, atol=2e-6)

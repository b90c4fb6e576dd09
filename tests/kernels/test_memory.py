"""What the loss holds in memory: traced peak bytes against the formula of each docstring.

On a CPU every allocation and release is traced, those inside the custom operators too (bench/measure.py). A formula
bounds the peak of forward and backward above inputs and gradients, and most of it must be there: a bound that nothing
comes near proves nothing. The logits of all rows, N V itemsize, are above every one of them.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.measure import peak_bytes
from sftmix_kernels import linear_cross_entropy, sftmix_loss, token_stats
from sftmix_kernels.chunked import layer, scratch
from tests.parity import Case, make_case

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
N, V, D = 128, 2048, 32
pairs = pytest.mark.parametrize("num_pairs", [0, 40, 64])
# One 16-bit type in `make test`, the other in `make slow`.
dtypes = pytest.mark.parametrize(
    "dtype", [F32, BF16, pytest.param(F16, marks=pytest.mark.slow)], ids=["float32", "bfloat16", "float16"]
)
# Statistics, coefficients (float64) and what makes them: bytes a row and a pair, whatever V and D are.
PER_ROW, PER_PAIR = 160, 160
needs_interpreter = pytest.mark.skipif(
    torch.cuda.is_available(), reason="on a GPU: tests/gpu/test_memory_graphs.py"
)


@pytest.fixture
def no_garbage(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Triton's interpreter leaves its arguments in reference cycles; they are collected after each launch."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    launch = interpreter.GridExecutor.__call__

    def clean(*args: Any, **kwargs: Any) -> None:
        launch(*args, **kwargs)
        gc.collect()

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", clean)
    gc.collect()
    gc.freeze()  # what is there already need not be looked at again
    yield
    gc.unfreeze()


def extra_bytes(case: Case, **options: Any) -> int:
    """Peak of forward and backward above inputs and gradients."""
    hidden, weight = case.hidden.requires_grad_(), case.weight.requires_grad_()

    def call() -> tuple[Tensor, ...]:
        loss = sftmix_loss(hidden, weight, case.target, case.lam, **{**case.options, **options}).loss
        return torch.autograd.grad(loss, (hidden, weight))

    return peak_bytes(call, "cpu") - hidden.nbytes - weight.nbytes


def assert_near(peak: int, bound: int) -> None:
    """At most the bound, and at least 70 % of it."""
    assert 0.7 * bound <= peak <= bound, f"{peak} bytes, bound {bound}"


def statistics_bytes(num_pairs: int) -> int:
    return PER_ROW * N + PER_PAIR * num_pairs


# --- chunked -------------------------------------------------------------------------------------------------------

WIDE = 10_000  # classes: a product of dweight, and a block of it that is scaled, are less than half of them
COLUMNS = scratch.PRODUCT_COLUMNS
SCRATCH = 24 * WIDE * 4


def library_bytes(dtype: torch.dtype, rows: int) -> int:
    """What the library holds for itself in a product of ``rows`` rows: oneDNN packs 16-bit operands."""
    dlogits, weight, hidden = (torch.ones(s, dtype=dtype) for s in ((rows, WIDE), (WIDE, D), (rows, D)))
    products = ((hidden, weight.t()), (dlogits, weight), (dlogits[:, :COLUMNS].t(), hidden))
    return max(peak_bytes(lambda: torch.mm(a, b), "cpu") - a.shape[0] * b.shape[1] * 2 for a, b in products)  # noqa: B023


def chunked_bytes(num_pairs: int, itemsize: int) -> int:
    """chunked.statistics_with_gradients, then made_bwd: the larger of what the two hold above the gradients."""
    rows = SCRATCH // (WIDE * itemsize)  # at most
    forward = SCRATCH + 2 * rows * D * itemsize + statistics_bytes(num_pairs)
    if itemsize == 4:
        return forward
    kept = 4 * WIDE * D + N * D * itemsize
    forward += kept + max((itemsize + 4) * COLUMNS * D, library_bytes(BF16, rows))
    backward = kept + 4 * COLUMNS * D + statistics_bytes(num_pairs)
    return max(forward - (N + WIDE) * D * itemsize, backward)


@pairs
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "z_loss": 1e-3}], ids=["plain", "smoothed"])
def test_chunked(dtype: torch.dtype, num_pairs: int, options: dict[str, float]) -> None:
    case = make_case(N, WIDE, D, num_pairs=num_pairs, dtype=dtype, **options)
    peak = extra_bytes(case, impl="chunked", scratch_bytes=SCRATCH)
    assert_near(peak, chunked_bytes(num_pairs, dtype.itemsize))


@pairs
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["float32", "bfloat16"])
def test_chunked_forward_and_statistics(dtype: torch.dtype, num_pairs: int) -> None:
    """Without gradients a tile that fills the scratch is all, the entropy's exponentials in it."""
    case = make_case(N, WIDE, D, num_pairs=num_pairs, dtype=dtype)
    arguments, beside = (
        (case.hidden, case.weight, case.target),
        SCRATCH // WIDE * D + statistics_bytes(num_pairs),
    )
    if layer.product_dtype(dtype, torch.device("cpu")) != dtype:  # rows and a slice of the weight, widened
        beside += 4 * N * D + 4 * layer.WIDENED_COLUMNS[1] * D
    loss = peak_bytes(lambda: sftmix_loss(*arguments, case.lam, impl="chunked", scratch_bytes=SCRATCH), "cpu")
    assert_near(loss, SCRATCH + beside)
    stats = peak_bytes(lambda: token_stats(*arguments, impl="chunked", scratch_bytes=SCRATCH), "cpu")
    assert_near(stats, SCRATCH + beside)


@pytest.mark.parametrize("num_pairs", [0, 64])
def test_chunked_never_holds_the_logits_of_all_rows_even_when_they_fit(num_pairs: int) -> None:
    case = make_case(N, V, D, num_pairs=num_pairs)
    assert extra_bytes(case, impl="chunked", scratch_bytes=2**30) < 0.9 * N * V * 4


# --- fused ---------------------------------------------------------------------------------------------------------
# `copies`: of 16-bit operands, in float32, where the library has no 16-bit product with a float32 result: not on a GPU.


def recompute_bytes(num_pairs: int, itemsize: int, columns: int, *, copies: bool = True) -> int:
    """fused/recompute.py: a slice of ``columns``, a copy of hidden; for 16 bits float32 dhidden, dweight's slice."""
    total = N * columns * itemsize + N * D * itemsize + statistics_bytes(num_pairs)
    if itemsize == 2:
        total += 4 * N * D + 4 * columns * D + copies * 4 * (N * columns + max(N, columns) * D)
    return total


@needs_interpreter
@pairs
@dtypes
def test_fused_recompute(no_garbage: None, dtype: torch.dtype, num_pairs: int) -> None:
    case, columns, size = make_case(N, V, D, num_pairs=num_pairs, dtype=dtype), 512, dtype.itemsize
    peak = extra_bytes(case, impl="fused", schedule="recompute", scratch_bytes=N * columns * size)
    assert_near(peak, recompute_bytes(num_pairs, size, columns))
    assert recompute_bytes(num_pairs, size, columns, copies=False) < N * V * size


def stored_bytes(num_pairs: int, itemsize: int, rows: int, *, copies: bool = True) -> int:
    """fused/stored.py: a chunk's logits and hidden states; for 16 bits float32 dweight and dhidden too."""
    total = rows * (V + D) * itemsize + statistics_bytes(num_pairs)
    if itemsize == 2:
        side = (
            rows if N > 2 * num_pairs else rows // 2
        )  # a pair's two sides are multiplied one after the other
        total += 4 * V * D + N * D * itemsize
        total += copies * 4 * max(side * (V + D) + V * D, rows * (V + D))
    return total


@needs_interpreter
@pairs
@dtypes
def test_fused_stored(no_garbage: None, dtype: torch.dtype, num_pairs: int) -> None:
    case, rows, size = make_case(N, V, D, num_pairs=num_pairs, dtype=dtype), 16, dtype.itemsize
    peak = extra_bytes(case, impl="fused", schedule="stored", scratch_bytes=rows * V * size)
    assert_near(peak, stored_bytes(num_pairs, size, rows))
    assert stored_bytes(num_pairs, size, rows, copies=False) < N * V * size


@needs_interpreter
@pairs
@dtypes
def test_fused_forward_and_statistics(no_garbage: None, dtype: torch.dtype, num_pairs: int) -> None:
    """Without gradients no schedule holds a logit: some floats for each row and pair."""
    case = make_case(N, V, D, num_pairs=num_pairs, dtype=dtype)
    arguments = (case.hidden, case.weight, case.target)
    calls = {
        "recompute": lambda: sftmix_loss(*arguments, case.lam, impl="fused", schedule="recompute"),
        "stored": lambda: sftmix_loss(*arguments, case.lam, impl="fused", schedule="stored"),
        "rows": lambda: linear_cross_entropy(*arguments, impl="fused", reduction="none"),
        "statistics": lambda: token_stats(*arguments, impl="fused"),
    }
    for name, call in calls.items():
        peak = peak_bytes(call, "cpu")
        assert 16 * N <= peak <= statistics_bytes(num_pairs) < N * V * dtype.itemsize / 16, name

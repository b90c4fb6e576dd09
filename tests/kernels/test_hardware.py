"""16-bit inputs where a device has no 16-bit products: who decides, and float32 products of a widened slice."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.measure import peak_bytes
from sftmix_kernels import hardware, linear_cross_entropy, product_support, sftmix_loss, token_stats
from sftmix_kernels.chunked import layer
from sftmix_kernels.hardware import ProductSupport, product_factor
from tests.kernels.watching import Bodies, LargestTensor, Products
from tests.parity import Case, assert_draws_within_contract, assert_parity, make_case, run

ROOT = Path(__file__).resolve().parents[2]
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
AVX2 = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
sixteen_bit = pytest.mark.parametrize("dtype", [BF16, F16], ids=["bfloat16", "float16"])


@pytest.fixture
def no_16_bit_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every device is taken for one without 16-bit products."""
    monkeypatch.setattr(
        layer,
        "product_support",
        lambda dtype, device: ProductSupport(dtype in (F32, torch.float64), "a test"),
    )


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """The answers kept from earlier calls are forgotten, before and after."""
    hardware._support.cache_clear()
    yield monkeypatch
    hardware._support.cache_clear()


# --- who decides ---------------------------------------------------------------------------------------------------


def answer_of(code: str, **environment: str) -> str:
    command = [sys.executable, "-c", f"import torch, sftmix_kernels as k; {code}"]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_a_restricted_cpu_has_no_16_bit_products() -> None:
    """Where a bfloat16 product takes many times a float32 one's time, the answer is no; and it does there."""
    code = "print(k.product_support(torch.bfloat16).in_hardware, k.product_factor(torch.bfloat16) > 4)"
    assert answer_of(code, **AVX2) == "False True"


@sixteen_bit
def test_the_answer_is_that_of_the_clock(dtype: torch.dtype) -> None:
    """Whatever this machine is: in hardware is not slower than float32 by much, and not in hardware is slower."""
    found, factor = product_support(dtype), product_factor(dtype)
    assert factor < 2 if found.in_hardware else factor > 1
    assert product_support(dtype) is found  # asked once


def test_torch_says_yes_and_the_clock_says_no(fresh: pytest.MonkeyPatch) -> None:
    """AVX-512 without its bfloat16 instructions: torch has a product, made of float32 ones and 2.5 times as long."""
    fresh.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True, raising=False)
    fresh.setattr(hardware, "product_factor", lambda dtype, device: 2.5)
    assert product_support(BF16) == ProductSupport(
        False, "a bfloat16 product takes 2.5 of a float32 one's time"
    )
    hardware._support.cache_clear()
    fresh.setattr(hardware, "product_factor", lambda dtype, device: 0.5)
    assert product_support(BF16).in_hardware


@pytest.mark.parametrize(
    "dtype,capability,found",
    [
        (BF16, (8, 0), True),
        (BF16, (7, 5), False),
        (BF16, (9, 0), True),
        (F16, (7, 0), True),
        (F16, (6, 1), False),
    ],
)
def test_an_nvidia_gpu_is_asked_for_its_capability(
    fresh: pytest.MonkeyPatch, dtype: torch.dtype, capability: tuple[int, int], found: bool
) -> None:
    fresh.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert product_support(dtype, "cuda").in_hardware is found


@pytest.mark.parametrize(
    "chip,found", [("gfx942:sramecc+", True), ("gfx90a", True), ("gfx1100", True), ("gfx906", False)]
)
def test_an_amd_gpu_is_asked_for_its_chip(fresh: pytest.MonkeyPatch, chip: str, found: bool) -> None:
    fresh.setattr(torch.version, "hip", "6.4")
    properties = type("Properties", (), {"gcnArchName": chip})()
    fresh.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert product_support(BF16, "cuda").in_hardware is found


def test_float32_is_everywhere_and_integers_are_refused() -> None:
    assert product_support(F32).in_hardware and product_support(torch.float64).in_hardware
    with pytest.raises(
        ValueError, match=r"^dtype: expected float32, float64, bfloat16 or float16, got torch\.int8$"
    ):
        product_support(torch.int8)


def test_a_tracer_neither_sees_nor_fakes_the_timed_product(fresh: pytest.MonkeyPatch) -> None:
    fresh.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True, raising=False)
    hardware._factor.cache_clear()
    with Bodies() as seen:
        product_support(BF16)
    assert "mm" not in seen.called


# --- float32 products ----------------------------------------------------------------------------------------------


@sixteen_bit
@pytest.mark.parametrize("num_pairs", [0, 24, 40], ids=["singles", "both", "pairs"])
@pytest.mark.parametrize(
    "options", [{}, {"softcap": 5.0, "bias": True, "label_smoothing": 0.1, "z_loss": 1e-3}]
)
def test_the_contract_holds(
    no_16_bit_products: None,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    num_pairs: int,
    options: dict[str, Any],
) -> None:
    """Several chunks and several slices of the weight, the last one ragged."""
    monkeypatch.setattr(layer, "WIDENED_COLUMNS", (8, 48))
    case = make_case(80, 131, 32, num_pairs=num_pairs, dtype=dtype, ignored=(3, 50), **options)
    assert_parity(case, impl="chunked", scratch_bytes=131 * 4 * 24, orders=4)


@sixteen_bit
def test_results_get_better(no_16_bit_products: None, dtype: torch.dtype) -> None:
    """Logits are not rounded to 16 bits: the loss of each row is right to float32, not to 2^-8."""
    case = make_case(64, 300, 48, num_pairs=32, dtype=dtype)
    truth, ours = run(case, impl="reference", dtype=torch.float64), run(case, impl="chunked")
    rounded = run(case, impl="reference")
    for name in ("nll", "mixup_nll", "lse"):
        error = (ours[name] - truth[name]).abs().max()
        assert error < 2e-5 and error < 0.05 * (rounded[name] - truth[name]).abs().max(), name


@sixteen_bit
def test_statistics_and_rows_without_a_reduction(no_16_bit_products: None, dtype: torch.dtype) -> None:
    case = make_case(64, 300, 48, dtype=dtype, ignored=(5,))
    exact = [t.double() for t in (case.hidden, case.weight)]
    ours, truth = (
        token_stats(*pair, case.target, impl=impl)
        for pair, impl in (((case.hidden, case.weight), "chunked"), (exact, "reference"))
    )
    for name in ("logprob", "lse", "entropy"):
        torch.testing.assert_close(getattr(ours, name).double(), getattr(truth, name), atol=2e-5, rtol=1e-6)
    upstream = torch.linspace(-1, 2, 64)
    grads = []
    for hidden, weight, impl in (
        (case.hidden, case.weight, "chunked"),
        (*exact, "reference"),
        (case.hidden, case.weight, "reference"),
    ):
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        losses = linear_cross_entropy(*leaves, case.target, reduction="none", impl=impl)
        grads.append(torch.autograd.grad(losses, leaves, upstream.to(losses.dtype)))
    for name, ours_, truth_, same in zip(("dhidden", "dweight"), *grads, strict=True):
        assert_draws_within_contract(name, [(ours_, same, truth_)])


@sixteen_bit
def test_a_main_gradient_gets_the_whole_sum(no_16_bit_products: None, dtype: torch.dtype) -> None:
    case = make_case(64, 300, 48, num_pairs=24, dtype=dtype)
    main_grad, before = (torch.full((300, 48), 2.0**-8) for _ in range(2))  # as large as the gradient
    weight = case.weight.clone().requires_grad_()
    sftmix_loss(case.hidden, weight, case.target, case.lam, main_grad=main_grad, impl="chunked",
                scratch_bytes=300 * 4 * 20).loss.backward()  # fmt: skip
    truth = run(case, impl="reference", dtype=torch.float64)["dweight"]
    torch.testing.assert_close((main_grad - before).double(), truth, atol=2e-7, rtol=2e-5)


def case_of_many_columns(dtype: torch.dtype) -> Case:
    return make_case(96, 20_000, 32, num_pairs=40, dtype=dtype)


@sixteen_bit
def test_nothing_of_the_weights_size_is_copied(
    no_16_bit_products: None, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """With a frozen weight no tensor of [V, D] is made at all, and the products are those of one pass and dhidden's."""
    case = case_of_many_columns(dtype)
    hidden = case.hidden.requires_grad_()
    with LargestTensor() as largest:
        sftmix_loss(hidden, case.weight, case.target, case.lam, impl="chunked", scratch_bytes=2**20)
    assert 2**18 < largest.nbytes <= 2**20 < 4 * case.weight.numel()
    with Products(monkeypatch) as products:
        sftmix_loss(hidden, case.weight, case.target, case.lam, impl="chunked", scratch_bytes=2**20)
    assert products.multiply_adds == 2 * 96 * 20_000 * 32


@sixteen_bit
def test_memory_is_that_of_the_docstring(no_16_bit_products: None, dtype: torch.dtype) -> None:
    """Of chunked: scratch, 8 n D, a slice of the weight, statistics, dhidden in 16 bits, dweight in float32."""
    case, scratch = case_of_many_columns(dtype), 2**21
    hidden, weight = case.hidden.requires_grad_(), case.weight.requires_grad_()
    vocab_size, width = weight.shape

    def call() -> tuple[Tensor, ...]:
        loss = sftmix_loss(hidden, weight, case.target, case.lam, impl="chunked", scratch_bytes=scratch).loss
        return torch.autograd.grad(loss, (hidden, weight))

    rows = scratch // (4 * vocab_size)
    widened = 8 * rows * width + 4 * width * layer.WIDENED_COLUMNS[1]
    kept = 4 * vocab_size * width + 2 * hidden.numel()
    bound = scratch + widened + kept + 320 * 96
    assert (
        0.7 * bound
        <= peak_bytes(call, "cpu") - hidden.nbytes - weight.nbytes + 2 * weight.numel()
        <= bound + weight.nbytes
    )

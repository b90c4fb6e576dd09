"""bfloat16 in Triton's interpreter (tests/bfloat16.py) against torch's own, over all bit patterns that differ."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("the interpreter is for machines without a GPU", allow_module_level=True)

import triton
import triton.language as tl

# numpy, by which the interpreter computes, tells of infinities and NaN that are meant.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
BF16, F32 = torch.bfloat16, torch.float32
SIZE = 1 << 16


@triton.jit
def cast_kernel(source, result, MODE: tl.constexpr, SIZE: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(result + at, tl.load(source + at).to(result.dtype.element_ty, fp_downcast_rounding=MODE))


@triton.jit
def arithmetic_kernel(left, right, result, OPERATION: tl.constexpr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    a, b = tl.load(left + at), tl.load(right + at)
    if OPERATION == "add":
        found = a + b
    elif OPERATION == "sub":
        found = a - b
    elif OPERATION == "mul":
        found = a * b
    elif OPERATION == "mul by 0.1":
        found = a * 0.1
    elif OPERATION == "neg":
        found = -a
    elif OPERATION == "abs":
        found = tl.abs(a)
    elif OPERATION == "fma":
        found = tl.fma(a, b, b)
    elif OPERATION == "clamp":
        found = tl.clamp(a, -2.0, 3.0).to(tl.bfloat16)
    elif OPERATION == "lt":
        found = a < b
    elif OPERATION == "ge":
        found = a >= b
    elif OPERATION == "eq":
        found = a == b
    elif OPERATION == "where":
        found = tl.where(a < b, a, b)
    tl.store(result + at, found)


@triton.jit
def dot_kernel(left, right, result, start, N: tl.constexpr, D: tl.constexpr, V: tl.constexpr):
    rows, inner, columns = tl.arange(0, N), tl.arange(0, D), tl.arange(0, V)
    a = tl.load(left + rows[:, None] * D + inner[None, :])
    b = tl.load(right + inner[:, None] * V + columns[None, :])
    acc = tl.zeros([N, V], dtype=tl.float32) + start
    tl.store(result + rows[:, None] * V + columns[None, :], tl.dot(a, b, acc))


def every_bfloat16() -> Tensor:
    """All 65,536 bit patterns: zeros, subnormals, infinities and NaN among them."""
    return torch.arange(SIZE, dtype=torch.int32).to(torch.uint16).view(BF16)


def around_every_bfloat16() -> Tensor:
    """float32 numbers: each bfloat16 one, the tie above it, the neighbours of both, and all below the next."""
    low = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=torch.int64)
    bits = (torch.arange(SIZE, dtype=torch.int64)[:, None] << 16) + low
    return bits.to(torch.uint32).view(F32).T.contiguous().flatten()


def cast(source: Tensor, dtype: torch.dtype, mode: str | None = None) -> Tensor:
    result = torch.empty(source.shape, dtype=dtype)
    cast_kernel[(source.numel() // SIZE,)](source, result, MODE=mode, SIZE=SIZE)
    return result


def assert_same(found: Tensor, expected: Tensor) -> None:
    """Bit for bit, the sign of zero too; NaN may be any NaN."""
    assert found.dtype == expected.dtype
    number = ~expected.isnan()
    assert torch.equal(found.isnan(), ~number)
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[found.element_size()]
    assert torch.equal(found[number].view(integers), expected[number].view(integers))


@pytest.mark.parametrize("dtype", [F32, torch.float64, torch.float16], ids=str)
def test_every_bit_pattern_is_widened(dtype: torch.dtype) -> None:
    source = every_bfloat16()
    assert_same(cast(source, dtype), source.to(dtype))


def test_every_tie_and_its_neighbours_are_rounded_to_even() -> None:
    source = around_every_bfloat16()
    found = cast(source, BF16)
    assert_same(found, source.to(BF16))
    assert found.isinf().sum() > 6 and found.isnan().sum() == source.isnan().sum() > 700


def test_there_and_back_changes_nothing() -> None:
    source = every_bfloat16()
    assert_same(cast(cast(source, F32), BF16), source)


def test_rounding_towards_zero_where_it_is_asked_for() -> None:
    source = around_every_bfloat16()
    expected = (source.view(torch.int32) >> 16).to(torch.int16).view(BF16)
    expected[source.isnan()] = float("nan")
    assert_same(cast(source, BF16, "rtz"), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int32, torch.int16], ids=str)
def test_other_types_are_rounded(dtype: torch.dtype) -> None:
    if dtype.is_floating_point:
        bits = {torch.float64: around_every_bfloat16().double(), torch.float16: every_bfloat16().view(dtype)}
        source = bits[dtype]
    else:
        source = torch.arange(SIZE).sub(SIZE // 2).mul(1 if dtype is torch.int16 else 65_521).to(dtype)
    assert_same(cast(source, BF16), source.to(BF16))


def test_integers_are_cut_off() -> None:
    source = every_bfloat16()
    source = torch.where(source.abs() < 2**31, source, 7.5)
    assert torch.equal(cast(source, torch.int32), source.to(torch.int32))


OPERATIONS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "add": torch.add, "sub": torch.sub, "mul": torch.mul, "mul by 0.1": lambda a, b: a * torch.tensor(0.1, dtype=BF16),
    "neg": lambda a, b: 0 - a, "abs": lambda a, b: a.abs(), "lt": torch.lt, "ge": torch.ge, "eq": torch.eq,
    "where": lambda a, b: torch.where(a < b, a, b),
    "fma": lambda a, b: (a.float() * b.float() + b.float()).to(BF16), "clamp": lambda a, b: a.clamp(-2, 3),
}  # fmt: skip


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("near", [False, True], ids=["any two", "near in size"])
def test_arithmetic_and_comparisons_are_torchs(operation: str, near: bool) -> None:
    """Each bit pattern with another one: any other, or one within a factor of 2, so that sums cancel and tie."""
    left = every_bfloat16()
    order = torch.arange(SIZE).roll(37) if near else torch.randperm(SIZE)
    right = left[order]
    expected = OPERATIONS[operation](left, right)
    result = torch.empty(SIZE, dtype=expected.dtype)
    arithmetic_kernel[(1,)](left, right, result, OPERATION=operation, SIZE=SIZE)
    assert_same(result, expected)


def multiply(left: Tensor, right: Tensor, start: int) -> Tensor:
    """start + left right, as the kernel accumulates it."""
    result = torch.empty(left.shape[0], right.shape[1])
    dot_kernel[(1,)](left, right, result, start, N=left.shape[0], D=left.shape[1], V=right.shape[1])
    return result


def test_products_are_those_of_the_widened_operands() -> None:
    """Within float32's error of a sum of 64, whatever the order; exactly where every partial sum is an integer."""
    left, right = torch.randn(32, 64).to(BF16), torch.randn(64, 16).to(BF16)
    truth = 1 + left.double() @ right.double()
    bound = 64 * torch.finfo(F32).eps * (1 + left.double().abs() @ right.double().abs())
    assert ((multiply(left, right, 1) - truth).abs() <= bound).all()
    left, right = (torch.randint(-200, 201, shape).to(BF16) for shape in ((32, 64), (64, 16)))
    assert torch.equal(multiply(left, right, 3), 3 + left.float() @ right.float())


def test_every_bit_pattern_is_multiplied() -> None:
    """By 1 on either side, and by others that make subnormal numbers and infinities of it."""
    factors = torch.tensor([1, -1, 2.0**-7, 3, 2.0**100, 0, float("inf"), float("nan")] * 2, dtype=BF16)
    numbers, rest = every_bfloat16()[:, None], torch.zeros(SIZE, 15, dtype=BF16)
    left, right = torch.cat([numbers, rest], dim=1), torch.cat([factors[None], rest[:15, :1].expand(15, 16)])
    for found in (multiply(left, right, 0), multiply(right.T.contiguous(), left.T.contiguous(), 0).T):
        # A sum that starts at 0 has no -0.
        assert_same(found.contiguous(), numbers.float() * factors.float() + 0)

"""No kernel reads or writes past a tensor's end: tests/bounds.py finds it where one does, and sees every kernel."""

from __future__ import annotations

import pkgutil
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("the interpreter is for machines without a GPU", allow_module_level=True)

import triton
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError
from triton.tools.tensor_descriptor import TensorDescriptor

from sftmix_kernels import fused, sftmix_loss, token_stats
from sftmix_kernels.fused import Tile, forward, tiles
from tests.bounds import outside
from tests.parity import make_case

ITEM = 4  # bytes


@pytest.mark.parametrize(
    "tensor, inside",
    [
        (torch.arange(6.0), {0, 1, 2, 3, 4, 5}),
        (torch.arange(6.0)[2:4], {0, 1}),
        (torch.zeros(3, 4)[:, 1:3], {0, 1, 4, 5, 8, 9}),
        (torch.zeros(3, 4).T[:2], {0, 1, 4, 5, 8, 9}),
        (torch.zeros(1, 3).expand(5, 3), {0, 1, 2}),
        (torch.zeros(2, 3, 4)[:, ::2, ::3], {0, 3, 8, 11, 12, 15, 20, 23}),
        (torch.zeros(()), {0}),
        (torch.zeros(0, 3), set()),
    ],
    ids=["vector", "part of one", "part of rows", "columns", "expanded", "steps", "number", "empty"],
)
def test_outside_is_what_is_no_element(tensor: Tensor, inside: set[int]) -> None:
    elements = torch.arange(-30, 60)
    addresses = (elements * ITEM + tensor.data_ptr()).numpy().astype("uint64")
    assert set(outside(tensor, addresses).tolist()) == set(elements.tolist()) - inside


@triton.jit
def copy_kernel(source, result, first, num_read, num_written, BLOCK: tl.constexpr):
    at = first + tl.arange(0, BLOCK)
    tl.store(result + at, tl.load(source + at, mask=at < num_read, other=0.0), mask=at < num_written)


@triton.jit
def descriptor_kernel(source, result, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(result + at[:, None] * BLOCK + at[None, :], source.load([2, 0]))


def test_a_mask_keeps_inside() -> None:
    source, result = torch.randn(13), torch.zeros(13)
    copy_kernel[(1,)](source, result, 0, 13, 13, BLOCK=16)
    assert torch.equal(result, source)


@pytest.mark.parametrize(
    "first, num_read, num_written, message",
    [
        (0, 14, 13, r"1 addresses outside torch.float32 \[13\] with strides \[1\], elements 13 to 13"),
        (0, 16, 13, "3 addresses outside .* elements 13 to 15"),
        (0, 13, 16, "3 addresses outside .* elements 13 to 15"),
        (-2, 13, 13, "2 addresses outside .* elements -2 to -1"),
    ],
    ids=["one read", "reads", "writes", "before the start"],
)
def test_what_lies_outside_is_refused(first: int, num_read: int, num_written: int, message: str) -> None:
    with pytest.raises(InterpreterError, match=message):
        copy_kernel[(1,)](torch.randn(13), torch.zeros(13), first, num_read, num_written, BLOCK=16)


def test_a_neighbour_in_the_same_memory_is_outside_and_so_is_a_gap_between_rows() -> None:
    memory = torch.randn(64)
    with pytest.raises(InterpreterError, match=r"3 addresses outside .* elements 13 to 15"):
        copy_kernel[(1,)](memory[:13], memory[16:32], 0, 16, 13, BLOCK=16)
    rows = memory.view(8, 8)[:, :6]
    with pytest.raises(InterpreterError, match=r"4 addresses outside .* elements 6 to 15"):
        copy_kernel[(1,)](rows, torch.zeros(16), 0, 16, 16, BLOCK=16)


def test_descriptors_stop_at_their_shape() -> None:
    """And where the shape said is not the tensor's, it shows."""
    source, result = torch.randn(13, 8), torch.full((16, 16), float("nan"))
    descriptor_kernel[(1,)](TensorDescriptor.from_tensor(source, [16, 16]), result, BLOCK=16)
    assert torch.equal(result[:11, :8], source[2:]) and result.count_nonzero() == 88
    with pytest.raises(InterpreterError, match="24 addresses outside"):
        descriptor_kernel[(1,)](TensorDescriptor(source, [16, 8], [8, 1], [16, 16]), result, BLOCK=16)


@triton.jit
def unmasked_bias(affine, bias, offs_v, vocab_size):
    return affine + tl.load(bias + offs_v).to(tl.float32)[None, :]


@triton.jit
def unmasked_target(target, rows, mask, first_column, num_columns):
    y = tl.load(target + rows) - first_column
    return tl.where((y >= 0) & (y < num_columns), y, -1).to(tl.int32)


SMALL = {
    "pointers": Tile(16, 32, 16, group_n=2),
    "descriptors": Tile(16, 32, 16, group_n=2, use_descriptors=True),
}


def cut_small(monkeypatch: pytest.MonkeyPatch, tile: Tile) -> None:
    monkeypatch.setattr(tiles, "choose_tile", lambda *_, **__: tile)
    monkeypatch.setattr(forward, "choose_num_splits", lambda *_: 3)


@pytest.mark.parametrize("name, without", [("with_bias", unmasked_bias), ("load_target", unmasked_target)])
def test_a_kernel_without_one_of_its_masks_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, without: Any
) -> None:
    case = make_case(37, 101, 24, num_pairs=13, bias=True)
    arguments = (case.hidden, case.weight, case.target, case.lam)
    cut_small(monkeypatch, SMALL["pointers"])
    assert sftmix_loss(*arguments, bias=case.bias, impl="fused").loss.isfinite()
    monkeypatch.setattr(forward, name, without)
    with pytest.raises(InterpreterError, match="addresses outside"):
        sftmix_loss(*arguments, bias=case.bias, impl="fused")


def every_kernel() -> set[str]:
    """Names of the kernels in the fused implementation's files."""
    modules = [import_module(f"{fused.__name__}.{m.name}") for m in pkgutil.iter_modules(fused.__path__)]
    functions = [
        f for m in modules for f in vars(m).values() if isinstance(f, interpreter.InterpretedFunction)
    ]
    return {f.__name__ for f in functions if f.__name__.endswith("_kernel")}


@pytest.mark.parametrize("path", SMALL)
def test_every_kernel_stays_inside_at_ragged_sizes(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    """One past and one short of each block, in every mode; what the launches of this test did not see is no proof."""
    launched, launch = set(), interpreter.GridExecutor.__call__

    def seen(executor: Any, *args: Any, **kwargs: Any) -> None:
        launched.add(executor.fn.__name__)
        launch(executor, *args, **kwargs)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", seen)
    cut_small(monkeypatch, SMALL[path])
    for num_rows, vocab_size, width, num_pairs in ((37, 33, 24, 17), (3, 1, 1, 1), (15, 31, 40, 0)):
        options: dict[str, Any] = {"softcap": 5.0, "label_smoothing": 0.1, "z_loss": 1e-3, "ignored": (2,)}
        case = make_case(
            num_rows, vocab_size, width, num_pairs=num_pairs, dtype=torch.bfloat16, bias=True, **options
        )
        hidden, weight = case.hidden.requires_grad_(), case.weight.requires_grad_()
        lora = torch.randn(5, width).bfloat16(), torch.randn(vocab_size, 5).bfloat16(), 0.5
        common: dict[str, Any] = {"bias": case.bias, "impl": "fused"}
        for schedule, adapter in (("recompute", lora), ("stored", None)):
            loss = sftmix_loss(
                hidden, weight, case.target, case.lam, schedule=schedule, scratch_bytes=1, lora=adapter,
                **common, **case.options,
            ).loss  # fmt: skip
            assert all(g.isfinite().all() for g in torch.autograd.grad(loss, (hidden, weight)))
        assert token_stats(hidden, weight, case.target, **common).entropy.isfinite().all()
        given = case.target[:, None].repeat(1, 2)
        found = token_stats(hidden, weight, case.target, tokens=given, differentiable=True, **common)
        assert found.token_logprob is not None
        upstream = found.entropy.sum() + found.token_logprob.sum()
        assert all(g.isfinite().all() for g in torch.autograd.grad(upstream, (hidden, weight)))
    assert launched == every_kernel() and len(launched) > 2

"""Which schedule serves a call that names none: the faster by the cost model, within the bound, one guard on N."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor

pytest.importorskip("triton")
from sftmix_kernels import LossHead, SFTMixLoss, choice, fused, linear_cross_entropy, sftmix_loss
from sftmix_kernels.call import NAMESPACE, Needs
from sftmix_kernels.fused import schedule as model
from sftmix_kernels.fused.schedule import GRID, Sizes, choose_schedule, recompute_s, stored_from, stored_s
from tests.kernels.calls import Called
from tests.parity import make_case

ROOT = Path(__file__).resolve().parents[2]
BF16 = torch.bfloat16
HEADS = [(128256, 4096), (151936, 3584), (256000, 2304), (49152, 576), (32000, 4096), (50257, 768)]
ARCHS = ["sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950"]
llama = Sizes(128256, 4096, BF16, "sm_90")


AGAIN, MADE = ["terms_fwd", "terms_bwd"], ["made_fwd"]
BOUND = 2**40  # bytes that ``stored`` may take by default


def call(num_rows: int = 40, *, grad: str = "hw", **options: Any) -> list[str]:
    """Operators of a forward and backward on V = 33, D = 16."""
    case = make_case(num_rows, 33, 16, num_pairs=6)
    case.hidden.requires_grad_("h" in grad)
    case.weight.requires_grad_("w" in grad)
    with Called() as seen:
        loss = sftmix_loss(case.hidden, case.weight, case.target, case.lam, impl="fused", **options).loss
        if loss.requires_grad:
            loss.backward()
    return seen.names


def test_main_grad_takes_the_schedule_without_a_second_buffer(from_32_rows: list[tuple[Any, ...]]) -> None:
    """Where 40 rows would go to ``stored``; a named schedule is obeyed."""
    assert call() == MADE
    assert call(main_grad=torch.zeros(33, 16)) == ["terms_fwd", "terms_bwd_into"]
    assert call(main_grad=torch.zeros(33, 16), schedule="stored") == ["made_fwd", "made_bwd_into"]


@pytest.fixture
def from_32_rows(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """A chip on which ``stored`` is faster from 32 rows on; what the choice was asked."""
    asked: list[tuple[Any, ...]] = []

    @choice.constant
    def threshold(*arguments: Any) -> int:
        asked.append(arguments)
        return 32

    @choice.constant
    def arch(device: torch.device) -> str:
        return "sm_90"

    monkeypatch.setattr(choice, "stored_from", threshold)
    monkeypatch.setattr(choice, "architecture", arch)
    monkeypatch.setattr(choice, "default_bound", choice.constant(lambda device: BOUND))
    return asked


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(("V", "D"), HEADS)
@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=str)
@pytest.mark.parametrize("scratch_bytes", [None, 2**34, 2**26], ids=["no bound", "16 GiB", "64 MiB"])
def test_the_choice_is_the_faster_one(
    arch: str, V: int, D: int, dtype: torch.dtype, scratch_bytes: int | None
) -> None:
    """At every size of the grid, but for 10 % where one number must stand for a crossing that is not sharp."""
    sizes = Sizes(V, D, dtype, arch, scratch_bytes=scratch_bytes)
    for num_rows in GRID:
        chosen = choose_schedule(num_rows, sizes)
        if scratch_bytes is not None and sizes.dweight_bytes + 2 * sizes.row_bytes > scratch_bytes:
            assert chosen == "recompute"
            continue
        seconds = {"recompute": recompute_s(sizes, num_rows), "stored": stored_s(sizes, num_rows)}
        assert seconds[chosen] <= 1.10 * min(seconds.values()), (num_rows, seconds)


def test_both_schedules_are_chosen_where_they_should_be() -> None:
    """Few rows do not pay for stored's traffic, many do; a small bound leaves recompute alone."""
    assert choose_schedule(256, llama) == "recompute"
    assert choose_schedule(8192, llama) == "stored"
    room = llama.dweight_bytes + 2 * llama.row_bytes
    assert choose_schedule(8192, replace(llama, scratch_bytes=room - 1)) == "recompute"
    assert stored_from(replace(llama, scratch_bytes=llama.dweight_bytes + 2**30)) is not None
    frozen = replace(llama, need_dweight=False)
    assert (
        frozen.dweight_bytes == 0 and choose_schedule(8192, replace(frozen, scratch_bytes=2**30)) == "stored"
    )
    least = stored_from(llama)
    assert least is not None
    assert (choose_schedule(least - 1, llama), choose_schedule(least, llama)) == ("recompute", "stored")
    assert choose_schedule(2**30, replace(llama, arch="interpreter")) == "recompute"


def test_more_work_takes_longer() -> None:
    for cost in (recompute_s, stored_s):
        base = cost(llama, 8192)
        assert cost(llama, 16384) > 1.9 * base
        assert cost(replace(llama, vocab_size=2 * llama.vocab_size), 8192) > 1.9 * base
        assert cost(replace(llama, need_dweight=False), 8192) < 0.85 * base
        assert cost(replace(llama, need_dhidden=False), 8192) < 0.85 * base
        assert cost(replace(llama, dtype=torch.float32), 8192) > 5 * base
    small = replace(llama, scratch_bytes=2**23)
    assert recompute_s(small, 8192) > recompute_s(llama, 8192)


def test_every_tile_table_has_a_chip() -> None:
    assert set(model.CHIPS) == {model.table_arch(arch) for arch in ARCHS}
    for arch in ARCHS:
        assert Sizes(1000, 64, BF16, arch).chip is model.CHIPS[model.table_arch(arch)]


# --- the public functions ----------------------------------------------------------------------------------------


def test_without_a_gpu_none_is_recompute() -> None:
    assert call(64) == AGAIN
    assert call(64, schedule="stored") == MADE


def test_none_takes_the_schedule_of_the_choice(from_32_rows: list[tuple[Any, ...]]) -> None:
    assert call(31) == AGAIN
    assert call(32) == MADE
    assert call(32, schedule="recompute") == AGAIN
    assert call(31, schedule="stored") == MADE
    assert call(32, grad="h")[0] == call(32, grad="w")[0] == "made_fwd"
    assert call(32, grad="") == call(32, grad="", schedule="stored") == ["terms_fwd"]
    assert from_32_rows[0] == (33, 16, torch.float32, "sm_90", (True, True, False, False, False), BOUND)
    assert from_32_rows[-1] == (33, 16, torch.float32, "sm_90", (False, True, False, False, False), BOUND)
    case = make_case(40, 33, 16)
    with Called() as seen:
        linear_cross_entropy(
            case.hidden.requires_grad_(), case.weight, case.target, impl="fused", reduction="none"
        ).sum().backward()
    assert seen.names == AGAIN


def test_dweights_sum_comes_off_the_bound(
    from_32_rows: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sftmix_kernels.fused import stored

    given: list[int] = []
    chunks = stored._chunks
    monkeypatch.setattr(stored, "_chunks", lambda *sizes: given.append(sizes[3]) or chunks(*sizes))
    call(scratch_bytes=10_000)
    call(scratch_bytes=10_000, grad="h")
    call(scratch_bytes=10_000, schedule="stored")
    call()
    usual = choice.DEFAULT_ROWS * 48 * 4  # rows of whole 16 elements
    assert given == [10_000 - 4 * 33 * 16, 10_000, 10_000, usual]
    assert from_32_rows[0][-1] == 10_000


def test_stored_is_taken_by_default_within_a_share_of_the_memory(h100: None) -> None:
    """80 GB: a float32 dweight of 2.1 GB and a chunk fit 1/32 of it, one of 2.4 GB and a chunk do not."""
    bound = choice.default_bound(torch.device("cuda"))
    assert bound == 80 * 10**9 // 32
    shapes = {(128256, 4096): True, (256000, 2304): False, (49152, 576): True}
    for (V, D), taken in shapes.items():
        sizes = Sizes(V, D, BF16, "sm_90", scratch_bytes=bound)
        assert (stored_from(sizes) is not None) == taken
        if taken:
            assert sizes.dweight_bytes + 2 * sizes.row_bytes <= bound


def step(hidden: Tensor, weight: Tensor, target: Tensor, lam: Tensor) -> Tensor:
    return sftmix_loss(hidden, weight, target, lam, impl="fused").loss


@pytest.mark.parametrize("how", ["dynamic=True", "mark_dynamic"])
def test_a_changing_n_compiles_each_side_of_the_choice_once(
    how: str, from_32_rows: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under compile N is compared with one number: two graphs at most, whatever the sizes, and the right schedule."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        step, fullgraph=True, backend=counter, dynamic=True if how == "dynamic=True" else None
    )
    stored: list[int] = []
    run = fused.statistics_with_gradients

    def record(call: Any, coef: Any) -> Any:
        stored.append(call.sizes[0])
        return run(call, coef)

    monkeypatch.setattr(fused, "statistics_with_gradients", record)
    sizes, frames = (48, 40, 33, 57, 20, 30, 25, 64), []
    for num_rows in sizes:
        case = make_case(num_rows, 33, 16, num_pairs=num_rows // 4)
        leaves = [case.hidden.requires_grad_(), case.weight.requires_grad_()]
        if how == "mark_dynamic":
            for tensor in (case.hidden, case.target, case.lam):
                torch._dynamo.mark_dynamic(tensor, 0)
        torch.autograd.grad(compiled(case.hidden, case.weight, case.target, case.lam), leaves)
        frames.append(counter.frame_count)
    assert stored == [size for size in sizes if size >= 32]
    assert [count - frames[0] for count in frames] == [0, 0, 0, 0, 1, 1, 1, 1] and frames[0] <= 2


class Step(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = LossHead(16, 33)

    def forward(self, hidden: Tensor, target: Tensor, lam: Tensor) -> SFTMixLoss:
        return self.head(hidden * 2, target, lam, impl="fused")


@pytest.mark.parametrize("strict", [False, True])
def test_export_keeps_n_dynamic_on_its_side(strict: bool, from_32_rows: list[tuple[Any, ...]]) -> None:
    case = make_case(48, 33, 16, num_pairs=9)
    free = torch.export.Dim.DYNAMIC
    program = torch.export.export(
        Step(),
        (case.hidden, case.target, case.lam),
        dynamic_shapes=({0: free}, {0: free}, {0: free}),
        strict=strict,
    )
    names = [str(node.target) for node in program.graph.nodes]
    assert sum(f"{NAMESPACE}.made_fwd" in name for name in names) == 1
    for num_rows in (32, 57):
        case = make_case(num_rows, 33, 16, num_pairs=9)
        program.module()(case.hidden, case.target, case.lam)
    small = make_case(20, 33, 16, num_pairs=9)
    with pytest.raises(AssertionError):
        program.module()(small.hidden, small.target, small.lam)


def test_triton_is_not_imported_where_fused_does_not_run() -> None:
    code = (
        "import sys, torch; from sftmix_kernels import sftmix_loss; h = torch.randn(8, 4, requires_grad=True)\n"
        "assert 'triton' not in sys.modules and 'torch._dynamo' not in sys.modules\n"
        "sftmix_loss(h, torch.randn(9, 4), torch.arange(8), torch.rand(4)).loss.backward()\n"
        "assert 'sftmix_kernels.fused' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_chunked_off_a_cpu_takes_larger_chunks() -> None:
    """64 MiB of a head of 128k are chunks of 130 rows: on a GPU nothing but launches and passes over dweight."""
    kinds: dict[str, Any] = {"rows": False, "vocab_parallel": False, "main_grad": False, "schedule": None}
    for device, expected in (("cpu", 64 * 2**20), ("mps", 512 * 2**20)):
        head = choice.HeadFacts(torch.device(device), torch.float32, 20, 33, 16)
        for scratch, bound in ((None, expected), (1000, 1000)):
            needs = Needs(True, True, False, False, False)
            assert (
                choice.choose("chunked", head, needs, scratch_bytes=scratch, **kinds).scratch_bytes == bound
            )

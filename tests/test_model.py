"""The counted model counts what runs: products, launches, flops and peak bytes of real calls, to the last one."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("triton")
from bench import model, targets
from bench.figures import Figure, write_figures
from bench.measure import peak_bytes
from bench.problem import Problem
from bench.providers import choose
from bench.shapes import SHAPE_SETS, Shape
from bench.trace import Trace, recording, trace_call
from sftmix_kernels.fused import schedule

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="counts the interpreter's launches")
SMALL = Shape(64, 320, 48)
CALLS = [
    ("ours:recompute", "sftmix"), ("ours:recompute", "ntp"), ("ours:recompute", "stats"),
    ("ours:recompute", "planned"), ("ours:stored", "sftmix"), ("ours:stored", "ntp"), ("torch:4 GEMMs", "gemm"),
]  # fmt: skip
calls = pytest.mark.parametrize(("spec", "task"), CALLS, ids=[" ".join(call) for call in CALLS])


def traced(problem: Problem, spec: str, task: str, *, launching: bool) -> Trace:
    (provider,) = choose(spec)
    call = provider.build(problem, task)
    return trace_call(lambda: step(call, task), problem.tensors, launching=launching)


def step(call: Any, task: str) -> Any:
    if task in ("stats", "gemm"):
        return call()
    loss = call()
    loss.backward()
    return loss


@contextmanager
def dots() -> Iterator[list[int]]:
    """Flops of every tl.dot that the interpreter executes."""
    from triton.runtime import interpreter

    run, counted = interpreter.InterpreterBuilder.create_dot, []

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        counted.append(2 * a.data.shape[-2] * a.data.shape[-1] * b.data.shape[-1])
        return run(self, a, b, *rest)

    interpreter.InterpreterBuilder.create_dot = create_dot
    try:
        yield counted
    finally:
        interpreter.InterpreterBuilder.create_dot = run


@calls
def test_a_count_without_values_is_that_of_the_running_code(spec: str, task: str) -> None:
    """Meta tensors and real ones in the interpreter: the same products, launches with their arguments, and bytes."""
    counted = traced(Problem.on_meta(SMALL, "float32"), spec, task, launching=False)
    real = traced(Problem(SMALL, "float32", "cpu"), spec, task, launching=True)

    def main(trace: Trace) -> list[Any]:
        # In float32 a CPU hands its gradients over unscaled.
        return [
            event for event in trace.events if event.kind != "pass" and event.name != "_sftmix_round_kernel"
        ]

    assert main(counted) == main(real) and main(real)
    assert [event.arguments for event in main(counted)] == [event.arguments for event in main(real)]


@calls
def test_flops_are_torchs_and_the_interpreters(spec: str, task: str) -> None:
    """Library products against torch's own counter, kernels' products against every dot that is executed."""
    problem = Problem(SMALL, "float32", "cpu")
    in_place = {torch.ops.aten.addmm_: _product_flops}  # which torch's counter leaves out
    with FlopCounterMode(display=False, custom_mapping=in_place) as torchs, dots() as executed:
        trace = traced(problem, spec, task, launching=True)
    assert sum(event.flops for event in trace.events) == torchs.get_total_flops()
    kernels = [event for event in trace.events if event.kind == "kernel" and "hidden_c" in event.arguments]
    assert sum(_dot_flops(event) for event in kernels) == sum(executed)
    unit = 2 * SMALL.N * SMALL.V * SMALL.D
    counted = sum(model.kernel_cost(event, "sm_90")[0] for event in kernels)
    if task == "sftmix":
        units = {"ours:recompute": (2, 2), "ours:stored": (3, 0)}[spec]
        assert (torchs.get_total_flops(), counted) == (units[0] * unit, units[1] * unit)


def _product_flops(total: Any, left: Any, right: Any, *rest: Any, **options: Any) -> int:
    return 2 * left[0] * left[1] * right[1]


def _dot_flops(event: Any) -> int:
    """With the padding of the tiles, from grid and arguments."""
    a, planes = event.arguments, 2 if event.arguments["PAIRED"] else 1
    depth = -(-a["hidden_size"] // a["BLOCK_D"]) * a["BLOCK_D"]
    tiles = -(-a["vocab_size"] // a["BLOCK_V"]) * a["num_blocks_n"]
    return tiles * planes * 2 * a["BLOCK_N"] * a["BLOCK_V"] * depth


@calls
def test_the_peak_is_that_of_traced_allocations(spec: str, task: str) -> None:
    """The profiler's record of every allocation of a real call, against tensors alive in the count; scalars aside.

    Launches are left out of the real call: kernels allocate nothing, but the interpreter copies their arguments.
    """
    shape = Shape(512, 2048, 64)
    counted = traced(Problem.on_meta(shape, "float32"), spec, task, launching=False)
    problem = Problem(shape, "float32", "cpu")
    (provider,) = choose(spec)
    call = provider.build(problem, task)
    step(call, task)
    problem.clear_gradients()
    with recording(Trace(), launching=False):
        real = peak_bytes(lambda: step(call, task), "cpu")
    assert abs(real - counted.peak_bytes) <= 64


@pytest.mark.parametrize("shape", SHAPE_SETS["record"], ids=str)
def test_what_the_issue_bounds(shape: Shape) -> None:
    """Units of work, and rows 4 and 5 of memory: recompute's peak, and no buffer of more than a slice or dhidden."""
    recompute = model.counts(shape, "bfloat16", "ours:recompute", "sftmix", "fwd_bwd")
    stored = model.counts(shape, "bfloat16", "ours:stored", "sftmix", "fwd_bwd")
    unit = 2 * shape.N * shape.V * shape.D
    assert (recompute.flops, stored.flops) == (4 * unit, 3 * unit)
    gradients = 2 * (shape.N + shape.V) * shape.D
    assert recompute.peak_bytes - gradients <= 4 * shape.N * shape.D + 256 * 2**20
    logits = 2 * shape.N * shape.V
    assert model.counts(shape, "bfloat16", "ours:recompute", "sftmix", "fwd").peak_bytes < logits / 16
    assert stored.peak_bytes < gradients + logits // 2 + 2 * 4 * shape.V * shape.D + 12 * shape.N * shape.D


@pytest.mark.parametrize("shape", SHAPE_SETS["record"], ids=str)
def test_the_default_schedule_is_chosen_by_the_same_costs(shape: Shape) -> None:
    """The closed form that chooses is the sum over the traced pieces, but for passes over rows' scalars."""
    sizes = schedule.Sizes(shape.V, shape.D, torch.bfloat16, "sm_90")
    for name, cost in (("recompute", schedule.recompute_s), ("stored", schedule.stored_s)):
        counted = model.counts(shape, "bfloat16", f"ours:{name}", "sftmix", "fwd_bwd")
        others = counted.passes * sizes.chip.launch
        assert abs(counted.seconds - others - cost(sizes, shape.N)) <= 0.01 * counted.seconds, name


def test_the_notes_hold_the_prediction() -> None:
    assert model.main(["--check"]) == 0, "run `python -m bench.model --write`"


def test_the_section_is_rewritten_between_its_markers() -> None:
    page = f"before\n{model.BEGIN}\nold\n{model.END}\nafter\n"
    new = model.rewritten(page, "text", model.BEGIN, model.END)
    assert new == f"before\n{model.BEGIN}\n\ntext\n\n{model.END}\nafter\n"
    with pytest.raises(ValueError, match=r"^page: expected the lines .*predicted"):
        model.rewritten("no markers", "text", model.BEGIN, model.END)


def test_measured_figures_of_a_gpu_are_compared_and_a_cpus_are_not(tmp_path: Path, capsys: Any) -> None:
    shape = Shape(2048, 32000, 1024)
    (predicted,) = (
        figure
        for figure in model.predict([(shape, "bfloat16")])
        if (figure.task, figure.schedule, figure.direction) == ("sftmix", "stored", "fwd_bwd")
    )
    assert predicted.ms_median is not None
    twice = {"ms_median": 2 * predicted.ms_median, "ms_min": 1.0, "run_id": "1"}
    cpu = dataclasses.replace(predicted, device="a CPU, 2 cores", **twice)
    gpu = dataclasses.replace(predicted, device="NVIDIA H200", **twice)
    write_figures(tmp_path / "cpu.jsonl", [cpu])
    options = ["--shapes", "toy", "--results", str(tmp_path)]
    assert model.main(options) == 0
    assert "nothing to compare" in capsys.readouterr().out
    write_figures(tmp_path / "gpu.jsonl", [gpu])
    assert model.main(options) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "NVIDIA H200" in line)
    assert line.endswith("| 0.50 |") and "2 cores" not in line


# --- the rows ------------------------------------------------------------------------------------------------------


def figures(**ms: float) -> list[Figure]:
    """Figures at the first shape by "provider_task_direction..." names of TABLE."""
    made = []
    for name, value in ms.items():
        provider, schedule, task, direction = TABLE[name]
        made.append(
            model._figure(
                Shape(*targets.FIRST), "bfloat16", provider=provider, schedule=schedule, task=task,
                direction=direction, ms_median=value,
            )
        )  # fmt: skip
    return made


TABLE = {
    "stored": ("ours", "stored", "sftmix", "fwd_bwd"), "recompute": ("ours", "recompute", "sftmix", "fwd_bwd"),
    "ours_ntp": ("ours", "stored", "ntp", "fwd_bwd"), "quack_ntp": ("quack", "chunked", "ntp", "fwd_bwd"),
    "quack": ("quack", "chunked", "sftmix", "fwd_bwd"), "liger": ("liger", "default", "sftmix", "fwd_bwd"),
    "gemm1": ("torch", "1 GEMM", "gemm", "fwd"), "gemm3": ("torch", "3 GEMMs", "gemm", "fwd_bwd"),
    "gemm4": ("torch", "4 GEMMs", "gemm", "fwd_bwd"), "stats": ("ours", "recompute", "stats", "fwd"),
    "no_grad": ("ours", "recompute", "sftmix", "fwd"), "planned": ("ours", "stored", "planned", "fwd_bwd"),
}  # fmt: skip


def test_every_row_is_the_ratio_it_says() -> None:
    made = figures(
        stored=36.0, recompute=50.0, ours_ntp=35.0, quack_ntp=37.5, quack=90.0, liger=75.0, gemm1=10.0, gemm3=30.0,
        gemm4=40.0, stats=11.0, no_grad=10.2, planned=20.0,
    )  # fmt: skip
    found = {result.row: (result.value, result.verdict) for result in targets.results(made)}
    expected = {
        "1": 36 / 37.5,
        "2": 36 / 75,
        "3": 1.2,
        "4": 1.25,
        "6a": 1.1,
        "6b": 1.02,
        "7": 36 / 35,
        "9": 20 / 36,
    }
    assert {row: value for row, (value, _) in found.items() if value is not None} == pytest.approx(expected)
    assert {row for row, (_, verdict) in found.items() if verdict == "met"} == {"1", "2", "6b", "7", "9"}
    assert {row for row, (_, verdict) in found.items() if verdict == "missed"} == {"3", "4", "6a"}
    assert found["5"] == found["11a"] == (None, "open")
    assert "| 3 | SFTMix / three GEMMs | 8192x128256x4096 | 1.200 | 1.120 | missed |" in targets.table(made)


def test_memory_errors_steps_and_other_shapes_have_their_rows() -> None:
    made = figures(recompute=50.0, quack_ntp=37.5)
    bound = 4 * 8192 * 4096 + 256 * 2**20
    made[0] = dataclasses.replace(made[0], extra_peak_bytes=bound + 1)
    made[1] = dataclasses.replace(made[1], dhidden_error=2e-3, dweight_error=4e-3)
    ours = dataclasses.replace(
        made[1], provider="ours", schedule="stored", dhidden_error=1e-3, dweight_error=5e-3
    )
    half = dataclasses.replace(made[0], N=4096, ms_median=30.0)
    steps = [
        dataclasses.replace(made[0], task=task, N=4000, ms_median=ms, extra_peak_bytes=None)
        for task, ms in (("step_ntp", 100.0), ("step_sftmix", 101.0))
    ]
    found = {(r.row, r.shape): r for r in targets.results([*made, ours, half, *steps]) if r.value is not None}
    first = "8192x128256x4096"
    assert found["5", first].verdict == "missed" and found["5", first].value == pytest.approx(1, abs=1e-8)
    assert (found["11a", first].value, found["11b", first].value) == (0.5, 1.25)
    assert found["10", "4000x128256x4096"].value == pytest.approx(1.01)
    assert found["10", "4000x128256x4096"].verdict == "met"
    assert found["8", "4096x128256x4096"].value == pytest.approx(1.2)
    assert not [key for key in found if key[0] == "8" and key[1] == first]

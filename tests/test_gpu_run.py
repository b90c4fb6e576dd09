"""What `make gpu` measures: rehearsed on a CPU, every row has its provider, errors and kept rows are checked."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import gpu, loss, problem, providers, report, targets
from bench.figures import read_figures
from bench.shapes import SHAPE_SETS, Shape
from tests.test_bench import FIGURE, ROOT, TOY, run_toy


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU would start the real run")
def test_gpu_run_refuses_without_a_gpu(tmp_path: Path, capsys: Any) -> None:
    assert gpu.main(["--out", str(tmp_path / "out")]) == 2
    assert "no NVIDIA GPU" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_gpu_run_rehearsed_on_a_cpu(tmp_path: Path, monkeypatch: Any) -> None:
    """The path of ``make gpu`` at toy size: tests, JSON lines with the fused kernels in them, table last."""
    command = [
        sys.executable,
        "-m",
        "bench.gpu",
        "--rehearse",
        "--out",
        str(tmp_path),
        "--budget-seconds",
        "200",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = read_figures(tmp_path)
    fused = [figure for figure in figures if figure.schedule == "recompute"]
    assert {(figure.task, figure.direction) for figure in fused} == {
        ("ntp", "fwd"), ("ntp", "fwd_bwd"), ("sftmix", "fwd"), ("sftmix", "fwd_bwd"), ("stats", "fwd"),
        ("planned", "fwd_bwd"),
    }  # fmt: skip
    stored = {(f.task, f.direction) for f in figures if f.schedule == "stored"}
    assert stored == {(f.task, f.direction) for f in fused} - {("stats", "fwd")}
    assert all(figure.error is None for figure in figures)
    assert {figure.task for figure in figures if figure.schedule == "default"} == {"step_ntp", "step_sftmix"}
    assert done.stdout.index("tests: exit code") < done.stdout.index("| ours (recompute)")
    for peer in ("quack:chunked", "liger:default", "cce_exact"):
        assert f"not measured: {peer}: needs a GPU" in done.stdout
    assert "Whole training step, SFTMix: ours (default)" in done.stdout
    # Every row that needs no peer has its figures.
    monkeypatch.setattr(targets, "FIRST", (TOY.N, TOY.V, TOY.D))
    found = {result.row for result in targets.results(figures) if result.value is not None}
    assert found == {"3", "4", "5", "6a", "6b", "7", "9", "10"}
    errors = [f.dweight_error for f in figures if (f.task, f.direction) == ("ntp", "fwd_bwd")]
    assert errors and all(error is not None and 0 < error < 1e-5 for error in errors)


def test_a_real_run_has_every_provider_that_a_row_names() -> None:
    """Parts 1 to 3 time what the targets ask for, at the shapes of the issue."""
    first = loss.parse_arguments(gpu._FIRST[1:])
    assert first.errors and [str(shape) for shape, _ in first.groups] == ["8192x128256x4096"]
    assert {p.spec for p in first.chosen} == {
        p.spec for p in providers.PROVIDERS
    } and "planned" in first.tasks
    rest, ends = (loss.parse_arguments(options[1:]) for options in (gpu._REST, gpu._ENDS))
    for args in (rest, ends):
        named = {p.spec for p in args.chosen}
        assert {"ours:recompute", "ours:stored", "quack:chunked", "torch:3 GEMMs", "liger:default"} <= named
    assert len(rest.groups) == len(SHAPE_SETS["record"]) - 1
    heads = {(shape.V, shape.D) for shape in SHAPE_SETS["record"]}
    for V, D in heads:
        rows = {s.N for s in (*SHAPE_SETS["record"], *SHAPE_SETS["ends"]) if (s.V, s.D) == (V, D)}
        assert {1024, 8192, 32768} <= rows
    assert set(gpu._STEPS) == {"bench.train"}
    assert {name for part in gpu._PARTS.values() for name, _ in part} == {
        gpu._FIRST,
        gpu._STEPS,
        gpu._REST,
        gpu._ENDS,
    }


def test_gradient_errors_are_those_of_the_gradients() -> None:
    """Zero for float64's own gradients, the perturbation's size for perturbed ones; the truth is autograd's."""
    inputs = problem.Problem(Shape(48, 65, 24), "float32", "cpu")
    truth = problem.true_gradients(inputs)
    hidden, weight = (t.detach().double().requires_grad_() for t in (inputs.hidden, inputs.weight))
    torch.nn.functional.cross_entropy(hidden @ weight.t(), inputs.target).backward()
    for gradient, true in zip((hidden.grad, weight.grad), truth, strict=True):
        torch.testing.assert_close(gradient, true)
    inputs.hidden.grad, inputs.weight.grad = truth[0].float() * 1.01, truth[1].float() * 0.98
    assert problem.gradient_errors(inputs, truth) == pytest.approx((0.01, 0.02), rel=1e-3)


def test_the_planned_rows_are_checked_against_the_specification(tmp_path: Path, monkeypatch: Any) -> None:
    """60 % of the pairs, both members of each; a provider that takes all rows is refused."""
    inputs = problem.Problem(Shape(20, 33, 8), "float32", "cpu")
    assert inputs.kept_rows().tolist() == [*range(6), *range(10, 16)]
    whole = providers.choose("ours:chunked")[0].build
    wrong = providers.Provider(
        "wrong", "", ("planned",), lambda p, task: whole(p, "sftmix"), providers.anywhere
    )
    right = providers.Provider("right", "", ("planned",), whole, providers.anywhere)
    monkeypatch.setattr(providers, "PROVIDERS", (wrong, right))
    figures = {figure.provider: figure for figure in run_toy(tmp_path)}
    assert (figures["wrong"].error or "").startswith("ArithmeticError: loss")
    assert figures["right"].error is None and figures["right"].M == TOY.M * 3 // 5


def test_a_gpus_figures_are_held_against_the_targets_and_a_cpus_are_not() -> None:
    gpu_figure = dataclasses.replace(FIGURE, device="NVIDIA H200", dtype="bfloat16")
    page = report.tables([FIGURE, gpu_figure])
    assert page.count("**Targets on") == 1 and "**Targets on NVIDIA H200**" in page
    assert "Targets" not in report.tables(
        [dataclasses.replace(FIGURE, device="a CPU, 2 cores", dtype="bfloat16")]
    )

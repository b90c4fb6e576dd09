"""The benchmark measures what it says: true losses only, failures shown, memory seen inside custom ops."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import time
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import loss, machine, measure, problem, providers, report
from bench.figures import OUT_OF_TIME, Figure, newest, read_figures, write_figures
from bench.shapes import SHAPE_SETS, Shape, parse_shapes

ROOT = Path(__file__).resolve().parent.parent
TOY = SHAPE_SETS["toy"][0]
REQUIRED = (
    "run_id commit device versions command task direction provider schedule dtype N V D M lam "
    "ms_median ms_min extra_peak_bytes rounds threads"
).split()
FIGURE = Figure(
    run_id="20250101T000000Z-0000", commit="abc", device="a CPU, 2 cores", versions={"torch": "2"}, command="bench",
    task="ntp", direction="fwd", provider="ours", schedule="chunked", lam="", dtype="float32", N=2, V=3, D=4,
    M=0, threads=1, rounds=3, ms_median=2.0, ms_min=1.0, extra_peak_bytes=2**20, peak_bytes=2**21,
)  # fmt: skip


@torch.library.custom_op("sftmix_bench_test::hog", mutates_args=())
def hog(x: Tensor) -> Tensor:
    first = torch.empty(4 * 2**20, dtype=torch.float32)  # 16 MiB
    second = torch.empty(2 * 2**20, dtype=torch.float32)  # 8 MiB beside it: the peak
    del first
    third = torch.empty(3 * 2**20, dtype=torch.float32)  # 12 MiB once the first is gone: below the peak
    del second, third
    return x + 1


def run_toy(out: Path, *options: str) -> list[Figure]:
    arguments = ["--shapes", "toy", "--device", "cpu", "--rounds", "2", "--warmup", "0", "--out", str(out)]
    assert loss.main([*arguments, *options]) == 0
    return read_figures(out)


def broken_provider(call: Any) -> providers.Provider:
    return providers.Provider("broken", "", ("ntp",), lambda p, task: partial(call, p), providers.anywhere)


@pytest.mark.parametrize("shape", SHAPE_SETS["small"], ids=str)
@pytest.mark.parametrize("task", providers.LOSSES)
@pytest.mark.parametrize("spec", ["ours:chunked", "ours:reference", "torch:eager"])
def test_benchmark_small_shapes(benchmark: Any, spec: str, task: str, shape: Shape) -> None:
    """Forward and backward under pytest-benchmark; the loss is checked against the specification."""
    inputs = problem.Problem(shape, "float32", "cpu")
    (provider,) = providers.choose(spec)
    call = provider.build(inputs, task)

    def step() -> Tensor:
        value: Tensor = call()
        value.backward()
        return value

    benchmark.extra_info.update(dataclasses.asdict(shape), provider=spec, task=task)
    value = benchmark.pedantic(step, setup=inputs.clear_gradients, rounds=3, warmup_rounds=1)
    problem.check_loss(inputs, value, problem.true_value(inputs, "row" if task == "sftmix" else ""))


def test_run_writes_complete_lines_and_prints_the_table_last(tmp_path: Path, capsys: Any) -> None:
    figures = run_toy(tmp_path, "--providers", "ours:chunked,torch:eager,torch:1 GEMM,torch:3 GEMMs")
    lines = [json.loads(line) for line in next(tmp_path.glob("*.jsonl")).read_text().splitlines()]
    assert all(set(REQUIRED) <= set(line) for line in lines)
    found = {(line["provider"], line["schedule"], line["task"], line["direction"]) for line in lines}
    for name, schedule in (("ours", "chunked"), ("torch", "eager")):
        for task in providers.LOSSES:
            assert {(name, schedule, task, "fwd"), (name, schedule, task, "fwd_bwd")} <= found
        assert (name, schedule, "stats", "fwd") in found
    assert {("torch", "1 GEMM", "gemm", "fwd"), ("torch", "3 GEMMs", "gemm", "fwd_bwd")} <= found
    for figure in figures:
        assert figure.error is None
        assert figure.rounds == 2
        assert figure.ms_median is not None
        assert 0 < (figure.ms_min or 0) <= figure.ms_median
        assert figure.M == (TOY.M if figure.task == "sftmix" else 0)
    out = capsys.readouterr().out
    assert out.rstrip().endswith(f"written: {next(tmp_path.glob('*.jsonl'))}")
    assert out.index("| ours (chunked)") < out.index("Bare library products") < out.index("written:")


def test_eager_torch_needs_the_logits_and_ours_does_not(tmp_path: Path) -> None:
    """Above inputs and gradients, eager torch holds at least the float32 logits [N, V]; ours less."""
    options = ("--providers", "ours:chunked,torch:eager", "--tasks", "ntp", "--shapes", "64x8192x16")
    eager, chunked = (
        next(f for f in run_toy(tmp_path, *options) if f.provider == name and f.direction == "fwd_bwd")
        for name in ("torch", "ours")
    )
    logits_bytes = 64 * 8192 * 4
    assert eager.extra_peak_bytes is not None
    assert chunked.extra_peak_bytes is not None
    assert eager.extra_peak_bytes >= logits_bytes
    assert chunked.extra_peak_bytes < eager.extra_peak_bytes


@pytest.mark.skipif(torch.cuda.is_available(), reason="without a GPU, kernels must be interpreted")
def test_peak_sees_inside_a_custom_op() -> None:
    """16 + 8 MiB are held at once inside the operator, and none of it outside."""
    hog(torch.ones(1))
    assert 24 * 2**20 <= measure.peak_bytes(lambda: hog(torch.ones(1)), "cpu") < 24 * 2**20 + 4096


@pytest.mark.parametrize("kind", ["row", "batch"])
def test_a_composition_of_hard_label_losses_is_the_sftmix_loss(kind: str) -> None:
    """What peers are asked to compute is SFTMix, for λ by row and for one λ; other weights are caught."""
    inputs = problem.Problem(Shape(64, 257, 24), "float32", "cpu")
    call = providers.build_composed(inputs, "sftmix", loss=providers.torch_ntp, lam=kind)
    value = call()
    value.backward()
    problem.check_loss(inputs, value, problem.true_value(inputs, kind))
    problem.check_gradients(inputs, *problem.true_dhidden(inputs, kind))
    other = problem.true_value(inputs, "batch" if kind == "row" else "row")
    with pytest.raises(ArithmeticError, match="is right"):
        problem.check_loss(inputs, value, other)


def test_wrong_values_and_gradients_are_refused(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    """A provider with a wrong loss, a wrong dhidden or a wrong dweight gives an error figure, not a time."""

    def wrong_loss(p: problem.Problem) -> Tensor:
        return providers.torch_ntp(p.hidden, p.weight, p.target) * 1.01

    def half_dhidden(p: problem.Problem) -> Tensor:
        return providers.torch_ntp((p.hidden + p.hidden.detach()) / 2, p.weight, p.target)

    def half_dweight(p: problem.Problem) -> Tensor:
        return providers.torch_ntp(p.hidden, (p.weight + p.weight.detach()) / 2, p.target)

    def raising(p: problem.Problem) -> Tensor:
        raise RuntimeError(f"no kernel\nin {ROOT}/somewhere")

    for call, message in (
        (wrong_loss, "ArithmeticError: loss"),
        (half_dhidden, "ArithmeticError: dhidden"),
        (half_dweight, "ArithmeticError: dweight"),
        (raising, "RuntimeError: no kernel"),
    ):
        monkeypatch.setattr(providers, "PROVIDERS", (broken_provider(call),))
        folder = tmp_path / call.__name__
        figures = run_toy(folder, "--tasks", "ntp")
        assert [figure.direction for figure in figures] == ["fwd", "fwd_bwd"]
        assert all(
            (figure.error or "").startswith(message) and figure.ms_median is None for figure in figures
        )
        out = capsys.readouterr().out
        assert "failed" in out
        assert message in out


@pytest.mark.parametrize("name", ["broken", "ours"])
def test_a_slightly_wrong_loss_of_a_peer_is_timed_and_marked(
    name: str, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    """0.3 % off: a peer's figure carries a mark and both values; ours is refused."""

    def inexact(p: problem.Problem) -> Tensor:
        loss = providers.torch_ntp(p.hidden, p.weight, p.target)
        return loss + loss.detach() * 0.003

    monkeypatch.setattr(providers, "PROVIDERS", (dataclasses.replace(broken_provider(inexact), name=name),))
    figures = run_toy(tmp_path, "--tasks", "ntp")
    out = capsys.readouterr().out
    if name == "ours":
        assert all(figure.ms_median is None and figure.caveat is None for figure in figures)
        return
    assert all(figure.ms_median and "is right" in (figure.caveat or "") for figure in figures)
    assert "†" in out and "is right" in out


def test_rounds_are_interleaved_and_stop_at_the_deadline() -> None:
    """Each round times every case once, starting one case later; a late run still has one round of all."""
    order: list[str] = []
    cases = [measure.Case(name, partial(order.append, name), lambda: None) for name in "abc"]
    done = list(measure.interleave(cases, rounds=2, warmup=1, device="cpu", deadline=float("inf")))
    assert "".join(order) == "abc" + "bca" + "cab"
    assert done == [1, 1, 1, 2, 2, 2]
    assert all(len(case.times_ms) == 2 for case in cases)
    late = [measure.Case(name, lambda: None, lambda: None) for name in "ab"]
    assert list(measure.interleave(late, rounds=9, warmup=0, device="cpu", deadline=time.monotonic())) == [
        1,
        1,
    ]
    assert all(len(case.times_ms) == 1 for case in late)


def test_a_case_that_fails_while_timed_does_not_stop_the_others() -> None:
    def fail() -> None:
        raise MemoryError("too large")

    cases = [measure.Case("bad", fail, lambda: None), measure.Case("good", lambda: None, lambda: None)]
    list(measure.interleave(cases, rounds=3, warmup=0, device="cpu", deadline=float("inf")))
    assert cases[0].error == "MemoryError: too large"
    assert len(cases[1].times_ms) == 3


def test_a_spent_budget_is_stated_not_hidden(tmp_path: Path, capsys: Any) -> None:
    figures = run_toy(tmp_path, "--providers", "ours:chunked", "--tasks", "ntp", "--budget-seconds", "0")
    assert [figure.error for figure in figures] == [OUT_OF_TIME] * 2
    assert "not run" in capsys.readouterr().out


def test_every_shape_has_its_share_of_the_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shares: list[float] = []

    def note(group: Any, chosen: Any, args: Any, save: Any) -> list[Figure]:
        shares.append(args.deadline - time.monotonic())
        return []

    monkeypatch.setattr(loss, "run_group", note)
    arguments = ["--shapes", "record", "--device", "cpu", "--budget-seconds", "100", "--out", str(tmp_path)]
    assert loss.main(arguments) == 0
    # Nobody used any of it, so that the last has all.
    assert shares == pytest.approx([100 / (10 - index) for index in range(10)], rel=0.05)


def test_a_command_is_told_without_where_it_wrote() -> None:
    assert machine.command_line("bench.loss", ["--out", "/a/b", "--rounds", "3"]).endswith(
        "bench.loss --rounds 3"
    )


def test_an_interrupted_run_keeps_what_it_timed(tmp_path: Path, monkeypatch: Any) -> None:
    calls = iter(range(100))

    def interrupt_late(p: problem.Problem) -> Tensor:
        # One call checks, three measure the memory of both directions, then there are two per round.
        if next(calls) == 7:
            raise KeyboardInterrupt
        return providers.torch_ntp(p.hidden, p.weight, p.target)

    monkeypatch.setattr(providers, "PROVIDERS", (broken_provider(interrupt_late),))
    monkeypatch.setattr(loss, "_WRITE_EVERY_S", -1.0)
    with pytest.raises(KeyboardInterrupt):
        run_toy(tmp_path, "--tasks", "ntp", "--rounds", "9")
    figures = read_figures(tmp_path)
    assert [figure.rounds for figure in figures] == [1, 2]
    assert all(figure.ms_median is not None for figure in figures)


def test_newest_run_replaces_only_the_same_figure(tmp_path: Path) -> None:
    later = dataclasses.replace(FIGURE, run_id="20250102T000000Z-0000", ms_median=1.5)
    other = dataclasses.replace(FIGURE, direction="fwd_bwd")
    write_figures(tmp_path / "b.jsonl", [later])
    write_figures(tmp_path / "a.jsonl", [FIGURE, other])
    assert newest(read_figures(tmp_path)) == [later, other]
    assert [figure.run_id for figure in read_figures(tmp_path)] == sorted(
        f.run_id for f in (later, FIGURE, other)
    )
    assert "1.5" in report.tables(read_figures(tmp_path))


def test_run_ids_sort_by_time() -> None:
    starts = [datetime(2025, 9, 30, 23, 59, 59), datetime(2025, 10, 1), datetime(2026, 1, 1)]
    ids = [machine.new_run_id(start) for start in starts]
    assert ids == sorted(ids)
    assert machine.new_run_id() > ids[-1]


@pytest.mark.parametrize(
    "line", ["{", '{"run_id": 1}', json.dumps({**dataclasses.asdict(FIGURE), "task": "x"})]
)
def test_a_broken_line_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "r.jsonl").write_text(json.dumps(dataclasses.asdict(FIGURE)) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=r"r\.jsonl line 2: expected a figure"):
        read_figures(tmp_path)


def test_commit_without_git_comes_from_a_file_or_is_unknown(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    monkeypatch.setattr(machine, "COMMIT_FILE", tmp_path / ".commit")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert machine.commit() == "unknown"
    (tmp_path / ".commit").write_text("0123abc\n")
    assert machine.commit() == "0123abc"


def test_where_figures_come_from_is_complete() -> None:
    assert re.search(r", \d+ cores, \S", machine.device_name("cpu"))
    assert machine.versions()["torch"] == torch.__version__ or torch.__version__.startswith(
        machine.versions()["torch"]
    )


@pytest.mark.parametrize(
    "options", [["--shapes", "big"], ["--shapes", "3x4x5"], ["--providers", "them"], ["--dtype", "int8"],
                ["--tasks", "all"], ["--rounds", "0"]],
)  # fmt: skip
def test_bad_options_exit_with_code_2(options: list[str], capsys: Any) -> None:
    with pytest.raises(SystemExit) as stopped:
        loss.main(options)
    assert stopped.value.code == 2
    assert "expected" in capsys.readouterr().err


def test_shapes_of_the_issue_are_measured() -> None:
    sizes = {str(shape) for shape, dtype in parse_shapes("record") if dtype == "bfloat16"}
    assert {
        "8192x128256x4096",
        "8192x151936x3584",
        "8192x256000x2304",
        "8192x49152x576",
        "8192x32000x4096",
    } <= sizes
    assert {"1024x128256x4096", "32768x128256x4096"} <= sizes
    assert parse_shapes("2x3x4,cpu")[0] == (Shape(2, 3, 4), "float32")


def test_pages_hold_the_tables_of_the_results() -> None:
    assert report.main(["--check"]) == 0, "run `python -m bench.report`"


def test_report_writes_between_its_markers_and_notices_a_change() -> None:
    page = f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n"
    new = report.rewritten(page, report.tables([FIGURE]))
    assert new.startswith("before\n")
    assert new.endswith("\nafter\n")
    assert "old" not in new
    assert "| ours (chunked) |" in new
    assert report.rewritten(new, report.tables([FIGURE])) == new
    with pytest.raises(ValueError, match="page: expected the lines"):
        report.rewritten("no markers", "text")


def test_compiled_code_of_two_instruction_sets_is_kept_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile's cache would hand code made for AVX-512 to a run that is held to AVX2, with wrong losses."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "put back at the end")
    folders = set()
    for name in ("AVX-512-BF16", "AVX2 (restricted)"):
        monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
        monkeypatch.setattr(machine, "instruction_set", lambda name=name: name)
        machine.keep_compiled_apart()
        folders.add(os.environ["TORCHINDUCTOR_CACHE_DIR"])
    assert len(folders) == 2
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "mine")
    machine.keep_compiled_apart()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "mine"

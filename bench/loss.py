"""Time and peak memory of the losses: ``python -m bench.loss --shapes cpu``.

Every provider first reproduces the true loss and gradients, then all of a shape are timed in interleaved
rounds: forward alone without autograd, and forward with backward. One JSON line per figure goes to the output
folder, rewritten as rounds finish; the table comes last.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from bench import machine, report
from bench.figures import OUT_OF_TIME, TASKS, Figure, write_figures
from bench.measure import Case, describe_error, interleave, measure_peak
from bench.problem import (
    TOLERANCE,
    InexactLossError,
    Problem,
    check_gradients,
    check_loss,
    gradient_errors,
    true_dhidden,
    true_gradients,
    true_value,
)
from bench.providers import Call, Provider, choose, directions
from bench.shapes import Shape, parse_shapes

LOSS_TASKS = tuple(task for task in TASKS if not task.startswith("step_"))
FACTS = ("run_id", "commit", "device", "versions", "command", "provisional")
_WRITE_EVERY_S = 5.0


@dataclass
class Entry:
    """One figure in the making."""

    provider: Provider
    task: str
    direction: str
    case: Case
    errors: tuple[float, float] | None = None  # of dhidden and dweight against float64
    caveat: str | None = None

    @property
    def lam(self) -> str:
        return self.provider.lam if self.task in ("sftmix", "planned") else ""


class Group:
    """All figures of one shape and dtype, timed against each other."""

    def __init__(self, shape: Shape, dtype: str, device: str, *, errors: bool = False) -> None:
        self.shape, self.dtype, self.device, self.errors = shape, dtype, device, errors
        self.entries: list[Entry] = []
        self._truth: dict[str, tuple[float, torch.Tensor, torch.Tensor]] = {}

    @cached_property
    def problem(self) -> Problem:
        """Made when first needed, so that a shape without time left costs none."""
        return Problem(self.shape, self.dtype, self.device)

    @cached_property
    def gradients(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the next-token loss, in float64."""
        return true_gradients(self.problem)

    def clear_gradients(self) -> None:
        if "problem" in self.__dict__:
            self.problem.clear_gradients()

    def add(self, provider: Provider, task: str, deadline: float) -> None:
        """Build, verify and measure the memory of a provider on a task."""
        error = OUT_OF_TIME if time.monotonic() > deadline else None
        call: Call = lambda: None  # noqa: E731
        errors = caveat = None
        if error is None:
            try:
                call = provider.build(self.problem, task)
                caveat = self._verify(provider, task, call)
                if self.errors and task == "ntp":
                    errors = gradient_errors(self.problem, self.gradients)
            except Exception as problem:  # a peer may fail in any way: the figure then says how
                error = describe_error(problem)
            self.clear_gradients()
        for direction in directions(provider, task):
            run = call if direction == "fwd_bwd" and task != "gemm" else _without_grad(call)
            name = f"{provider.spec} {task} {direction}"
            run = _with_backward(run) if run is call else run
            case = Case(name, run, self.clear_gradients, error=error)
            # Verification has run the backward once, but not the call without autograd, which compiles anew.
            measure_peak(case, self.device, is_warm=direction == "fwd_bwd" and task != "gemm")
            self.entries.append(Entry(provider, task, direction, case, errors, caveat))

    def _verify(self, provider: Provider, task: str, call: Call) -> str | None:
        """Raise where loss or gradients are wrong; what to say of a peer's loss that is wrong by little."""
        if task == "gemm":
            return None
        kind = provider.lam if task == "sftmix" else "planned" if task == "planned" else ""
        if kind == "planned" and kind not in self._truth:
            kept = self.problem.planned()
            rows, dhidden = true_dhidden(kept, "row")
            self._truth[kind] = (true_value(kept, "row"), self.problem.kept_rows()[rows], dhidden)
        elif kind not in self._truth:
            self._truth[kind] = (true_value(self.problem, kind), *true_dhidden(self.problem, kind))
        expected, rows, dhidden = self._truth[kind]
        if task == "stats":
            with torch.no_grad():
                check_loss(self.problem, -call()[0].float().mean(), expected)
            return None
        self.problem.clear_gradients()
        loss = call()
        loss.backward()
        caveat = None
        try:
            check_loss(self.problem, loss, expected)
        except InexactLossError as problem:
            if provider.name == "ours":
                raise
            caveat = str(problem)
        check_gradients(self.problem, rows, dhidden)
        return caveat

    def figure(self, entry: Entry, **facts: Any) -> Figure:
        """The entry as a figure; ``facts`` are the fields that say where it was measured."""
        shape, case = self.shape, entry.case
        error = case.error or (None if case.times_ms else OUT_OF_TIME)
        good = error is None
        peak = case.peak_bytes if good else None
        has_gradients = entry.direction == "fwd_bwd" and entry.task != "gemm"
        itemsize = getattr(torch, self.dtype).itemsize
        gradients = (shape.N + shape.V) * shape.D * itemsize if has_gradients else 0
        return Figure(
            **facts,
            task=entry.task,
            direction=entry.direction,
            provider=entry.provider.name,
            schedule=entry.provider.schedule,
            lam=entry.lam,
            dtype=self.dtype,
            N=shape.N,
            V=shape.V,
            D=shape.D,
            M={"sftmix": shape.M, "planned": shape.num_kept_pairs}.get(entry.task, 0),
            rounds=len(case.times_ms),
            ms_median=round(statistics.median(case.times_ms), 4) if good else None,
            ms_min=round(min(case.times_ms), 4) if good else None,
            extra_peak_bytes=None if peak is None else max(0, peak - gradients),
            peak_bytes=peak,
            error=error,
            caveat=entry.caveat if good else None,
            dhidden_error=entry.errors[0] if entry.errors and good and has_gradients else None,
            dweight_error=entry.errors[1] if entry.errors and good and has_gradients else None,
        )


def _without_grad(call: Call) -> Call:
    def run() -> Any:
        with torch.no_grad():
            return call()

    return run


def _with_backward(call: Call) -> Call:
    def run() -> Any:
        loss = call()
        loss.backward()
        return loss

    return run


def run_group(
    group: Group,
    providers: Sequence[Provider],
    args: argparse.Namespace,
    save: Callable[[list[Figure]], None],
) -> list[Figure]:
    """Measure a shape: ``save`` gets its figures so far every few seconds, and once complete."""
    torch.compiler.reset()
    facts = {key: getattr(args, key) for key in FACTS} | {"threads": torch.get_num_threads()}
    # Preparing may use half of what is left; the rest is for timing, in which every case meets every other.
    half_way = time.monotonic() + (args.deadline - time.monotonic()) / 2
    for provider in providers:
        for task in (task for task in args.tasks if task in provider.tasks):
            begin = time.monotonic()
            group.add(provider, task, half_way)
            print(f"  ready: {provider.spec} {task} ({time.monotonic() - begin:.1f} s)", file=sys.stderr)
    group.__dict__.pop("gradients", None)  # in float64 four times the size of bfloat16's
    saved = time.monotonic()
    cases = [entry.case for entry in group.entries]
    for done in interleave(
        cases, rounds=args.rounds, warmup=args.warmup, device=args.backend, deadline=args.deadline
    ):
        if time.monotonic() - saved > _WRITE_EVERY_S:
            print(f"  round {done} of {args.rounds}", file=sys.stderr)
            save([group.figure(entry, **facts) for entry in group.entries])
            saved = time.monotonic()
    figures = [group.figure(entry, **facts) for entry in group.entries]
    save(figures)
    return figures


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.loss", description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", default="small", help="comma list of toy, small, cpu, record, NxVxD")
    parser.add_argument("--skip-first", action="store_true", help="leave out the first of these shapes")
    parser.add_argument("--providers", help="comma list of names or name:schedule; default all that can run")
    parser.add_argument(
        "--tasks", default=",".join(LOSS_TASKS), help="comma list of " + ", ".join(LOSS_TASKS)
    )
    parser.add_argument("--dtype", help="comma list of float32, bfloat16, float16; default the shape's own")
    parser.add_argument("--out", type=Path, default=report.RESULTS, help="folder of the JSON lines")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--warmup", type=int, default=1, help="untimed rounds")
    parser.add_argument("--budget-seconds", type=float, default=math.inf, help="stop timing after so long")
    parser.add_argument("--device", dest="backend", choices=("cpu", "cuda"), help="default: cuda if there")
    parser.add_argument("--errors", action="store_true", help="errors of both gradients against float64")
    parser.add_argument("--provisional", action="store_true", help="mark figures of a busy machine")
    args = parser.parse_args(argv)
    try:
        args.groups = parse_shapes(args.shapes)[int(args.skip_first) :]
        args.chosen = choose(args.providers)
        args.tasks = args.tasks.split(",")
        if unknown := set(args.tasks) - set(LOSS_TASKS):
            raise ValueError(f"tasks: expected {', '.join(LOSS_TASKS)}, got {', '.join(sorted(unknown))}")
        if args.dtype and (unknown := set(args.dtype.split(",")) - set(TOLERANCE)):
            raise ValueError(f"dtype: expected {', '.join(TOLERANCE)}, got {', '.join(sorted(unknown))}")
        if args.rounds < 1 or args.warmup < 0:
            raise ValueError(f"rounds, warmup: expected at least 1 and 0, got {args.rounds}, {args.warmup}")
    except ValueError as problem:
        parser.error(str(problem))
    args.backend = args.backend or ("cuda" if torch.cuda.is_available() else "cpu")
    args.command = machine.command_line("bench.loss", argv)
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; exit code 0 even where a provider failed, which its figure states."""
    args = parse_arguments(sys.argv[1:] if argv is None else argv)
    machine.keep_compiled_apart()
    args.run_id, args.commit, args.versions = machine.new_run_id(), machine.commit(), machine.versions()
    args.device = machine.device_name(args.backend)
    path = args.out / f"{args.run_id}.jsonl"

    absent = {provider.spec: reason for provider in args.chosen if (reason := provider.missing(args.backend))}
    providers = [provider for provider in args.chosen if provider.spec not in absent]
    finished: list[Figure] = []

    def save(figures: list[Figure]) -> None:
        write_figures(path, finished + figures)

    groups = [
        (shape, dtype)
        for shape, default_dtype in args.groups
        for dtype in (args.dtype.split(",") if args.dtype else [default_dtype])
    ]
    end = time.monotonic() + args.budget_seconds
    for index, (shape, dtype) in enumerate(groups):
        print(f"{shape} {dtype}", file=sys.stderr)
        # Every shape its share of what is left, or the last would have none.
        args.deadline = time.monotonic() + (end - time.monotonic()) / (len(groups) - index)
        finished += run_group(Group(shape, dtype, args.backend, errors=args.errors), providers, args, save)
    print(report.tables(finished))
    for spec, reason in absent.items():
        print(f"not measured: {spec}: {reason}")
    print(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Time and peak memory of a call, on a GPU or a CPU.

Time: rounds are interleaved, every case once per round, because clocks drift; medians are reported. Memory on
a GPU is the allocator's peak; on a CPU it is summed from the profiler's record of every allocation and
release, which sees those made inside custom operators (but not scratch that a library takes from malloc
without torch's allocator).
"""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch.profiler import ProfilerActivity, profile

from bench.machine import ROOT


@dataclass
class Case:
    """Something to time. ``before`` runs untimed before each call; ``error`` ends its measurement."""

    name: str
    call: Callable[[], object]
    before: Callable[[], None]
    times_ms: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    error: str | None = None


def describe_error(problem: BaseException) -> str:
    """One line: the kind of the exception and the first line of its message, paths relative to the
    project."""
    text = str(problem).strip().splitlines()
    first = text[0].replace(f"{ROOT}{os.sep}", "") if text else ""
    return f"{type(problem).__name__}: {first}"[:300]


# Of the GPU's clock, about 3 ms: the host is ahead of the device when a call begins, as it is in training.
HEAD_START = 5_000_000


def time_ms(case: Case, device: str, head_start: int = HEAD_START) -> float:
    """Milliseconds of one call: CUDA events on a GPU, the performance counter on a CPU.

    The GPU waits ``head_start`` cycles first, so that what the host does before the first launch is not in the figure,
    nor the gaps between launches, as far as that reaches (bench/host.py has the host's time).
    """
    case.before()
    if device == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        torch.cuda._sleep(head_start)
        start.record()
        case.call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)
    begin = time.perf_counter()
    case.call()
    return (time.perf_counter() - begin) * 1e3


def peak_bytes(call: Callable[[], object], device: str) -> int:
    """The most memory that one call holds at any moment, above what was held before it."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - held
    with _stderr_silenced(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        call()
    events = [event for event in trace.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@contextmanager
def _stderr_silenced() -> Iterator[None]:
    """Some builds of torch's profiler print at start and stop; errors are raised, not printed."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def measure_peak(case: Case, device: str, *, is_warm: bool = False) -> None:
    """Fill ``case.peak_bytes``; unless ``is_warm``, after a call that pays for compilation and first-use caches."""

    def run() -> None:
        if not is_warm:
            case.before()
            case.call()
        case.before()
        case.peak_bytes = peak_bytes(case.call, device)

    _guarded(case, run, device)


def interleave(
    cases: Sequence[Case], *, rounds: int, warmup: int, device: str, deadline: float
) -> Iterator[int]:
    """Time every case once per round, starting each round one case later; yields the round after each timed call.

    Stops early, after at least one timed round, when ``deadline`` (of ``time.monotonic``) has passed.
    """
    for index in range(warmup + rounds):
        for position in range(len(cases)):
            case = cases[(position + index) % len(cases)]

            def run(case: Case = case, timed: bool = index >= warmup) -> None:
                elapsed = time_ms(case, device)
                if timed:
                    case.times_ms.append(elapsed)

            _guarded(case, run, device)
            if index >= warmup:
                yield index - warmup + 1
        if index >= warmup and time.monotonic() > deadline:
            return


def _guarded(case: Case, run: Callable[[], None], device: str) -> None:
    """Run unless the case has failed already; a failure is kept as its message, and its memory given back."""
    if case.error is not None:
        return
    try:
        run()
    except Exception as problem:  # a peer may fail in any way: the figure then says how
        case.error = describe_error(problem)
    if case.error is not None:
        case.before()
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()

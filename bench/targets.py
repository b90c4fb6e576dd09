"""What the GPU figures are held against, in numbered rows, from measured figures or from predicted ones.

A row is a ratio of two figures of one shape, or of a figure and a bound; where one of them is missing or failed, the
row is open. The same functions read bench/results and bench/model.py's prediction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from bench.figures import Figure

Figures = Sequence[Figure]
PEERS = ("quack", "liger", "cce_exact", "torch_linear_ce")
FIRST = (8192, 128256, 4096)
MIB = 2**20
# Row 8: within 10 % of the targets of rows 1, 3 and 5 at every shape.
SLACK = 1.10


@dataclass(frozen=True)
class Result:
    """One row at one shape. ``value`` None: a figure is missing."""

    row: str
    what: str
    shape: str
    value: float | None
    target: float

    @property
    def verdict(self) -> str:
        return "open" if self.value is None else "met" if self.value <= self.target else "missed"


def _is_compared(figure: Figure) -> bool:
    """Of our ways only the Triton kernels' schedules: the reference holds every logit, ``chunked`` is the CPU's."""
    return figure.provider != "ours" or figure.schedule in ("recompute", "stored", "default")


def pick(
    figures: Figures, task: str, direction: str = "fwd_bwd", *, providers: Sequence[str] = ("ours",),
    schedule: str | None = None,
) -> Figure | None:  # fmt: skip
    """The fastest good figure of these."""
    found = [
        figure
        for figure in figures
        if (figure.task, figure.direction) == (task, direction) and figure.provider in providers
        and schedule in (None, figure.schedule) and figure.ms_median is not None and _is_compared(figure)
    ]  # fmt: skip
    return min(found, key=lambda figure: figure.ms_median or 0.0, default=None)


def _ratio(over: Figure | None, under: Figure | None) -> float | None:
    if over is None or under is None or over.ms_median is None or not under.ms_median:
        return None
    return over.ms_median / under.ms_median


def _gemm(figures: Figures, count: int) -> Figure | None:
    name = "1 GEMM" if count == 1 else f"{count} GEMMs"
    return pick(figures, "gemm", "fwd" if count == 1 else "fwd_bwd", providers=("torch",), schedule=name)


def _against(under: Callable[[Figures], Figure | None]) -> Callable[[Figures], float | None]:
    return lambda figures: _ratio(pick(figures, "sftmix"), under(figures))


def _recompute_memory(figures: Figures) -> float | None:
    """Its peak beside inputs and gradients over 4 N D + 256 MiB."""
    figure = pick(figures, "sftmix", schedule="recompute")
    if figure is None or figure.extra_peak_bytes is None:
        return None
    return figure.extra_peak_bytes / (4 * figure.N * figure.D + 256 * MIB)


def _same_schedule(over: str, under: str, figures: Figures) -> float | None:
    """Two tasks of ours, both by the schedule that is fastest at the full SFTMix loss."""
    fastest = pick(figures, "sftmix")
    if fastest is None:
        return None
    name = fastest.schedule
    return _ratio(pick(figures, over, schedule=name), pick(figures, under, schedule=name))


def _error(peer: str, gradient: str) -> Callable[[Figures], float | None]:
    """Our gradient's error over the peer's, next-token loss: the worst of our schedules, the best of the peer's."""

    def value(figures: Figures) -> float | None:
        losses = [f for f in figures if (f.task, f.direction) == ("ntp", "fwd_bwd") and _is_compared(f)]
        ours, theirs = (
            [error for f in losses if f.provider == name and (error := getattr(f, gradient)) is not None]
            for name in ("ours", peer)
        )
        return max(ours) / min(theirs) if ours and theirs and min(theirs) else None

    return value


# (row, what, target, value of the figures of one shape)
ROWS: tuple[tuple[str, str, float, Callable[[Figures], float | None]], ...] = (
    ("1", "SFTMix / QuACK's NTP", 1.00, _against(lambda fs: pick(fs, "ntp", providers=("quack",)))),
    ("2", "SFTMix / best composition of peers", 0.50, _against(lambda fs: pick(fs, "sftmix", providers=PEERS))),
    ("3", "SFTMix / three GEMMs", 1.12, _against(lambda fs: _gemm(fs, 3))),
    ("4", "recompute / four GEMMs", 1.15,
     lambda fs: _ratio(pick(fs, "sftmix", schedule="recompute"), _gemm(fs, 4))),
    ("5", "recompute's peak / (4 N D + 256 MiB)", 1.00, _recompute_memory),
    ("6a", "token_stats / one GEMM", 1.05, lambda fs: _ratio(pick(fs, "stats", "fwd"), _gemm(fs, 1))),
    ("6b", "SFTMix without autograd / one GEMM", 1.05,
     lambda fs: _ratio(pick(fs, "sftmix", "fwd", schedule="recompute"), _gemm(fs, 1))),
    ("7", "SFTMix / our NTP", 1.03, lambda fs: _same_schedule("sftmix", "ntp", fs)),
    ("9", "60 % of the rows / all rows", 0.62, lambda fs: _same_schedule("planned", "sftmix", fs)),
    ("11a", "dhidden's error / QuACK's", 1.00, _error("quack", "dhidden_error")),
    ("11b", "dweight's error / QuACK's", 1.00, _error("quack", "dweight_error")),
    ("11c", "dhidden's error / Liger's", 1.00, _error("liger", "dhidden_error")),
    ("11d", "dweight's error / Liger's", 1.00, _error("liger", "dweight_error")),
)  # fmt: skip
EVERYWHERE = ("1", "3", "5")


def _by_shape(figures: Iterable[Figure]) -> dict[tuple[int, int, int], list[Figure]]:
    groups: dict[tuple[int, int, int], list[Figure]] = {}
    for figure in figures:
        groups.setdefault((figure.N, figure.V, figure.D), []).append(figure)
    return groups


def results(figures: Iterable[Figure]) -> list[Result]:
    """Every row: 1 to 7, 9 and 11 at the first shape, 8 at every other, 10 for each model."""
    groups = _by_shape(figures)
    first = groups.get(FIRST, [])
    name = "x".join(map(str, FIRST))
    found = [Result(row, what, name, value(first), target) for row, what, target, value in ROWS]
    for shape, members in groups.items():
        name = "x".join(map(str, shape))
        steps = [figure for figure in members if figure.task.startswith("step_")]
        if steps:
            ratio = _ratio(pick(steps, "step_sftmix"), pick(steps, "step_ntp"))
            found.append(Result("10", "training step, SFTMix / NTP", name, ratio, 1.02))
        if shape == FIRST or pick(members, "sftmix") is None:
            continue
        for row, what, target, value in ROWS:
            if row in EVERYWHERE:
                found.append(Result("8", f"row {row}: {what}", name, value(members), target * SLACK))
        if shape[2] == FIRST[2]:
            found.append(
                Result("8", "time per N V / that of the first", name, _linear(members, first), SLACK)
            )
    return sorted(found, key=lambda result: int(result.row.rstrip("abcd")))


def _linear(members: Figures, first: Figures) -> float | None:
    base = pick(first, "sftmix")
    figure = None if base is None else pick(members, "sftmix", schedule=base.schedule)
    ratio = _ratio(figure, base)
    if figure is None or base is None or ratio is None:
        return None
    return ratio * (base.N * base.V) / (figure.N * figure.V)


def table(figures: Iterable[Figure]) -> str:
    """Markdown: one line per row and shape, with its verdict."""
    lines = ["| row | what | N x V x D | ratio | target | |", "|---|---|---|---:|---:|---|"]
    for result in results(figures):
        value = "" if result.value is None else f"{result.value:.3f}"
        lines.append(
            f"| {result.row} | {result.what} | {result.shape} | {value} | {result.target:.3f} | {result.verdict} |"
        )
    return "\n".join(lines)

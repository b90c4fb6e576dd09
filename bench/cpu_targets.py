"""What the CPU figures are held against: the SFTMix loss of ``chunked`` beside torch's, as ratios within one run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from bench.figures import Figure

Figures = Sequence[Figure]
EAGER, COMPILED = "torch:eager", "torch_compile:plain"


def _find(figures: Figures, spec: str, task: str) -> Figure | None:
    provider, schedule = spec.split(":")
    for figure in figures:
        name = (figure.provider, figure.schedule, figure.task, figure.direction)
        if name == (provider, schedule, task, "fwd_bwd") and figure.ms_median is not None:
            return figure
    return None


Value = Callable[[Figures], float | None]
OURS = ("ours:chunked", "sftmix")


def _over(*others: tuple[str, str], ours: tuple[str, str] = OURS) -> Value:
    """Time of ``ours`` over the fastest of ``others``, all of which must have been measured."""

    def ratio(figures: Figures) -> float | None:
        over, *under = (_find(figures, *name) for name in (ours, *others))
        times = [figure.ms_median for figure in under if figure is not None and figure.ms_median]
        if over is None or over.ms_median is None or len(times) < len(others):
            return None
        return over.ms_median / min(times)

    return ratio


def _memory(figures: Figures) -> float | None:
    """Peak beside inputs and gradients over 15 % of eager next-token loss's, plus in 16 bits the float32 dweight."""
    ours, eager = _find(figures, "ours:chunked", "sftmix"), _find(figures, EAGER, "ntp")
    if ours is None or eager is None or ours.extra_peak_bytes is None or eager.extra_peak_bytes is None:
        return None
    dweight = 0 if ours.dtype == "float32" else 4 * ours.V * ours.D
    return ours.extra_peak_bytes / (0.15 * eager.extra_peak_bytes + dweight)


# (what, target or None, value of one run's figures of one shape and dtype)
ROWS: tuple[tuple[str, float | None, Value], ...] = (
    ("eager torch's NTP alone", 1.00, _over((EAGER, "ntp"))),
    ("faster of eager and compiled torch's SFTMix", 0.80, _over((EAGER, "sftmix"), (COMPILED, "sftmix"))),
    ("compiled torch's NTP alone", 1.25, _over((COMPILED, "ntp"))),
    ("torch's linear_cross_entropy in chunks, NTP alone", 0.40, _over(("torch_linear_ce:chunked", "ntp"))),
    ("memory: 15 % of eager NTP's (16 bits: + 4 V D bytes)", 1.00, _memory),
    ("(bare products / faster of torch's SFTMix)", None,
     _over((EAGER, "sftmix"), (COMPILED, "sftmix"), ours=("torch:3 GEMMs", "gemm"))),
)  # fmt: skip


def table(figures: Iterable[Figure]) -> str:
    """Markdown: our SFTMix over each, the newest run that has both; empty where no run has any."""
    groups: dict[tuple[str, str], dict[str, list[Figure]]] = {}
    for figure in figures:
        runs = groups.setdefault((f"{figure.N}x{figure.V}x{figure.D}", figure.dtype), {})
        runs.setdefault(figure.run_id, []).append(figure)
    lines = []
    for (shape, dtype), runs in sorted(groups.items()):
        for what, target, value in ROWS:
            found = [(run, ratio) for run in sorted(runs) if (ratio := value(runs[run])) is not None]
            if not found:
                continue
            run, ratio = found[-1]
            verdict = "" if target is None else "met" if ratio <= target else "missed"
            limit = "" if target is None else f"{target:.2f}"
            lines.append(f"| {what} | {shape} | {dtype} | {ratio:.2f} | {limit} | {verdict} | {run} |")
    if not lines:
        return ""
    title = "| our SFTMix / | N x V x D | dtype | ratio | target | | run |"
    return "\n".join([title, "|---|---|---|---:|---:|---|---|", *lines])

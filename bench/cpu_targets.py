"""What the CPU figures are held against: ``chunked`` beside torch's losses and itself, as ratios within one run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from bench.figures import Figure
from bench.shapes import SHAPE_SETS, Shape

Figures = Sequence[Figure]
EAGER, COMPILED = "torch:eager", "torch_compile:plain"


def _find(figures: Figures, spec: str, task: str) -> Figure | None:
    provider, schedule = spec.split(":")
    for figure in figures:
        name = (figure.provider, figure.schedule, figure.task, figure.direction)
        way = "fwd" if task == "stats" else "fwd_bwd"
        if name == (provider, schedule, task, way) and figure.ms_median is not None:
            return figure
    return None


Value = Callable[[Figures], float | None]
OURS = ("ours:chunked", "sftmix")
NTP = ("ours:chunked", "ntp")


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
    ours, eager = _find(figures, *OURS), _find(figures, EAGER, "ntp")
    if ours is None or eager is None or ours.extra_peak_bytes is None or eager.extra_peak_bytes is None:
        return None
    dweight = 0 if ours.dtype == "float32" else 4 * ours.V * ours.D
    return ours.extra_peak_bytes / (0.15 * eager.extra_peak_bytes + dweight)


def _ms(name: tuple[str, str]) -> Value:
    def value(figures: Figures) -> float | None:
        found = _find(figures, *name)
        return None if found is None else found.ms_median

    return value


# (what, target or None, value of one run's figures of one shape and dtype), by the set of shapes it is asked at
ROWS: dict[str, tuple[tuple[str, float | None, Value], ...]] = {
    "cpu": (
        ("our SFTMix / eager torch's NTP alone", 1.00, _over((EAGER, "ntp"))),
        ("our SFTMix / faster of eager and compiled torch's SFTMix", 0.80,
         _over((EAGER, "sftmix"), (COMPILED, "sftmix"))),
        ("our SFTMix / compiled torch's NTP alone", 1.25, _over((COMPILED, "ntp"))),
        ("our SFTMix / torch's linear_cross_entropy in chunks, NTP alone", 0.40,
         _over(("torch_linear_ce:chunked", "ntp"))),
        ("our NTP / our SFTMix", 1.00, _over(OURS, ours=NTP)),
        ("our statistics / our NTP forward and backward", 1 / 3, _over(NTP, ours=("ours:chunked", "stats"))),
        ("memory: our SFTMix / 15 % of eager NTP's (16 bits: + 4 V D bytes)", 1.00, _memory),
        ("(bare products / faster of torch's SFTMix)", None,
         _over((EAGER, "sftmix"), (COMPILED, "sftmix"), ours=("torch:3 GEMMs", "gemm"))),
    ),
    "mid": (
        ("our NTP / eager torch's NTP", 1.50, _over((EAGER, "ntp"), ours=NTP)),
        ("our SFTMix / eager torch's SFTMix", 1.50, _over((EAGER, "sftmix"))),
        ("our NTP / our SFTMix", 1.00, _over(OURS, ours=NTP)),
    ),
    "call": (
        ("milliseconds of our NTP", 1.00, _ms(NTP)),
        ("milliseconds of our SFTMix", 1.00, _ms(OURS)),
        ("our NTP / our SFTMix", 1.00, _over(OURS, ours=NTP)),
    ),
}  # fmt: skip
WIDENED = "our SFTMix in 16 bits / in float32, on a CPU without 16-bit products"


def table(figures: Iterable[Figure]) -> str:
    """Markdown: every row at its shapes, from the newest run that has what it needs; empty where no run has any."""
    figures = list(figures)
    lines = []
    for name, rows in ROWS.items():
        for shape in SHAPE_SETS[name]:
            own = [f for f in figures if (f.N, f.V, f.D) == (shape.N, shape.V, shape.D)]
            for dtype in sorted({f.dtype for f in own}):
                runs = _by_run([f for f in own if f.dtype == dtype])
                lines += [_line(row, shape, dtype, runs) for row in rows]
            known = own[0].instruction_set if own else ""
            if known and not {"BF16", "AMX"} & set(known.split("-")):
                lines += [
                    _line((WIDENED, 1.30, _across(dtype)), shape, dtype, _by_run(own))
                    for dtype in sorted({f.dtype for f in own} - {"float32"})
                ]
    found = [line for line in lines if line]
    title = "| what | N x V x D | dtype | value | target | | run |"
    return "\n".join([title, "|---|---|---|---:|---:|---|---|", *found]) if found else ""


def _across(dtype: str) -> Value:
    """Our SFTMix in ``dtype`` over that in float32."""

    def ratio(figures: Figures) -> float | None:
        times = [
            _ms(OURS)([figure for figure in figures if figure.dtype == kind]) for kind in (dtype, "float32")
        ]
        return None if times[0] is None or times[1] is None else times[0] / times[1]

    return ratio


def _by_run(figures: Figures) -> dict[str, list[Figure]]:
    runs: dict[str, list[Figure]] = {}
    for figure in figures:
        runs.setdefault(figure.run_id, []).append(figure)
    return runs


def _line(
    row: tuple[str, float | None, Value], shape: Shape, dtype: str, runs: dict[str, list[Figure]]
) -> str:
    """One row of the table; empty where no run has what it needs."""
    what, target, value = row
    found = [(run, ratio) for run in sorted(runs) if (ratio := value(runs[run])) is not None]
    if not found:
        return ""
    run, ratio = found[-1]
    verdict = "" if target is None else "met" if ratio <= target else "missed"
    limit = "" if target is None else f"{target:.2f}"
    return f"| {what} | {shape} | {dtype} | {ratio:.2f} | {limit} | {verdict} | {run} |"

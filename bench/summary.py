"""The README's small table: the losses at one size on each kind of processor, and what follows, in words."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence

from bench.figures import Figure, newest

# The head of SmolLM2-135M on the CPU; a large head on a GPU.
SIZES = {"CPU": (1024, 49152, 576), "GPU": (8192, 128256, 4096)}
# Row → the ways of it, of which the fastest that passed is shown. Ours and torch's own come from one run.
OURS = ("ours:chunked", "ours:stored", "ours:recompute", "ours:default")
EAGER, COMPILED = ("torch:eager",), ("torch_compile:plain",)
ROWS = {
    "ours": OURS,
    "eager torch": EAGER,
    "compiled torch": COMPILED,
    "torch's `linear_cross_entropy`": ("torch_linear_ce:plain", "torch_linear_ce:chunked"),
    "QuACK": ("quack:chunked",),
    "Liger": ("liger:default", "liger:float32 sums"),
    "cut-cross-entropy": ("cce_exact:",),
}
Figures = Sequence[Figure]


def _pick(figures: Figures, specs: Sequence[str], task: str) -> Figure | None:
    """The fastest good figure of forward and backward among these ways; the λ-by-row form where there are two.

    ``chunked`` is what serves a CPU: on a GPU the Triton kernels do, of whose schedules the faster is the default.
    """
    found = [
        figure for figure in figures
        if f"{figure.provider}:{figure.schedule}" in specs and figure.task == task and figure.lam != "batch"
        and figure.direction == "fwd_bwd" and figure.ms_median is not None
        and not (figure.on_gpu and figure.schedule == "chunked")
    ]  # fmt: skip
    return min(found, key=lambda figure: figure.ms_median or 0.0, default=None)


def _is_whole(run: Figures) -> bool:
    """Whether a run has both losses of ours, eager and compiled torch."""
    return all(_pick(run, specs, task) for specs in (OURS, EAGER, COMPILED) for task in ("ntp", "sftmix"))


def _runs(figures: Iterable[Figure], *, size: tuple[int, int, int], dtype: str) -> list[list[Figure]]:
    """The figures of one size and dtype, by run, oldest first."""
    runs: dict[str, list[Figure]] = {}
    for figure in sorted(figures, key=lambda figure: figure.run_id):
        if (figure.N, figure.V, figure.D) == size and figure.dtype == dtype:
            runs.setdefault(figure.run_id, []).append(figure)
    return list(runs.values())


def _dtype(device: Figure) -> str:
    """What ``model.dtype=auto`` takes there: float32 on a CPU that is known to have no 16-bit products."""
    known = device.instruction_set
    return "bfloat16" if device.on_gpu or not known or "-BF16" in known or "-AMX" in known else "float32"


def chosen(figures: Iterable[Figure]) -> list[list[Figure]]:
    """For each kind of processor the newest run that has ours, eager and compiled torch, others' rows added.

    A kind is a GPU, or the instruction set of a CPU; CPUs of results that do not say it are taken only where no
    other CPU is there.
    """
    kinds: dict[str, list[Figure]] = {}
    for figure in figures:
        kinds.setdefault(figure.device if figure.on_gpu else figure.instruction_set, []).append(figure)
    if any(kind and not members[0].on_gpu for kind, members in kinds.items()):
        kinds.pop("", None)
    result = []
    for members in kinds.values():
        size = SIZES["GPU" if members[0].on_gpu else "CPU"]
        runs = _runs(members, size=size, dtype=_dtype(members[0]))
        whole = [run for run in runs if _is_whole(run)]
        if whole:
            later = [figure for run in runs for figure in run if figure.device == whole[-1][0].device]
            mine = {f"{figure.provider}:{figure.schedule}" for figure in whole[-1]}
            others = [f for f in newest(later) if f"{f.provider}:{f.schedule}" not in mine]
            result.append([*whole[-1], *others])
    return result


def _cells(name: str, figures: Figures) -> list[str]:
    """Milliseconds and MiB of one row; † where the loss is slightly off, ‡ where it comes from another run."""
    cells = []
    for task in ("ntp", "sftmix"):
        figure = _pick(figures, ROWS[name], task)
        if figure is None or figure.ms_median is None:
            cells += ["–", "–"]
            continue
        marks = ("†" if figure.caveat else "") + ("‡" if figure.run_id != figures[0].run_id else "")
        memory = "–" if figure.extra_peak_bytes is None else f"{figure.extra_peak_bytes / 2**20:,.0f}"
        cells += [f"{figure.ms_median:,.0f}{marks}", memory]
    return cells


def _words(figures: Figures) -> str:
    """What the table says of ours on one kind of processor, as ratios within its run."""

    def ms(specs: Sequence[str], task: str) -> float:
        figure = _pick(figures, specs, task)
        assert figure is not None and figure.ms_median is not None
        return figure.ms_median

    ours, head = ms(OURS, "sftmix"), figures[0]
    kind = head.device if head.on_gpu else head.instruction_set or head.device
    return (
        f"On {kind} in {head.dtype} our whole SFTMix loss takes {ours / ms(EAGER, 'ntp'):.2f} of the time of eager "
        f"torch's next-token loss alone, {ours / ms(COMPILED, 'ntp'):.2f} of compiled torch's, and "
        f"{ours / ms(COMPILED, 'sftmix'):.2f} of compiled torch's SFTMix."
    )


def _origins(figures: Figures) -> list[str]:
    """Machine, versions, commit, run and command of every run that is shown."""
    shown = {
        figure.run_id: figure
        for task in ("ntp", "sftmix") for specs in ROWS.values() if (figure := _pick(figures, specs, task))
    }  # fmt: skip
    return [
        f"- {figure.device}, {figure.threads} threads; torch {figure.versions.get('torch', '?')}; commit "
        f"{figure.commit}; run {run}: `{figure.command}`"
        for run, figure in sorted(shown.items())
    ]


def summary(figures: Iterable[Figure]) -> str:
    """Markdown of the whole block: the table, the sentences, where it comes from."""
    parts = chosen(figures)
    if not parts:
        return "No figures yet."
    lines = ["| processor, dtype | loss | NTP ms | MiB | SFTMix ms | MiB |", "|---|---|---:|---:|---:|---:|"]
    for part in parts:
        head = part[0]
        where = f"{head.device}, {head.dtype}"
        for name in ROWS:
            cells = _cells(name, part)
            if set(cells) != {"–"}:
                lines.append("| " + " | ".join([where, name, *cells]) + " |")
                where = ""
    origins = [line for part in parts for line in _origins(part)]
    return "\n".join([*lines, "", textwrap.fill(_note(parts, lines), 118), "", *origins])


def _note(parts: Sequence[Figures], lines: Sequence[str]) -> str:
    """What stands under the table: the sizes, the ratios in words, the marks that occur."""
    sizes = {(part[0].N, part[0].V, part[0].D) for part in parts}
    shape = " and ".join(f"N = {N}, V = {V}, D = {D}" for N, V, D in sorted(sizes))
    note = f"Forward and backward at {shape} (SFTMix pairs all rows); MiB above inputs and gradients. "
    note += " ".join(map(_words, parts))
    if any("†" in line for line in lines):
        note += " †: its loss is slightly off, see [RESULTS.md](bench/RESULTS.md)."
    if any("‡" in line for line in lines):
        note += " ‡: from another run on the same machine."
    return note

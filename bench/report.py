"""Tables from figures: ``python -m bench.report`` rewrites RESULTS.md and the README's small table."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from bench import cpu_targets, data, load, loop, suspects, targets
from bench.figures import OUT_OF_TIME, Figure, newest, read_figures
from bench.machine import ROOT
from bench.summary import summary

RESULTS = ROOT / "bench" / "results"
PAGE = ROOT / "bench" / "RESULTS.md"
README = ROOT / "README.md"
SUMMARY = ("<!-- summary: written by `python -m bench.report`, do not edit -->", "<!-- end of summary -->")
BEGIN = "<!-- measured: written by `python -m bench.report`, do not edit -->"
END = "<!-- end of measured -->"
# Tasks that have no column.
_ASIDE = {
    "planned": "SFTMix on the 60 % of rows that a row plan keeps",
    "step_ntp": "Whole training step, next-token loss",
    "step_sftmix": "Whole training step, SFTMix",
}
COLUMNS = (
    ("NTP fwd", "ntp", "fwd", "ms"),
    ("NTP fwd+bwd", "ntp", "fwd_bwd", "ms"),
    ("extra MiB", "ntp", "fwd_bwd", "MiB"),
    ("SFTMix fwd", "sftmix", "fwd", "ms"),
    ("SFTMix fwd+bwd", "sftmix", "fwd_bwd", "ms"),
    ("extra MiB", "sftmix", "fwd_bwd", "MiB"),
    ("statistics", "stats", "fwd", "ms"),
)


def _group_key(figure: Figure) -> tuple[str, str, int, int, int]:
    return figure.device, figure.dtype, figure.N, figure.V, figure.D


def _cell(figure: Figure | None, unit: str) -> str:
    if figure is None:
        return ""
    if figure.ms_median is None:
        return "not run" if figure.error == OUT_OF_TIME else "failed"
    if unit == "ms":
        return f"{figure.ms_median:.4g}" + ("†" if figure.caveat else "")
    return "" if figure.extra_peak_bytes is None else f"{figure.extra_peak_bytes / 2**20:.1f}"


def _table(figures: list[Figure]) -> list[str]:
    """The figures of one device, dtype and shape as a Markdown table that also reads as text."""
    shown = {task for _, task, *_ in COLUMNS}
    losses = [figure for figure in figures if figure.task in shown]
    found = {(figure.label, figure.task, figure.direction): figure for figure in losses}
    rows = [["provider", *(title for title, *_ in COLUMNS)]]
    for label in dict.fromkeys(figure.label for figure in losses):
        rows.append([label, *(_cell(found.get((label, task, way)), unit) for _, task, way, unit in COLUMNS)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        numbers = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        lines.append("| " + " | ".join([row[0].ljust(widths[0]), *numbers]) + " |")
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return [lines[0], "| " + " | ".join(rule) + " |", *lines[1:]] if losses else []


def _notes(figures: list[Figure]) -> list[str]:
    """Under a table: the bare products, what failed and why."""
    notes = []
    gemms = [f"{item.schedule} {_cell(item, 'ms')} ms" for item in figures if item.task == "gemm"]
    if gemms:
        notes.append(f"Bare library products of the same sizes: {', '.join(gemms)}.")
    for task, what in _ASIDE.items():
        times = [f"{item.label} {_cell(item, 'ms')} ms" for item in figures if item.task == task]
        if times:
            notes.append(f"{what}: {', '.join(times)}.")
    errors = [
        f"{item.label} {item.dhidden_error:.2g} and {item.dweight_error:.2g}"
        for item in figures
        if item.dhidden_error is not None and item.dweight_error is not None
    ]
    if errors:
        notes.append(f"Errors of dhidden and dweight against float64, next-token loss: {'; '.join(errors)}.")
    caveats = {(item.label, item.task): item.caveat for item in figures if item.caveat}
    notes += [f"† {label}, {task}: {caveat}" for (label, task), caveat in caveats.items()]
    failures: dict[tuple[str, str], list[str]] = {}
    for figure in figures:
        if figure.error is not None:
            failures.setdefault((figure.label, figure.error), []).append(f"{figure.task} {figure.direction}")
    return notes + [f"{label}, {', '.join(which)}: {error}" for (label, error), which in failures.items()]


def _origin(figures: list[Figure]) -> list[str]:
    """Device, versions, commit and command of the runs behind a table, one line per run."""
    lines = []
    for run_id, figure in {figure.run_id: figure for figure in figures}.items():
        versions = ", ".join(f"{name} {version}" for name, version in figure.versions.items())
        rounds = min((item.rounds for item in figures if item.run_id == run_id and item.rounds), default=0)
        state = ", provisional (the machine was not quiet)" if figure.provisional else ""
        lines.append(
            f"{figure.device}, {figure.threads} threads; {versions}; commit {figure.commit}; "
            f"run {run_id}, at least {rounds} rounds{state}: `{figure.command}`"
        )
    return lines


def _targets(figures: list[Figure]) -> list[str]:
    """What is aimed at, met or missed, for each GPU."""
    parts = []
    for device in dict.fromkeys(figure.device for figure in figures):
        own = [figure for figure in figures if figure.device == device]
        parts += [f"**Targets on {device}** (bfloat16, forward and backward)", targets.table(own)]
    return parts


def _cpu_targets(figures: list[Figure]) -> list[str]:
    """The same for each CPU, at the shapes that are published; ratios within one run."""
    parts = []
    for device in dict.fromkeys(figure.device for figure in figures):
        table = cpu_targets.table(figure for figure in figures if figure.device == device)
        parts += [f"**Targets on {device}** (`chunked`; forward and backward)", table] if table else []
    return parts


def _never_ran(figures: list[Figure]) -> set[str]:
    """Ways of which the time budget left nothing to show."""
    ran = {figure.label for figure in figures if figure.error != OUT_OF_TIME}
    return {figure.label for figure in figures} - ran


def tables(figures: Iterable[Figure]) -> str:
    """Markdown of all figures: targets, then a table per device, dtype and shape, newest run of each figure."""
    figures = list(figures)
    ordered = sorted(newest(figures), key=lambda figure: (figure.device, figure.dtype))
    parts = _targets([figure for figure in ordered if figure.on_gpu and figure.dtype == "bfloat16"])
    parts += _cpu_targets([figure for figure in figures if not figure.on_gpu])
    groups: dict[tuple[str, str, int, int, int], list[Figure]] = {}
    for figure in ordered:
        groups.setdefault(_group_key(figure), []).append(figure)
    for (_, dtype, N, V, D), everything in groups.items():
        left_out = _never_ran(everything)
        members = [figure for figure in everything if figure.label not in left_out]
        parts.append(f"**N = {N}, V = {V}, D = {D}, {dtype}** (ms, median)")
        parts.append("\n".join(_table(members)))
        notes = _notes(members)
        notes += [f"{', '.join(sorted(left_out))}: {OUT_OF_TIME}"] if left_out else []
        parts += ["\n".join(f"- {note}" for note in notes)]
        parts.append("\n\n".join(_origin(members or everything[:1])))
    return "\n\n".join(part for part in parts if part) or "No figures yet."


def rewritten(page: str, text: str, begin: str = BEGIN, end: str = END) -> str:
    """The page with ``text`` between its markers. Raises ``ValueError`` where a marker is missing."""
    before, found_begin, rest = page.partition(begin)
    _, found_end, after = rest.partition(end)
    if not found_begin or not found_end:
        raise ValueError(f"page: expected the lines {begin!r} and {end!r}, got neither or one")
    return f"{before}{begin}\n\n{text}\n\n{end}{after}"


def update(page: Path, text: str, markers: tuple[str, str], *, check: bool, command: str) -> int:
    """Write ``text`` between the markers of ``page``; with ``check`` only compare. 1: a checked page differs."""
    current = page.read_text(encoding="utf-8")
    wanted = rewritten(current, text, *markers)
    if check:
        if current != wanted:
            print(f"{page.name} differs from its source: run `{command}`", file=sys.stderr)
        return int(current != wanted)
    page.write_text(wanted, encoding="utf-8")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a page differs")
    args = parser.parse_args(argv)
    figures = read_figures(RESULTS)
    measured = tables(figures)
    others = [(data.section, data.RECORD), (load.section, load.RECORD), (suspects.section, suspects.RECORD)]
    others += [(loop.section, path) for path in loop.RECORDS]
    for section, record in others:
        if record.exists():
            measured += "\n\n" + section(json.loads(record.read_text(encoding="utf-8")))
    pages = ((PAGE, measured, (BEGIN, END)), (README, summary(figures), SUMMARY))
    return max(update(*page, check=args.check, command="python -m bench.report") for page in pages)


if __name__ == "__main__":
    sys.exit(main())

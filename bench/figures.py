"""One measured figure: its fields, its JSON line, and reading it back."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

# planned: SFTMix on the 60 % of rows that a row plan keeps; step_*: a whole training step (bench/train.py).
TASKS = ("ntp", "sftmix", "stats", "gemm", "planned", "step_ntp", "step_sftmix")
DIRECTIONS = ("fwd", "fwd_bwd")
# "AMD EPYC, 2 cores, AVX-512-BF16": bench/machine.py writes it; older files end after the cores.
_CPU = re.compile(r", \d+ cores(?:, (?P<instructions>.+))?$")
OUT_OF_TIME = "not run: the time budget was spent"


@dataclass(frozen=True)
class Figure:
    """A median of one provider on one task, or the reason why there is none.

    ``extra_peak_bytes`` is the peak above inputs and, with a backward, above the gradients of hidden and
    weight, which any loss must return; ``peak_bytes`` is the peak above inputs alone. ``lam``: the Mixup
    weights differ by row ("row"), are one number for the batch ("batch", for peers that cannot weight rows),
    or are absent ("").
    """

    run_id: str  # UTC time, so that names sort by time
    commit: str
    device: str
    versions: dict[str, str]
    command: str
    task: str
    direction: str
    provider: str
    schedule: str
    lam: str
    dtype: str
    N: int
    V: int
    D: int
    M: int
    threads: int
    rounds: int
    ms_median: float | None
    ms_min: float | None
    extra_peak_bytes: int | None
    peak_bytes: int | None
    provisional: bool = False
    error: str | None = None
    caveat: str | None = None  # what is wrong with a figure that is shown all the same
    dhidden_error: float | None = None  # against float64, as norms
    dweight_error: float | None = None

    def __post_init__(self) -> None:
        if self.task not in TASKS or self.direction not in DIRECTIONS:
            raise ValueError(
                f"task, direction: expected {TASKS}, {DIRECTIONS}, got {self.task}, {self.direction}"
            )
        if (self.ms_median is None) != (self.error is not None):
            raise ValueError(f"error: expected a message exactly where ms_median is None, got {self.error!r}")

    @property
    def key(self) -> tuple[str, ...]:
        """What a newer run replaces: everything that says which figure this is, and nothing of when."""
        sizes = (str(self.N), str(self.V), str(self.D), self.dtype)
        return (self.device, *sizes, self.task, self.direction, self.provider, self.schedule, self.lam)

    @property
    def on_gpu(self) -> bool:
        return _CPU.search(self.device) is None

    @property
    def instruction_set(self) -> str:
        """What a CPU's figure used of its instructions; "" on a GPU, and in files that do not say it yet."""
        found = _CPU.search(self.device)
        return (found["instructions"] or "") if found else ""

    @property
    def label(self) -> str:
        """Provider with its schedule, as tables show it."""
        note = ", one λ" if self.lam == "batch" else ""
        return f"{self.provider} ({self.schedule}{note})" if self.schedule else self.provider


def write_figures(path: Path, figures: Iterable[Figure]) -> None:
    """Write one JSON object per line; the file is replaced at once, so a kill never leaves half a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(dataclasses.asdict(figure), sort_keys=False) + "\n" for figure in figures)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def read_figures(folder: Path) -> list[Figure]:
    """Every figure of ``folder/*.jsonl``, oldest run first; ``ValueError`` names a line that is not one."""
    figures = []
    for path in sorted(folder.glob("*.jsonl")):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            try:
                figures.append(Figure(**json.loads(line)))
            except (TypeError, ValueError) as problem:
                raise ValueError(f"{path.name} line {number}: expected a figure, got {problem}") from problem
    return sorted(figures, key=lambda figure: figure.run_id)


def newest(figures: Iterable[Figure]) -> list[Figure]:
    """Of figures that measure the same thing, the one of the latest run, in order of first appearance."""
    latest: dict[tuple[str, ...], Figure] = {}
    for figure in sorted(figures, key=lambda item: item.run_id):
        latest[figure.key] = figure
    return list(latest.values())

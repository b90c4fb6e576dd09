"""What metrics.jsonl says, as curves over the optimizer steps that a page can draw."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sftmix.evaluation.curves import exponential_mean

MOST = 600  # points of one curve
_DIGITS = 6
Records = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Panel:
    """One picture of several runs: which figure of the records, its title and its unit."""

    name: str
    title: str
    unit: str
    smooth: bool = False
    scale: float = 1.0


PANELS = (
    Panel("ntp_loss", "Next-token loss", "nats per token", smooth=True),
    Panel("mixup_loss", "Mixup loss, unweighted", "nats per mixed position", smooth=True),
    Panel("loss", "Loss that is minimised", "nats", smooth=True),
    Panel("lr", "Learning rate", ""),
    Panel("grad_norm", "Gradient norm before clipping", ""),
    Panel("tokens_per_second", "Throughput", "tokens that bear loss per second"),
    Panel("peak_memory_bytes", "Most memory so far", "GB", scale=1e-9),
)


def panels(runs: Mapping[str, Records]) -> list[dict[str, Any]]:
    """The panels that have a value, each with a curve for every run that has one; ``k`` is the run's place."""
    found = []
    for panel in PANELS:
        curves = [{**curve(label, records, panel), "k": k} for k, (label, records) in enumerate(runs.items())]
        curves = [each for each in curves if each["steps"]]
        if curves:
            found.append({"name": panel.name, "title": panel.title, "unit": panel.unit, "curves": curves})
    return found


def curve(label: str, records: Records, panel: Panel) -> dict[str, Any]:
    """Steps and values of one figure; ``bad`` counts the steps whose value was not finite.

    Of more than ``MOST`` values the lowest and the highest of each stretch are kept, which is told as ``of`` values;
    a stretch of which nothing is finite leaves a gap. Steps that were left out of training are in ``skipped``.
    """
    has = [record for record in records if panel.name in record]
    values = np.array([_number(record[panel.name]) * panel.scale for record in has], np.float64)
    steps = np.array([record["step"] for record in has], np.int64)
    finite = np.isfinite(values)
    if not finite.any():
        return {"label": label, "steps": [], "values": [], "bad": len(values), "of": 0}
    kept = _kept(values)
    made: dict[str, Any] = {
        "label": label, "steps": steps[kept].tolist(), "values": _rounded(values[kept]),
        "bad": int((~finite).sum()), "of": len(values), "last": _rounded(values[finite])[-1],
        "skipped": [int(record["step"]) for record in has if record.get("skipped")][:100],
    }  # fmt: skip
    if panel.smooth:
        smooth = np.full(len(values), np.nan)
        smooth[finite] = exponential_mean(values[finite])
        made["smooth"] = _rounded(smooth[kept])
    return made


def _number(value: Any) -> float:
    """metrics.jsonl has null for what was not finite."""
    return float(value) if isinstance(value, (int, float)) else math.nan


def _kept(values: np.ndarray[Any, np.dtype[np.float64]]) -> list[int]:
    """Places to draw, in order: all, or of each stretch the lowest and the highest, the first and the last of all."""
    if len(values) <= MOST:
        return list(range(len(values)))
    found = {0, len(values) - 1}
    for stretch in np.array_split(np.arange(len(values)), MOST // 2 - 1):
        here = values[stretch]
        if np.isfinite(here).any():
            found |= {int(stretch[np.nanargmin(here)]), int(stretch[np.nanargmax(here)])}
        else:
            found.add(int(stretch[0]))
    return sorted(found)


def _rounded(values: np.ndarray[Any, np.dtype[np.float64]]) -> list[float | None]:
    return [float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None for value in values.tolist()]

"""Scores of examples as a table: what dynamics.parquet has, and beside it what a scoring pass of its own knows.

``scores.parquet`` has a row per scoring point and example, with the columns of dynamics.parquet (so it can be
``reference.scores``) and ``model``, ``nll``, ``entropy`` (nats per token that bears loss), ``perplexity`` and ``ifd``
(null where there is none). ``ExampleScores`` is the same by example.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sftmix.scores.dynamics import SCHEMA, SOURCES, mean_ranks, read_dynamics, read_table

SCORES = pa.schema(
    [
        *SCHEMA,
        pa.field("model", pa.string(), nullable=False),
        pa.field("nll", pa.float64(), nullable=False),
        pa.field("perplexity", pa.float64(), nullable=False),
        pa.field("entropy", pa.float64(), nullable=False),
        pa.field("ifd", pa.float64()),
    ]
)
BY_POINT = ("nll", "perplexity", "top1_share", "entropy", "ifd")  # each with a mean and a variability
Values = NDArray[np.float64]


@dataclass(frozen=True)
class ExampleScores:
    """E examples at C scoring points, in the order of their ids; NaN where an example has no such score."""

    examples: list[str]  # [E]
    num_tokens: NDArray[np.int64]  # [E]
    points: dict[str, Values]  # name in BY_POINT → [C, E]; of plain dynamics without entropy and ifd
    source: str

    @property
    def num_points(self) -> int:
        """C, the number of scoring points."""
        return len(self.points["nll"])

    @cached_property
    def columns(self) -> dict[str, Values]:
        """Every score by which examples can be ordered, each [E].

        ``confidence`` is minus the mean perplexity, ``variability`` its standard deviation (from two points on);
        ``first_nll``, ``first_ifd`` and ``last_nll`` are those of one point; the others are means over the points.
        """
        found: dict[str, Values] = {
            "confidence": -self.points["perplexity"].mean(0), "num_tokens": self.num_tokens.astype(np.float64),
            **{name: values.mean(0) for name, values in self.points.items()},
            "first_nll": self.points["nll"][0], "last_nll": self.points["nll"][-1],
        }  # fmt: skip
        if "ifd" in self.points:
            found["first_ifd"] = self.points["ifd"][0]
        if self.num_points > 1:
            found["variability"] = np.std(self.points["perplexity"], axis=0)
        return found

    def of(self, index: int) -> dict[str, Any]:
        """The scores of one example as plain data: by point, their mean, and their variability (standard deviation)."""
        told: dict[str, Any] = {"num_tokens": int(self.num_tokens[index])}
        told |= {
            name: float(self.columns[name][index])
            for name in ("confidence", "variability")
            if name in self.columns
        }
        for name, values in self.points.items():
            column = values[:, index]
            told[name] = {"mean": float(column.mean()), "by_point": column.tolist()}
            if len(column) > 1:
                told[name]["variability"] = float(np.std(column))
        return told


def score_row(
    name: str, *, checkpoint: int, step: int, model: str, nll_sum: float, num_tokens: int, num_top1: int,
    entropy_sum: float, ifd: float | None,
) -> dict[str, Any]:  # fmt: skip
    """One row of scores.parquet from sums over the example's tokens that bear loss."""
    nll = nll_sum / num_tokens
    return {
        "example": name, "checkpoint": checkpoint, "step": step, "nll_sum": nll_sum, "num_tokens": num_tokens,
        "top1_share": num_top1 / num_tokens, "source": SOURCES[0], "model": model, "nll": nll,
        "perplexity": float(np.exp(nll)), "entropy": entropy_sum / num_tokens, "ifd": ifd,
    }  # fmt: skip


def read_scores(path: str | os.PathLike[str]) -> ExampleScores:
    """The scores of a scores.parquet, or of a dynamics.parquet. Raises ``ValueError`` as ``read_dynamics`` does."""
    dynamics = read_dynamics(path)
    points: dict[str, Values] = {
        "nll": dynamics.nll_sum / dynamics.num_tokens, "perplexity": dynamics.perplexity,
        "top1_share": dynamics.top1_share,
    }  # fmt: skip
    try:
        table = read_table(path, SCORES, "score")
    except ValueError:  # plain dynamics
        return ExampleScores(dynamics.examples, dynamics.num_tokens[0], points, dynamics.source)
    column = {name: at for at, name in enumerate(dynamics.examples)}
    at = np.array([column[name] for name in table.column("example").to_pylist()])
    checkpoint = table.column("checkpoint").to_numpy()
    for name in ("entropy", "ifd"):
        values = np.full(dynamics.nll_sum.shape, np.nan)
        values[checkpoint, at] = table.column(name).to_numpy(zero_copy_only=False)
        if name == "entropy" or not np.isnan(values).all():
            points[name] = values
    return ExampleScores(dynamics.examples, dynamics.num_tokens[0], points, dynamics.source)


def ranked(names: Sequence[str], values: Values, *, highest: bool) -> list[str]:
    """Ids by their score, those without one (NaN) left out; equal scores in the order of the ids."""
    pairs = [(value, name) for value, name in zip(values.tolist(), names, strict=True) if value == value]
    return [name for _, name in sorted(pairs, key=lambda pair: (-pair[0] if highest else pair[0], pair[1]))]


def auroc(values: Iterable[float], positive: Sequence[bool]) -> float:
    """Area under the ROC curve: the chance that a positive has the higher value, ties counting half.

    Raises ``ValueError`` where all are positive or none is, and for NaN.
    """
    ranks, marks = mean_ranks(np.asarray(list(values), dtype=np.float64)), np.asarray(positive, dtype=bool)
    good, bad = int(marks.sum()), int((~marks).sum())
    if not good or not bad:
        raise ValueError(f"positive: expected some of both, got {good} of {len(marks)}")
    return float((ranks[marks].sum() - good * (good + 1) / 2) / (good * bad))

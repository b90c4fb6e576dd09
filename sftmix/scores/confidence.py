"""From training dynamics to the confident and the unconfident half.

``confidence = -(1/C) sum_c perplexity_c``: the negative mean, over the C scoring points, of the perplexity
of the response. ``variability`` is the standard deviation of the same perplexities. The split is at the
median confidence (``halves.median_split``) and lives in ``split.parquet``: ``example``, ``half``,
``confidence`` and ``variability`` (both null where unknown), in order of falling confidence.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

import numpy as np
import pyarrow as pa

from sftmix.scores.dynamics import Dynamics, read_table, to_table, write_table
from sftmix.scores.halves import Split, quantile_split

__all__ = ["Split", "confidence", "make_split", "read_split", "variability", "write_split"]

SCHEMA = pa.schema(
    [
        pa.field("example", pa.string(), nullable=False),
        pa.field("half", pa.string(), nullable=False),
        pa.field("confidence", pa.float64()),
        pa.field("variability", pa.float64()),
    ]
)


def confidence(dynamics: Dynamics) -> dict[str, float]:
    """Each example's confidence: minus its mean perplexity over the scoring points."""
    return dict(zip(dynamics.examples, (-dynamics.perplexity.mean(axis=0)).tolist(), strict=True))


def variability(dynamics: Dynamics) -> dict[str, float]:
    """Each example's standard deviation of perplexity; empty with one scoring point, where there is none."""
    if dynamics.num_checkpoints < 2:
        return {}
    return dict(zip(dynamics.examples, np.std(dynamics.perplexity, axis=0).tolist(), strict=True))


def make_split(dynamics: Dynamics, share: float = 0.5) -> Split:
    """The split of scored examples, at the median or where ``share`` of them are confident.

    Raises ``ValueError`` for fewer than two examples.
    """
    scores = confidence(dynamics)
    confident, unconfident = quantile_split(scores, share)
    return Split(confident, unconfident, scores, variability(dynamics))


def write_split(path: str | os.PathLike[str], split: Split) -> None:
    """Write a split; the file is whole or absent. Raises ``ValueError`` for what ``read_split`` refuses."""
    halves = [("confident", name) for name in split.confident]
    halves += [("unconfident", name) for name in split.unconfident]
    _check(halves, split.confidence, split.variability, os.fspath(path))
    rows = [
        {
            "example": name,
            "half": half,
            "confidence": split.confidence.get(name),
            "variability": split.variability.get(name),
        }
        for half, name in halves
    ]
    write_table(path, to_table(rows, SCHEMA, "split"))


def read_split(path: str | os.PathLike[str]) -> Split:
    """Read a split.

    Raises ``ValueError`` for a file that is missing, damaged or half written, missing columns, an unknown
    half, an id that is repeated, halves that differ by more than one, and scores that are not numbers.
    """
    columns = read_table(path, SCHEMA, "split").to_pydict()
    halves = list(zip(columns["half"], columns["example"], strict=True))
    scores = {
        name: {
            example: value
            for example, value in zip(columns["example"], columns[name], strict=True)
            if value is not None
        }
        for name in ("confidence", "variability")
    }
    _check(halves, scores["confidence"], scores["variability"], os.fspath(path))
    return Split(
        confident=[name for half, name in halves if half == "confident"],
        unconfident=[name for half, name in halves if half == "unconfident"],
        confidence=scores["confidence"],
        variability=scores["variability"],
    )


def _check(
    halves: list[tuple[str, str]],
    scores: Mapping[str, float],
    spread: Mapping[str, float],
    path: str,
) -> None:
    """Everything that makes a split usable."""
    remedy = "`sftmix split` writes it anew"
    sizes = {"confident": 0, "unconfident": 0}
    seen: set[str] = set()
    for half, name in halves:
        if half not in sizes:
            raise ValueError(f"{path}: expected half to be confident or unconfident, got {half!r}; {remedy}")
        if name in seen:
            raise ValueError(f"{path}: expected every example once, got {name} again; {remedy}")
        sizes[half] += 1
        seen.add(name)
    if len(seen) < 2:
        raise ValueError(f"{path}: expected at least two examples, got {len(seen)}; {remedy}")
    if not all(sizes.values()):
        raise ValueError(
            f"{path}: expected an example in each half, got {sizes['confident']} confident and "
            f"{sizes['unconfident']} unconfident; {remedy}"
        )
    for column, values in (("confidence", scores), ("variability", spread)):
        if values and values.keys() != seen:
            raise ValueError(
                f"{path}: expected {column} for all {len(seen)} examples or none, got {len(values)}"
            )
        if any(np.isnan(value) for value in values.values()):
            raise ValueError(f"{path}: expected {column} to be numbers, got nan; {remedy}")

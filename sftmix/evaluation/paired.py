"""Per-example held-out sums of every model on disk, and the difference of two models on the same examples.

``heldout.parquet`` has one row per model and example: ``model`` (base, ntp or sftmix), ``example`` (id), ``nll_sum``
(nats over the tokens that bear loss), ``num_tokens`` and ``num_top1`` (tokens that were the most likely one).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from sftmix.evaluation.uncertainty import ratio_stderr
from sftmix.scores.dynamics import read_table, to_table, write_table

Row = dict[str, Any]
SCHEMA = pa.schema(
    [
        pa.field("model", pa.string(), nullable=False),
        pa.field("example", pa.string(), nullable=False),
        pa.field("nll_sum", pa.float64(), nullable=False),
        pa.field("num_tokens", pa.int64(), nullable=False),
        pa.field("num_top1", pa.int64(), nullable=False),
    ]
)


def write_rows(path: str | os.PathLike[str], rows: Mapping[str, Sequence[Row]]) -> None:
    """Write the rows of every model, by model; the file is whole or absent."""
    listed = [{"model": model, **row} for model, found in rows.items() for row in found]
    write_table(path, to_table(listed, SCHEMA, "heldout"))


def read_rows(path: str | os.PathLike[str]) -> dict[str, list[Row]]:
    """The rows by model; none where there is no file. Raises ``ValueError`` for one that is damaged."""
    found: dict[str, list[Row]] = {}
    for row in read_table(path, SCHEMA, "evaluate").to_pylist() if Path(path).exists() else []:
        found.setdefault(row.pop("model"), []).append(row)
    return found


def difference(ours: Sequence[Row], theirs: Sequence[Row]) -> dict[str, Any]:
    """``nll`` of ours minus theirs, nats a token on the same examples, and its paired standard error ``nll_stderr``.

    What makes an example hard for both cancels, so the error is smaller than that of two independent figures. Raises
    ``ValueError`` for rows of other examples.
    """
    other = {row["example"]: row for row in theirs}
    pairs = [(row, other.get(row["example"])) for row in ours]
    if len(ours) != len(theirs) or any(b is None or a["num_tokens"] != b["num_tokens"] for a, b in pairs):
        raise ValueError(
            f"theirs: expected the {len(ours)} examples of ours, got {len(theirs)}, others among them"
        )
    counts = [row["num_tokens"] for row in ours]
    sums = [a["nll_sum"] - b["nll_sum"] for a, b in pairs if b is not None]
    return {"nll": sum(sums) / sum(counts), "nll_stderr": ratio_stderr(sums, counts)}

"""Training dynamics: how well the reference predicts each example at each scoring point, on disk.

``dynamics.parquet`` has one row per source, scoring point and example: ``example`` (id), ``checkpoint``
(0 to C - 1), ``step`` (the optimizer step it was scored at), ``nll_sum`` (nats over the tokens that bear
loss), ``num_tokens``, ``top1_share`` (share of those tokens that were the most likely one) and ``source``:

- ``checkpoint``: every example scored with the weights of one saved checkpoint, in evaluation mode;
- ``online``: a by-product of the training steps, so examples of one scoring point were seen with different
  weights, and in training mode (dropout on).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from sftmix.files import replacing

SOURCES = ("checkpoint", "online")
SCHEMA = pa.schema(
    [
        pa.field("example", pa.string(), nullable=False),
        pa.field("checkpoint", pa.int64(), nullable=False),
        pa.field("step", pa.int64(), nullable=False),
        pa.field("nll_sum", pa.float64(), nullable=False),
        pa.field("num_tokens", pa.int64(), nullable=False),
        pa.field("top1_share", pa.float64(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
    ]
)


@dataclass(frozen=True)
class Dynamics:
    """The scores of one source: C scoring points by E examples, examples in the order of their ids."""

    examples: list[str]  # [E]
    step: NDArray[np.int64]  # [C, E]
    nll_sum: NDArray[np.float64]  # [C, E], nats
    num_tokens: NDArray[np.int64]  # [C, E]
    top1_share: NDArray[np.float64]  # [C, E]
    source: str

    @property
    def num_checkpoints(self) -> int:
        """C, the number of scoring points."""
        return len(self.nll_sum)

    @property
    def perplexity(self) -> NDArray[np.float64]:
        """[C, E], exp of the mean NLL over the tokens that bear loss."""
        return np.exp(self.nll_sum / self.num_tokens)


class ExampleSums(NamedTuple):
    """Per-example sums over the rows of a batch, each [B]."""

    nll_sum: Tensor  # float64
    num_tokens: Tensor  # int64
    num_top1: Tensor  # int64


def accumulate(nll: Tensor, is_top1: Tensor, example: Tensor, num_examples: int) -> ExampleSums:
    """Sum per-row ``nll`` [N] and ``is_top1`` [N] by ``example`` [N] (0 to ``num_examples`` - 1).

    Stays on the device of its arguments without a host read, and is deterministic there (no atomics).
    Raises ``ValueError`` for shapes that differ, and on a CPU for an example out of range.
    """
    if not (nll.shape == is_top1.shape == example.shape and nll.dim() == 1):
        shapes = ", ".join(str(list(value.shape)) for value in (nll, is_top1, example))
        raise ValueError(f"nll, is_top1, example: expected the same shape [N], got {shapes}")
    if (
        example.device.type == "cpu"
        and example.numel()
        and not 0 <= example.min() <= example.max() < num_examples
    ):
        raise ValueError(f"example: expected values in [0, {num_examples}), got up to {int(example.max())}")
    member = example == torch.arange(num_examples, device=example.device)[:, None]  # [B, N]
    return ExampleSums(
        nll_sum=torch.where(member, nll.double(), 0.0).sum(1),
        num_tokens=member.sum(1),
        num_top1=(member & is_top1.bool()).sum(1),
    )


def write_dynamics(path: str | os.PathLike[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows, each with the columns above, after checking them; the file is whole or absent.

    Raises ``ValueError`` for anything that ``read_dynamics`` would refuse.
    """
    table = to_table(rows, SCHEMA, "dynamics")
    if not len(table):
        raise ValueError(f"{path}: expected at least one row, got none")
    for source in sorted(_sources(table, path)):
        _grid(table, source, os.fspath(path))
    write_table(path, table)


def read_dynamics(path: str | os.PathLike[str], source: str | None = None) -> Dynamics:
    """Read one source's scores; ``None`` takes the checkpoints' where the file has both.

    Raises ``ValueError`` for a file that is missing, damaged or half written, for columns that are missing,
    a source that is not there, examples not scored exactly once at every scoring point, and bad values.
    """
    table = read_table(path, SCHEMA, "score")
    found = _sources(table, path)
    if source is None:
        source = next((name for name in SOURCES if name in found), None)
    if source not in found or source is None:
        raise ValueError(
            f"{path}: expected scores of source {source or 'checkpoint'}, got {sorted(found) or 'none'}"
        )
    return _grid(table, source, os.fspath(path))


def read_rows(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """All rows as they are in the file, e.g. to add another source's and write it anew."""
    rows: list[dict[str, Any]] = read_table(path, SCHEMA, "score").to_pylist()
    return rows


def rank_correlation(a: Mapping[str, float], b: Mapping[str, float]) -> float:
    """Spearman's rank correlation of two scores of the same examples, ties given their mean rank.

    NaN when all values of one are equal. Raises ``ValueError`` for ids that differ, NaN, or fewer than two.
    """
    if a.keys() != b.keys():
        differ = a.keys() ^ b.keys()
        raise ValueError(
            f"b: expected the ids of a, got {len(differ)} in only one of them, e.g. {min(differ)}"
        )
    if len(a) < 2:
        raise ValueError(f"a: expected at least two examples, got {len(a)}")
    x, y = (mean_ranks(np.array([scores[name] for name in a], dtype=np.float64)) for scores in (a, b))
    x, y = x - x.mean(), y - y.mean()
    spread = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / spread if spread > 0 else float("nan")


def to_table(rows: Iterable[Mapping[str, Any]], schema: pa.Schema, name: str) -> pa.Table:
    """Rows as an Arrow table of ``schema``; ``ValueError`` for missing, unknown or mistyped columns."""
    listed = list(rows)
    for i, row in enumerate(listed):
        if set(row) != set(schema.names):
            raise ValueError(
                f"{name}: expected columns {', '.join(schema.names)}, got {', '.join(row)} in row {i}"
            )
        missing = [field.name for field in schema if not field.nullable and row[field.name] is None]
        if missing:
            raise ValueError(f"{name}: expected a value for {missing[0]}, got none in row {i}")
    columns = [[row[column] for row in listed] for column in schema.names]
    try:
        return pa.table(
            [pa.array(c, field.type) for c, field in zip(columns, schema, strict=True)], schema=schema
        )
    except (pa.ArrowException, TypeError, OverflowError) as error:
        raise ValueError(
            f"{name}: expected values of the types {schema.types}, got others ({error})"
        ) from error


def write_table(path: str | os.PathLike[str], table: pa.Table) -> None:
    """Write a Parquet file that is whole or absent."""
    with replacing(path) as temporary:
        pq.write_table(table, temporary)


def read_table(path: str | os.PathLike[str], schema: pa.Schema, stage: str) -> pa.Table:
    """Read a Parquet file of ``schema``; every message says which stage writes the file."""
    remedy = f"`sftmix {stage}` writes it anew"
    if not Path(path).is_file():
        raise ValueError(f"{path}: expected a file, got none; {remedy}")
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ValueError(
            f"{path}: expected a whole Parquet file, got a damaged one ({' '.join(str(error).split())}); {remedy}"
        ) from error
    missing = [name for name in schema.names if name not in table.column_names]
    if missing:
        got = ", ".join(table.column_names)
        raise ValueError(f"{path}: expected a column {missing[0]}, got {got}; {remedy}")
    try:
        table = table.select(schema.names).cast(pa.schema([field.with_nullable(True) for field in schema]))
    except pa.ArrowException as error:
        raise ValueError(
            f"{path}: expected columns of {schema.types}, got others ({error}); {remedy}"
        ) from error
    for field in schema:
        if not field.nullable and table.column(field.name).null_count:
            raise ValueError(f"{path}: expected a value for {field.name} in every row, got nulls; {remedy}")
    return table


def _sources(table: pa.Table, path: str | os.PathLike[str]) -> set[str]:
    """The sources in the file, each one of ``SOURCES``."""
    found: set[str] = set(table.column("source").to_pylist())
    unknown = sorted(found.difference(SOURCES))
    if unknown:
        raise ValueError(f"{path}: expected source to be one of {', '.join(SOURCES)}, got {unknown[0]!r}")
    return found


def _grid(table: pa.Table, source: str, path: str) -> Dynamics:
    """One source's rows as [C, E] arrays: nothing missing, repeated or out of range."""
    table = table.filter(pc.equal(table.column("source"), source))
    examples, column = np.unique(np.array(table.column("example").to_pylist()), return_inverse=True)
    values = {
        name: table.column(name).to_numpy() for name in SCHEMA.names if name not in ("example", "source")
    }
    checkpoint = values.pop("checkpoint")
    for name, valid in _validity(checkpoint, values).items():
        if not valid.all():
            i = int(np.argmin(valid))
            got = checkpoint[i] if name == "checkpoint" else values[name][i]
            raise ValueError(
                f"{path}: expected {name} {_EXPECTED[name]}, got {got} for {examples[column[i]]}"
            )
    count = np.zeros((int(checkpoint.max()) + 1, len(examples)), dtype=np.int64)
    np.add.at(count, (checkpoint, column), 1)
    if (count != 1).any():
        c, e = np.argwhere(count != 1)[0]
        raise ValueError(
            f"{path}: expected example {examples[e]} once at checkpoint {c} ({source}), "
            f"got it {count[c, e]} times; `sftmix score` writes it anew"
        )
    grids = {name: np.empty(count.shape, dtype=array.dtype) for name, array in values.items()}
    for name, array in values.items():
        grids[name][checkpoint, column] = array
    return Dynamics(examples=[str(name) for name in examples], source=source, **grids)


_EXPECTED = {
    "checkpoint": "to count from 0",
    "step": "of at least 0",
    "nll_sum": "to be a finite number of at least 0",
    "num_tokens": "of at least 1",
    "top1_share": "between 0 and 1",
}


def _validity(checkpoint: NDArray[Any], values: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[np.bool_]]:
    """Which rows hold a usable value, by column."""
    return {
        # A number beyond the count of rows must leave a gap; found here, it cannot ask for a huge grid.
        "checkpoint": (checkpoint >= 0) & (checkpoint < len(checkpoint)),
        "step": values["step"] >= 0,
        # float32 rounding may leave a token predicted with certainty slightly below 0.
        "nll_sum": (values["nll_sum"] >= -1e-3 * values["num_tokens"]) & np.isfinite(values["nll_sum"]),
        "num_tokens": values["num_tokens"] >= 1,
        "top1_share": (values["top1_share"] >= 0) & (values["top1_share"] <= 1),
    }


def mean_ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ranks from 1, equal values sharing their mean rank."""
    if np.isnan(values).any():
        raise ValueError("scores: expected numbers, got nan")
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    mean_rank: NDArray[np.float64] = np.cumsum(counts) - (counts - 1) / 2
    return mean_rank[inverse]

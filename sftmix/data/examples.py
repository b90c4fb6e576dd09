"""Examples from a source, in memory: what a script of one's own needs; a run reads by ``prepare``."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from sftmix.data.forms import parse_row
from sftmix.data.prepare import Source, unique
from sftmix.data.rows import Example, Fault, RowError

__all__ = ["Example", "load_examples"]


def load_examples(source: str, *, split: str | None = None, limit: int | None = None) -> list[Example]:
    """The examples of a file, folder, glob or ``datasets`` id (its ``split``); ``limit`` keeps the first so many rows.

    Rows that are equal get ids that end in -2, -3, … so that every id is unique. Raises ``ValueError`` naming file and
    line for the first row that cannot be used, and for a source without any.
    """
    examples = []
    seen: Counter[str] = Counter()
    for row in Source(source, split=split, limit=limit).rows():
        try:
            if isinstance(row, Fault):
                raise RowError(row.kind, row.reason)
            example = parse_row(row).example
        except RowError as error:
            raise ValueError(f"{row.place}: {error.reason}") from error
        examples.append(replace(example, id=unique(example.id, seen)))
    return examples

"""One JSON object that is a whole file: the list of rows in it, its columns, or itself as the only row.

- a list of objects under ``data``, ``rows`` or ``examples``, under the name of a split, or under the only key;
- lists of one length under every key (``{"a": [1, 2], "b": [3, 4]}``), or objects with the keys 0, 1, 2, … there:
  columns;
- objects under the keys 0, 1, 2, …: rows;
- anything else is one row; so is an object whose lists are turns of a conversation or tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from sftmix.data.json_values import Repeated
from sftmix.data.rows import Row
from sftmix.data.splits import SPLITS, split_of

Said = Callable[[str, str], None]  # (what, why): told of everything that is not read and is no record
_HOLDERS = ("data", "rows", "examples")
_TOKENS = ("input_ids", "labels", "attention_mask")


def rows_of_document(document: Row, name: str, split: str | None, said: Said) -> Iterator[Row]:
    """Rows of the only object of the file ``name``; raises ``ValueError`` when several lists could be the rows."""
    fields = document.fields
    if not isinstance(fields, dict) or not fields:
        yield document
        return
    holder = _holder(fields, document.place, split)
    if holder is not None:
        for key in fields:
            if key != holder:
                said(f"{document.place}, {key}", f"beside {holder}, which holds the rows")
        rows = fields[holder]
    elif (columns := _columns(fields)) is not None:
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    elif _is_numbered(fields) and all(isinstance(value, dict) for value in fields.values()):
        rows = list(fields.values())
    else:
        yield document
        return
    if isinstance(fields, Repeated):
        raise ValueError(f"{document.place}: expected each key of the object once, got {fields.key!r} again")
    for item, row in enumerate(rows, 1):
        yield Row(f"{name}, item {item}", row)


def _holder(fields: dict[str, Any], place: str, split: str | None) -> str | None:
    """The key whose list is the rows; None: there is none."""
    lists = [key for key, value in fields.items() if _is_rows(value)]
    named = [key for key in lists if key in _HOLDERS]
    splits = [key for key in lists if key.lower() in SPLITS]
    if len(splits) > 1 and not named:
        splits = [key for key in splits if split_of(key) == split_of(split or "train")]
        if not splits:
            raise ValueError(f"{place}: expected the split {split or 'train'}, got {', '.join(lists)}")
    found = named or splits or (lists if len(fields) == 1 else [])
    if len(found) > 1:
        raise ValueError(f"{place}: expected one list of rows, got {', '.join(found)}")
    if not found and len(fields) == 1 and (key := next(iter(fields))) in (*_HOLDERS, *SPLITS):
        return key if fields[key] == [] else None
    return found[0] if found else None


def _is_rows(value: Any) -> bool:
    """Whether this is a list of objects that are rows, and not the turns of one conversation."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(item, dict) for item in value)
        and not _is_turns(value)
    )


def _is_turns(value: Any) -> bool:
    return any(isinstance(item, dict) and ("role" in item or "from" in item) for item in value)


def _columns(fields: dict[str, Any]) -> dict[str, list[Any]] | None:
    """Columns by name when the object is a table written column by column, else None."""
    values = list(fields.values())
    if all(isinstance(value, dict) and value and _is_numbered(value) for value in values):
        if len({tuple(value) for value in values}) == 1:
            return {key: list(value.values()) for key, value in fields.items()}
    if not all(isinstance(value, list) for value in values) or len({len(value) for value in values}) != 1:
        return None
    if any(_is_turns(value) for value in values):
        return None
    if any(isinstance(fields.get(key), list) and _is_flat(fields[key]) for key in _TOKENS):
        return None
    return dict(fields)


def _is_flat(value: list[Any]) -> bool:
    return not any(isinstance(item, list) for item in value)


def _is_numbered(fields: dict[str, Any]) -> bool:
    return list(fields) == [str(i) for i in range(len(fields))]

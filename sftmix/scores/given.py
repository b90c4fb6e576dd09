"""Halves and ids that somebody else made: a file of examples with a half, or a confidence to cut at its median.

Read are Parquet, JSON Lines, JSON, CSV and their compressed forms, as training data are. A row names its example in
``example``, ``id`` or ``guid`` (allenai/cartography's) and has ``half`` (confident or unconfident) or ``confidence``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

from sftmix.data.read import read_rows
from sftmix.data.rows import Fault
from sftmix.scores.halves import Split, median_split

NAMES = ("example", "id", "guid")
HALVES = ("confident", "unconfident")


def records(path: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(place, id of the example, fields) of each row. Raises ``ValueError`` naming a row that cannot be used."""
    for row in read_rows(path):
        if isinstance(row, Fault):
            raise ValueError(f"{row.place}: {row.reason}")
        if not isinstance(row.fields, dict):
            raise ValueError(f"{row.place}: expected an object, got {str(row.fields)[:40]!r}")
        name = next((row.fields[key] for key in NAMES if row.fields.get(key) not in (None, "")), None)
        if name is None or isinstance(name, (dict, list)):
            raise ValueError(f"{row.place}: expected one of {', '.join(NAMES)}, got {', '.join(row.fields)}")
        yield row.place, str(name), row.fields


def read_halves(path: str) -> Split:
    """The split that a file gives, each example once.

    Raises ``ValueError`` for a file or row that cannot be read, for an example that is repeated, for a half of another
    name, and for a confidence that is no number.
    """
    halves: dict[str, list[str]] = {name: [] for name in HALVES}
    confidence: dict[str, float] = {}
    variability: dict[str, float] = {}
    seen: set[str] = set()
    for place, name, fields in records(path):
        if name in seen:
            raise ValueError(f"{place}: expected every example once, got {name} again")
        seen.add(name)
        half = fields.get("half")
        if half is not None:
            if half not in HALVES:
                raise ValueError(f"{place}: expected half to be confident or unconfident, got {half!r}")
            halves[half].append(name)
        for key, found in (("confidence", confidence), ("variability", variability)):
            if fields.get(key) is not None:
                found[name] = _number(place, key, fields[key])
        if half is None and name not in confidence:
            raise ValueError(f"{place}: expected half or confidence, got {', '.join(fields)}")
    placed = sum(map(len, halves.values()))
    if placed not in (0, len(seen)):
        raise ValueError(f"{path}: expected half in every row or none, got it in {placed} of {len(seen)}")
    if not placed:
        halves["confident"], halves["unconfident"] = median_split(confidence)
    whole = len(confidence) == len(seen)
    return Split(
        halves["confident"],
        halves["unconfident"],
        confidence if whole else {},
        variability if whole and len(variability) == len(seen) else {},
    )


def read_ids(path: str) -> list[str]:
    """Ids of examples, each once: a text file with one a line, rows as above, or a JSON array of ids (a report's).

    Raises ``ValueError`` for a file that cannot be read, one without ids, and for repeats.
    """
    if path.endswith(".txt"):
        try:
            with open(path, encoding="utf-8") as file:
                names = [line.strip() for line in file if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: expected a text file of ids, got {error}") from error
    else:
        names = _json_ids(path) or [name for _, name, _ in records(path)]
    if not names:
        raise ValueError(f"{path}: expected ids, got none")
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ValueError(f"{path}: expected every id once, got {name} again")
        seen.add(name)
    return names


def _json_ids(path: str) -> list[str]:
    """The ids of a JSON array of texts, as a report's page saves them; none for any other file."""
    if not path.endswith(".json"):
        return []
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
    except (OSError, ValueError):  # whoever reads it as rows says what is wrong
        return []
    return found if isinstance(found, list) and all(isinstance(name, str) for name in found) else []


def _number(place: str, key: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(value, bool) or math.isnan(number):
        raise ValueError(f"{place}: expected {key} to be a number, got {value!r}")
    return number

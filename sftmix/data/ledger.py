"""What has to be said of one row, and how its values become text without a silent change."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from sftmix.data.rows import RowError


@dataclass
class Ledger:
    """What has to be said of one row: fields not used, and notes; dictionaries keep the order and drop repeats."""

    ignored: dict[str, None] = field(default_factory=dict)
    notes: dict[str, None] = field(default_factory=dict)

    def ignore(self, name: str) -> None:
        self.ignored[name] = None

    def note(self, text: str) -> None:
        self.notes[text] = None


def empty(value: Any) -> bool:
    """Nothing is lost with it: None, NaN (how tables write a missing value), white space, no items."""
    return (
        value is None
        or value != value
        or (isinstance(value, (str, list, tuple, dict)) and not value)
        or (isinstance(value, str) and not value.strip())
    )


def as_text(value: Any, place: str, ledger: Ledger) -> str:
    """Text as it is, a number as its digits (noted), None and NaN as no text; raises ``RowError`` for anything else."""
    if isinstance(value, str):
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError as error:
                raise RowError(
                    "text not Unicode", f"{place}: expected Unicode text, got a lone surrogate"
                ) from error
        return value
    if value is None or value != value:
        return ""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        try:
            text = str(value)
        except ValueError as error:
            raise RowError("not text", f"{place}: expected text, got a number of too many digits") from error
        ledger.note(f"number in {place} used as text")
        return text
    raise RowError("not text", f"{place}: expected text, got {type(value).__name__}")


def parsed(value: Any, place: str) -> Any:
    """What JSON text says; any other value as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise RowError("not JSON", f"{place}: expected JSON, got text that does not parse") from error


def short(value: Any) -> str:
    """A value as a message names it: the beginning of a text, the type of anything else."""
    return repr(value[:40]) if isinstance(value, str) else type(value).__name__

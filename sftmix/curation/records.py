"""The user's own records with their scores beside them: one line each, in the order in which they were read."""

from __future__ import annotations

import base64
import datetime
import decimal
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sftmix.data.prepare import Source
from sftmix.data.rows import Example, Fault, Row
from sftmix.data.tokens import Encoder
from sftmix.files import replacing
from sftmix.progress import say
from sftmix.run.inputs import train_source
from sftmix.scores.table import ExampleScores

if TYPE_CHECKING:
    from sftmix.run.session import Session


def records(source: Source) -> Iterator[tuple[Row | Fault, Example | Fault]]:
    """Every record of the file, in order, with its example or why it is none."""
    return source.outcomes()


def write_records(session: Session, scores: ExampleScores, lines: Path, kept: Path) -> None:
    """``lines``: ``{"id", "place", "scores", "record"}`` for every record; ``kept``: the ids that have scores.

    A record without scores says ``why``. Values that JSON has no word for are written as text, or null where a number
    is not finite; how many is said.
    """
    at = {name: index for index, name in enumerate(scores.examples)}
    encoder = Encoder(session.tokenizer, session.token_options)
    changed: Counter[str] = Counter()
    missed = 0
    with (
        replacing(lines) as temporary,
        replacing(kept) as ids,
        open(temporary, "w", encoding="utf-8") as file,
    ):
        names = []
        for row, found in records(train_source(session.config)):
            told: dict[str, Any] = {"id": None, "place": row.place, "scores": None}
            if isinstance(found, Example) and found.id in at:
                told |= {"id": found.id, "scores": scores.of(at[found.id])}
                names.append(found.id)
            else:
                missed += 1
                told["id"] = found.id if isinstance(found, Example) else None
                told["why"] = _why(found, encoder)
            told["record"] = row.fields if isinstance(row, Row) else None
            file.write(json.dumps(plain(told, changed), ensure_ascii=False, allow_nan=False) + "\n")
        ids.write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
    if missed:
        say(f"score: {missed} records have no scores; {lines} says why of each")
    tell_changed(changed, lines)


def _why(found: Example | Fault, encoder: Encoder) -> str:
    outcome = found if isinstance(found, Fault) else encoder.show(found)
    return f"{outcome.kind}: {outcome.reason}" if isinstance(outcome, Fault) else "held out"


def plain(value: Any, changed: Counter[str]) -> Any:
    """``value`` as JSON holds it; what had to be changed is counted by kind."""
    if isinstance(value, float) and not math.isfinite(value):
        changed["numbers that are not finite as null"] += 1
        return None
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(item, changed) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item, changed) for item in value]
    if isinstance(value, (bytes, bytearray)):
        changed["bytes as base64"] += 1
        return base64.b64encode(value).decode()
    if isinstance(value, (datetime.date, datetime.time)):
        changed["dates as text"] += 1
        return value.isoformat()
    if isinstance(value, decimal.Decimal):
        changed["decimals as text"] += 1
        return str(value)
    if hasattr(value, "tolist"):
        return plain(value.tolist(), changed)
    changed[f"{type(value).__name__} as text"] += 1
    return str(value)


def tell_changed(changed: Counter[str], path: Path) -> None:
    """Say what JSON could not hold as it was."""
    if changed:
        told = ", ".join(f"{count} {kind}" for kind, count in changed.most_common())
        say(f"{path.name}: {told}, as JSON has no word for them")

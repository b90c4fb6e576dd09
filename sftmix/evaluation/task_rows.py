"""Rows of the built-in benchmarks as their public files have them, each checked, in the one form that a task reads.

- ``gsm8k``: question, answer (its number after ####)
- ``pubmedqa``: question, context, final_decision (yes, no or maybe); also in capitals, as ``ori_pqal.json`` has them,
  and the context as text, as a list of texts, or as an object that holds ``contexts``
- ``medqa``: question, options (an object by letter, a list of texts, or of objects with key and value), and
  ``answer_idx`` or ``answer``: a letter, or the text of one option

Raises ``ValueError`` for the first row that is none; a field that is not used is counted.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sftmix.data.read import read_rows
from sftmix.data.rows import Fault, Row

Fields = dict[str, Any]
_NUMBER = re.compile(r"####\s*\$?(-?\d[\d,]*(?:\.\d+)?)\s*\.?\s*$")


@dataclass(frozen=True)
class TaskRows:
    """The rows of one file, and the fields that were not used, with the number of rows that have them."""

    rows: list[Fields]
    ignored: Counter[str]
    repeated: int  # rows equal to an earlier one


def read_task_rows(form: str, path: str, knob: str) -> TaskRows:
    """The rows of ``path`` in the ``form`` of a built-in benchmark; ``knob`` named the file.

    Raises ``ValueError`` naming file and row for the first that is not of the form, and for a file without any.
    """
    make, used = _FORMS[form]
    rows: list[Fields] = []
    ignored: Counter[str] = Counter()
    for place, fields in _records(path):
        if not isinstance(fields, dict):
            raise ValueError(f"{knob}: {place}: expected an object of {form}'s fields, got {fields!r:.60}")
        low = {str(name).lower(): value for name, value in fields.items()}
        try:
            rows.append(make(low))
        except ValueError as error:
            raise ValueError(f"{knob}: {place}: {error}") from None
        ignored.update(_unused(fields, used))
    distinct = len({repr(row) for row in rows})
    return TaskRows(rows, ignored, len(rows) - distinct)


def _unused(fields: Fields, used: Sequence[str]) -> Iterator[str]:
    for name, value in fields.items():
        if str(name).lower() not in used:
            yield from [str(name)] if value not in _EMPTY else []
        elif str(name).lower() == "context" and isinstance(value, dict):
            yield from (
                f"{name}.{key}" for key, inner in value.items() if key != "contexts" and inner not in _EMPTY
            )


_EMPTY: tuple[Any, ...] = (None, "", [], {})


def _records(path: str) -> Iterator[tuple[str, Any]]:
    """Place and fields of each record; one object of objects by id is that many records."""
    found: list[Row] = []
    for row in read_rows(path):
        if isinstance(row, Fault):
            raise ValueError(f"{row.place}: {row.reason}")
        found.append(row)
    only = found[0].fields if len(found) == 1 else None
    if isinstance(only, dict) and only and all(isinstance(value, dict) for value in only.values()):
        yield from ((f"{found[0].place}, {name}", value) for name, value in only.items())
        return
    yield from ((row.place, row.fields) for row in found)


def _text(fields: Fields, *names: str) -> str:
    """The first of ``names`` that is there, which must be a text that is not blank."""
    name = next((name for name in names if fields.get(name) is not None), names[0])
    value = fields.get(name)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{name}: expected a text, got {value!r:.60}")
    return value.strip()


def _gsm8k(fields: Fields) -> Fields:
    answer = _text(fields, "answer")
    number = _NUMBER.search(answer)
    if number is None:
        raise ValueError(f"answer: expected a text that ends with #### and a number, got …{answer[-40:]!r}")
    return {"question": _text(fields, "question"), "answer": answer, "number": number[1]}


def _pubmedqa(fields: Fields) -> Fields:
    context = fields.get("context", fields.get("contexts"))
    if isinstance(context, dict):
        context = context.get("contexts")
    if isinstance(context, (list, tuple)) and all(isinstance(part, str) for part in context):
        context = "\n".join(context)
    if not isinstance(context, str) or not context.strip():
        raise ValueError(f"context: expected a text, or a list of texts, got {context!r:.60}")
    answer = _text(fields, "final_decision", "answer").lower()
    if answer not in ("yes", "no", "maybe"):
        raise ValueError(f"final_decision: expected yes, no or maybe, got {answer!r:.60}")
    return {"question": _text(fields, "question"), "context": context.strip(), "answer": answer}


def _medqa(fields: Fields) -> Fields:
    options = _options(fields.get("options"))
    given = _text(fields, "answer_idx", "answer")
    letters = list(options)
    answer = given if given in options else next((k for k, text in options.items() if text == given), None)
    if answer is None:
        raise ValueError(
            f"answer: expected one of {', '.join(letters)}, or an option's text, got {given!r:.60}"
        )
    text = fields.get("answer")
    if isinstance(text, str) and text.strip() not in (answer, options[answer]):
        raise ValueError(f"answer: expected {options[answer]!r:.60}, option {answer}, got {text!r:.60}")
    shown = "\n".join(f"{letter}. {option}" for letter, option in options.items())
    return {"question": _text(fields, "question"), "options": shown, "letters": letters, "answer": answer}


def _options(value: Any) -> dict[str, str]:
    """Options by letter, in the order of the letters."""
    found: dict[str, Any] = {}
    if isinstance(value, dict):
        found = {str(key): text for key, text in value.items() if text is not None}  # null: Parquet's absence
    elif isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        found = {str(item.get("key")): item.get("value") for item in value}
    elif isinstance(value, list):
        found = dict(zip(string.ascii_uppercase, value, strict=False))
    letters = list(string.ascii_uppercase[: len(found)])
    texts = [text.strip() for text in found.values() if isinstance(text, str) and text.strip()]
    if not 2 <= len(found) <= 26 or sorted(found) != letters or len({*texts}) < len(found):
        raise ValueError(f"options: expected two to 26 differing texts by letter from A, got {value!r:.100}")
    return {letter: found[letter].strip() for letter in letters}


_FORMS: dict[str, tuple[Callable[[Fields], Fields], Sequence[str]]] = {
    "gsm8k": (_gsm8k, ("question", "answer")),
    "medqa": (_medqa, ("question", "options", "answer", "answer_idx")),
    "pubmedqa": (_pubmedqa, ("question", "context", "contexts", "final_decision", "answer")),
}  # fmt: skip
FORMS = tuple(_FORMS)

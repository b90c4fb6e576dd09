"""Forms of rows: a table says which columns make an example, what becomes of each, and when a row is ambiguous.

Every column that is not empty is used, or named in ``Parsed.ignored``; a row that two forms read differently is
refused with both. ``data.form`` chooses among forms, ``data.columns`` gives a form's columns other names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from sftmix.data.content_id import content_id, hashed
from sftmix.data.exchanges import read_exchange
from sftmix.data.ledger import Ledger, as_text, empty, parsed
from sftmix.data.messages import list_marks, read_messages
from sftmix.data.pretokenised import read_tokens
from sftmix.data.rows import Example, Row, RowError
from sftmix.data.tools import read_tools

_SYSTEM = ("system", "system_prompt")
_TOOLS = ("tools", "functions")
_CONTEXT = ("context", "input")
_MESSAGES = ("messages", "conversations", "conversation", "dialog", "dialogue", "dialogs")
_BESIDE = {"system": _SYSTEM, "tools": _TOOLS, "arguments": ("chat_template_kwargs",)}


@dataclass(frozen=True)
class Form:
    """Slots of a form, each with the column names that fill it, the first being the usual one."""

    name: str
    required: dict[str, tuple[str, ...]]
    optional: dict[str, tuple[str, ...]]
    becomes: str


@dataclass(frozen=True)
class Parsed:
    """An example, the fields of its row that are not empty and not used, and what else has to be said of it."""

    example: Example
    ignored: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def _asked(name: str, question: str, answers: tuple[str, ...], becomes: str) -> Form:
    optional = {"context": _CONTEXT, "history": ("history",), **_BESIDE}
    return Form(name, {"question": (question,), "answer": answers}, optional, becomes)


FORMS: tuple[Form, ...] = (
    Form(
        "messages",
        {"messages": _MESSAGES},
        {**_BESIDE, "loss": ("loss_mask",)},
        "the conversation; system and tools go before it",
    ),
    _asked("alpaca", "instruction", ("output",), "user: instruction, a blank line, input; assistant: output"),
    _asked(
        "dolly",
        "instruction",
        ("response", "completion", "answer"),
        "user: instruction, a blank line, context; assistant: response",
    ),
    _asked(
        "question",
        "question",
        ("answer", "answers", "response", "completion", "output"),
        "user: context, a blank line, question; assistant: answer (the first of answers)",
    ),
    _asked(
        "prompt_completion",
        "prompt",
        ("completion", "response", "answer", "output"),
        "user: prompt; assistant: completion; texts or lists of messages; the completion alone bears loss",
    ),
    Form(
        "preference",
        {"answer": ("chosen",), "rejected": ("rejected",)},
        {"question": ("prompt", "question"), **_BESIDE},
        "user: prompt; assistant: chosen; rejected is not used",
    ),
    Form(
        "tokens",
        {"input_ids": ("input_ids",), "labels": ("labels",)},
        {"masks": ("attention_mask",), "loss": ("loss_mask", "assistant_masks")},
        "tokens as they are; labels of -100 bear no loss",
    ),
    Form("text", {"text": ("text",)}, {}, "text as it is, without a chat template, where no other form fits"),
)
_BY_NAME = {form.name: form for form in FORMS}
_COLUMNS = {
    name for form in FORMS for names in (*form.required.values(), *form.optional.values()) for name in names
}


def forms_table() -> list[tuple[str, str, str]]:
    """(name, columns with the optional ones in brackets, what becomes of them) of each form."""
    return [
        (
            form.name,
            " ".join(
                ["|".join(names) for names in form.required.values()]
                + [f"[{'|'.join(names)}]" for names in form.optional.values()]
            ),
            form.becomes,
        )
        for form in FORMS
    ]


def parse_columns(text: str) -> dict[str, str]:
    """Form's column → file's column, from ``question=query,answer=reply.text``; raises ``ValueError``."""
    columns: dict[str, str] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, sign, path = (piece.strip() for piece in part.partition("="))
        if not sign or not path or name in columns:
            raise ValueError(f"data.columns: expected name=column once for each name, got {part!r}")
        columns[name] = path
    if unknown := sorted(columns.keys() - _COLUMNS):
        raise ValueError(
            f"data.columns: expected names among {', '.join(sorted(_COLUMNS))}, got {', '.join(unknown)}"
        )
    return columns


def parse_row(row: Row, *, form: str | None = None, columns: Mapping[str, str] | None = None) -> Parsed:
    """The example in a row, with the fields that it leaves unused.

    ``form`` is a name of the table, None to tell it by the columns; ``columns`` is what ``parse_columns`` returns.
    Raises ``RowError`` for a row that cannot be used, ``ValueError`` for an unknown ``form``.
    """
    if form is not None and form not in _BY_NAME:
        raise ValueError(f"data.form: expected one of {', '.join(_BY_NAME)}, got {form!r}")
    if not isinstance(row.fields, dict) or not row.fields:
        raise RowError(
            "not an object", f"row: expected an object with columns, got {type(row.fields).__name__}"
        )
    ledger = Ledger()
    try:
        fields, origin = _mapped(row.fields, columns or {}, ledger)
        full = tuple(name for name, value in fields.items() if not empty(value))
        chosen, slots = _plan(form, full, tuple(fields))
        if chosen.name == "prompt_completion" and isinstance(fields.get("label"), bool):
            raise RowError(
                "feedback row", "label: expected an answer to learn from, got one judged true or false"
            )
        used = set(slots.values())
        for name in full:
            if name not in used:
                ledger.ignore(origin.get(name, str(name)))
        example = _example(chosen, slots, fields, row.place, ledger)
    except RecursionError as error:
        raise RowError("nested too deeply", "row: expected lists and objects of moderate depth") from error
    return Parsed(example, tuple(ledger.ignored), tuple(ledger.notes))


def _mapped(
    fields: dict[str, Any], columns: Mapping[str, str], ledger: Ledger
) -> tuple[dict[str, Any], dict[str, str]]:
    """(fields under the forms' names, the file's name of each that was renamed)."""
    if not columns:
        return fields, {}
    values: dict[str, Any] = {}
    taken: dict[str, set[str]] = {}
    for name, path in columns.items():
        first, *rest = [path] if path in fields else path.split(".")
        value, walked = fields.get(first), first
        taken.setdefault(first, set())
        for step in rest:
            value = parsed(value, walked) if isinstance(value, str) else value
            taken[first].add(walked + "." + step)
            walked += "." + step
            value = value.get(step) if isinstance(value, dict) else None
        values[name] = value
    for first, walks in taken.items():
        if walks:
            _ignore_beside(fields.get(first), first, walks, ledger)
    for name, value in fields.items():
        if name not in taken and name in values:
            if not empty(value):
                ledger.ignore(name)
        elif name not in taken:
            values[name] = value
    return values, dict(columns)


def _ignore_beside(value: Any, walked: str, walks: set[str], ledger: Ledger) -> None:
    """Names what is left of a nested column of which a path is used."""
    value = parsed(value, walked) if isinstance(value, str) and not empty(value) else value
    if not isinstance(value, dict):
        if not empty(value):
            ledger.ignore(walked)
        return
    for key, item in value.items():
        path = f"{walked}.{key}"
        if path in walks and any(walk.startswith(path + ".") for walk in walks):
            _ignore_beside(item, path, walks, ledger)
        elif path not in walks and not empty(item):
            ledger.ignore(path)


@lru_cache(maxsize=1024)
def _plan(form: str | None, full: tuple[Any, ...], present: tuple[Any, ...]) -> tuple[Form, dict[str, str]]:
    """(form, slot → column) of rows with these columns, of which ``full`` hold something; most rows share them."""
    chosen = _BY_NAME[form] if form else _detected(full, present)
    return chosen, _slots(chosen, full, present)


def _detected(full: tuple[Any, ...], columns: tuple[Any, ...]) -> Form:
    """The one form whose columns the row has, and more of them than any other's; ``text`` only when alone."""
    for present in (full, columns):
        fits = [
            f for f in FORMS if all(any(name in present for name in names) for names in f.required.values())
        ]
        if len(fits) > 1:
            fits = [f for f in fits if f.name != "text"]
        if len(fits) == 1:
            return fits[0]
        if fits:
            covers = [
                {n for names in (*f.required.values(), *f.optional.values()) for n in names if n in present}
                for f in fits
            ]
            for form, cover in zip(fits, covers, strict=True):
                if all(cover > other for other in covers if other is not cover):
                    return form
            found = "; ".join(f"{f.name} ({', '.join(sorted(c))})" for f, c in zip(fits, covers, strict=True))
            raise RowError(
                "ambiguous columns",
                f"columns: expected one form, got {found}; data.form=NAME chooses, data.columns=system=prompt renames",
            )
    names = ", ".join(sorted(map(str, columns)))
    expected = "; ".join(" + ".join("|".join(names) for names in form.required.values()) for form in FORMS)
    raise RowError(
        "unknown columns", f"columns: expected {expected}, got {names[:200]}; data.columns maps others"
    )


def _slots(form: Form, filled: tuple[Any, ...], columns: tuple[Any, ...]) -> dict[str, str]:
    """Slot → column; an empty optional column fills none, two full columns for one slot are ambiguous."""
    slots: dict[str, str] = {}
    for slots_of, needed in ((form.required, True), (form.optional, False)):
        for slot, names in slots_of.items():
            there = [name for name in names if name in columns]
            if not there:
                if needed:
                    raise RowError(
                        "missing columns", f"{form.name}: expected column {'|'.join(names)}, got none"
                    )
                continue
            full = there if len(there) == 1 and needed else [name for name in there if name in filled]
            if len(full) > 1:
                raise RowError(
                    "ambiguous columns",
                    f"{form.name}: expected one of {', '.join(full)}, got all; data.columns={full[0]}=NAME decides",
                )
            if full or needed:
                slots[slot] = (full or there)[0]
    return slots


def _example(
    form: Form, slots: dict[str, str], fields: dict[str, Any], place: str, ledger: Ledger
) -> Example:
    value = {slot: fields[name] for slot, name in slots.items()}
    if form.name == "tokens":
        return read_tokens(value, place)
    if form.name == "preference" and "question" not in slots and isinstance(value["answer"], str):
        raise RowError(
            "no question",
            "chosen: expected a prompt beside the chosen text, or a list of messages, got text alone",
        )
    if form.name == "text":
        text = as_text(value["text"], slots["text"], ledger)
        if not text.strip():
            raise RowError("empty answer", f"{form.name}: expected text, got none")
        return Example(hashed(["text", text]), place=place, form=form.name, text=text)
    if form.name == "messages":
        messages, marks = read_messages(value["messages"], slots["messages"], ledger)
        marks = list_marks(value["loss"], messages, marks) if "loss" in slots else marks
        completion = None
    else:
        messages, marks, completion = read_exchange(form.name, slots, value, ledger)
    if "system" in slots:
        system = as_text(value["system"], slots["system"], ledger)
        given = messages[0]["content"] if messages and messages[0]["role"] == "system" else None
        if given is not None and given != system:
            raise RowError(
                "two system prompts",
                f"{slots['system']}: expected one system prompt, got another in messages",
            )
        if given is None:
            messages, marks = [{"role": "system", "content": system}, *messages], [None, *marks]
            completion = None if completion is None else completion + 1
    if not any(message["role"] == "assistant" for message in messages):
        raise RowError("no answer", f"{form.name}: expected at least one assistant's turn, got none")
    if messages[-1]["role"] != "assistant":
        ledger.note("conversation ends without an answer")
    tools = read_tools(value["tools"], slots["tools"], ledger) if "tools" in slots else ()
    arguments = parsed(value.get("arguments") or {}, slots.get("arguments", ""))
    if not isinstance(arguments, dict):
        raise RowError(
            "invalid template arguments", "chat_template_kwargs: expected an object, got something else"
        )
    kept = tuple(marks) if any(mark is not None for mark in marks) else ()
    name = content_id(messages, kept, tools, arguments, completion if form.name != "messages" else None)
    return Example(name, tuple(messages), place, form.name, kept, completion, tools, arguments)

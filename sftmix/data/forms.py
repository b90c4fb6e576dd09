"""Rows as other tools write them, told apart by their columns, as examples.

Every column of a row that is not empty is used or named as ignored. A row whose columns fit several forms is refused
with the candidates. An example's id is a hash of what is trained, so it survives reordering and other formats.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sftmix.data.messages import Turns, is_empty, parse_messages, parse_tools
from sftmix.data.rows import Example, Message, Row, RowError

MESSAGES = ("messages", "conversations", "conversation", "dialog", "dialogue")
QUESTION = ("prompt", "question", "instruction", "query")
ANSWER = ("completion", "response", "answer", "output", "answers")
SYSTEM = ("system", "system_prompt", "system_message")
CONTEXT = ("context", "input")
TOOLS = ("tools", "functions")
_SLOTS = {
    "messages": MESSAGES, "question": QUESTION, "answer": ANSWER, "system": SYSTEM, "context": CONTEXT,
    "history": ("history",), "tools": TOOLS, "chosen": ("chosen",), "rejected": ("rejected",), "text": ("text",),
    "input_ids": ("input_ids",), "labels": ("labels",),
}  # fmt: skip
_MASKS = ("attention_mask", "token_type_ids", "position_ids")


@dataclass(frozen=True)
class Form:
    """A form of rows: its columns in words, and what becomes of them."""

    name: str
    columns: str
    meaning: str


FORMS = (
    Form(
        "messages", f"one of {', '.join(MESSAGES)}; with system, tools or functions, chat_template_kwargs",
        "a conversation: role and content, or from and value; a list of objects, an object of lists, or JSON text",
    ),
    Form(
        "exchange", f"one of {', '.join(QUESTION)} and one of {', '.join(ANSWER)}; with {', '.join(SYSTEM)}, context "
        "or input, history, tools",
        "a question and its answer, texts or lists of messages (Alpaca, Dolly, OpenOrca, SQuAD, prompt–completion); a "
        "context stands before a question or prompt and, like input, behind an instruction; input and output alone are "
        "an exchange too",
    ),
    Form("preference", "chosen, rejected; with prompt", "the chosen answer is trained, the rejected one is not"),
    Form("text", "text, and no other form", "plain text, all of which bears loss, and its end"),
    Form("tokens", "input_ids, labels", "ready tokens; labels are the tokens themselves or -100, which bears no loss"),
)  # fmt: skip


@dataclass(frozen=True)
class Parsed:
    """An example, the fields of its row that are ignored though not empty, and what else has to be said."""

    example: Example
    ignored: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def forms_table() -> list[tuple[str, str, str]]:
    """The forms as (name, columns, meaning), for the help of ``sftmix data``."""
    return [(form.name, form.columns, form.meaning) for form in FORMS]


def parse_columns(text: str) -> dict[str, str]:
    """``question=query,answer=reply.text`` as a dict. Raises ``ValueError`` for a name that no form has."""
    found = {}
    for part in text.split(","):
        name, equals, column = (piece.strip() for piece in part.partition("="))
        if not equals or name not in _SLOTS or not column or name in found:
            raise ValueError(
                f"data.columns: expected name=column, separated by commas, each name once and one of "
                f"{', '.join(_SLOTS)}, got {part.strip()!r}"
            )
        found[name] = column
    return found


def parse_row(row: Row, *, form: str | None = None, columns: Mapping[str, str] | None = None) -> Parsed:
    """A row as an example.

    ``form`` is the name of one of ``FORMS``, for rows that fit several; ``columns`` maps ``question``, ``answer``, … to
    the row's own names. Raises ``RowError`` for a row that is no example, and ``ValueError`` for an unknown form.
    """
    if form is not None and form not in [known.name for known in FORMS]:
        raise ValueError(
            f"data.form: expected one of {', '.join(known.name for known in FORMS)}, got {form!r}"
        )
    fields = row.fields
    if not isinstance(fields, Mapping):
        raise RowError("not an object", f"expected an object with columns, got {type(fields).__name__}")
    reader = _Reader(fields, columns or {})
    name = form or reader.form()
    example: Example = getattr(reader, f"read_{name}")(row.place)
    return Parsed(example, tuple(reader.ignored()), tuple(reader.turns.notes))


class _Reader:
    """One row: which of its columns are taken, and by which form."""

    def __init__(self, fields: Mapping[str, Any], columns: Mapping[str, str]) -> None:
        self.fields = fields
        self.mapped = {slot: self._mapped(column) for slot, column in columns.items()}
        self._columns = columns
        self.full = {str(name) for name, value in fields.items() if not is_empty(value)}
        self.taken = {column.split(".")[0] for column in columns.values()}
        self.turns = Turns()

    def _mapped(self, column: str) -> Any:
        value: Any = self.fields
        for part in [column] if column in self.fields else column.split("."):
            if not isinstance(value, Mapping) or part not in value:
                raise RowError(
                    "missing column", f"expected the column {column} (data.columns), got {self._names()}"
                )
            value = value[part]
        return value

    def _names(self) -> str:
        return ", ".join(map(str, self.fields)) or "none"

    def ignored(self) -> list[str]:
        """Fields that are not empty and were not taken."""
        beside: list[str] = []
        for column in self._columns.values():
            beside += _beside(self.fields, column)
        return [
            *(name for name in self.fields if name in self.full - self.taken),
            *beside,
            *self.turns.ignored,
        ]

    def _has(self, slot: str) -> list[str]:
        """The columns of a slot that are not empty, the mapped one alone where there is one."""
        if slot in self.mapped:
            return [] if is_empty(self.mapped[slot]) else [self._columns[slot]]
        return [name for name in _SLOTS[slot] if name in self.full and name not in self.taken]

    def _take(self, slot: str) -> Any:
        """The value of a slot, None where it is empty. Raises ``RowError`` where two columns have one."""
        found = self._has(slot)
        if len(found) > 1:
            raise RowError(
                "ambiguous columns",
                f"expected one column as {slot}, got {' and '.join(found)}; say which with data.columns, such as "
                f"{slot}={found[0]}",
            )
        if not found:
            return None
        if slot in self.mapped:
            return self.mapped[slot]
        self.taken.add(found[0])
        return self.fields[found[0]]

    def form(self) -> str:
        """The one form that the columns fit. Raises ``RowError`` for none or several."""
        fits = []
        if self._has("messages"):
            fits.append("messages")
        if self._has("answer") and (self._has("question") or self._has("context")):
            fits.append("exchange")
        if self._has("chosen"):
            fits.append("preference")
        if self._has("input_ids"):
            fits.append("tokens")
        if not fits and self._has("text"):
            return "text"
        if len(fits) == 1:
            return fits[0]
        if fits:
            raise RowError(
                "ambiguous columns",
                f"expected columns of one form, got those of {' and '.join(fits)} ({self._names()}); say which with "
                f"data.form={fits[0]}",
            )
        empty = [name for name in (*MESSAGES, *ANSWER) if name in self.fields and name not in self.full]
        if empty:
            raise RowError("empty answer", f"expected an answer, got an empty {empty[0]}")
        wanted = "; or ".join(known.columns.partition(";")[0] for known in FORMS)
        raise RowError("unknown columns", f"expected columns {wanted}; got {self._names()}")

    # --- forms ---

    def read_messages(self, place: str) -> Example:
        column = (self._has("messages") or ["messages"])[0]
        value = self._take("messages")
        self.turns = parse_messages(value, column)
        self._system_first()
        return self._conversation("messages", place)

    def read_exchange(self, place: str) -> Example:
        asked, answered = self._has("question"), self._has("answer")
        if not asked and self._has("context") == ["input"]:
            question, context = self._take("context"), None
        else:
            question, context = self._take("question"), self._take("context")
        answer, history = self._take("answer"), self._take("history")
        if is_empty(question) or is_empty(answer):
            what = "question" if is_empty(question) else "answer"
            raise RowError(
                f"empty {what}", f"expected a question and an answer, got no {what} ({self._names()})"
            )
        if isinstance(answer, Mapping) and "text" in answer:  # SQuAD
            texts = answer["text"] if isinstance(answer["text"], (list, tuple)) else [answer["text"]]
            if is_empty(texts) or is_empty(texts[0]):
                raise RowError("empty answer", "expected an answer, got an empty list of answers")
            self.turns.ignored.update(
                {f"{answered[0]}.{k}": None for k, v in answer.items() if k != "text" and not is_empty(v)}
            )
            if len(set(map(str, texts))) > 1:
                self.turns.notes["the first of several answers used"] = None
            answer = texts[0]
        before = self._turns_of(history)
        if isinstance(question, (list, tuple)):
            if context is not None:
                raise RowError(
                    "ambiguous columns", "expected no context beside a prompt of messages, got one"
                )
            before += self._part(question, asked[0])
        else:
            text = self._text(question, asked[0] if asked else "input")
            if context is not None:
                more = self._text(context, "context")
                behind = (asked or [""])[0] == "instruction"
                text = f"{text}\n\n{more}" if behind else f"{more}\n\n{text}"
            before.append(({"role": "user", "content": text}, None))
        if isinstance(answer, (list, tuple)):
            after = self._part(answer, answered[0])
        else:
            after = [({"role": "assistant", "content": self._text(answer, answered[0])}, None)]
        self.turns.messages = [message for message, _ in (*before, *after)]
        self.turns.marks = [mark for _, mark in (*before, *after)]
        added = self._system_first()
        completion = None if history is not None else len(before) + added
        return self._conversation("exchange", place, completion)

    def read_preference(self, place: str) -> Example:
        question, chosen = self._take("question"), self._take("chosen")
        rejected = self._take("rejected")
        if is_empty(chosen):
            raise RowError("empty answer", "expected a chosen answer, got none")
        before = []
        if isinstance(question, (list, tuple)):
            before = self._part(question, "prompt")
        elif question is not None:
            before = [({"role": "user", "content": self._text(question, "prompt")}, None)]
        if isinstance(chosen, str):
            after: list[tuple[Message, float | None]] = [({"role": "assistant", "content": chosen}, None)]
            if not before:
                raise RowError("no question", "expected a prompt beside the chosen text, got none")
        else:
            after = self._part(chosen, "chosen")
            said = [message for message, _ in after]
            shared = [message for message, _ in before]
            if (
                said[: len(shared)] == shared
                or [m for m in said if m["role"] != "system"][: len(shared)] == shared
            ):
                before = []  # the chosen conversation repeats the prompt
        if rejected is not None:
            self.turns.notes["the chosen answer of a preference pair is trained, the rejected one is not"] = (
                None
            )
        self.turns.messages = [message for message, _ in (*before, *after)]
        self.turns.marks = [mark for _, mark in (*before, *after)]
        self._system_first()
        return self._conversation("preference", place)

    def read_text(self, place: str) -> Example:
        text = self._text(self._take("text"), "text")
        return Example(_hash(["text", text]), place=place, form="text", text=text)

    def read_tokens(self, place: str) -> Example:
        ids, labels = self._take("input_ids"), self._take("labels")
        self.taken.update(name for name in _MASKS if name in self.full)
        for name, values in (("input_ids", ids), ("labels", labels)):
            if not isinstance(values, (list, tuple)) or not all(type(value) is int for value in values):
                raise RowError("bad tokens", f"{name}: expected a list of ints, got {values!r:.60}")
        if len(ids) != len(labels):
            raise RowError(
                "bad tokens", f"expected input_ids and labels of one length, got {len(ids)} and {len(labels)}"
            )
        if min(ids) < 0:
            raise RowError("bad tokens", f"expected input_ids of at least 0, got {min(ids)}")
        if any(label not in (-100, token) for token, label in zip(ids, labels, strict=True)):
            raise RowError("bad tokens", "expected labels that are the tokens themselves or -100, got others")
        mask = self.fields.get("attention_mask")
        if mask is not None and list(mask) != [1] * len(ids):
            raise RowError("bad tokens", "expected an attention_mask of ones, without padding, got another")
        return Example(
            _hash(["tokens", list(ids), list(labels)]), place=place, form="tokens",
            input_ids=tuple(ids), labels=tuple(labels),
        )  # fmt: skip

    # --- parts ---

    def _text(self, value: Any, column: str) -> str:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            self.turns.notes[f"a number in {column} read as text"] = None
            return str(value)
        if not isinstance(value, str):
            raise RowError("content that is no text", f"{column}: expected text, got {value!r:.60}")
        return value

    def _part(self, value: Any, column: str) -> list[tuple[Message, float | None]]:
        """A list of messages with their marks."""
        turns = parse_messages(value, column)
        self.turns.ignored.update(turns.ignored)
        self.turns.notes.update(turns.notes)
        return list(zip(turns.messages, turns.marks, strict=True))

    def _turns_of(self, history: Any) -> list[tuple[Message, float | None]]:
        """Earlier turns: pairs of question and answer, or messages."""
        if history is None:
            return []
        if isinstance(history, str):
            try:
                history = json.loads(history)
            except (ValueError, RecursionError):
                raise RowError(
                    "bad history", f"history: expected pairs of texts, got {history!r:.60}"
                ) from None
        if isinstance(history, (list, tuple)) and all(isinstance(turn, Mapping) for turn in history):
            return self._part(history, "history")
        turns: list[tuple[Message, float | None]] = []
        for pair in history if isinstance(history, (list, tuple)) else [history]:
            if not isinstance(pair, (list, tuple)) or len(pair) != 2 or any(is_empty(text) for text in pair):
                raise RowError(
                    "bad history", f"history: expected pairs of question and answer, got {pair!r:.60}"
                )
            for role, text in zip(("user", "assistant"), pair, strict=True):
                turns.append(({"role": role, "content": self._text(text, "history")}, None))
        return turns

    def _system_first(self) -> int:
        """The system column as first message; 1 if it was put there."""
        system = self._take("system")
        if system is None:
            return 0
        text = self._text(system, "system")
        turns = self.turns
        if turns.messages and turns.messages[0]["role"] == "system":
            if turns.messages[0]["content"] == text:
                return 0
            raise RowError(
                "two system messages", "expected one system message, got one in a column and one in messages"
            )
        turns.messages.insert(0, {"role": "system", "content": text})
        turns.marks.insert(0, None)
        return 1

    def _conversation(self, form: str, place: str, completion: int | None = None) -> Example:
        """The example of the collected turns, with the columns that belong to any conversation."""
        turns, tools, arguments = self.turns, self._take("tools"), {}
        listed = () if tools is None else parse_tools(tools, "tools")
        if "chat_template_kwargs" in self.full:
            self.taken.add("chat_template_kwargs")
            arguments = _object(self.fields["chat_template_kwargs"], "chat_template_kwargs")
        if not any(message["role"] == "assistant" for message in turns.messages):
            roles = ", ".join(message["role"] for message in turns.messages[:8]) or "none"
            raise RowError("empty answer", f"expected at least one message of the assistant, got {roles}")
        if turns.messages[-1]["role"] != "assistant":
            turns.notes["a conversation that ends without an answer"] = None
        marks = tuple(turns.marks) if any(mark is not None for mark in turns.marks) else ()
        early = completion is not None and any(
            message["role"] == "assistant" for message in turns.messages[:completion]
        )
        is_plain = not (marks or listed or arguments or early) and all(len(m) == 2 for m in turns.messages)
        told: Any = [[m["role"], m["content"]] for m in turns.messages]
        if not is_plain:
            told = [turns.messages, marks, listed, arguments, completion if early else None]
        return Example(
            _hash(told), tuple(turns.messages), place, form, marks, completion, listed, arguments,
        )  # fmt: skip


def _beside(fields: Mapping[str, Any], column: str) -> list[str]:
    """What is not empty beside a column inside another one, such as ``reply.score`` beside ``reply.text``."""
    found: list[str] = []
    if column in fields:
        return found
    level: Any = fields
    parts = column.split(".")
    for depth, part in enumerate(parts):
        if depth:
            path = ".".join(parts[:depth])
            found += [f"{path}.{key}" for key, item in level.items() if key != part and not is_empty(item)]
        level = level[part]
    return found


def _object(value: Any, column: str) -> dict[str, Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            value = None
    if not isinstance(value, Mapping):
        raise RowError("bad template arguments", f"{column}: expected an object, got {value!r:.60}")
    return {str(key): item for key, item in value.items() if item is not None}


def _hash(told: Any) -> str:
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()[:16]

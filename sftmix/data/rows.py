"""What travels from a file to the tokens: rows, the faults found in them, examples, and the account of it all.

``read`` yields a ``Row`` or a ``Fault`` for each record, ``forms`` turns a row into an ``Example``, ``tokens`` an
example into a ``TokenizedExample``. Nothing on the way is lost without a ``Fault`` or a count in the ``Account``.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

Message = dict[
    str, Any
]  # role, content, and where a row has them: reasoning_content, tool_calls, name, tool_call_id


class RowError(ValueError):
    """One row cannot be used: ``kind`` is a few fixed words to count by, ``reason`` says what was expected and came."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind, self.reason = kind, reason


@dataclass(frozen=True)
class Row:
    """One record as it was read; ``place`` is its file and line, item or row: ``train.jsonl, line 3``."""

    place: str
    fields: Any  # a dict, or whatever else the record is


@dataclass(frozen=True)
class Fault:
    """A record that cannot be used, and why."""

    place: str
    kind: str
    reason: str


@dataclass(frozen=True)
class Example:
    """One conversation, text or ready sequence of tokens, whichever columns it came from.

    ``messages`` are what a chat template takes: roles are system, user, assistant or tool; content is text.
    ``marks`` are the weights that the row itself gives to its messages, None where it gives none (empty: it gives
    none at all). ``completion`` is the index of the first message of a prompt–completion row's completion.
    ``text`` and ``input_ids`` with ``labels`` stand alone, without messages.
    """

    id: str
    messages: tuple[Message, ...] = ()
    place: str = ""
    form: str = "messages"
    marks: tuple[float | None, ...] = ()
    completion: int | None = None
    tools: tuple[dict[str, Any], ...] = ()
    template_arguments: dict[str, Any] = field(default_factory=dict)
    text: str | None = None
    input_ids: tuple[int, ...] = ()
    labels: tuple[int, ...] = ()  # -100: bears no loss


@dataclass
class Account:
    """What became of the rows of one source; every count is over the rows that were read."""

    rows_read: int = 0
    rows_used: int = 0
    dropped: Counter[str] = field(default_factory=Counter)  # kind of fault → rows
    ignored: Counter[str] = field(
        default_factory=Counter
    )  # field (``a``, ``messages.b``) → rows where it is not empty
    forms: Counter[str] = field(default_factory=Counter)  # form → rows
    notes: Counter[str] = field(default_factory=Counter)  # anything else that has to be said → rows
    cut: int = 0  # examples cut to the longest length
    duplicates: int = 0  # rows equal to an earlier one
    supervised_tokens: int = 0
    tokens: int = 0
    faults: list[Fault] = field(default_factory=list)  # the first so many

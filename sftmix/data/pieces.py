"""Where each text of a conversation stands in what the chat template makes of it.

Every text (content, reasoning, names and arguments of tool calls) is a piece. A conversation is rendered with each
piece between two marks, characters that Unicode reserves for such use, and once without: where the two agree but for
the marks, the marks say where every piece is, and which ones the template leaves out. That holds for any template, and
takes time linear in the number of turns.

Conversations of one shape share their literals, the text between pieces: a shape met again is rendered once, and its
pieces are found by comparing the literals. A text that does not agree to the last character is marked after all.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sftmix.data.rows import Message, RowError
from sftmix.data.template import ChatTemplate, Span

_OPEN, _CLOSE = "\ufdd0", "\ufdd1"  # noncharacters: never part of a text that is meant for others
_FIRST = 0xF0000  # piece i is named by the private-use character _FIRST + i
_MOST = 0xFFFD
_MARK = re.compile(f"([{_OPEN}{_CLOSE}])([{chr(_FIRST)}-{chr(_FIRST + _MOST)}])")
_THINK = re.compile(r"(</?think>)")  # templates cut answers there and move the parts
TOOLS = -1  # message index of the pieces of the list of tools


@dataclass(frozen=True)
class Piece:
    """One text: of which message, what it is (content, reasoning, tool call, tools), and its text, outer blanks off."""

    message: int
    kind: str
    text: str


@dataclass(frozen=True)
class Placed:
    """A rendered conversation: ``spans[i]`` is where ``pieces[i]`` stands, None where the template leaves it out."""

    text: str
    pieces: tuple[Piece, ...]
    spans: tuple[Span | None, ...]


def pieces_of(messages: Sequence[Message], tools: Sequence[Any]) -> tuple[Piece, ...]:
    """All texts of a conversation, in a fixed order."""
    return tuple(_walk(messages, tools, lambda text, piece: text))


def texts_of(messages: Sequence[Message], tools: Sequence[Any]) -> list[str]:
    """The texts of ``pieces_of`` alone."""
    if not tools and all(
        _is_plain(message) for message in messages
    ):  # by far the most, and a million of them
        return [text for message in messages if (text := message["content"].strip())]
    return [piece.text for piece in pieces_of(messages, tools)]


def _is_plain(message: Message) -> bool:
    """Whether a message has a role and a content of one text only."""
    return len(message) == 2 and type(message.get("content")) is str and "think>" not in message["content"]


def place(
    template: ChatTemplate, messages: Sequence[Message], tools: Sequence[Any], arguments: Mapping[str, Any]
) -> Placed:
    """Render a conversation and find its pieces. Raises ``RowError`` where the template refuses or alters texts."""
    plain = template.render(messages, tools=tools, arguments=arguments)
    if _OPEN in plain or _CLOSE in plain:
        raise RowError(
            "reserved characters", "expected text without the noncharacters U+FDD0 and U+FDD1, got one"
        )
    pieces = pieces_of(messages, tools)
    if len(pieces) > _MOST:
        raise RowError(
            "too many turns", f"expected at most {_MOST} texts in one conversation, got {len(pieces)}"
        )
    for only in (None, "assistant"):  # a template may look at how a user's or tool's text begins or ends
        marked = _render_marked(template, messages, tools, arguments, only)
        if marked is None or _MARK.sub("", marked) != plain:
            continue
        spans = _spans(marked, len(pieces))
        if only is not None:
            spans = _search_others(plain, pieces, spans, messages)
        for piece, span in zip(pieces, spans, strict=True):
            if span is not None and not _is_same(plain[span[0] : span[1]], piece.text):
                raise RowError(
                    "text changed by the chat template",
                    f"expected the {piece.kind} of message {piece.message + 1} unchanged in the rendered text, got "
                    f"{plain[span[0] : span[1]]!r:.60} for {piece.text!r:.60}",
                )
        return Placed(plain, pieces, tuple(spans))
    raise RowError(
        "text changed by the chat template",
        "expected a chat template that treats texts alike whatever they begin or end with, got one whose text cannot "
        "be traced",
    )


def _render_marked(
    template: ChatTemplate, messages: Sequence[Message], tools: Sequence[Any], arguments: Mapping[str, Any],
    only: str | None,
) -> str | None:  # fmt: skip
    count = -1

    def mark(text: str, piece: Piece) -> str:
        nonlocal count
        count += 1
        if only is not None and (piece.message == TOOLS or messages[piece.message]["role"] != only):
            return text
        before = text[: len(text) - len(text.lstrip())]
        after = text[len(text.rstrip()) :]
        name = chr(_FIRST + count)
        return f"{before}{_OPEN}{name}{piece.text}{_CLOSE}{name}{after}"

    copies, tool_copies = _rebuilt(messages, tools, mark)
    try:
        return template.render(copies, tools=tool_copies, arguments=arguments)
    except RowError:
        return None


def _spans(marked: str, count: int) -> list[Span | None]:
    """Spans in the text without marks; of a piece that is there twice, the first."""
    found: list[Span | None] = [None] * count
    opened: dict[str, int] = {}
    removed = 0
    for match in _MARK.finditer(marked):
        at = match.start() - removed
        removed += 2
        index = ord(match[2]) - _FIRST
        if match[1] == _OPEN:
            opened[match[2]] = at
        elif match[2] in opened and found[index] is None:
            found[index] = (opened[match[2]], at)
    return found


def _search_others(
    text: str, pieces: Sequence[Piece], spans: Sequence[Span | None], messages: Sequence[Message]
) -> list[Span | None]:
    """Pieces that were not marked, searched for in order between those that were."""
    found = list(spans)
    after = 0
    for i, piece in enumerate(pieces):
        span = spans[i]
        if span is not None:
            after = span[1]
        elif piece.message == TOOLS or messages[piece.message]["role"] != "assistant":
            before = next((span[0] for span in spans[i:] if span is not None), len(text))
            at = text.find(piece.text, after, before)
            if at >= 0:
                found[i] = (at, at + len(piece.text))
                after = at + len(piece.text)
    return found


def _is_same(shown: str, text: str) -> bool:
    return shown == text or shown in (json.dumps(text, ensure_ascii=False)[1:-1], json.dumps(text)[1:-1])


def _walk(messages: Sequence[Message], tools: Sequence[Any], visit: Any) -> Iterator[Piece]:
    seen: list[Piece] = []

    def note(text: str, piece: Piece) -> str:
        seen.append(piece)
        return str(visit(text, piece))

    _rebuilt(messages, tools, note)
    return iter(seen)


def _rebuilt(
    messages: Sequence[Message], tools: Sequence[Any], change: Any
) -> tuple[list[Message], list[Any]]:
    """A copy of a conversation in which each text is what ``change(text, piece)`` gives for it."""

    def leaf(text: Any, message: int, kind: str) -> Any:
        if not isinstance(text, str) or not text.strip():
            return text
        return change(text, Piece(message, kind, text.strip()))

    def tree(value: Any, message: int, kind: str) -> Any:
        if isinstance(value, Mapping):
            return {key: tree(item, message, kind) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [tree(item, message, kind) for item in value]
        return leaf(value, message, kind)

    def content(text: str, message: int) -> str:
        return "".join(
            part if _THINK.fullmatch(part) else leaf(part, message, "content") for part in _THINK.split(text)
        )

    copies = []
    for i, message in enumerate(messages):
        copy = dict(message)
        reasoning = message.get("reasoning_content")
        if reasoning is not None:
            marked = leaf(reasoning, i, "reasoning")
            copy.update(
                {key: marked for key in ("reasoning_content", "thinking", "reasoning") if key in message}
            )
        if isinstance(message.get("content"), str):
            copy["content"] = content(message["content"], i)
        elif isinstance(message.get("content"), list):
            copy["content"] = [{**part, "text": content(part["text"], i)} for part in message["content"]]
        if message.get("tool_calls"):
            copy["tool_calls"] = [_call(call, i, leaf, tree) for call in message["tool_calls"]]
        copies.append(copy)
    tool_copies = []
    for tool in tools:
        function = tool.get("function", tool)
        told = {
            key: leaf(function[key], TOOLS, "tools") for key in ("name", "description") if key in function
        }
        marked = {**function, **told}
        tool_copies.append({**tool, "function": marked} if "function" in tool else marked)
    return copies, tool_copies


def _call(call: Mapping[str, Any], message: int, leaf: Any, tree: Any) -> dict[str, Any]:
    function = dict(call["function"])
    function["name"] = leaf(function["name"], message, "tool call")
    arguments = function.get("arguments")
    if isinstance(arguments, Mapping):
        function["arguments"] = tree(arguments, message, "tool call")
    elif arguments is not None:
        function["arguments"] = leaf(arguments, message, "tool call")
    return {**call, "function": function}


def told_lost(lost: Sequence[Piece], messages: Sequence[Message]) -> str:
    """What a chat template leaves out, in words."""
    first = lost[0]
    where = (
        "the list of tools" if first.message == TOOLS else f"the {first.kind} of message {first.message + 1}"
    )
    if first.message != TOOLS:
        where += f" ({messages[first.message]['role']})"
    more = f", and {len(lost) - 1} more" if len(lost) > 1 else ""
    return (
        f"expected a chat template that shows every text of the row, got one without {where}{more}: "
        f"{first.text!r:.60}; data.template_drops=allow uses such rows all the same"
    )

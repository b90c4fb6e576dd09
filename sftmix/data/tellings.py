"""Ways to tell a chat template the same conversation: templates differ in the form they take its parts in.

Arguments of tool calls as an object or as JSON text, the content beside tool calls empty, null or left out, content as
text or as a list of parts; reasoning under every name that is in use.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sftmix.data.rows import Message

_ARGUMENTS = ("as given", "as JSON text")
_EMPTY = ("", None, "absent")


def variants(messages: Sequence[Message]) -> Iterator[tuple[str, Any, bool]]:
    """Ways to tell a template the same thing that differ for this conversation."""
    has_arguments = any(
        isinstance(call["function"].get("arguments"), Mapping)
        for message in messages
        for call in message.get("tool_calls") or ()
    )
    has_empty = any(message.get("tool_calls") and not message.get("content") for message in messages)
    for parts in (False, True):
        for empty in _EMPTY if has_empty else _EMPTY[:1]:
            for form in _ARGUMENTS if has_arguments else _ARGUMENTS[:1]:
                yield form, empty, parts


def variant_of(messages: Sequence[Message], form: str, empty: Any, parts: bool) -> list[Message]:
    """The messages in one of these ways."""
    if form == _ARGUMENTS[0] and empty == "" and not parts and all(len(message) == 2 for message in messages):
        return list(messages)
    return [_told(message, form, empty, parts) for message in messages]


def _told(message: Message, form: str, empty: Any, parts: bool) -> Message:
    told = {key: value for key, value in message.items() if value is not None}
    reasoning = told.get("reasoning_content")
    if reasoning is not None:
        told.update(thinking=reasoning, reasoning=reasoning)
    if told.get("tool_calls"):
        if not told.get("content"):
            told["content"] = empty
            if empty == "absent":
                del told["content"]
        if form == _ARGUMENTS[1]:
            told["tool_calls"] = [_as_text(call) for call in told["tool_calls"]]
    if parts and isinstance(told.get("content"), str):
        told["content"] = [{"type": "text", "text": told["content"]}]
    return told


def _as_text(call: Mapping[str, Any]) -> dict[str, Any]:
    function = dict(call["function"])
    if isinstance(function.get("arguments"), Mapping):
        function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False)
    return {**call, "function": function}


def shape_of(messages: Sequence[Message], tools: Sequence[Any], arguments: Mapping[str, Any]) -> Any:
    """Conversations of one shape are likely to share their literals."""
    parts = []
    for message in messages:
        content = message.get("content")
        text = content if isinstance(content, str) else ""
        plain = not text or not (text[0].isspace() or text[-1].isspace())
        parts.append((message["role"], *(key for key in message if message[key]), plain, "think>" in text))
    return tuple(parts), len(tools), json.dumps(arguments, sort_keys=True, default=str) if arguments else ""

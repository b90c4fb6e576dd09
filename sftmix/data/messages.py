"""Messages of a conversation as other tools write them, in the one way that the recipe and chat templates read.

A message becomes ``{"role", "content"}`` with reasoning, tool calls, name and tool_call_id where it has them. Marks of
turns are taken out. Every other key that is not empty is named as ignored; what cannot be kept raises ``RowError``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sftmix.data.rows import Message, RowError

ROLES = {
    "user": "user", "human": "user", "prompter": "user", "assistant": "assistant", "gpt": "assistant",
    "chatgpt": "assistant", "bing": "assistant", "bard": "assistant", "bot": "assistant", "chatbot": "assistant",
    "model": "assistant", "ai": "assistant", "system": "system", "developer": "system", "tool": "tool",
    "function": "tool", "observation": "tool", "ipython": "tool", "tool_response": "tool", "function_response": "tool",
    "function_call": "assistant", "tool_call": "assistant",
}  # fmt: skip
_CALLS = ("function_call", "tool_call")  # ShareGPT's roles whose content is the call
_SHOWN_AS = ("developer",)  # roles whose mapping changes what the model is shown
MARKS = (
    "weight", "train", "loss", "training", "trainable", "train_on_turn", "supervise", "loss_weight", "loss_mask",
)  # fmt: skip
_REASONING = ("reasoning_content", "thinking", "reasoning", "thought")
_TEXT_PARTS = ("text", "input_text", "output_text")
_KEPT = {
    "role",
    "from",
    "content",
    "value",
    "tool_calls",
    "function_call",
    "refusal",
    "masked",
    "mask",
    *MARKS,
    *_REASONING,
}


@dataclass
class Turns:
    """The messages of a row, the marks they carry (by message; None: none), ignored keys, and notes."""

    messages: list[Message] = field(default_factory=list)
    marks: list[float | None] = field(default_factory=list)
    ignored: dict[str, None] = field(default_factory=dict)
    notes: dict[str, None] = field(default_factory=dict)


def is_empty(value: Any) -> bool:
    """Whether a field holds nothing: null, an empty or blank text, an empty list or object."""
    return (
        value is None
        or value == ""
        or value == []
        or value == {}
        or (isinstance(value, str) and not value.strip())
    )


def parse_messages(value: Any, column: str = "messages") -> Turns:
    """The messages in ``value``: a list of objects, an object of lists, or either as JSON text."""
    turns = Turns()
    for number, message in enumerate(_listed(value, column), 1):
        where = f"message {number}"
        if not isinstance(message, Mapping):
            raise RowError("not messages", f"{column}: expected objects, got {message!r:.60} as {where}")
        if len(message) == 2 and _simple(message, turns):
            continue
        _parse(message, where, column, turns)
    return turns


def _listed(value: Any, column: str) -> Sequence[Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise RowError(
                "not messages", f"{column}: expected a list of messages, got text {value!r:.60}"
            ) from None
    if isinstance(value, Mapping):
        columns = list(value.values())
        if columns and all(isinstance(item, (list, tuple)) for item in columns):
            if len({len(item) for item in columns}) != 1:
                raise RowError(
                    "not messages", f"{column}: expected lists of one length, got {_lengths(value)}"
                )
            return [dict(zip(value, row, strict=True)) for row in zip(*columns, strict=True)]
        if columns and ({"role", "from"} & set(value)):
            return [value]
    if not isinstance(value, (list, tuple)):
        raise RowError("not messages", f"{column}: expected a list of messages, got {value!r:.60}")
    return value


def _lengths(value: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {len(item)}" for key, item in value.items())


def _simple(message: Mapping[str, Any], turns: Turns) -> bool:
    """The case of nearly all messages: a plain role and a text."""
    role, content = message.get("role"), message.get("content")
    if role not in ("user", "assistant", "system") or not isinstance(content, str) or not content.strip():
        return False
    turns.messages.append({"role": role, "content": content})
    turns.marks.append(None)
    return True


def _parse(message: Mapping[str, Any], where: str, column: str, turns: Turns) -> None:
    given = _either(message, ("role", "from"), where)
    role = ROLES.get(given.strip().lower()) if isinstance(given, str) else None
    if role is None:
        raise RowError("unknown role", f"{where}: expected a role of {', '.join(ROLES)}, got {given!r:.60}")
    told: Message = {"role": role}
    reasoning: list[str] = [
        _text(message[key], where, key) for key in _REASONING if not is_empty(message.get(key))
    ]
    content = _content(_either(message, ("content", "value"), where), where, reasoning)
    calls = _calls(message, where)
    if str(given).strip().lower() in _CALLS:
        calls.append(_call(content, where))
        content = ""
    if not is_empty(message.get("refusal")):
        if content.strip():
            raise RowError("two answers in one message", f"{where}: expected content or refusal, got both")
        content = _text(message["refusal"], where, "refusal")
        turns.notes["a refusal used as the answer's content"] = None
    told["content"] = content
    if len(set(reasoning)) > 1:
        raise RowError(
            "two reasonings in one message",
            f"{where}: expected one reasoning, got {len(set(reasoning))} that differ",
        )
    if reasoning:
        if role != "assistant":
            raise RowError(
                "reasoning of another role",
                f"{where}: expected reasoning of the assistant only, got {role}'s",
            )
        told["reasoning_content"] = reasoning[0]
    if calls:
        if role != "assistant":
            raise RowError(
                "tool calls of another role",
                f"{where}: expected tool calls of the assistant only, got {role}'s",
            )
        told["tool_calls"] = calls
    if role == "tool":
        told.update({key: message[key] for key in ("name", "tool_call_id") if not is_empty(message.get(key))})
    if role == "assistant" and not content.strip() and not calls:
        raise RowError("empty answer", f"{where}: expected an answer, got empty text")
    if role != "assistant" and not content.strip():
        turns.notes[f"an empty message of the {role}"] = None
    if str(given).strip().lower() in _SHOWN_AS:
        turns.notes[f"role {given} read as {role}"] = None
    known = {*_KEPT, "name", "tool_call_id"} if role == "tool" else _KEPT
    for key, value in message.items():
        if key not in known and not is_empty(value):
            turns.ignored[f"{column}.{key}"] = None
    turns.messages.append(told)
    turns.marks.append(_mark(message, role, where))


def _either(message: Mapping[str, Any], names: tuple[str, str], where: str) -> Any:
    """The value under one of two names. Raises ``RowError`` where both hold different ones."""
    found = [message[name] for name in names if not is_empty(message.get(name))]
    if len(found) == 2 and found[0] != found[1]:
        raise RowError(
            "two values for one field", f"{where}: expected {' or '.join(names)}, got both, and they differ"
        )
    return found[0] if found else None


def _text(value: Any, where: str, name: str) -> str:
    if not isinstance(value, str):
        raise RowError("content that is no text", f"{where}, {name}: expected text, got {value!r:.60}")
    return value


def _content(value: Any, where: str, reasoning: list[str]) -> str:
    """A content as one text; parts of reasoning go to ``reasoning``."""
    if value is None:
        return ""
    if not isinstance(value, (list, tuple)):
        return _text(value, where, "content")
    texts = []
    for part in value:
        if isinstance(part, str):
            texts.append(part)
            continue
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind in _TEXT_PARTS or (
            kind is None and isinstance(part, Mapping) and isinstance(part.get("text"), str)
        ):
            texts.append(_text(part.get("text"), where, "content"))
        elif kind in ("thinking", "reasoning"):
            reasoning.append(
                _text(part.get("thinking") or part.get("reasoning") or part.get("text"), where, "content")
            )
        else:
            raise RowError("content that is no text", f"{where}: expected parts of text, got {part!r:.60}")
        extra = [
            key
            for key, item in part.items()
            if key not in ("type", "text", "thinking", "reasoning") and not is_empty(item)
        ]
        if extra:
            raise RowError(
                "content that is no text", f"{where}: expected parts of type and text only, got {extra[0]}"
            )
    return "".join(texts)


# --- tools ---


def _calls(message: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    found = []
    calls = message.get("tool_calls")
    if isinstance(calls, str) and calls.strip():
        calls = _json(calls, where, "tool_calls")
    if not is_empty(calls):
        if not isinstance(calls, (list, tuple)):
            raise RowError("bad tool call", f"{where}: expected a list of tool_calls, got {calls!r:.60}")
        found = [_call(call, where) for call in calls]
    if not is_empty(message.get("function_call")):
        if found:
            raise RowError("bad tool call", f"{where}: expected tool_calls or function_call, got both")
        found = [_call(message["function_call"], where)]
    return found


def _json(text: str, where: str, name: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise RowError("bad tool call", f"{where}, {name}: expected JSON, got {text!r:.60}") from None


def _call(value: Any, where: str) -> dict[str, Any]:
    """A tool call in OpenAI's form; arguments that are JSON text of an object become the object."""
    if isinstance(value, str):
        value = _json(value, where, "tool call")
    function = value.get("function", value) if isinstance(value, Mapping) else None
    if (
        not isinstance(function, Mapping)
        or not isinstance(function.get("name"), str)
        or not function["name"].strip()
    ):
        raise RowError(
            "bad tool call", f"{where}: expected a call with the name of a function, got {value!r:.60}"
        )
    arguments = function.get("arguments", function.get("parameters", {}))
    if isinstance(arguments, str):
        parsed = None
        try:
            parsed = json.loads(arguments)
        except (ValueError, RecursionError):
            pass
        arguments = parsed if isinstance(parsed, dict) else arguments
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, (str, dict)):
        raise RowError(
            "bad tool call", f"{where}: expected arguments as an object or text, got {arguments!r:.60}"
        )
    outer = (
        {}
        if value is function
        else {k: v for k, v in value.items() if k not in ("type", "function", "id", "index")}
    )
    extra = [
        k
        for k, v in {**outer, **function}.items()
        if k not in ("name", "arguments", "parameters", "id", "type") and not is_empty(v)
    ]
    if extra:
        raise RowError(
            "bad tool call", f"{where}: expected a call of name, arguments and id, got {extra[0]} too"
        )
    call: dict[str, Any] = {
        "type": "function",
        "function": {"name": function["name"], "arguments": arguments},
    }
    if not is_empty(value.get("id")):
        call["id"] = str(value["id"])
    return call


def parse_tools(value: Any, column: str) -> tuple[dict[str, Any], ...]:
    """A list of tools in OpenAI's form, from a list, one object, or either as JSON text."""
    if isinstance(value, str):
        value = _json(value, column, "tools")
    tools = [value] if isinstance(value, Mapping) else value
    if not isinstance(tools, (list, tuple)):
        raise RowError("bad tools", f"{column}: expected a list of tools, got {value!r:.60}")
    found = []
    for tool in tools:
        if isinstance(tool, str):
            tool = _json(tool, column, "tools")
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise RowError("bad tools", f"{column}: expected tools with a name, got {tool!r:.60}")
        found.append(dict(tool) if "function" in tool else {"type": "function", "function": dict(tool)})
    return tuple(found)


# --- marks ---


def _mark(message: Mapping[str, Any], role: str, where: str) -> float | None:
    """The weight that a message gives itself; None where it gives none."""
    if not is_empty(message.get("mask")):
        raise RowError(
            "ambiguous flag",
            f"{where}: expected weight, train or loss as a flag, got mask, which may mean either",
        )
    found = {key: _weight(message[key], where, key) for key in MARKS if message.get(key) is not None}
    if message.get("masked") is not None:
        found["masked"] = 1.0 - min(1.0, _weight(message["masked"], where, "masked"))
    if len(set(found.values())) > 1:
        told = ", ".join(f"{key} {value:g}" for key, value in found.items())
        raise RowError("flags that contradict", f"{where}: expected one weight, got {told}")
    if not found:
        return None
    weight = next(iter(found.values()))
    if role != "assistant":
        if weight > 0:
            raise RowError(
                "loss on another role", f"{where}: expected loss on the assistant's turns only, got {role}'s"
            )
        return None
    return weight


def _weight(value: Any, where: str, key: str) -> float:
    if not isinstance(value, (bool, int, float)) or not (math.isfinite(value) and value >= 0):
        raise RowError(
            "bad flag", f"{where}, {key}: expected true, false or a weight of at least 0, got {value!r:.60}"
        )
    return float(value)

"""Messages of any convention brought to one: role, content, reasoning, tool calls, and the mark that a row gives them.

Every key that is not empty is used, or named in the ledger as ignored; what has no sure meaning is a ``RowError``.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Any

from .rows import Message, RowError

ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(
        ("assistant", "gpt", "bot", "chatbot", "model", "ai", "function_call", "tool_call"), "assistant"
    ),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("tool", "function", "observation", "ipython", "tool_response"), "tool"),
}
_QUIET = {
    "user",
    "assistant",
    "system",
    "tool",
    "human",
    "gpt",
    "function_call",
}  # no note: conventions' own names
_CALLS = {"function_call", "tool_call"}
_MARKS = ("weight", "train", "loss", "training", "trainable", "loss_mask", "supervise", "masked")
_REASONING = ("reasoning_content", "thinking", "reasoning", "thought")
_KNOWN = {
    "role",
    "from",
    "content",
    "value",
    "tool_calls",
    "function_call",
    "refusal",
    "mask",
    *_MARKS,
    *_REASONING,
}


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
    """Nothing is lost with it: None, white space, a list or an object without items."""
    return (
        value is None
        or (isinstance(value, (str, list, tuple, dict)) and not value)
        or (isinstance(value, str) and not value.strip())
    )


def as_text(value: Any, place: str, ledger: Ledger) -> str:
    """Text as it is, a number as its digits (noted), None as no text; raises ``RowError`` for anything else."""
    if isinstance(value, str):
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError as error:
                raise RowError(
                    "text not Unicode", f"{place}: expected Unicode text, got a lone surrogate"
                ) from error
        return value
    if value is None:
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


def read_messages(value: Any, place: str, ledger: Ledger) -> tuple[list[Message], list[float | None]]:
    """(messages, marks) of a list of objects, an object of lists, or the JSON text of either."""
    value = parsed(value, place)
    if isinstance(value, dict):
        lengths = {len(v) for v in value.values() if isinstance(v, list)}
        if len(lengths) != 1 or not all(isinstance(v, list) or v is None for v in value.values()):
            raise RowError("not messages", f"{place}: expected lists of one length in an object of lists")
        value = [{k: v[i] for k, v in value.items() if v is not None} for i in range(lengths.pop())]
    if not isinstance(value, list) or not all(isinstance(m, dict) for m in value):
        raise RowError("not messages", f"{place}: expected a list of objects, got {type(value).__name__}")
    messages, marks = [], []
    for number, raw in enumerate(value, 1):
        message, mark = _message(raw, place, number, ledger)
        messages.append(message)
        marks.append(mark)
    return messages, marks


def read_tools(value: Any, place: str, ledger: Ledger) -> tuple[dict[str, Any], ...]:
    """Functions that the model may call, each ``{"type": "function", "function": {"name", …}}``."""
    value = parsed(value, place)
    tools = []
    for tool in [value] if isinstance(value, dict) else value if isinstance(value, list) else [value]:
        tool = parsed(tool, place)
        function = tool.get("function") if isinstance(tool, dict) and "function" in tool else tool
        if (
            not isinstance(function, dict)
            or not isinstance(function.get("name"), str)
            or not function["name"].strip()
        ):
            raise RowError(
                "invalid tools", f"{place}: expected functions with a name, got {type(tool).__name__}"
            )
        for key, item in tool.items() if function is not tool else ():
            if key not in ("type", "function") and not empty(item):
                ledger.ignore(f"{place}.{key}")
        if function is not tool and tool.get("type") not in (None, "function"):
            raise RowError(
                "invalid tools", f"{place}: expected type function, got {type(tool['type']).__name__}"
            )
        tools.append({"type": "function", "function": _without_none(function)})
    return tuple(tools)


def _message(raw: dict[str, Any], place: str, number: int, ledger: Ledger) -> tuple[Message, float | None]:
    role, content = raw.get("role"), raw.get("content")
    if len(raw) == 2 and type(content) is str and role in ("user", "assistant", "system") and content.strip():
        return {"role": role, "content": as_text(content, f"{place}.content", ledger)}, None
    where = f"{place}, message {number}"
    named = _one(raw, ("role", "from"), where)
    name = named.strip().lower() if isinstance(named, str) else ""
    if name not in ROLES:
        raise RowError(
            "unknown role", f"{where}: expected a role among {', '.join(ROLES)}, got {_short(named)}"
        )
    role = ROLES[name]
    if name not in _QUIET or named != name:
        ledger.note(f"role {named} read as {role}")
    message: Message = {"role": role, "content": ""}
    body, thoughts = _content(_one(raw, ("content", "value"), where), place, ledger)
    thoughts += [as_text(raw[key], f"{place}.{key}", ledger) for key in _REASONING if not empty(raw.get(key))]
    calls = _calls(raw, name, body, where, ledger)
    body = (
        ""
        if name in _CALLS and body and calls and "function_call" not in raw and "tool_calls" not in raw
        else body
    )
    if not empty(raw.get("refusal")):
        refusal = as_text(raw["refusal"], f"{place}.refusal", ledger)
        if body.strip() and body != refusal:
            raise RowError("contradictory content", f"{where}: expected content or refusal, got both")
        body = refusal
        ledger.note("refusal used as the answer")
    message["content"] = body
    if thoughts and len(set(thoughts)) > 1:
        raise RowError(
            "contradictory reasoning", f"{where}: expected one reasoning, got {len(set(thoughts))}"
        )
    if (thoughts or calls) and role != "assistant":
        raise RowError(
            "not the assistant's", f"{where}: expected reasoning and calls on the assistant's turns only"
        )
    if thoughts:
        message["reasoning_content"] = thoughts[0]
    if calls:
        message["tool_calls"] = calls
    for key, value in raw.items():
        if key in _KNOWN or empty(value):
            continue
        if role == "tool" and key in ("name", "tool_call_id"):
            message[key] = as_text(value, f"{place}.{key}", ledger)
        else:
            ledger.ignore(f"{place}.{key}")
    if not body.strip() and not calls:
        if role == "assistant":
            raise RowError("empty answer", f"{where}: expected an answer, got empty text")
        if not {"content", "value"} & raw.keys():
            raise RowError(
                "missing content", f"{where}: expected content or value, got {', '.join(map(str, raw))}"
            )
        ledger.note(f"empty {role} turn")
    return message, _mark(raw, role, where)


def _one(raw: dict[str, Any], names: tuple[str, str], where: str) -> Any:
    """The value under either name; both, and different, is an error."""
    first, second = raw.get(names[0]), raw.get(names[1])
    if empty(first):
        return first if empty(second) and first is not None else second
    if not empty(second) and second != first:
        raise RowError("contradictory keys", f"{where}: expected {names[0]} or {names[1]}, got both")
    return first


def _content(value: Any, place: str, ledger: Ledger) -> tuple[str, list[str]]:
    """(text, reasoning) of content: text, or a list of parts joined without a separator, as chat templates do."""
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        return as_text(value, f"{place}.content", ledger), []
    texts, thoughts = [], []
    for part in value:
        kind = "text" if isinstance(part, str) else part.get("type") if isinstance(part, dict) else None
        if isinstance(part, str):
            texts.append(as_text(part, f"{place}.content", ledger))
            continue
        if kind not in ("text", "thinking", "reasoning", None) or not isinstance(part, dict):
            raise RowError("content not text", f"{place}: expected parts of text, got {_short(kind)}")
        key = next((k for k in ("text", kind) if k and not empty(part.get(k))), "text")
        (texts if kind in ("text", None) else thoughts).append(
            as_text(part.get(key), f"{place}.content", ledger)
        )
        for name, item in part.items():
            if name not in ("type", key) and not empty(item):
                ledger.ignore(f"{place}.content.{name}")
    return "".join(texts), ["".join(thoughts)] if any(map(str.strip, thoughts)) else []


def _calls(raw: dict[str, Any], name: str, body: str, where: str, ledger: Ledger) -> list[dict[str, Any]]:
    """Tool calls in OpenAI's shape, from tool_calls, function_call, or the content of a turn whose role is a call."""
    calls = parsed(raw.get("tool_calls") or None, where)
    single = parsed(raw.get("function_call") or None, where)
    if calls is not None and single is not None:
        raise RowError("invalid tool calls", f"{where}: expected tool_calls or function_call, got both")
    if single is not None:
        calls = [single]
    elif calls is None and name in _CALLS:
        value = parsed(body, where)
        calls = value if isinstance(value, list) else [value]
    if calls is None:
        return []
    if not isinstance(calls, list):
        raise RowError("invalid tool calls", f"{where}: expected a list of calls, got {type(calls).__name__}")
    return [_call(call, where, ledger) for call in calls]


def _call(call: Any, where: str, ledger: Ledger) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    if (
        not isinstance(function, dict)
        or not isinstance(function.get("name"), str)
        or not function["name"].strip()
    ):
        raise RowError(
            "invalid tool calls", f"{where}: expected a call with a name, got {type(call).__name__}"
        )
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            loaded = json.loads(arguments)
        except (ValueError, RecursionError):
            loaded = None
        arguments = loaded if isinstance(loaded, dict) else arguments
    elif isinstance(arguments, dict):
        if None in arguments.values():
            ledger.note("null arguments of a tool call left out")
        arguments = {key: value for key, value in arguments.items() if value is not None}
    elif arguments is not None:
        raise RowError(
            "invalid tool calls", f"{where}: expected arguments as an object, got {_short(arguments)}"
        )
    kept: dict[str, Any] = {"type": "function"}
    if not empty(call.get("id")):
        kept["id"] = as_text(call["id"], "tool_calls.id", ledger)
    kept["function"] = {"name": function["name"], "arguments": {} if arguments is None else arguments}
    for owner in (call, function) if function is not call else (call,):
        for key, value in owner.items():
            wanted = ("type", "id", "function") if owner is call else ()
            if (
                key not in wanted
                and not (owner is function and key in ("name", "arguments"))
                and not empty(value)
            ):
                ledger.ignore(f"messages.tool_calls.{key}")
    return kept


def _mark(raw: dict[str, Any], role: str, where: str) -> float | None:
    """The weight that a message's own keys give it, None without any."""
    if not empty(raw.get("mask")):
        raise RowError(
            "ambiguous mark", f"{where}: expected train, weight or masked, got mask, which is read both ways"
        )
    weights = set()
    for key in _MARKS:
        value = raw.get(key)
        if value is None:
            continue
        if not isinstance(value, (bool, int, float)) or not 0 <= value < 2**63 or math.isnan(value):
            raise RowError(
                "invalid mark", f"{where}: expected {key} true, false or at least 0, got {_short(value)}"
            )
        weights.add(float(not value) if key == "masked" else float(value))
    if len(weights) > 1:
        raise RowError("contradictory marks", f"{where}: expected one weight, got {sorted(weights)}")
    if role == "assistant":
        return weights.pop() if weights else None
    if weights and weights.pop() > 0:
        raise RowError(
            "mark on another's turn", f"{where}: expected marks on the assistant's turns, got a {role}'s"
        )
    return None


def _without_none(value: Any) -> Any:
    """Arrow fills the keys that one object has and another has not with None: they are left out again."""
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value


def _short(value: Any) -> str:
    return repr(value[:40]) if isinstance(value, str) else type(value).__name__

"""Messages of any convention brought to one: role, content, reasoning, tool calls, and the mark that a row gives them.

Every key that is not empty is used, or named in the ledger as ignored; what has no sure meaning is a ``RowError``.
"""

from __future__ import annotations

import math
from typing import Any

from sftmix.data.ledger import Ledger, as_text, empty, parsed, short
from sftmix.data.rows import Message, RowError
from sftmix.data.tools import CALL_ROLES, read_calls

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


def list_marks(value: Any, messages: list[Message], marks: list[float | None]) -> list[float | None]:
    """Marks of a row's own list, one item per message; items of turns that are not the assistant's say nothing."""
    value = parsed(value, "loss_mask")
    if not isinstance(value, list) or len(value) != len(messages):
        raise RowError(
            "invalid mark", f"loss_mask: expected a list of {len(messages)} marks, one per message"
        )
    merged = []
    for number, (item, message, mark) in enumerate(zip(value, messages, marks, strict=True), 1):
        given = _mark({"loss_mask": item}, "assistant", f"loss_mask, item {number}")
        given = given if message["role"] == "assistant" else None
        if mark is not None and given is not None and mark != given:
            raise RowError("contradictory marks", f"loss_mask, item {number}: expected {mark}, got {given}")
        merged.append(mark if given is None else given)
    return merged


def _message(raw: dict[str, Any], place: str, number: int, ledger: Ledger) -> tuple[Message, float | None]:
    role, content = raw.get("role"), raw.get("content")
    if len(raw) == 2 and type(content) is str and role in ("user", "assistant", "system") and content.strip():
        return {"role": role, "content": as_text(content, f"{place}.content", ledger)}, None
    where = f"{place}, message {number}"
    named = _one(raw, ("role", "from"), where)
    name = named.strip().lower() if isinstance(named, str) else ""
    if name not in ROLES:
        raise RowError(
            "unknown role", f"{where}: expected a role among {', '.join(ROLES)}, got {short(named)}"
        )
    role = ROLES[name]
    if name not in _QUIET or named != name:
        ledger.note(f"role {named} read as {role}")
    message: Message = {"role": role, "content": ""}
    body, thoughts = _content(_one(raw, ("content", "value"), where), place, ledger)
    thoughts += [as_text(raw[key], f"{place}.{key}", ledger) for key in _REASONING if not empty(raw.get(key))]
    calls = read_calls(raw, name, body, where, ledger)
    body = (
        ""
        if name in CALL_ROLES and body and calls and "function_call" not in raw and "tool_calls" not in raw
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
    texts: list[str] = []
    thoughts: list[str] = []
    for part in value:
        kind = "text" if isinstance(part, str) else part.get("type") if isinstance(part, dict) else None
        if isinstance(part, str):
            texts.append(as_text(part, f"{place}.content", ledger))
            continue
        if kind not in ("text", "thinking", "reasoning", None) or not isinstance(part, dict):
            raise RowError("content not text", f"{place}: expected parts of text, got {short(kind)}")
        key = next((k for k in ("text", kind) if k and not empty(part.get(k))), "text")
        (texts if kind in ("text", None) else thoughts).append(
            as_text(part.get(key), f"{place}.content", ledger)
        )
        for name, item in part.items():
            if name not in ("type", key) and not empty(item):
                ledger.ignore(f"{place}.content.{name}")
    return "".join(texts), ["".join(thoughts)] if any(map(str.strip, thoughts)) else []


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
                "invalid mark", f"{where}: expected {key} true, false or at least 0, got {short(value)}"
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

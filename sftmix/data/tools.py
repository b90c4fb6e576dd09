"""Tools that a model may call and the calls that it makes, brought to the one shape that chat templates read."""

from __future__ import annotations

import json
from typing import Any

from sftmix.data.ledger import Ledger, as_text, empty, parsed, short
from sftmix.data.rows import RowError

CALL_ROLES = {"function_call", "tool_call"}  # roles whose content is a call


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


def read_calls(raw: dict[str, Any], name: str, body: str, where: str, ledger: Ledger) -> list[dict[str, Any]]:
    """Tool calls in OpenAI's shape, from tool_calls, function_call, or the content of a turn whose role is a call."""
    calls = parsed(raw.get("tool_calls") or None, where)
    single = parsed(raw.get("function_call") or None, where)
    if calls is not None and single is not None:
        raise RowError("invalid tool calls", f"{where}: expected tool_calls or function_call, got both")
    if single is not None:
        calls = [single]
    elif calls is None and name in CALL_ROLES:
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
    named = "parameters" if empty(function.get("arguments")) and "parameters" in function else "arguments"
    arguments = function.get(named)
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
            "invalid tool calls", f"{where}: expected arguments as an object, got {short(arguments)}"
        )
    kept: dict[str, Any] = {"type": "function"}
    if not empty(call.get("id")):
        kept["id"] = as_text(call["id"], "tool_calls.id", ledger)
    kept["function"] = {"name": function["name"], "arguments": {} if arguments is None else arguments}
    for owner in (call, function) if function is not call else (call,):
        for key, value in owner.items():
            wanted = ("type", "id", "function") if owner is call else ()
            if key not in wanted and not (owner is function and key in ("name", named)) and not empty(value):
                ledger.ignore(f"messages.tool_calls.{key}")
    return kept


def _without_none(value: Any) -> Any:
    """Arrow fills the keys that one object has and another has not with None: they are left out again."""
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value

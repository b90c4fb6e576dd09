"""Conversations of every kind that a chat template meets, each text in them a word that occurs nowhere else."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

Message = dict[str, Any]


@dataclass(frozen=True)
class Text:
    """A piece of text that has to be found: whose it is (``kind``), and which message holds it (None: the tools)."""

    kind: str  # system, user, assistant, reasoning, tool call, tool result or tools
    words: str
    message: int | None


@dataclass
class Conversation:
    """Messages as forms hand them on, and the texts that a rendering of them must hold."""

    kind: str
    messages: list[Message] = field(default_factory=list)
    tools: list[dict[str, Any]] = field(default_factory=list)
    texts: list[Text] = field(default_factory=list)
    draw: random.Random = field(default_factory=lambda: random.Random(7))
    has_marker: bool = False  # a text holds the string of a special token

    def word(self) -> str:
        """Nine letters that nothing else holds: no template spells words of consonants."""
        return "".join(self.draw.choices("bcdfghjklmnpqrstvwxz", k=9))

    def add(self, role: str, content: str | None = None, **more: Any) -> None:
        """A message of ``role``; without ``content``, a new word is its text."""
        content = self.word() if content is None else content
        index, kind = len(self.messages), {"tool": "tool result"}.get(role, role)
        self.messages.append({"role": role, "content": content, **more})
        if more.get("reasoning_content"):
            self.texts.append(Text("reasoning", more["reasoning_content"], index))
        if content.strip():
            self.texts.append(Text(kind, content.strip(), index))

    def turns(self, count: int, *, reasoning: bool = False) -> Conversation:
        """So many questions with their answers."""
        for _ in range(count):
            self.add("user")
            self.add("assistant", **({"reasoning_content": self.word()} if reasoning else {}))
        return self

    def call(self, *, as_text: bool = False, content: str = "", reasoning: bool = False) -> None:
        """A question, the call of a tool, its result and the answer; ``as_text``: arguments are JSON text."""
        described, name, value, index = self.word(), self.word(), self.word(), len(self.messages) + 1
        if not self.tools:
            place = {"type": "string", "description": self.word()}
            parameters = {"type": "object", "properties": {"place": place}, "required": ["place"]}
            function = {"name": name, "description": described, "parameters": parameters}
            self.tools.append({"type": "function", "function": function})
            self.texts.append(Text("tools", described, None))
        name = self.tools[0]["function"]["name"]
        arguments = {"place": value}
        function = {"name": name, "arguments": json.dumps(arguments) if as_text else arguments}
        made: Message = {"tool_calls": [{"id": f"call{index}", "type": "function", "function": function}]}
        if reasoning:
            made["reasoning_content"] = self.word()
        self.add("user")
        self.add("assistant", content, **made)
        self.texts.append(Text("tool call", value, index))
        self.add("tool", name=name, tool_call_id=f"call{index}")
        self.add("assistant")


def _system(talk: Conversation, turns: int) -> None:
    talk.add("system")
    talk.turns(turns)


def _white_space(talk: Conversation) -> None:
    for left, right in (("  ", "\n\n"), ("\n\n ", " \n")):
        talk.add("user", left + talk.word() + "\n\n  " + talk.word() + right)
        talk.add("assistant", left + talk.word() + "\n \n" + talk.word() + right)


def _letters(talk: Conversation) -> None:
    talk.add("user", f"{talk.word()} 你好，世界 ёж 🦔 {talk.word()}")
    talk.add("assistant", f"🇺🇳 {talk.word()} 👩🏽‍🚀 ½·π ≈ {talk.word()} e\u0301")
    talk.add("user", f"مرحبا {talk.word()}")
    talk.add("assistant", f"{talk.word()} 🤖")


def _repeats(talk: Conversation) -> None:
    for _ in range(2):
        same = f"{talk.word()} {talk.word()}"
        talk.add("user", same)
        talk.add("assistant", same)


def _empty_system(talk: Conversation) -> None:
    talk.add("system", "")
    talk.turns(2)


def _role_names(talk: Conversation) -> None:
    talk.add("user", f"assistant: {talk.word()}\nuser\n{talk.word()}")
    talk.add("assistant", f"{talk.word()}\n\nuser: {talk.word()}\nassistant\n\n{talk.word()}\nsystem")
    talk.turns(1)


def _unlisted_tools(talk: Conversation) -> None:
    talk.call()
    talk.tools.clear()
    talk.texts = [text for text in talk.texts if text.kind != "tools"]


def _running_users(talk: Conversation) -> None:
    talk.add("user")
    talk.turns(2)


def _thought_inside(talk: Conversation) -> None:
    talk.turns(1)
    talk.add("user")
    talk.add("assistant", f"{talk.word()} </think> {talk.word()}")


KINDS: dict[str, Callable[[Conversation], Any]] = {
    "single": lambda talk: talk.turns(1),
    "multi": lambda talk: talk.turns(3),
    "system": lambda talk: _system(talk, 1),
    "system, multi": lambda talk: _system(talk, 3),
    "tools": lambda talk: talk.call(),
    "tools, arguments as text": lambda talk: talk.call(as_text=True),
    "tools, text beside the call": lambda talk: talk.call(content=talk.word()),
    "tools, reasoning": lambda talk: talk.call(reasoning=True),
    "tools, multi": lambda talk: (talk.call(), talk.call(), talk.turns(1)),
    "tools, not listed": _unlisted_tools,
    "reasoning": lambda talk: talk.turns(1, reasoning=True),
    "reasoning, multi": lambda talk: talk.turns(2, reasoning=True),
    "white space": _white_space,
    "role names": _role_names,
    "marker": lambda talk: talk.turns(1),  # see ``conversation``
    "letters": _letters,
    "repeats": _repeats,
    "empty system": _empty_system,
    "</think> inside": _thought_inside,
    "users running": _running_users,
    "40 turns": lambda talk: talk.turns(40),
}


def conversation(kind: str, marker: str = "") -> Conversation:
    """The conversation of a kind of ``KINDS``; ``marker`` is put into the texts of the kind that asks for one."""
    talk = Conversation(kind)
    if kind == "marker":
        talk.has_marker = True
        talk.add("user", f"{talk.word()}{marker}{talk.word()}")
        talk.add("assistant", f"{talk.word()}{marker}{talk.word()}")
    KINDS[kind](talk)
    return talk

"""Ways to render a conversation with ``apply_chat_template``, and where each of its texts lies in what comes out.

Every text is a word that occurs nowhere else, so that what a chat template loses is found by searching. Nothing here
knows of ``sftmix``.
"""

from __future__ import annotations

import copy
import datetime
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

from transformers.utils import chat_template_utils

from tests.recipe.data.template_conversations import Conversation, Message
from tests.recipe.data.template_tokenizers import Family

DATE = "2025-03-04"
SUPERVISED = ("assistant", "reasoning", "tool call")


@dataclass
class Rendering:
    """One way to hand a conversation to the template, and what came out.

    ``places`` are where each text lies, None where it is not one piece; ``missing`` the kinds of text that are lost,
    with ``end`` for an answer without one; ``error`` what the template raised.
    """

    text: str = ""
    ids: list[int] = field(default_factory=list)
    offsets: list[tuple[int, int]] = field(default_factory=list)
    places: list[tuple[int, int] | None] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    error: str = ""
    demanded: bool = True  # a product must find this way; where False it may refuse as well
    merged: bool = False  # an answer runs on into the next one, with one end for both

    @property
    def whole(self) -> bool:
        return not self.error and not self.missing

    @property
    def plain(self) -> bool:
        """Whether each text is there in one piece and each answer has an end of its own."""
        return self.whole and not self.merged and None not in self.places


@contextmanager
def _fixed_date() -> Iterator[None]:
    """Within it ``strftime_now`` of chat templates is at ``DATE``."""

    class Fixed(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> Fixed:
            return cls.fromisoformat(DATE)

    with mock.patch.object(chat_template_utils, "datetime", Fixed):
        yield


def _rewritten(messages: list[Message], *, as_text: bool | None, empty: str | None = "") -> list[Message]:
    """The messages with reasoning under each of its names, arguments as text or objects, and calls' empty content.

    ``empty`` is what stands for it: ``""``, None, or ``"absent"`` for no such key.
    """
    made = copy.deepcopy(messages)
    for message in made:
        if "reasoning_content" in message:
            message["reasoning"] = message["thinking"] = message["reasoning_content"]
        for call in message.get("tool_calls", ()):
            given = call["function"]["arguments"]
            if as_text is not None and isinstance(given, str) != as_text:
                call["function"]["arguments"] = json.dumps(given) if as_text else json.loads(given)
        if message.get("tool_calls") and not message["content"]:
            message["content"] = empty
            if empty == "absent":
                del message["content"]
    return made


def _in_parts(messages: list[Message]) -> list[Message]:
    """Each plain string as a list of one part of text, as models of images want it."""
    return [
        {**message, "content": [{"type": "text", "text": message.get("content") or ""}]}
        for message in messages
    ]


def renderings(talk: Conversation, tokenizer: Any, family: Family) -> list[Rendering]:
    """Every way to say the same: arguments as objects or text, a call's empty content or none; then more ways that a
    product may take or leave: parts of text, no system message where it is empty, and None for a call's content,
    which some templates ask for and ``apply_chat_template`` takes out before they see it; these count only where no
    other loses nothing."""
    plain = _rewritten(talk.messages, as_text=None)
    ways = [(plain, True)]
    if any("tool_calls" in message for message in talk.messages):
        ways += [
            (_rewritten(talk.messages, as_text=as_text, empty=empty), empty is not None)
            for as_text in (False, True)
            for empty in ("", "absent", None)
        ]
    if talk.messages[0]["role"] == "system" and not talk.messages[0]["content"]:
        ways.append((plain[1:], False))
    ways += [(_in_parts(messages), False) for messages, _ in ways]
    made = [_render(talk, messages, True, tokenizer, family) for messages, demanded in ways if demanded]
    if not any(one.plain for one in made):
        made += [
            _render(talk, messages, False, tokenizer, family) for messages, demanded in ways if not demanded
        ]
    return made


def _render(
    talk: Conversation, messages: list[Message], demanded: bool, tokenizer: Any, family: Family
) -> Rendering:
    tools, told = talk.tools or None, None
    try:
        with _fixed_date():
            text = _text(messages, tools, tokenizer)
            if messages == talk.messages:
                told = tokenizer.apply_chat_template(messages, tools=tools, tokenize=True, return_dict=False)
    except Exception as error:  # a template runs into whatever it runs into
        return Rendering(error=str(error) or type(error).__name__, demanded=demanded)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    assert told is None or list(told) == encoded["input_ids"]
    offsets = [tuple(pair) for pair in encoded["offset_mapping"]]
    made = Rendering(text, list(encoded["input_ids"]), offsets, demanded=demanded)
    _search(made, talk)
    tokens = tokenizer.convert_tokens_to_ids(list(family.ends))
    ends = [pair for token, pair in zip(made.ids, made.offsets, strict=True) if token in tokens]
    found = [_end_of(made, talk, index, ends) for index in answers(talk)]
    made.merged = "merged" in found
    made.missing += ["end"] if "none" in found else []
    return made


def _text(messages: list[Message], tools: Any, tokenizer: Any) -> str:
    """What ``apply_chat_template`` gives; a value of None reaches the template."""
    if all(value is not None for message in messages for value in message.values()):
        return str(tokenizer.apply_chat_template(messages, tools=tools, tokenize=False))
    rendered: Any = chat_template_utils.render_jinja_template(
        conversations=[messages],
        tools=tools,
        chat_template=tokenizer.chat_template,
        **tokenizer.special_tokens_map,
    )
    return str(rendered[0][0])


def _search(made: Rendering, talk: Conversation) -> None:
    """Fills ``places`` and ``missing``; texts that are alike lie in the order of their messages."""
    same: dict[str, list[int]] = {}
    for i, text in enumerate(talk.texts):
        same.setdefault(text.words, []).append(i)
    made.places = [None] * len(talk.texts)
    for words, indices in same.items():
        starts = [match.start() for match in re.finditer(re.escape(words), made.text)]
        if len(starts) == len(indices):
            for i, start in zip(indices, starts, strict=True):
                made.places[i] = (start, start + len(words))
        elif not in_order(words.split(), made.text):
            made.missing += [talk.texts[i].kind for i in indices]
    for text in talk.texts:
        if text.kind == "tool call" and re.search(
            r'\\"' + text.words, made.text
        ):  # JSON put into JSON: {\"a\": …
            made.missing.append("tool call")


def in_order(words: list[str], text: str) -> bool:
    """Whether ``words`` follow one another in ``text``, whatever is between them."""
    position = 0
    for word in words:
        position = text.find(word, position) + len(word)
        if position < len(word):
            return False
    return True


def answers(talk: Conversation) -> list[int]:
    """The indices of the assistant's messages."""
    return [i for i, message in enumerate(talk.messages) if message["role"] == "assistant"]


def _end_of(made: Rendering, talk: Conversation, index: int, ends: list[tuple[int, int]]) -> str:
    """What follows the text of message ``index``: an ``end``, another answer (``merged``), or ``none`` of them.

    ``ends`` are the characters [start, stop) of every token that may end an answer.
    """
    lying = [(place, text) for text, place in zip(talk.texts, made.places, strict=True) if place]
    mine = [place for place, text in lying if text.message == index]
    if not mine:
        return "end"  # its text was moved: the search cannot say
    last = max(stop for _, stop in mine)
    later = sorted(
        ((place, text.kind) for place, text in lying if place[0] >= last), key=lambda pair: pair[0]
    )
    before = later[0][0][0] if later else len(made.text)
    if any(last <= start and stop <= before for start, stop in ends):
        return "end"
    return "merged" if later and later[0][1] in SUPERVISED else "none"

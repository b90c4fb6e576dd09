"""The judge of rendering: what a chat template can do with a conversation, and whether the tokens made of it are right.

It knows nothing of ``sftmix/data``. It renders with ``apply_chat_template`` and searches the words of the texts, each
of which occurs nowhere else, in the rendered text; tokens are then right by where those words lie. ``verdict`` says
what must come of a conversation; ``judge`` compares what came of it.
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
# What the reason of a refusal must say, by the kind of what is missing.
NAMED = {
    "system": r"system",
    "user": r"user",
    "assistant": r"assistant|answer",
    "reasoning": r"reason|think",
    "tool call": r"tool",
    "tool result": r"tool",
    "tools": r"tool",
    "end": r"\b(ends?|ending|stops?|closes?)\b",
}


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


def _rewritten(messages: list[Message], *, as_text: bool | None, keep_empty: bool) -> list[Message]:
    """The messages with reasoning under each of its names, arguments as text or objects, and calls' empty content."""
    made = copy.deepcopy(messages)
    for message in made:
        if "reasoning_content" in message:
            message["reasoning"] = message["thinking"] = message["reasoning_content"]
        for call in message.get("tool_calls", ()):
            given = call["function"]["arguments"]
            if as_text is not None and isinstance(given, str) != as_text:
                call["function"]["arguments"] = json.dumps(given) if as_text else json.loads(given)
        if not keep_empty and message.get("tool_calls") and not message["content"]:
            del message["content"]
    return made


def _in_parts(messages: list[Message]) -> list[Message]:
    """Each plain string as a list of one part of text, as models of images want it."""
    return [{**message, "content": [{"type": "text", "text": message.get("content", "")}]} for message in messages]


def renderings(talk: Conversation, tokenizer: Any, family: Family) -> list[Rendering]:
    """Every way to say the same: arguments as objects or text, a call's empty content or none; then two more ways
    that a product may take or leave: parts of text, and without a system message that is empty."""
    plain = _rewritten(talk.messages, as_text=None, keep_empty=True)
    ways = [(plain, True)]
    if talk.tools:
        ways += [
            (_rewritten(talk.messages, as_text=as_text, keep_empty=keep_empty), True)
            for as_text in (False, True)
            for keep_empty in (True, False)
        ]
    if talk.messages[0]["role"] == "system" and not talk.messages[0]["content"]:
        ways.append((plain[1:], False))
    ways += [(_in_parts(messages), False) for messages, _ in ways]
    return [_render(talk, messages, demanded, tokenizer, family) for messages, demanded in ways]


def _render(
    talk: Conversation, messages: list[Message], demanded: bool, tokenizer: Any, family: Family
) -> Rendering:
    tools = talk.tools or None
    try:
        with _fixed_date():
            text = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)
            ids = tokenizer.apply_chat_template(messages, tools=tools, tokenize=True, return_dict=False)
    except Exception as error:  # a template runs into whatever it runs into
        return Rendering(error=str(error) or type(error).__name__, demanded=demanded)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    assert encoded["input_ids"] == list(ids)
    made = Rendering(text, list(ids), [tuple(o) for o in encoded["offset_mapping"]], demanded=demanded)
    _search(made, talk)
    if not made.missing:
        ends = [_end_of(made, talk, index, tokenizer, family) for index in answers(talk)]
        made.merged = "merged" in ends
        made.missing += ["end"] if "none" in ends else []
    return made


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
        if text.kind == "tool call" and re.search(r'\\"' + text.words, made.text):  # JSON put into JSON: {\"a\": …
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


def _end_of(made: Rendering, talk: Conversation, index: int, tokenizer: Any, family: Family) -> str:
    """What follows the text of message ``index``: an ``end``, another answer (``merged``), or ``none`` of them."""
    lying = [(place, text) for text, place in zip(talk.texts, made.places, strict=True) if place]
    mine = [place for place, text in lying if text.message == index]
    if not mine:
        return "end"  # its text was moved: the search cannot say
    last = max(stop for _, stop in mine)
    later = sorted(((place, text.kind) for place, text in lying if place[0] >= last), key=lambda pair: pair[0])
    before = later[0][0][0] if later else len(made.text)
    ends = tokenizer.convert_tokens_to_ids(list(family.ends))
    spans = zip(made.ids, made.offsets, strict=True)
    if any(token in ends and start >= last and stop <= before for token, (start, stop) in spans):
        return "end"
    return "merged" if later and later[0][1] in SUPERVISED else "none"


def verdict(talk: Conversation, tokenizer: Any, family: Family) -> str:
    """``pass``, ``either`` (the words are there but not as given, or in a way not demanded) or ``refuse: why``."""
    made = renderings(talk, tokenizer, family)
    if any(one.plain and one.demanded for one in made):
        return "pass"
    if any(one.whole for one in made):
        return "either"
    lost = dict.fromkeys(kind for one in _nearest(made) for kind in one.missing)
    return "refuse: " + (", ".join(lost) or made[0].error)


def _nearest(made: list[Rendering]) -> list[Rendering]:
    """The renderings that lose the least, and the one of the messages as they are: a refusal may name theirs."""
    rendered = [one for one in made if not one.error]
    least = min((len(one.missing) for one in rendered), default=0)
    return [one for one in rendered if len(one.missing) == least or one is made[0]]


def judge(
    result: Any, talk: Conversation, tokenizer: Any, family: Family, *, place: str = "", is_fault: bool = False
) -> str:
    """What is wrong with ``result``, a fault (``place``, ``reason``) or tokens with their marks; ``""``: nothing."""
    made, wanted = renderings(talk, tokenizer, family), verdict(talk, tokenizer, family)
    if is_fault:
        return _judge_refusal(result, made, wanted, place)
    if wanted.startswith("refuse"):
        return f"accepted, expected {wanted}"
    ids, supervised, weights = list(result.input_ids), list(result.supervised), result.weights
    if len(supervised) != len(ids) or (weights is not None and len(weights) != len(ids)):
        return f"expected a mark for each of {len(ids)} tokens, got {len(supervised)}"
    if weights is not None and [weight > 0 for weight in weights] != [bool(mark) for mark in supervised]:
        return "weights differ from marks"
    fitting = [one for one in made if one.whole]
    if has_special(talk, tokenizer):
        complaint, like = _judge_special(ids, talk, tokenizer, fitting), fitting[0]
    else:
        exact = [one for one in fitting if one.ids == ids]
        if not exact:
            return "tokens differ from those of apply_chat_template"
        complaint, like = _judge_places(exact[0], talk, supervised), exact[0]
    return complaint or _judge_runs(ids, supervised, like, talk, tokenizer, family)


def _judge_refusal(fault: Any, made: list[Rendering], wanted: str, place: str) -> str:
    said = f"{getattr(fault, 'kind', '')} {fault.reason}".lower()
    if wanted == "pass":
        return f"refused, expected tokens: {fault.reason}"
    if place and fault.place != place:
        return f"refused at {fault.place!r}, expected {place!r}"
    kinds = {kind for one in _nearest(made) for kind in one.missing}
    kinds |= {"assistant", "user"} if wanted == "either" else set()
    named = any(re.search(NAMED[kind], said) for kind in kinds)
    raised = any(one.error and one.error[:24].lower() in said for one in made)
    return "" if named or raised else f"refused for {fault.reason!r}, expected {wanted}"


def has_special(talk: Conversation, tokenizer: Any) -> bool:
    """Whether a text holds the string of a token that stands beside the vocabulary."""
    added = [str(token) for token in tokenizer.added_tokens_decoder.values()]
    return any(token in text.words for token in added for text in talk.texts)


def _judge_places(made: Rendering, talk: Conversation, supervised: list[bool]) -> str:
    """Every token of an answer's, a thought's and a call's text bears loss, and no token of another text."""
    for text, place in zip(talk.texts, made.places, strict=True):
        if place is None:
            continue
        start, stop = place
        marks = {
            bool(mark)
            for mark, (first, last) in zip(supervised, made.offsets, strict=True)
            if first < stop and last > start
        }
        if marks != {text.kind in SUPERVISED}:
            state = "is not wholly supervised" if text.kind in SUPERVISED else "is supervised"
            return f"{text.kind} text of message {text.message} {state}"
    return ""


def _judge_runs(
    ids: list[int], supervised: list[bool], like: Rendering, talk: Conversation, tokenizer: Any, family: Family
) -> str:
    """Runs of supervised tokens: each ends in an end, none starts with one, their texts are the answers' in order."""
    ends = tokenizer.convert_tokens_to_ids(list(family.ends))
    runs = _runs(ids, supervised)
    if not runs:
        return "no token is supervised"
    for run in runs:
        if run[-1] not in ends:
            return f"supervised run ends in {tokenizer.decode(run[-1:])!r}, which is no end"
        if run[0] in ends:
            return f"supervised run starts with {tokenizer.decode(run[:1])!r}, the end before it"
    decoded = "".join(tokenizer.decode(run, clean_up_tokenization_spaces=False) for run in runs)
    lying = zip(talk.texts, like.places, strict=True)
    wanted = [(place or (0, 0), text) for text, place in lying if text.kind in SUPERVISED]
    if None not in like.places:
        wanted.sort(key=lambda pair: pair[0])
    words = [word for _, text in wanted for word in text.words.split()]
    if not in_order(words, decoded):
        return "the answers' words are not in the supervised tokens in order"
    for text in talk.texts:
        strange = [word for word in text.words.split() if word not in words and len(word) == 9]
        if text.kind not in SUPERVISED and any(word in decoded for word in strange):
            return f"{text.kind} text of message {text.message} is supervised"
    if not like.merged and len(runs) < sum(talk.messages[i - 1]["role"] != "assistant" for i in answers(talk)):
        return f"expected a run for each of {len(answers(talk))} answers, got {len(runs)}"
    return ""


def _runs(ids: list[int], supervised: list[bool]) -> list[list[int]]:
    runs: list[list[int]] = []
    for i, mark in enumerate(supervised):
        if mark and (i == 0 or not supervised[i - 1]):
            runs.append([])
        if mark:
            runs[-1].append(ids[i])
    return runs


def _judge_special(ids: list[int], talk: Conversation, tokenizer: Any, fitting: list[Rendering]) -> str:
    """The tokens spell the rendered text, and none of them was made a special token by what the texts hold."""
    texts = [_squeezed(one.text) for one in fitting]
    if _squeezed(tokenizer.decode(ids, clean_up_tokenization_spaces=False)) not in texts:
        return "tokens do not spell the rendered text"
    special = set(tokenizer.all_special_ids) | {
        i for i, token in tokenizer.added_tokens_decoder.items() if token.special
    }
    held = {i: 0 for i in special}
    for text in talk.texts:
        for token in tokenizer(text.words, add_special_tokens=False)["input_ids"]:
            held[token] = held.get(token, 0) + 1
    for one in fitting:
        if all(ids.count(i) == one.ids.count(i) - held[i] for i in special):
            return ""
    return "a special token's string in a text became the token"


def _squeezed(text: str) -> str:
    return re.sub(r"\s+", "", text)


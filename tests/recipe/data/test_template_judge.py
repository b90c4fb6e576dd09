"""The judge of rendering lets a right product pass, and catches each of these wrong ones."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import dataclass
from typing import Any

import pytest

from tests.recipe.data.template_conversations import KINDS, Conversation, conversation
from tests.recipe.data.template_judge import Judge
from tests.recipe.data.template_tokenizers import Family, family_of, stand_in

FAMILY = family_of("qwen")
HEAD = "{% for t in tools or [] %}{{ '<|im_start|>system\n' + t.function.description + '<|im_end|>\n' }}{% endfor %}"
THOUGHT = "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
CALLS = "{% for c in m.tool_calls or [] %}{{ c.function.arguments | tojson }}{% endfor %}"
END = "<|im_end|>\n"


def template(*, head: str = HEAD, thought: str = THOUGHT, calls: str = CALLS, end: str = END) -> str:
    """ChatML with tools, thoughts and calls, or without one of them."""
    body = "{{ '<|im_start|>' + m.role + '\n' }}" + thought + "{{ m.content }}" + calls + end
    asked = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    return head + "{% for m in messages %}" + body + "{% endfor %}" + asked


@dataclass
class Tokens:
    """What a product makes of a conversation."""

    input_ids: list[int]
    supervised: list[bool]
    weights: list[float] | None = None


@dataclass
class Refusal:
    """What a product says where it makes nothing."""

    place: str
    kind: str
    reason: str


def product(talk: Conversation, tokenizer: Any, *, fault: str = "") -> Tokens:
    """ChatML by its markers: what follows ``<|im_start|>assistant\n`` up to ``<|im_end|>`` bears loss."""
    messages = copy.deepcopy(talk.messages)
    for message in messages:
        if fault == "reasoning dropped":
            message.pop("reasoning_content", None)
        for call in message.get("tool_calls", ()):
            given = call["function"]["arguments"]
            call["function"]["arguments"] = json.loads(given) if isinstance(given, str) else given
    text = tokenizer.apply_chat_template(messages, tools=talk.tools or None, tokenize=False)
    spans = [
        match.span(1) for match in re.finditer(r"<\|im_start\|>assistant\n(.*?<\|im_end\|>)", text, re.S)
    ]
    spans = spans[1:] if fault == "a turn lost" else spans
    if fault == "header":
        spans = [(start - len("<|im_start|>assistant\n"), stop) for start, stop in spans]
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    marks = [any(first < stop and last > start for start, stop in spans) for first, last in offsets]
    last = len(marks) - 1 - marks[::-1].index(True)
    changes = {
        "everything": [True] * len(marks),
        "nothing": [False] * len(marks),
        "user text": [
            mark or (not any(marks[:i]) and i > 3 and ids[i] > 256) for i, mark in enumerate(marks)
        ],
        "end missing": [mark and i != last for i, mark in enumerate(marks)],
        "one more token": [mark or i == last + 1 for i, mark in enumerate(marks)],
        "first token missing": [mark and (i == 0 or marks[i - 1]) for i, mark in enumerate(marks)],
        "a hole": [mark and i != last - 3 for i, mark in enumerate(marks)],
        "shifted": [False, *marks[:-1]],
    }
    marks = changes.get(fault, marks)
    if fault == "wrong ids":
        ids[-4] += 1
    if fault == "last token lost":
        ids, marks = ids[:-1], marks[:-1]
    weights = [0.0] * len(ids) if fault == "weights of zero" else None
    return Tokens(ids, marks, weights)


def said(talk: Conversation, tokenizer: Any, fault: str = "", family: Family = FAMILY) -> str:
    return Judge(talk, tokenizer, family).tokens(product(talk, tokenizer, fault=fault))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("marker", "</think> inside")])
def test_the_judge_lets_a_right_product_pass(kind: str) -> None:
    tokenizer, talk = stand_in(template(), "qwen"), conversation(kind)
    assert Judge(talk, tokenizer, FAMILY).verdict == "pass"
    assert said(talk, tokenizer) == ""


@pytest.mark.parametrize(
    "fault, why",
    [
        ("everything", "is supervised"),
        ("nothing", "is not wholly supervised"),
        ("user text", "user text of message 0 is supervised"),
        ("end missing", "generation does not stop"),
        ("one more token", "generation does not stop"),
        ("first token missing", "is not wholly supervised"),
        ("a hole", "is not wholly supervised"),
        ("header", "starts with '<|im_start|>'"),
        ("shifted", "is not wholly supervised"),
        ("wrong ids", "tokens differ"),
        ("last token lost", "tokens differ"),
        ("a turn lost", "is not wholly supervised"),
        ("weights of zero", "weights differ"),
    ],
)
def test_the_judge_catches_wrong_marks_and_tokens(fault: str, why: str) -> None:
    tokenizer, talk = stand_in(template(), "qwen"), conversation("multi")
    if fault == "user text":
        talk.messages[0]["content"] = (
            "then " + talk.messages[0]["content"] + " then"
        )  # words of merged letters
        talk.texts[0] = type(talk.texts[0])("user", talk.messages[0]["content"], 0)
    assert why in said(talk, tokenizer, fault)


def test_the_judge_catches_reasoning_that_is_dropped() -> None:
    tokenizer, talk = stand_in(template(), "qwen"), conversation("reasoning")
    assert "tokens differ" in said(talk, tokenizer, "reasoning dropped")


def test_the_judge_catches_a_marker_that_becomes_a_token() -> None:
    tokenizer, talk = stand_in(template(), "qwen"), conversation("marker", "<|endoftext|>")
    assert "became the token" in said(talk, tokenizer)


@pytest.mark.parametrize(
    "kind, lost, changes",
    [
        ("reasoning", "reasoning", {"thought": ""}),
        ("reasoning, multi", "reasoning", {"thought": THOUGHT.replace("m.reason", "loop.last and m.reason")}),
        ("tools", "tools", {"head": ""}),
        ("tools", "tool call", {"calls": ""}),
        ("tools", "tool call", {"calls": CALLS.replace("| tojson", "| tojson | tojson")}),
        ("single", "end", {"end": "\n"}),
        ("multi", "end", {"end": "{% if not loop.last %}<|im_end|>{% endif %}\n"}),
        (
            "single",
            "assistant",
            {"end": "{% if m.role == 'user' %}<|im_end|>{% else %}{% break %}{% endif %}"},
        ),
    ],
)
def test_the_judge_catches_text_that_a_template_loses(kind: str, lost: str, changes: dict[str, str]) -> None:
    source = template(**changes)
    if lost == "assistant":
        source = source.replace("{{ m.content }}", "{% if m.role == 'user' %}{{ m.content }}{% endif %}")
    tokenizer, talk = stand_in(source, "qwen"), conversation(kind)
    assert Judge(talk, tokenizer, FAMILY).verdict == f"refuse: {lost}"
    assert Judge(talk, tokenizer, FAMILY).tokens(Tokens([1], [True])) == f"accepted, expected refuse: {lost}"

    def refused(reason: str, place: str = "x.jsonl, line 3") -> str:
        fault = Refusal(place, "template", reason)
        return Judge(talk, tokenizer, FAMILY).refusal(fault, "x.jsonl, line 3")

    assert refused(f"the chat template drops the {lost}, or the answer has no end") == ""
    assert refused("something is wrong") != ""
    assert refused(f"the chat template drops the {lost}, or the answer has no end", "line 4") != ""


def test_the_judge_catches_a_refusal_without_cause() -> None:
    tokenizer, talk = stand_in(template(), "qwen"), conversation("multi")
    fault = Refusal("", "template", "the chat template drops the user's text, reasoning, tools and system")
    assert Judge(talk, tokenizer, FAMILY).refusal(fault).startswith("refused, expected tokens")


def test_the_judge_names_what_a_template_raises() -> None:
    source = "{{ raise_exception('no system here, please') }}"
    tokenizer, talk = stand_in(source, "qwen"), conversation("system")
    assert Judge(talk, tokenizer, FAMILY).verdict == "refuse: no system here, please"
    fault = Refusal("", "template", "TemplateError: no system here, please")
    assert Judge(talk, tokenizer, FAMILY).refusal(fault) == ""


def test_the_next_role_ends_an_answer_only_where_generation_stops_at_it() -> None:
    source = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}<|user|>"
    talk = conversation("multi")
    knows = Family(eos="<|e|>", generation=("<|user|>",), marker="", more=("<|assistant|>", "<|user|>"))
    wants = Family(eos="<|e|>", generation=("<|e|>",), marker="", more=("<|assistant|>", "<|user|>"))
    assert Judge(talk, stand_in(source, "x", knows), knows).verdict == "pass"
    assert Judge(talk, stand_in(source, "x", wants), wants).verdict == "refuse: end"


def test_the_judge_sees_to_the_rest_where_text_may_be_dropped() -> None:
    tokenizer, talk = stand_in(template(thought=""), "qwen"), conversation("reasoning, multi")
    judge = Judge(talk, tokenizer, FAMILY, drops=True)
    assert judge.verdict == "either"
    assert judge.tokens(product(talk, tokenizer)) == ""
    assert "is supervised" in judge.tokens(product(talk, tokenizer, fault="everything"))
    assert "generation does not stop" in judge.tokens(product(talk, tokenizer, fault="end missing"))
    endless = stand_in(template(thought="", end="\n"), "qwen")
    assert Judge(talk, endless, FAMILY, drops=True).verdict == "refuse: reasoning, end"

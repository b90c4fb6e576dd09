"""The law from row to token: every text is shown, every answer that bears loss ends where generation stops, or refused.

Rows of every form are drawn with system texts, reasoning, tool calls, flags, unknown fields and roles, and rendered by
templates that show all of it, a part of it, or mark it with ``{% generation %}``. Each text is a word of its own, so
that it can be looked for.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sftmix.data.forms import parse_row
from sftmix.data.rows import Fault, Row, RowError
from sftmix.data.tokens import Encoder, TokenOptions

_TURN = "{{ '<|im_start|>' + m['role'] + '\\n' }}"
_CALLS = (
    "{% for c in m.tool_calls or [] %}{{ '<call>' + c.function.name + ' ' + (c.function.arguments | tojson) }}"
    "{% endfor %}"
)
_THINK = "{% if m.reasoning_content %}{{ '<think>' + m.reasoning_content + '</think>' }}{% endif %}"
_PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
TEMPLATES = {
    "all": "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}{% for m in messages %}" + _TURN + _THINK
    + "{{ m['content'] }}" + _CALLS + "{{ '<|im_end|>\\n' }}{% endfor %}" + _PROMPT,
    "plain": "{% for m in messages %}" + _TURN + "{{ m['content'] + '<|im_end|>\\n' }}{% endfor %}" + _PROMPT,
    "tagged": "{% for m in messages %}" + _TURN + "{% if m['role'] == 'assistant' %}{% generation %}" + _THINK
    + "{{ m['content'] }}" + _CALLS + "{{ '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}{% else %}"
    + "{{ m['content'] + '<|im_end|>\\n' }}{% endif %}{% endfor %}" + _PROMPT,
    "open": "{% for m in messages %}" + _TURN + "{{ m['content'] + '\\n' }}{% endfor %}" + _PROMPT,
}  # fmt: skip
SHOWS = {
    "all": {"reasoning", "calls", "tools"},
    "plain": set(),
    "tagged": {"reasoning", "calls"},
    "open": set(),
}


def tokenizer(name: str) -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|im_end|>", chat_template=TEMPLATES[name],
        additional_special_tokens=["<|im_start|>"],
    )  # fmt: skip


ENCODERS = {name: Encoder(tokenizer(name), TokenOptions()) for name in TEMPLATES}


@st.composite
def rows(draw: Any) -> tuple[dict[str, Any], dict[str, float], set[str]]:
    """(row, weight of every word in it, kinds of text that it holds beside contents)."""
    words: dict[str, float] = {}
    kinds: set[str] = set()

    def word(weight: float = 0.0) -> str:
        name = f"q{len(words)}z" + draw(st.sampled_from(["", "é", " 漢 x", "\n y"]))
        words[name] = weight
        return name

    def assistant(weight: float) -> dict[str, Any]:
        turn: dict[str, Any] = {
            "role": draw(st.sampled_from(["assistant", "gpt", "Assistant"])),
            "content": word(weight),
        }
        if draw(st.integers(0, 3)) == 0:
            turn[draw(st.sampled_from(["reasoning_content", "thinking"]))] = word(weight)
            kinds.add("reasoning")
        if draw(st.integers(0, 5)) == 0:
            turn["tool_calls"] = [
                {"type": "function", "function": {"name": word(weight), "arguments": {"a": word(weight)}}}
            ]
            kinds.add("calls")
        return turn

    form = draw(st.sampled_from(["messages", "sharegpt", "alpaca", "prompt_completion", "question"]))
    row: dict[str, Any] = dict.fromkeys(draw(st.sets(st.sampled_from(["source", "score", "x y"]))), "unread")
    if draw(st.booleans()):
        row["system"] = word()
    if form == "alpaca":
        row |= {"instruction": word(), "input": word() if draw(st.booleans()) else "", "output": word(1.0)}
    elif form == "question":
        row |= {"context": word(), "question": word(), "answer": word(1.0)}
    elif form == "prompt_completion":
        row |= {"prompt": word(), "completion": word(1.0)}
    else:
        turns = []
        for _ in range(draw(st.integers(1, 4))):
            turns.append({"role": draw(st.sampled_from(["user", "human", "User"])), "content": word()})
            weight = draw(st.sampled_from([None, 0, 1, 0.5, True, False]))
            turn = assistant(1.0 if weight is None else float(weight))
            turns.append(
                turn
                if weight is None
                else {**turn, draw(st.sampled_from(["weight", "train", "loss"])): weight}
            )
        if form == "sharegpt":
            turns = [{"from": t.pop("role"), "value": t.pop("content"), **t} for t in turns]
        row["conversations" if form == "sharegpt" else "messages"] = turns
    if form in ("messages", "sharegpt") and draw(st.integers(0, 4)) == 0:
        row["tools"] = [
            {"type": "function", "function": {"name": word(), "description": word(), "parameters": {}}}
        ]
        kinds.add("tools")
    return row, words, kinds


def is_in(text: str, word: str) -> bool:
    """Whether a text holds a word, as it is or as JSON spells it."""
    return word in text or word.replace("\n", "\\n") in text


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=120, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(drawn=rows())
def test_every_text_is_shown_and_every_answer_ends(
    name: str, drawn: tuple[Any, dict[str, float], set[str]]
) -> None:
    row, words, kinds = drawn
    encoder = ENCODERS[name]
    tok = encoder.tokenizer
    try:
        parsed = parse_row(Row("f, line 1", row))
        ((found, _),) = encoder.outcomes([parsed.example])
    except RowError as error:
        found = Fault("f, line 1", error.kind, error.reason)
    if isinstance(found, Fault):
        assert found.place == "f, line 1"
        nothing = not any(words.values()) and found.kind == "nothing to train on"
        lost = kinds - SHOWS[name] and found.kind == "text that the chat template leaves out"
        assert nothing or lost or (name == "open" and found.kind == "answer without an end"), found
        return
    assert name != "open" and not kinds - SHOWS[name] and any(words.values())
    assert set(parsed.ignored) == {key for key in row if row[key] == "unread"}
    text = tok.decode(found.input_ids)
    weights = found.weights or tuple(float(mark) for mark in found.supervised)
    for weight in {w for w in words.values() if w}:
        trained = tok.decode([t for t, w in zip(found.input_ids, weights, strict=True) if w == weight])
        assert all(is_in(trained, word) for word, given in words.items() if given == weight)
        assert not any(is_in(trained, word) for word, given in words.items() if given != weight)
    assert all(is_in(text, word) for word in words)
    end = tok.convert_tokens_to_ids("<|im_end|>")
    last = [t for t, mark in enumerate(found.supervised) if mark and not (*found.supervised, False)[t + 1]]
    assert all(found.input_ids[t] == end for t in last)

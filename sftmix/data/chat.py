"""Conversations to tokens: the chat template, and which tokens bear loss.

Only what the assistant says bears loss: its text and the end-of-turn token after it. Where that is in the
rendered conversation comes from the template's ``{% generation %}`` tags when it has them. Otherwise it is
found by rendering prefixes: the answer of message i starts where ``messages[:i]`` with the generation
prompt ends, and stops where ``messages[:i + 1]`` ends; both must be prefixes of the whole text.

The whole text is tokenized once, so tokens are those the model will see. A token bears loss when its last
character lies inside an answer; one that begins in the prompt does so only if what it takes from the
prompt is white space (a tokenizer may join "Assistant: " and "yes" as " yes").
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sftmix.data.examples import Example
from sftmix.data.tokenized import TokenizedExample

_GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")
_CHUNK = 1000  # conversations tokenized together: the tokenizer's threads stay busy, offsets stay small
Span = tuple[int, int]  # characters [start, stop) of an answer in the rendered text


def use_chat_template(tokenizer: Any, path: str | os.PathLike[str]) -> None:
    """Give the tokenizer the Jinja template in ``path`` (``data.chat_template``)."""
    try:
        template = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"data.chat_template: expected a text file, got {path} ({error})") from error
    if not template.strip():
        raise ValueError(f"data.chat_template: expected a template, got an empty file {path}")
    tokenizer.chat_template = template


def tokenize_examples(
    examples: Sequence[Example], tokenizer: Any, *, max_length: int
) -> list[TokenizedExample]:
    """Render and tokenize conversations, cut to ``max_length`` tokens on the right.

    Raises ``ValueError`` for a tokenizer without chat template, and naming the example for one that the
    template cannot render, whose answers cannot be located, or that has no token that bears loss.
    """
    if max_length < 2:
        raise ValueError(f"max_length: expected at least 2, got {max_length}")
    template = _template(tokenizer)
    tagged = _GENERATION_TAG.search(template) is not None
    closers = _closers(tokenizer)
    tokenized: list[TokenizedExample] = []
    for first in range(0, len(examples), _CHUNK):
        chunk = examples[first : first + _CHUNK]
        rendered = [
            _tagged_spans(example, tokenizer, template)
            if tagged
            else _prefix_spans(example, tokenizer, closers)
            for example in chunk
        ]
        marked = _tokenize([text for text, _ in rendered], [spans for _, spans in rendered], tokenizer)
        for example, (ids, supervised) in zip(chunk, marked, strict=True):
            tokenized.append(_cut(example.id, ids, supervised, max_length))
    return tokenized


def prompt_ids(example: Example, tokenizer: Any) -> list[int]:
    """The tokens of a conversation up to its last answer, with the generation prompt, to sample from."""
    _template(tokenizer)
    answers = _answers(example)
    text = _render(example, tokenizer, answers[-1], prompt=True)
    return [int(token) for token in tokenizer(text, add_special_tokens=False)["input_ids"]]


def _template(tokenizer: Any) -> str:
    if not getattr(tokenizer, "chat_template", None):
        name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        raise ValueError(f"tokenizer: expected a chat template, got none in {name}; give data.chat_template")
    return str(tokenizer.get_chat_template())


def _answers(example: Example) -> list[int]:
    answers = [i for i, message in enumerate(example.messages) if message["role"] == "assistant"]
    if not answers:
        raise ValueError(f"example {example.id}: expected an assistant message, got none")
    return answers


def _render(example: Example, tokenizer: Any, stop: int | None = None, *, prompt: bool = False) -> str:
    """The text of ``messages[:stop]``; whatever the template raises becomes a ``ValueError``."""
    messages = [dict(message) for message in example.messages[:stop]]
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt))
    except Exception as error:  # Jinja errors, and whatever a template's own code runs into
        raise _unrenderable(example, error) from error


def _unrenderable(example: Example, error: Exception) -> ValueError:
    roles = ", ".join(message["role"] for message in example.messages)
    return ValueError(
        f"example {example.id}: expected a conversation that the chat template can render, got roles {roles} "
        f"({type(error).__name__}: {error})"
    )


def _tagged_spans(example: Example, tokenizer: Any, template: str) -> tuple[str, list[Span]]:
    """The rendered text and the spans of its ``{% generation %}`` blocks."""
    from transformers.utils.chat_template_utils import render_jinja_template

    messages = [dict(message) for message in example.messages]
    try:
        rendered: Any = render_jinja_template(
            conversations=[messages],
            chat_template=template,
            return_assistant_tokens_mask=True,
            **tokenizer.special_tokens_map,
        )
    except Exception as error:
        raise _unrenderable(example, error) from error
    (text,), (spans,) = rendered
    return text, [(int(start), int(stop)) for start, stop in spans]


def _prefix_spans(example: Example, tokenizer: Any, closers: tuple[str, ...]) -> tuple[str, list[Span]]:
    """The rendered text and its answers, found by rendering the conversation up to and through each."""
    if example.messages[0]["role"] == "assistant":
        raise ValueError(
            f"example {example.id}: expected the conversation to start with another role, got "
            "assistant, which needs a chat template with {% generation %} tags (data.chat_template)"
        )
    text = _render(example, tokenizer)
    spans = []
    for i in _answers(example):
        before = _render(example, tokenizer, i, prompt=True)
        through = text if i + 1 == len(example.messages) else _render(example, tokenizer, i + 1)
        if not (through.startswith(before) and text.startswith(through)):
            raise ValueError(
                f"example {example.id}: expected a chat template that renders the first messages of a "
                f"conversation the same way whatever follows, got another text at message {i + 1}; give a "
                "template with {% generation %} tags as data.chat_template"
            )
        spans.append((len(before), _end_of_turn(through, len(before), closers)))
    return text, spans


def _closers(tokenizer: Any) -> tuple[str, ...]:
    """The tokens that may end a turn: all that were added to the vocabulary, white space excepted."""
    added = {str(token) for token in getattr(tokenizer, "added_tokens_decoder", {}).values()}
    return tuple(sorted(token for token in added | set(tokenizer.all_special_tokens) if token.strip()))


def _end_of_turn(through: str, start: int, closers: tuple[str, ...]) -> int:
    """Where an answer stops: after its end-of-turn token, without the white space a template adds behind."""
    bare = through.rstrip()
    return len(bare) if bare.endswith(closers) and len(bare) > start else len(through)


def _tokenize(
    texts: list[str], spans: list[list[Span]], tokenizer: Any
) -> Iterator[tuple[list[int], list[bool]]]:
    """Token ids and marks of each text."""
    if not tokenizer.is_fast:
        for text, answers in zip(texts, spans, strict=True):
            yield _marks_by_prefix(text, answers, tokenizer)
        return
    encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
    for i, (text, answers) in enumerate(zip(texts, spans, strict=True)):
        yield encoded["input_ids"][i], _marks_by_offset(text, answers, encoded["offset_mapping"][i])


def _marks_by_offset(text: str, spans: list[Span], offsets: Sequence[Span]) -> list[bool]:
    """Marks from each token's characters.

    A token is taken to begin where the one before it ended: tokenizers leave white space, and all but the
    first byte of a character, out of the offsets they report.
    """
    marks: list[bool] = []
    start = 0
    answers = iter(spans)
    answer = next(answers, None)
    for _, stop in offsets:
        while answer is not None and start >= answer[1]:
            answer = next(answers, None)
        stop = max(start, stop)
        if stop == start and marks:
            marks.append(marks[-1])  # a further byte of the same character
        else:
            marks.append(answer is not None and _inside(text, start, stop, answer))
        start = stop
    return marks


def _inside(text: str, start: int, stop: int, answer: Span) -> bool:
    """Whether a token of characters [start, stop) belongs to an answer; white space may stick out."""
    if stop <= answer[0] or start >= answer[1]:
        return False
    return not text[start : answer[0]].strip() and not text[answer[1] : stop].strip()


def _marks_by_prefix(text: str, spans: list[Span], tokenizer: Any) -> tuple[list[int], list[bool]]:
    """Ids and marks for a tokenizer without offsets: compare the ids of the text up to each boundary."""

    def shared(stop: int) -> int:
        prefix = tokenizer(text[:stop], add_special_tokens=False)["input_ids"]
        pairs = enumerate(zip(prefix, ids, strict=False))
        return next((i for i, (one, other) in pairs if one != other), min(len(prefix), len(ids)))

    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    marks = [False] * len(ids)
    for start, stop in spans:
        first, last = shared(start), shared(stop)
        marks[first:last] = [True] * (last - first)
    return ids, marks


def _cut(name: str, ids: list[int], supervised: list[bool], max_length: int) -> TokenizedExample:
    """The example cut to ``max_length``; one that bears no loss is an error that says why."""
    marks = [False, *supervised[1:]]  # nothing predicts the first token
    if not any(marks[:max_length]):
        why = "the chat template marks none as the assistant's"
        if any(marks):
            why = f"its answer starts at token {marks.index(True)}, beyond max_length = {max_length}"
        raise ValueError(f"example {name}: expected at least one token that bears loss, got none: {why}")
    return TokenizedExample(name, tuple(ids[:max_length]), tuple(marks[:max_length]))

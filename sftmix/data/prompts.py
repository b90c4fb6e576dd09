"""Tokens of examples in memory: what to sample from, and all of them at once for a script of one's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sftmix.data.rows import Example, Fault
from sftmix.data.tokenized import TokenizedExample
from sftmix.data.tokens import Encoder, TokenOptions


def tokenize_examples(
    examples: Sequence[Example], tokenizer: Any, *, max_length: int | None = None, **options: Any
) -> list[TokenizedExample]:
    """All examples as tokens, cut to ``max_length``; other options are those of ``TokenOptions``.

    Raises ``ValueError`` for the first example that cannot be used, naming it and the reason.
    """
    found = []
    encoder = Encoder(tokenizer, TokenOptions(max_length=max_length, **options))
    for example, (outcome, _) in zip(examples, encoder.outcomes(examples), strict=True):
        if isinstance(outcome, Fault):
            raise ValueError(f"{example.place or f'example {example.id}'}: {outcome.reason}")
        found.append(outcome)
    return found


def prompt_ids(example: Example, tokenizer: Any, options: TokenOptions | None = None) -> list[int]:
    """The tokens of a conversation up to its last answer, with the generation prompt, to sample from.

    Of an example without messages: its tokens before the first that bears loss; a text has none but its first.
    """
    encoder = Encoder(tokenizer, options or TokenOptions())
    if not example.messages:
        ready = tokenize_examples([example], tokenizer)[0]
        return list(ready.input_ids[: max(1, ready.supervised.index(True))])
    roles = [message["role"] for message in example.messages]
    last = len(roles) - 1 - roles[::-1].index("assistant")
    text = encoder.renderer.prompt(example.messages[:last], example.tools, example.template_arguments)
    return [int(token) for token in tokenizer(text, add_special_tokens=False)["input_ids"]]

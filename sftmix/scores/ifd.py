"""Instruction-following difficulty: how much the prompt helps the model to the answer (Li et al., arXiv 2308.12032).

IFD = perplexity of the answer with its prompt / perplexity of the answer without it, both over the same tokens. Above 1
the prompt does not help: the answer may belong to another one. The answer is every token that bears loss, turns one
after the other; its first token, before which nothing stands once the prompt is gone, is in neither perplexity.
"""

from __future__ import annotations

import math

from sftmix.data.tokenized import TokenizedExample


def without_prompt(example: TokenizedExample, begin: int | None = None) -> TokenizedExample | None:
    """The answer of ``example`` by itself, its first token given; None where the answer has one token only.

    ``begin``: the token that begins every text of this model (BOS); it is kept where the example begins with it and
    has it nowhere else (a token that also begins each message of a chat begins no text).
    """
    shown = [token for token, marked in zip(example.input_ids, example.supervised, strict=True) if marked]
    if len(shown) < 2:
        return None
    begins = example.input_ids[0] == begin and example.input_ids.count(example.input_ids[0]) == 1
    prefix = [example.input_ids[0]] if begins else []
    size, first = len(prefix) + len(shown), len(prefix)
    moved = {old: new for new, old in enumerate(_marked(example), start=first)}
    return TokenizedExample(
        example.id,
        (*prefix, *shown),
        tuple(at > first for at in range(size)),
        replaced=tuple((moved[at], target) for at, target in example.replaced if moved[at] > first),
    )


def difficulty(with_prompt: float, without: float, num_tokens: int) -> float:
    """IFD of summed NLLs in nats over the same ``num_tokens``; inf where it is beyond what a float holds."""
    difference = (with_prompt - without) / num_tokens
    return math.exp(difference) if difference < 700 else math.inf


def _marked(example: TokenizedExample) -> list[int]:
    return [at for at, marked in enumerate(example.supervised) if marked]

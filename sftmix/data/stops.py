"""The tokens that training teaches to end an answer with, read off the tokenised examples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sftmix.data.chat import TokenizedExample


def stop_ids(
    examples: Iterable[TokenizedExample],
    *,
    max_length: int | None = None,
    among: Container[int] | None = None,
) -> tuple[int, ...]:
    """The last token of each run of tokens that bear loss, the most frequent first.

    A run that ends at ``max_length`` lost its end to the cut and does not count. ``among`` are the tokens that may
    end an answer (those added to the vocabulary): a template without an end leaves answers whose last token is a word.
    """
    counts: Counter[int] = Counter()
    for example in examples:
        marks, last = example.supervised, len(example.supervised) - 1
        for at, marked in enumerate(marks):
            ends = marked and (at == last or not marks[at + 1])
            if ends and not (at == last and max_length is not None and at + 1 >= max_length):
                token = int(example.input_ids[at])
                counts[token] += among is None or token in among
    return tuple(token for token, count in counts.most_common() if count)

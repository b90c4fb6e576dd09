"""Greedy answers of a batch of prompts, whatever the model's own settings of generation say."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationConfig


@contextmanager
def greedy(model: Any, ends: Sequence[int]) -> Iterator[None]:
    """Inside the block generation is greedy and stops at ``ends``, whatever the model's own settings say.

    They are taken away, not overruled: transformers fills what a caller leaves open, such as a repetition penalty,
    from them.
    """
    before = getattr(model, "generation_config", None)
    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=list(ends) or None)
    try:
        yield
    finally:
        model.generation_config = before


def batches(lengths: Sequence[int], size: int, *, alone_above: int | None) -> list[list[int]]:
    """Indices of prompts of such ``lengths``, the longest first, ``size`` at a time; longer ones by themselves.

    A prompt with no room for a whole answer is by itself: it must not shorten its neighbours' answers.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    alone = [i for i in order if alone_above is not None and lengths[i] > alone_above]
    others = order[len(alone) :]
    return [[i] for i in alone] + [others[start : start + size] for start in range(0, len(others), size)]


@torch.inference_mode()
def answer_batch(
    model: Any, prompts: Sequence[Sequence[int]], *, ends: Sequence[int], pad_id: int, max_new_tokens: int
) -> list[tuple[list[int], bool]]:
    """The tokens before the first of ``ends`` after each prompt, and whether one came within ``max_new_tokens``.

    ``model`` has ``generate`` and ``device``, and is ``greedy``. Prompts are padded on the left.
    """
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), pad_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    output = model.generate(
        ids.to(model.device), attention_mask=mask.to(model.device), do_sample=False,
        max_new_tokens=max_new_tokens, pad_token_id=pad_id, eos_token_id=list(ends) or None,
    )  # fmt: skip
    found = []
    for tokens in output[:, longest:].tolist():
        end = next((at for at, token in enumerate(tokens) if token in ends), None)
        found.append((tokens[:end], end is not None))
    return found

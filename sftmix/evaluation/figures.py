"""Held-out evaluation, scores for the training dynamics, and sample answers.

Statistics come from ``token_stats`` inside the head's forward: no logits are stored. Sequences are batched by
length, padded or ``packed`` (for a model that ``packs``), so the results do not depend on the batch size beyond
rounding. Every token that bears loss counts once,
whatever its weight in training: the paper's perplexity has no weights, and held-out figures of runs with other
weights stay comparable.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from sftmix.data.prompts import prompt_ids
from sftmix.data.rows import Example
from sftmix.data.tokenized import TokenizedExample
from sftmix.data.tokens import TokenOptions
from sftmix.evaluation.calibration import calibration
from sftmix.evaluation.decoding import answer_batch, greedy
from sftmix.evaluation.sums import Answer, OnBatch, Passes, TopTokens, perplexity, read_answers
from sftmix.evaluation.uncertainty import ratio_stderr
from sftmix.model.causal_lm import SFTMixModel, evaluating
from sftmix.model.export import stops
from sftmix.model.parallel import World
from sftmix.model.vocabulary import safe_pad_id
from sftmix.progress import say

Row = dict[str, Any]


def evaluate_model(
    model: SFTMixModel, examples: Sequence[TokenizedExample], *, batch_size: int = 8, pad_id: int = 0,
    impl: str | None = None, packed: bool = False, progress: OnBatch | None = None, world: World | None = None,
) -> dict[str, float]:  # fmt: skip
    """``nll`` (mean over all supervised tokens), ``perplexity``, ``token_accuracy`` and ``num_tokens``.

    The model's mode is restored. Every process calls it with the same examples; with ``world`` they share the
    batches, and all get the figures of all. Raises ``ValueError`` for no examples.
    """
    passes = Passes(batch_size=batch_size, pad_id=pad_id, impl=impl, packed=packed, world=world)
    answers = read_answers(model, examples, passes, progress)
    return _mean(answers, sum(example.num_supervised for example in examples))


def _mean(answers: Sequence[Answer], num_tokens: int) -> dict[str, float]:
    """Means over all tokens."""
    nll_sum = math.fsum(answer.nll_sum for answer in answers)
    accuracy = sum(answer.num_top1 for answer in answers) / num_tokens
    return {
        "nll": nll_sum / num_tokens, "perplexity": perplexity(nll_sum, num_tokens), "token_accuracy": accuracy,
        "num_tokens": num_tokens,
    }  # fmt: skip


def heldout_figures(
    model: SFTMixModel, examples: Sequence[TokenizedExample], passes: Passes, progress: OnBatch | None = None
) -> tuple[dict[str, Any], list[Row]]:
    """What ``evaluate_model`` gives, with standard errors over examples and the calibration; and a row per example.

    ``nll_stderr`` and ``token_accuracy_stderr`` are None for a single example. A row has ``example`` (id),
    ``nll_sum``, ``num_tokens`` and ``num_top1``, in the order given.
    """
    tokens: TopTokens = []
    answers = read_answers(model, examples, passes, progress, tokens=tokens)
    by_id = {answer.id: answer for answer in answers}
    rows: list[Row] = [
        {
            "example": example.id, "nll_sum": by_id[example.id].nll_sum, "num_tokens": example.num_supervised,
            "num_top1": by_id[example.id].num_top1,
        }
        for example in examples
    ]  # fmt: skip
    counts = [row["num_tokens"] for row in rows]
    errors = {
        "nll_stderr": ratio_stderr([row["nll_sum"] for row in rows], counts),
        "token_accuracy_stderr": ratio_stderr([row["num_top1"] for row in rows], counts),
    }
    confidence, correct = (np.concatenate(parts) for parts in zip(*tokens, strict=True))
    found = _mean(answers, sum(counts))
    sound = bool(np.isfinite(confidence).all())  # a model that gives NaN has figures that say so
    return {**found, **errors, "calibration": calibration(confidence, correct) if sound else None}, rows


def score_examples(
    model: SFTMixModel, examples: Sequence[TokenizedExample], *, checkpoint: int, step: int,
    batch_size: int = 8, pad_id: int = 0, impl: str | None = None, packed: bool = False,
    progress: OnBatch | None = None, world: World | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """One row of the dynamics per example, in the order given, from the model as it is now; ``world`` as above."""
    passes = Passes(batch_size=batch_size, pad_id=pad_id, impl=impl, packed=packed, world=world)
    by_id = {answer.id: answer for answer in read_answers(model, examples, passes, progress)}
    rows = []
    for example in examples:
        answer = by_id[example.id]
        rows.append(
            {
                "example": example.id, "checkpoint": checkpoint, "step": step, "nll_sum": answer.nll_sum,
                "num_tokens": example.num_supervised, "top1_share": answer.num_top1 / example.num_supervised,
                "source": "checkpoint",
            }
        )  # fmt: skip
    return rows


@torch.inference_mode()
def sample_answers(
    model: SFTMixModel, tokenizer: Any, examples: Sequence[Example], *, max_new_tokens: int = 64,
    stop_ids: Sequence[int] = (), options: TokenOptions | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Greedy answers: ``{"id", "prompt", "answer", "expected", "stopped"}`` each, the prompt being the last question.

    The model is given the conversation up to its last assistant turn, in the tokenizer's chat template with the
    arguments of ``options``; of a text or of ready tokens, what comes before the first that bears loss. An answer
    ends before the first of ``stop_ids``, or of the model's own stop tokens; ``stopped`` is False where none came
    within ``max_new_tokens``. The model's mode is restored. Of a sharded model every process calls it with the same
    examples. None are given, and a line is said, of a class that has no ``generate``.
    """
    answers: list[dict[str, Any]] = []
    if not hasattr(model.base, "generate"):
        say(f"samples: left out, {type(model.base).__name__} has no generate")
        return answers
    ends = stops(model.base, stop_ids)
    pad_id = safe_pad_id(tokenizer, model.vocab_size)
    with evaluating(model), greedy(model.base, ends):
        for example in examples:
            ids = prompt_ids(example, tokenizer, options)
            question, expected = _last_turns(example, tokenizer)
            ((tokens, ended),) = answer_batch(
                model, [ids], ends=ends, pad_id=pad_id, max_new_tokens=max_new_tokens
            )
            answer = tokenizer.decode(tokens, skip_special_tokens=True).strip()
            answers.append(
                {
                    "id": example.id, "prompt": question, "answer": answer, "expected": expected,
                    "stopped": ended,
                }
            )  # fmt: skip
    return answers


def _last_turns(example: Example, tokenizer: Any) -> tuple[str, str]:
    """The last answer of a conversation, and the message before it: (question, answer)."""
    if not example.messages:
        return "", example.text if example.text is not None else tokenizer.decode(example.input_ids)
    at = max(i for i, message in enumerate(example.messages) if message["role"] == "assistant")
    question, answer = example.messages[at - 1] if at else {}, example.messages[at]
    return str(question.get("content") or ""), str(answer.get("content") or answer.get("tool_calls") or "")

"""Held-out evaluation, scores for the training dynamics, and sample answers.

Statistics come from ``token_stats`` inside the head's forward: no logits are stored. Sequences are batched by
length, padded or ``packed`` (for a model that ``packs``), so the results do not depend on the batch size beyond
rounding. Every token that bears loss counts once,
whatever its weight in training: the paper's perplexity has no weights, and held-out figures of runs with other
weights stay comparable.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import torch

from sftmix.data.prompts import prompt_ids
from sftmix.data.rows import Example
from sftmix.data.tokenized import TokenizedExample
from sftmix.data.tokens import TokenOptions
from sftmix.evaluation.calibration import calibration
from sftmix.evaluation.decoding import answer_batch, greedy
from sftmix.evaluation.uncertainty import ratio_stderr
from sftmix.model.causal_lm import SFTMixModel, evaluating
from sftmix.model.export import stops
from sftmix.model.parallel import World, gather_objects
from sftmix.model.vocabulary import safe_pad_id
from sftmix.progress import say
from sftmix.scores.dynamics import accumulate
from sftmix.training.batch import blank_batch, check_batch, collate_plain
from sftmix_kernels import TokenStats

OnBatch = Callable[[int, int], None]  # (examples done, examples in all)
Row = dict[str, Any]


def evaluate_model(
    model: SFTMixModel, examples: Sequence[TokenizedExample], *, batch_size: int = 8, pad_id: int = 0,
    impl: str | None = None, packed: bool = False, progress: OnBatch | None = None, world: World | None = None,
) -> dict[str, float]:  # fmt: skip
    """``nll`` (mean over all supervised tokens), ``perplexity``, ``token_accuracy`` and ``num_tokens``.

    The model's mode is restored. Every process calls it with the same examples; with ``world`` they share the
    batches, and all get the figures of all. Raises ``ValueError`` for no examples.
    """
    found = _sums(
        model,
        examples,
        batch_size=batch_size,
        pad_id=pad_id,
        impl=impl,
        packed=packed,
        progress=progress,
        world=world,
    )
    num_tokens = sum(example.num_supervised for example in examples)
    return _mean([(nll_sum, top1) for _, nll_sum, top1 in found], num_tokens)


def _mean(sums: Sequence[tuple[float, float]], num_tokens: int) -> dict[str, float]:
    """Means over all tokens, of (NLL sum, number of top-1 tokens) of each example."""
    nll = math.fsum(nll_sum for nll_sum, _ in sums) / num_tokens
    accuracy = sum(top1 for _, top1 in sums) / num_tokens
    perplexity = math.exp(nll) if nll < 700 else math.inf
    return {"nll": nll, "perplexity": perplexity, "token_accuracy": accuracy, "num_tokens": num_tokens}


def heldout_figures(
    model: SFTMixModel, examples: Sequence[TokenizedExample], **options: Any
) -> tuple[dict[str, Any], list[Row]]:  # fmt: skip
    """What ``evaluate_model`` gives, with standard errors over examples and the calibration; and a row per example.

    ``options`` are those of ``evaluate_model``. ``nll_stderr`` and ``token_accuracy_stderr`` are None for a single
    example. A row has ``example`` (id), ``nll_sum``, ``num_tokens`` and ``num_top1``, in the order given.
    """
    tokens: list[tuple[np.ndarray, np.ndarray]] = []
    given: dict[str, Any] = {"batch_size": 8, "pad_id": 0, "impl": None, "packed": False, "progress": None}
    given |= {"world": None, **options}
    sums = _sums(model, examples, tokens=tokens, **given)
    by_id = {name: (nll, top1) for name, nll, top1 in sums}
    rows: list[Row] = [
        {
            "example": example.id, "nll_sum": by_id[example.id][0], "num_tokens": example.num_supervised,
            "num_top1": int(by_id[example.id][1]),
        }
        for example in examples
    ]  # fmt: skip
    counts = [row["num_tokens"] for row in rows]
    errors = {
        "nll_stderr": ratio_stderr([row["nll_sum"] for row in rows], counts),
        "token_accuracy_stderr": ratio_stderr([row["num_top1"] for row in rows], counts),
    }
    confidence, correct = (np.concatenate(parts) for parts in zip(*tokens, strict=True))
    found = _mean([(nll, top1) for _, nll, top1 in sums], sum(counts))
    sound = bool(np.isfinite(confidence).all())  # a model that gives NaN has figures that say so
    return {**found, **errors, "calibration": calibration(confidence, correct) if sound else None}, rows


def score_examples(
    model: SFTMixModel, examples: Sequence[TokenizedExample], *, checkpoint: int, step: int,
    batch_size: int = 8, pad_id: int = 0, impl: str | None = None, packed: bool = False,
    progress: OnBatch | None = None, world: World | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """One row of the dynamics per example, in the order given, from the model as it is now; ``world`` as above."""
    found = _sums(
        model,
        examples,
        batch_size=batch_size,
        pad_id=pad_id,
        impl=impl,
        packed=packed,
        progress=progress,
        world=world,
    )
    by_id = {name: (nll_sum, top1) for name, nll_sum, top1 in found}
    rows = []
    for example in examples:
        nll_sum, top1 = by_id[example.id]
        rows.append(
            {
                "example": example.id, "checkpoint": checkpoint, "step": step, "nll_sum": nll_sum,
                "num_tokens": example.num_supervised, "top1_share": top1 / example.num_supervised,
                "source": "checkpoint",
            }
        )  # fmt: skip
    return rows


@torch.inference_mode()
def _sums(
    model: SFTMixModel, examples: Sequence[TokenizedExample], *, batch_size: int, pad_id: int,
    impl: str | None, packed: bool, progress: OnBatch | None, world: World | None,
    tokens: list[tuple[np.ndarray, np.ndarray]] | None = None,
) -> list[tuple[str, float, float]]:  # fmt: skip
    """(id, sum of the response's NLL, number of top-1 tokens) of each example, batched by length.

    ``tokens``, where given, gets two arrays [N] of each process's batches: the most likely token's probability, and
    whether the answer's token was it.

    The batches do not depend on the number of processes. Each process takes its own in every round; one that has none
    left takes part with a blank one, for a sharded model is gathered by all.
    """
    if not examples:
        raise ValueError("examples: expected at least one, got none")
    world = world or World()
    ordered = by_length(examples)
    starts = range(0, len(ordered), batch_size)
    found: list[tuple[str, float, float]] = []
    own_tokens: list[tuple[np.ndarray, np.ndarray]] = []
    with evaluating(model):
        for first in range(0, len(starts), world.size):
            mine = first + world.rank
            batch = blank_batch(pad_id)
            if mine < len(starts):
                own = ordered[starts[mine] : starts[mine] + batch_size]
                batch = collate_plain(own, pad_id=pad_id, packed=packed)
            check_batch(batch, model.vocab_size)
            batch = batch.to(model.device)
            tensors = (batch.input_ids, batch.attention_mask, batch.rows, batch.target)
            row = {"position_ids": batch.position_ids, "starts": batch.starts}
            top = tokens is not None
            stats = cast(TokenStats, model(*tensors, **row, stats=True, top=top, impl=impl))
            sums = accumulate(-stats.logprob, stats.is_top1, batch.example, len(batch.ids))
            values = torch.stack([sums.nll_sum, sums.num_top1.double()]).tolist()
            if mine < len(starts):
                found += zip(batch.ids, *values, strict=True)
                if stats.token_logprob is not None:
                    confidence = stats.token_logprob[:, 0].double().exp()
                    own_tokens.append((confidence.cpu().numpy(), stats.is_top1.cpu().numpy()))
            if progress is not None:
                progress(min((first + world.size) * batch_size, len(ordered)), len(ordered))
    if tokens is not None:
        tokens += [pair for pairs in gather_objects(own_tokens, world) for pair in pairs]
    return [row for rows in gather_objects(found, world) for row in rows]


def by_length(examples: Sequence[TokenizedExample]) -> list[TokenizedExample]:
    """The order in which examples are evaluated: from long to short, so that a batch has little padding."""
    return sorted(examples, key=lambda example: (-len(example.input_ids), example.id))


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

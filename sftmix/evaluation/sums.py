"""What a model makes of whole answers: sums over each example's tokens that bear loss, with the prompt and without."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sftmix.data.tokenized import TokenizedExample
from sftmix.model.causal_lm import SFTMixModel, evaluating
from sftmix.model.parallel import World, gather_objects
from sftmix.scores.ifd import difficulty, without_prompt
from sftmix.training.batch import Batch, blank_batch, check_batch, collate_plain
from sftmix_kernels import TokenStats

# Of each batch: the most likely token's probability [N] float64, and whether the answer's token was it [N] bool.
TopTokens = list[tuple[NDArray[np.float64], NDArray[np.bool_]]]
OnBatch = Callable[[int, int], None]  # (examples done, examples in all)


@dataclass(frozen=True)
class Passes:
    """How a model goes over examples: sizes and implementation, as the knobs of the same names say."""

    batch_size: int = 8
    pad_id: int = 0
    impl: str | None = None
    packed: bool = False
    world: World | None = None


@dataclass(frozen=True)
class Answer:
    """Sums over the tokens of one example that bear loss, in nats; ``first_nll`` is the first such token's."""

    id: str
    nll_sum: float
    num_top1: int
    entropy_sum: float
    first_nll: float


def by_length(examples: Sequence[TokenizedExample]) -> list[TokenizedExample]:
    """The order in which examples are evaluated: from long to short, so that a batch has little padding."""
    return sorted(examples, key=lambda example: (-len(example.input_ids), example.id))


def batches(
    model: SFTMixModel, examples: Sequence[TokenizedExample], passes: Passes, progress: OnBatch | None = None, *,
    top: bool = False,
) -> Iterator[tuple[Batch, TokenStats]]:  # fmt: skip
    """This process's batches with the statistics of their rows, examples from long to short.

    ``top``: with the most likely token's log-probability, which costs another product with the head.

    The batches do not depend on the number of processes. Each process takes its own in every round; one that has none
    left takes part with a blank one, for a sharded model is gathered by all. Raises ``ValueError`` for no examples.
    """
    if not examples:
        raise ValueError("examples: expected at least one, got none")
    world, size = passes.world or World(), passes.batch_size
    ordered = by_length(examples)
    starts = range(0, len(ordered), size)
    with evaluating(model):
        for first in range(0, len(starts), world.size):
            mine = first + world.rank
            batch = blank_batch(passes.pad_id)
            if mine < len(starts):
                own = ordered[starts[mine] : starts[mine] + size]
                batch = collate_plain(own, pad_id=passes.pad_id, packed=passes.packed)
            check_batch(batch, model.vocab_size)
            batch = batch.to(model.device)
            tensors = (batch.input_ids, batch.attention_mask, batch.rows, batch.target)
            row = {"position_ids": batch.position_ids, "starts": batch.starts}
            stats = cast(TokenStats, model(*tensors, **row, stats=True, top=top, impl=passes.impl))
            if mine < len(starts):
                yield batch, stats
            if progress is not None:
                progress(min((first + world.size) * size, len(ordered)), len(ordered))


@torch.inference_mode()
def read_answers(
    model: SFTMixModel, examples: Sequence[TokenizedExample], passes: Passes, progress: OnBatch | None = None, *,
    tokens: TopTokens | None = None,
) -> list[Answer]:  # fmt: skip
    """An ``Answer`` of each example, over all processes, in the order in which they were read.

    ``tokens``, where given, gets what is known of the most likely token at each place.
    """
    found: list[Answer] = []
    own: TopTokens = []
    world = passes.world or World()
    for batch, stats in batches(model, examples, passes, progress, top=tokens is not None):
        member = batch.example == torch.arange(len(batch.ids), device=batch.example.device)[:, None]  # [B, N]
        values = torch.stack(
            [
                _summed(member, -stats.logprob),
                _summed(member, stats.is_top1),
                _summed(member, stats.entropy),
                -stats.logprob[member.to(torch.uint8).argmax(1)].double(),
            ]
        )
        for name, nll, top1, entropy, first in zip(batch.ids, *values.tolist(), strict=True):
            found.append(Answer(name, nll, int(top1), entropy, first))
        if stats.token_logprob is not None:
            confidence = stats.token_logprob[:, 0].double().exp()
            own.append((confidence.cpu().numpy(), stats.is_top1.cpu().numpy()))
    if tokens is not None:
        tokens += [pair for pairs in gather_objects(own, world) for pair in pairs]
    return [answer for answers in gather_objects(found, world) for answer in answers]


def difficulties(
    model: SFTMixModel, examples: Sequence[TokenizedExample], answers: Sequence[Answer], passes: Passes, *,
    begin: int | None = None, progress: OnBatch | None = None,
) -> dict[str, float]:  # fmt: skip
    """IFD by id, from a second pass over the answers by themselves; none for an answer of one token.

    ``answers`` are those of the same model with the prompts; ``begin``: see ``without_prompt``.
    """
    alone = [shown for shown in (without_prompt(example, begin) for example in examples) if shown is not None]
    if not alone:
        return {}
    with_prompt = {answer.id: answer.nll_sum - answer.first_nll for answer in answers}
    sizes = {example.id: example.num_supervised for example in alone}
    return {
        answer.id: difficulty(with_prompt[answer.id], answer.nll_sum, sizes[answer.id])
        for answer in read_answers(model, alone, passes, progress)
    }


def perplexity(nll_sum: float, num_tokens: int) -> float:
    """exp of the mean NLL; inf where it is beyond what a float holds."""
    nll = nll_sum / num_tokens
    return math.exp(nll) if nll < 700 else math.inf


def _summed(member: Tensor, values: Tensor) -> Tensor:
    """Sums by sequence [B] of rows' values [N], in float64, without atomics."""
    return torch.where(member, values.double(), 0.0).sum(1)

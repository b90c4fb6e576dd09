"""What each optimizer step trains on: known to every process before the step, on the CPU.

An epoch's entries (pairs; a plain example is an entry without partner) are cut into steps, and a step into
chunks, one forward pass each. The step's two sums of weights (token counts, where all weigh 1) are the loss's
denominators, so they need neither a collective call nor a host read. Nothing here depends on the number of
processes.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sftmix.config import MixupConfig
from sftmix.data.tokenized import TokenizedExample
from sftmix.training.batch import Batch, PairItem, collate_pairs, count_mixed, pair_weights
from sftmix.training.pairs import Pair, draw_lam

Examples = Mapping[str, TokenizedExample]


@dataclass(frozen=True)
class Step:
    """One optimizer step: ``index`` within its epoch, its chunks, and its counts over all chunks.

    ``num_cut``: supervised tokens of pairs beyond the end of the shorter partner, which train unmixed.
    """

    epoch: int
    index: int
    chunks: tuple[tuple[Pair, ...], ...]
    num_supervised: int
    num_mixed: int
    num_cut: int = 0

    def ids(self) -> list[str]:
        return [name for chunk in self.chunks for name in chunk_ids(chunk)]

    def lengths(self, examples: Examples) -> list[int]:
        """Tokens of each sequence."""
        return [len(examples[name].input_ids) for name in self.ids()]


def chunk_ids(chunk: Sequence[Pair]) -> list[str]:
    return [name for pair in chunk for name in (pair.confident, pair.unconfident) if name is not None]


def plain_entries(order: Sequence[str]) -> list[Pair]:
    """Single examples as entries without partner (M = 0)."""
    return [Pair(name, None, 1.0, index) for index, name in enumerate(order)]


def plan_steps(
    entries: Sequence[Pair], examples: Examples, *, epoch: int, batch_size: int, micro_batch_size: int
) -> list[Step]:
    """Cut one epoch's entries into steps of ``batch_size`` sequences; the last step may be smaller.

    Inside a step the entries are ordered from long to short, so that a chunk holds sequences of similar
    length and little padding. Raises ``ValueError`` for an id that ``examples`` lacks.
    """
    steps = []
    for index, group in enumerate(in_steps(entries, batch_size)):
        by_length = sorted(group, key=lambda pair: (-_longest(pair, examples), pair.index))
        chunks = tuple(tuple(chunk) for chunk in in_steps(by_length, micro_batch_size))
        supervised = sum(examples[name].num_supervised for name in chunk_ids(group))
        mixed = sum(count_mixed(*_members(pair, examples)) for pair in group)
        alone = sum(examples[pair.confident].num_supervised for pair in group if pair.unconfident is None)
        cut = supervised - 2 * mixed - alone
        steps.append(Step(epoch, index, chunks, num_supervised=supervised, num_mixed=mixed, num_cut=cut))
    return steps


def in_steps(entries: Sequence[Pair], size: int) -> list[list[Pair]]:
    """Groups of consecutive entries of at most ``size`` sequences each, a pair being two: the steps of an epoch."""
    groups: list[list[Pair]] = []
    used = size
    for pair in entries:
        width = 1 if pair.unconfident is None else 2
        if used + width > size:
            groups.append([])
            used = 0
        groups[-1].append(pair)
        used += width
    return groups


def collate_chunk(
    chunk: Sequence[Pair], step: Step, examples: Examples, *, mixup: MixupConfig, seed: int, pad_id: int,
    packed: bool = False,
) -> Batch:  # fmt: skip
    """The batch of one chunk, with lambda per pair, per token or per optimizer step as ``mixup.lam`` says."""
    items = [_item(pair, step, examples, mixup, seed) for pair in chunk]
    return collate_pairs(items, pad_id=pad_id, packed=packed)


def denominators(step: Step, examples: Examples, *, mixup: MixupConfig, seed: int) -> tuple[float, float]:
    """What the step's sums of next-token and of Mixup terms are divided by: the sums of their weights.

    The weights are those of all chunks' batches, added exactly, so that no order of chunks matters. Where no
    example has weights they are the counts, as ints. Without mixed positions the second is 1.
    """
    members = [examples[name] for name in step.ids()]
    if all(member.weights is None for member in members):
        return step.num_supervised, max(1, step.num_mixed)
    items = (_item(pair, step, examples, mixup, seed) for chunk in step.chunks for pair in chunk)
    mixed = math.fsum(weight for item in items for weight in pair_weights(*item).tolist())
    return math.fsum(member.weight_sum for member in members), mixed or 1


def most_rows(steps: Sequence[Step], examples: Examples) -> int:
    """The most rows that bear loss in one chunk."""
    return max(
        sum(examples[name].num_supervised for name in chunk_ids(chunk))
        for step in steps
        for chunk in step.chunks
    )


def digest(steps: Sequence[Step], *, lam: bool = True) -> str:
    """A short hash of an epoch's ids, in order, and with ``lam`` the lambdas: equal plans have equal digests."""
    pairs = [pair for step in steps for chunk in step.chunks for pair in chunk]
    entries = sorted(
        (pair.index, pair.confident, pair.unconfident or "", pair.lam if lam else 0) for pair in pairs
    )
    return hashlib.sha256(repr(entries).encode()).hexdigest()[:16]


def point_steps(steps: int, points: int) -> list[int]:
    """The steps of an epoch (from 1) after which an evenly spaced scoring point comes, the last one included.

    Raises ``ValueError`` for more points than steps.
    """
    if points > steps:
        raise ValueError(
            f"reference.checkpoints_per_epoch: expected at most the epoch's {steps} steps, got {points}"
        )
    return [math.ceil(steps * (index + 1) / points) for index in range(points)]


def _item(pair: Pair, step: Step, examples: Examples, mixup: MixupConfig, seed: int) -> PairItem:
    """A pair's examples and its lambda: the pair's own, one a token, or the optimizer step's."""
    members = _members(pair, examples)
    if mixup.lam == "pair" or pair.unconfident is None:
        return (*members, pair.lam)
    if mixup.lam == "batch":
        return (*members, draw_lam(seed=seed, epoch=step.epoch, index=step.index, alpha=mixup.alpha))
    size = count_mixed(*members)
    keys = {"seed": seed, "epoch": step.epoch, "index": pair.index}
    return (*members, draw_lam(**keys, alpha=mixup.alpha, size=size))


def _members(pair: Pair, examples: Examples) -> tuple[TokenizedExample, TokenizedExample | None]:
    return examples[pair.confident], None if pair.unconfident is None else examples[pair.unconfident]


def _longest(pair: Pair, examples: Examples) -> int:
    missing = [name for name in chunk_ids([pair]) if name not in examples]
    if missing:
        raise ValueError(f"examples: expected one with id {missing[0]}, got none")
    return max(len(examples[name].input_ids) for name in chunk_ids([pair]))

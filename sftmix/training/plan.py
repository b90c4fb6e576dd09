"""What each optimizer step trains on: known to every process before the step, on the CPU.

An epoch's entries (pairs; a plain example is an entry without partner) are cut into steps, and a step into
chunks, one forward pass each. The step's two token counts are the loss's denominators, so they need neither
a collective call nor a host read. Nothing here depends on the number of processes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sftmix.config import MixupConfig
from sftmix.data.chat import TokenizedExample
from sftmix.training.batch import Batch, Lam, collate_pairs, count_mixed
from sftmix.training.pairs import Pair, draw_lam

Examples = Mapping[str, TokenizedExample]


@dataclass(frozen=True)
class Step:
    """One optimizer step: ``index`` within its epoch, its chunks, and its counts over all chunks."""

    epoch: int
    index: int
    chunks: tuple[tuple[Pair, ...], ...]
    num_supervised: int
    num_mixed: int

    def ids(self) -> list[str]:
        return [name for chunk in self.chunks for name in chunk_ids(chunk)]


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
    for index, group in enumerate(_fill(entries, batch_size)):
        by_length = sorted(group, key=lambda pair: (-_longest(pair, examples), pair.index))
        chunks = tuple(tuple(chunk) for chunk in _fill(by_length, micro_batch_size))
        supervised = sum(examples[name].num_supervised for name in chunk_ids(group))
        mixed = sum(count_mixed(*_members(pair, examples)) for pair in group)
        steps.append(Step(epoch, index, chunks, num_supervised=supervised, num_mixed=mixed))
    return steps


def collate_chunk(
    chunk: Sequence[Pair], step: Step, examples: Examples, *, mixup: MixupConfig, seed: int, pad_id: int
) -> Batch:
    """The batch of one chunk, with lambda per pair, per token or per optimizer step as ``mixup.lam`` says."""

    def lam(pair: Pair) -> Lam:
        if mixup.lam == "pair" or pair.unconfident is None:
            return pair.lam
        keys = {"seed": seed, "epoch": step.epoch}
        if mixup.lam == "batch":
            return draw_lam(**keys, index=step.index, alpha=mixup.alpha)
        size = count_mixed(*_members(pair, examples))
        return draw_lam(**keys, index=pair.index, alpha=mixup.alpha, size=size)

    return collate_pairs([(*_members(pair, examples), lam(pair)) for pair in chunk], pad_id=pad_id)


def digest(steps: Sequence[Step], *, lam: bool = True) -> str:
    """A short hash of an epoch's ids, in order, and with ``lam`` the lambdas: equal plans have equal digests."""
    pairs = [pair for step in steps for chunk in step.chunks for pair in chunk]
    entries = sorted(
        (pair.index, pair.confident, pair.unconfident or "", pair.lam if lam else 0) for pair in pairs
    )
    return hashlib.sha256(repr(entries).encode()).hexdigest()[:16]


def _members(pair: Pair, examples: Examples) -> tuple[TokenizedExample, TokenizedExample | None]:
    return examples[pair.confident], None if pair.unconfident is None else examples[pair.unconfident]


def _longest(pair: Pair, examples: Examples) -> int:
    missing = [name for name in chunk_ids([pair]) if name not in examples]
    if missing:
        raise ValueError(f"examples: expected one with id {missing[0]}, got none")
    return max(len(examples[name].input_ids) for name in chunk_ids([pair]))


def _fill(entries: Sequence[Pair], size: int) -> list[list[Pair]]:
    """Groups of consecutive entries of at most ``size`` sequences each."""
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

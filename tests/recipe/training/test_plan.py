"""The plan of an epoch: complete, ordered by length inside a step, its counts those of the collated batches."""

from __future__ import annotations

import dataclasses

import pytest

from sftmix.config import MixupConfig
from sftmix.training.pairs import epoch_pairs
from sftmix.training.plan import collate_chunk, digest, plain_entries, plan_steps
from tests.recipe import tiny

EXAMPLES = tiny.examples(21)
PAIRS = epoch_pairs(tiny.halves(EXAMPLES), seed=0, epoch=0, alpha=0.5)
SIZES = {"epoch": 0, "batch_size": 8, "micro_batch_size": 4}
STEPS = plan_steps(PAIRS, EXAMPLES, **SIZES)


def test_steps_keep_the_order_of_the_epoch_and_hold_every_entry_once() -> None:
    assert [len(step.ids()) for step in STEPS] == [8, 8, 5]
    for index, step in enumerate(STEPS):
        held = sorted(pair.index for chunk in step.chunks for pair in chunk)
        assert held == [pair.index for pair in PAIRS[4 * index : 4 * index + 4]]
        assert all(len(chunk) <= 2 for chunk in step.chunks)
    plain = plan_steps(plain_entries(sorted(EXAMPLES)), EXAMPLES, **SIZES)
    assert [len(step.ids()) for step in plain] == [8, 8, 5]
    assert [step.num_mixed for step in plain] == [0, 0, 0]


def test_long_sequences_share_a_chunk() -> None:
    for step in STEPS:
        longest = [max(len(EXAMPLES[i].input_ids) for i in (p.confident, p.unconfident) if i is not None)
                   for chunk in step.chunks for p in chunk]  # fmt: skip
        assert longest == sorted(longest, reverse=True)


@pytest.mark.parametrize("lam", ["pair", "token", "batch"])
def test_counts_are_those_of_the_batches(lam: str) -> None:
    options = {"mixup": MixupConfig(lam=lam), "seed": 0, "pad_id": 0}
    for step in STEPS:
        batches = [collate_chunk(chunk, step, EXAMPLES, **options) for chunk in step.chunks]
        assert sum(batch.num_supervised for batch in batches) == step.num_supervised
        assert sum(batch.num_mixed for batch in batches) == step.num_mixed
        drawn = {value for batch in batches for value in batch.lam.tolist()}
        expected = {"pair": sum(p.unconfident is not None for c in step.chunks for p in c), "batch": 1}
        assert len(drawn) == expected.get(lam, step.num_mixed)


def test_the_digest_sees_examples_pairs_and_lambdas_but_not_the_chunks() -> None:
    assert digest(STEPS) == digest(plan_steps(PAIRS, EXAMPLES, **{**SIZES, "micro_batch_size": 8}))
    for change in ({"lam": 0.123}, {"unconfident": None}):
        changed = [dataclasses.replace(PAIRS[0], **change), *PAIRS[1:]]
        assert digest(STEPS) != digest(plan_steps(changed, EXAMPLES, **SIZES))


def test_an_id_without_example_is_refused() -> None:
    with pytest.raises(ValueError, match="examples: expected one with id lost, got none"):
        plan_steps(plain_entries(["e000", "lost"]), EXAMPLES, **SIZES)

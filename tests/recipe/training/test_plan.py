"""The plan of an epoch: complete, ordered by length inside a step, its counts those of the collated batches."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from sftmix.config import MixupConfig
from sftmix.training.pairs import epoch_pairs
from sftmix.training.plan import collate_chunk, denominators, digest, plain_entries, plan_steps
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


@pytest.mark.parametrize("lam", ["pair", "token", "batch"])
def test_denominators_are_the_sums_of_the_batches_weights_however_they_are_cut(lam: str) -> None:
    found, mixup = tiny.weighted(EXAMPLES), MixupConfig(lam=lam)
    options: dict[str, Any] = {"mixup": mixup, "seed": 0}
    sums = []
    for size in (2, 4, 8):
        steps = plan_steps(PAIRS, found, **{**SIZES, "micro_batch_size": size})
        sums.append([denominators(step, found, **options) for step in steps])
        for step, (rows, pairs) in zip(steps, sums[-1], strict=True):
            batches = [collate_chunk(chunk, step, found, **options, pad_id=0) for chunk in step.chunks]
            weights = [b.row_weight if b.row_weight is not None else torch.ones(len(b.rows)) for b in batches]
            assert rows == torch.cat(weights).double().sum().item()
            assert rows != step.num_supervised
            weights = [
                b.pair_weight if b.pair_weight is not None else torch.ones(len(b.lam)) for b in batches
            ]
            assert pairs == pytest.approx(torch.cat(weights).double().sum().item(), rel=1e-14)
            assert pairs != step.num_mixed
    assert sums[0] == sums[1] == sums[2]  # to the last bit


def test_denominators_without_weights_are_the_counts() -> None:
    for step in STEPS:
        found = denominators(step, EXAMPLES, mixup=MixupConfig(), seed=0)
        assert found == (step.num_supervised, step.num_mixed)
        assert [type(value) for value in found] == [int, int]
    (plain,) = plan_steps(plain_entries(["e000"]), EXAMPLES, **SIZES)
    assert denominators(plain, EXAMPLES, mixup=MixupConfig(), seed=0) == (plain.num_supervised, 1)
    heavy = {
        "e000": dataclasses.replace(EXAMPLES["e000"], weights=tuple(map(float, EXAMPLES["e000"].supervised)))
    }
    assert denominators(plain, heavy, mixup=MixupConfig(), seed=0) == (plain.num_supervised, 1)


def test_the_digest_sees_examples_pairs_and_lambdas_but_not_the_chunks() -> None:
    assert digest(STEPS) == digest(plan_steps(PAIRS, EXAMPLES, **{**SIZES, "micro_batch_size": 8}))
    for change in ({"lam": 0.123}, {"unconfident": None}):
        changed = [dataclasses.replace(PAIRS[0], **change), *PAIRS[1:]]
        assert digest(STEPS) != digest(plan_steps(changed, EXAMPLES, **SIZES))


def test_an_id_without_example_is_refused() -> None:
    with pytest.raises(ValueError, match="examples: expected one with id lost, got none"):
        plan_steps(plain_entries(["e000", "lost"]), EXAMPLES, **SIZES)

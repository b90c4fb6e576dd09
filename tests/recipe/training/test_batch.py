"""The collator's row plan, against hand-made examples and a slow obvious one."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from sftmix.data.tokenized import TokenizedExample
from sftmix.training.batch import Batch, PairItem, blank_batch, check_batch, collate_pairs, collate_plain

PAD = 0
VOCAB = 1000


def example(name: str, tokens: list[int], marks: str) -> TokenizedExample:
    return TokenizedExample(name, tuple(tokens), tuple(mark == "x" for mark in marks))


def slow_plan(pairs: list[PairItem]) -> tuple[list[tuple[str, int]], list[float]]:
    """Rows as (example id, supervised position) in the order of the loss, and lambda of each mixed one."""
    left, right, rest, lam = [], [], [], []
    for c, u, value in pairs:
        spots_c = [(c.id, t) for t, mark in enumerate(c.supervised) if mark]
        spots_u = [(u.id, t) for t, mark in enumerate(u.supervised) if mark] if u is not None else []
        for i, (one, other) in enumerate(zip(spots_c, spots_u, strict=False)):
            left.append(one)
            right.append(other)
            lam.append(float(value[i]) if isinstance(value, np.ndarray) else float(value))
    used = {*left, *right}
    sequences = (
        [c for c, u, _ in pairs if u] + [u for _, u, _ in pairs if u] + [c for c, u, _ in pairs if not u]
    )
    for sequence in sequences:
        spots = [(sequence.id, t) for t, mark in enumerate(sequence.supervised) if mark]
        rest += [spot for spot in spots if spot not in used]
    return left + right + rest, lam


def random_pairs(seed: int) -> list[PairItem]:
    source = random.Random(seed)
    count = 0

    def draw() -> TokenizedExample:
        nonlocal count
        count += 1
        length = source.randint(2, 14)
        marks = [False] + [source.random() < 0.5 for _ in range(length - 1)]
        tokens = tuple(source.randint(1, VOCAB - 1) for _ in range(length))
        return TokenizedExample(f"e{count}", tokens, tuple(marks))

    pairs: list[PairItem] = []
    for _ in range(source.randint(1, 6)):
        c, u = draw(), draw() if source.random() < 0.8 else None
        size = min(c.num_supervised, u.num_supervised) if u else 0
        lam = np.array([source.random() for _ in range(size)], np.float32) if seed % 2 else source.random()
        pairs.append((c, u, lam))
    return pairs


def test_a_pair_by_hand() -> None:
    c = example("c", [10, 11, 12, 13, 14], "..xxx")
    u = example("u", [20, 21, 22], ".xx")
    batch = collate_pairs([(c, u, 0.25)], pad_id=PAD)
    assert batch.input_ids.tolist() == [[10, 11, 12, 13, 14], [20, 21, 22, 0, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    # M = 2 confident rows, their 2 partners, and the confident example's tail; T = 5.
    assert batch.rows.tolist() == [1, 2, 5, 6, 3]
    assert batch.target.tolist() == [12, 13, 21, 22, 14]
    assert batch.lam.tolist() == [0.25, 0.25]
    assert batch.example.tolist() == [0, 0, 1, 1, 0]
    assert (batch.num_supervised, batch.num_mixed, batch.ids) == (5, 2, ["c", "u"])


def test_pairs_and_an_odd_one_by_hand() -> None:
    a = example("a", [1, 2, 3], ".xx")
    b = example("b", [4, 5, 6], "..x")
    c = example("c", [7, 8], ".x")
    d = example("d", [9, 10, 11], ".xx")
    e = example("e", [12, 13], ".x")
    batch = collate_pairs([(a, b, 0.1), (e, None, 1.0), (c, d, 0.9)], pad_id=PAD)
    assert batch.ids == ["a", "c", "b", "d", "e"]
    assert batch.target.tolist() == [2, 8, 6, 10, 3, 11, 13]
    assert batch.rows.tolist() == [0, 3, 7, 9, 1, 10, 12]
    assert batch.lam.tolist() == pytest.approx([0.1, 0.9])


def test_turns_are_mixed_in_order_of_their_supervised_tokens() -> None:
    c = example("c", [1, 2, 3, 4, 5, 6], ".x..xx")  # two assistant turns
    u = example("u", [7, 8, 9, 10], "..xx")
    batch = collate_pairs([(c, u, 0.5)], pad_id=PAD)
    assert batch.target.tolist() == [2, 5, 9, 10, 6]


@pytest.mark.parametrize("seed", range(40))
def test_the_plan_is_that_of_the_slow_version(seed: int) -> None:
    pairs = random_pairs(seed)
    batch = collate_pairs(pairs, pad_id=PAD)
    spots, lam = slow_plan(pairs)
    by_id = {e.id: e for c, u, _ in pairs for e in (c, u) if e is not None}
    length = max(len(e.input_ids) for e in by_id.values())
    assert batch.input_ids.shape == (len(by_id), length)
    assert batch.rows.tolist() == [batch.ids.index(name) * length + t - 1 for name, t in spots]
    assert batch.target.tolist() == [by_id[name].input_ids[t] for name, t in spots]
    assert batch.example.tolist() == [batch.ids.index(name) for name, _ in spots]
    np.testing.assert_allclose(batch.lam.numpy(), lam, rtol=1e-6)
    # Every supervised token once; no prompt and no padding position at all.
    assert sorted(spots) == sorted(
        (e.id, t) for e in by_id.values() for t, mark in enumerate(e.supervised) if mark
    )
    for name, e in by_id.items():
        b = batch.ids.index(name)
        assert batch.input_ids[b, : len(e.input_ids)].tolist() == list(e.input_ids)
        assert batch.attention_mask[b].sum() == len(e.input_ids)
    check_batch(batch, VOCAB)


def test_weights_by_hand() -> None:
    """Rows keep their own token's weight; a pair's term has lambda w_c + (1 - lambda) w_u."""
    c = replace(example("c", [10, 11, 12, 13, 14], "..xxx"), weights=(0, 0, 0.5, 0.5, 2))
    u = replace(example("u", [20, 21, 22], ".xx"), weights=(0, 3, 0.25))
    v = example("v", [30, 31], ".x")
    batch = collate_pairs([(v, None, 1.0), (c, u, 0.25)], pad_id=PAD)
    assert batch.target.tolist() == [12, 13, 21, 22, 14, 31]
    assert batch.row_weight is not None
    assert batch.pair_weight is not None
    assert batch.row_weight.tolist() == [0.5, 0.5, 3, 0.25, 2, 1]
    assert batch.pair_weight.tolist() == [0.25 * 0.5 + 0.75 * 3, 0.25 * 0.5 + 0.75 * 0.25]
    assert batch.row_weight.dtype == batch.pair_weight.dtype == torch.float32
    check_batch(batch, VOCAB)
    moved = batch.to("meta")
    assert moved.row_weight is not None
    assert moved.row_weight.device.type == "meta"
    per_token = collate_pairs([(v, u, np.array([0.5], np.float32))], pad_id=PAD)  # v has no weights: 1
    assert per_token.pair_weight is not None
    assert per_token.pair_weight.tolist() == [0.5 * 1 + 0.5 * 3]


def test_a_pair_of_equal_weights_keeps_them_exactly() -> None:
    c = replace(example("c", [1, 2, 3, 4], ".xxx"), weights=(0, 0.1, 0.7, 1 / 3))
    batch = collate_pairs([(c, replace(c, id="u"), np.array([0.1, 0.3, 0.9], np.float32))], pad_id=PAD)
    assert batch.pair_weight is not None
    assert batch.row_weight is not None
    assert torch.equal(batch.pair_weight, batch.row_weight[:3])


def test_without_weights_there_is_none() -> None:
    c, u = example("c", [10, 11, 12], ".xx"), example("u", [20, 21, 22], ".xx")
    for one in (c, replace(c, weights=(0, 1, 1))):
        batch = collate_pairs([(one, u, 0.25)], pad_id=PAD)
        assert batch.row_weight is None
        assert batch.pair_weight is None
    tail = replace(example("t", [1, 2, 3, 4], ".xxx"), weights=(0, 1, 1, 2))
    batch = collate_pairs([(tail, u, 0.25)], pad_id=PAD)
    assert batch.row_weight is not None
    assert batch.pair_weight is None  # the mixed tokens weigh 1


def test_an_example_with_bad_weights_is_refused() -> None:
    bad = replace(example("c", [10, 11, 12], ".xx"), weights=(0, 1, 0))
    with pytest.raises(
        ValueError, match="weights: expected a positive finite float32 at token 2 of c, got 0"
    ):
        collate_plain([bad], pad_id=PAD)


def test_types_are_what_the_loss_asks_for() -> None:
    batch = collate_pairs(random_pairs(1), pad_id=PAD)
    for name in ("input_ids", "attention_mask", "rows", "target", "example"):
        assert getattr(batch, name).dtype == torch.int64, name
    assert batch.lam.dtype == torch.float32
    moved = batch.to("cpu")
    assert moved is not batch
    assert torch.equal(moved.rows, batch.rows)
    assert moved.ids == batch.ids


def test_plain_batches_have_no_mixed_rows() -> None:
    a, b = example("a", [1, 2, 3], ".xx"), example("b", [4, 5], ".x")
    batch = collate_plain([a, b], pad_id=PAD)
    assert (batch.ids, batch.num_mixed, batch.rows.tolist()) == (["a", "b"], 0, [0, 1, 3])
    assert batch.target.tolist() == [2, 3, 5]
    check_batch(batch, VOCAB)


def test_a_blank_batch_has_attended_tokens_and_no_rows() -> None:
    batch = blank_batch(PAD)
    assert (batch.num_supervised, batch.num_mixed) == (0, 0)
    assert batch.attention_mask.all()
    assert batch.rows.dtype == torch.int64
    check_batch(batch, VOCAB)


def test_no_pairs_and_bad_lams_are_refused() -> None:
    c, u = example("c", [1, 2, 3], ".xx"), example("u", [4, 5, 6], ".xx")
    with pytest.raises(ValueError, match="pairs: expected at least one"):
        collate_pairs([], pad_id=PAD)
    for bad in (-0.1, 1.5, float("nan"), np.array([0.5, float("nan")])):
        with pytest.raises(ValueError, match=r"lam: expected values in \[0, 1\] for the pair of c"):
            collate_pairs([(c, u, bad)], pad_id=PAD)
    with pytest.raises(ValueError, match=r"lam: expected one number or \[2\] for the pair of c, got \[3\]"):
        collate_pairs([(c, u, np.ones(3))], pad_id=PAD)
    with pytest.raises(ValueError, match="expected the first token of x unsupervised"):
        collate_plain([example("x", [1, 2], "xx")], pad_id=PAD)


BREAKS: list[tuple[Callable[[Batch], Batch], str]] = [
    (lambda b: replace(b, target=b.target + VOCAB), r"target: expected values in \[0, V=1000\)"),
    (lambda b: replace(b, target=-b.target), r"target: expected values in \[0, V=1000\)"),
    (lambda b: replace(b, input_ids=b.input_ids + VOCAB), "input_ids: expected values"),
    (lambda b: replace(b, rows=b.rows + 100), r"rows: expected values in \[0, B\*T=10\)"),
    (lambda b: replace(b, rows=b.rows - 2), r"rows: expected values in \[0, B\*T=10\)"),
    (lambda b: replace(b, rows=b.rows[0].expand(5)), "rows: expected every position at most once"),
    (lambda b: replace(b, target=b.target[:3]), r"target: expected \[N=5\], got \[3\]"),
    (lambda b: replace(b, example=b.example[:3]), r"example: expected \[N=5\], got \[3\]"),
    (lambda b: replace(b, lam=torch.rand(3)), "lam: expected at most N // 2 = 2 pairs, got 3"),
    (lambda b: replace(b, lam=b.lam + 1), r"lam: expected values in \[0, 1\]"),
    (lambda b: replace(b, lam=b.lam * float("nan")), r"lam: expected values in \[0, 1\]"),
    (lambda b: replace(b, row_weight=torch.ones(4)), r"row_weight: expected \[N=5\], got \[4\]"),
    (lambda b: replace(b, pair_weight=torch.ones(1)), r"pair_weight: expected \[M=2\], got \[1\]"),
    (lambda b: replace(b, row_weight=torch.zeros(5)), "row_weight: expected positive finite values"),
    (lambda b: replace(b, pair_weight=torch.ones(2) / 0), "pair_weight: expected positive finite values"),
]


@pytest.mark.parametrize("broken, message", BREAKS)
def test_a_broken_plan_is_refused(broken: Callable[[Batch], Batch], message: str) -> None:
    c, u = example("c", [10, 11, 12, 13, 14], "..xxx"), example("u", [20, 21, 22], ".xx")
    batch = collate_pairs([(c, u, 0.25)], pad_id=PAD)
    check_batch(batch, VOCAB)
    with pytest.raises(ValueError, match=message):
        check_batch(broken(batch), VOCAB)


def test_a_replaced_token_is_trained_and_not_shown() -> None:
    """The model sees token 12, and at its place is taught 40: the end of an earlier answer under some templates."""
    example = TokenizedExample("a", (10, 11, 12, 13), (False, True, True, True), replaced=((2, 40),))
    other = TokenizedExample("b", (20, 21), (False, True))
    batch = collate_pairs([(example, other, 0.5)], pad_id=0)
    assert batch.input_ids[0].tolist() == [10, 11, 12, 13]
    assert batch.target.tolist() == [11, 21, 40, 13]

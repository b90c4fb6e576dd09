"""IFD: which tokens stand in its two perplexities, and its value from logits alone."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from sftmix.data.tokenized import TokenizedExample
from sftmix.evaluation.sums import Passes, difficulties, read_answers
from sftmix.scores.ifd import difficulty, without_prompt
from tests.recipe import tiny


def example(ids: tuple[int, ...], marks: str, **others: object) -> TokenizedExample:
    return TokenizedExample("e", ids, tuple(mark == "x" for mark in marks), **others)  # type: ignore[arg-type]


def test_the_answer_alone_is_its_tokens_with_the_first_given() -> None:
    found = without_prompt(example((5, 6, 7, 8, 9, 10), "..xx.x"))
    assert found is not None
    assert found.input_ids == (7, 8, 10) and found.supervised == (False, True, True)


def test_a_token_that_begins_every_text_stays() -> None:
    found = without_prompt(example((1, 6, 7, 8), "..xx"), begin=1)
    assert found is not None and found.input_ids == (1, 7, 8) and found.supervised == (False, False, True)
    again = without_prompt(example((1, 6, 1, 8, 9), "...xx"), begin=1)  # it begins each message: no text
    assert again is not None and again.input_ids == (8, 9)


def test_an_answer_of_one_token_has_no_difficulty() -> None:
    assert without_prompt(example((5, 6, 7), "..x")) is None


def test_a_replaced_target_moves_with_its_token() -> None:
    found = without_prompt(example((5, 6, 7, 8), ".xxx", replaced=((1, 50), (3, 60))))
    assert found is not None and found.replaced == ((2, 60),)  # the first token is trained by nobody
    found.check()


def test_difficulty_by_hand_and_beyond_a_float() -> None:
    assert difficulty(6.0, 4.0, 2) == pytest.approx(math.e)
    assert difficulty(1e6, 0.0, 10) == math.inf


def by_logits(model: torch.nn.Module, ids: tuple[int, ...], marks: tuple[bool, ...]) -> list[float]:
    """NLL of each marked token, from the model's own logits."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].double()
    nll = F.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="none")
    return [float(nll[t - 1]) for t in range(1, len(ids)) if marks[t]]


def test_sums_entropy_and_difficulty_are_those_of_the_logits() -> None:
    plain, model = tiny.causal_lm(), tiny.model()
    examples = list(tiny.examples(9).values())
    passes = Passes(batch_size=4)
    answers = {answer.id: answer for answer in read_answers(model, examples, passes)}
    found = difficulties(model, examples, list(answers.values()), passes)
    for each in examples:
        nll = by_logits(plain, each.input_ids, each.supervised)
        with torch.no_grad():
            probabilities = plain(torch.tensor([each.input_ids])).logits[0].double().softmax(-1)
        rows = probabilities[[t - 1 for t, marked in enumerate(each.supervised) if marked]]
        entropy = float(-(rows * rows.log()).sum())
        shown = [token for token, marked in zip(each.input_ids, each.supervised, strict=True) if marked]
        top1 = sum(int(row.argmax()) == token for row, token in zip(rows, shown, strict=True))
        answer = answers[each.id]
        assert answer.nll_sum == pytest.approx(sum(nll), rel=1e-5)
        assert answer.first_nll == pytest.approx(nll[0], rel=1e-5)
        assert answer.entropy_sum == pytest.approx(entropy, rel=1e-5)
        assert answer.num_top1 == top1
        if len(shown) == 1:
            assert each.id not in found
            continue
        alone = by_logits(plain, tuple(shown), (True,) * len(shown))
        expected = math.exp((sum(nll[1:]) - sum(alone)) / len(alone))
        assert found[each.id] == pytest.approx(expected, rel=1e-4)
    assert len(found) == sum(each.num_supervised > 1 for each in examples) > 5


def test_no_examples_are_refused() -> None:
    with pytest.raises(ValueError, match="examples: expected at least one, got none"):
        read_answers(tiny.model(), [], Passes())

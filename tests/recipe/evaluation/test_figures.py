"""Evaluation and scores against the model's own logits, and greedy sample answers."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from sftmix.data.prompts import prompt_ids
from sftmix.data.rows import Example
from sftmix.evaluation.figures import evaluate_model, sample_answers, score_examples
from tests.recipe import tiny

EXAMPLES = list(tiny.examples(9).values())


def by_hand(kind: str) -> dict[str, tuple[float, int]]:
    """NLL sum and top-1 count of each example alone, without padding, from the model's logits."""
    model = tiny.causal_lm(kind)
    sums = {}
    for example in EXAMPLES:
        ids = torch.tensor([example.input_ids])
        kept = [t for t, loss in enumerate(example.supervised) if loss]
        with torch.no_grad():
            logits = model(ids).logits[0, [t - 1 for t in kept]].double()
        nll = F.cross_entropy(logits, ids[0, kept], reduction="sum").item()
        sums[example.id] = (nll, int((logits.argmax(-1) == ids[0, kept]).sum()))
    return sums


@pytest.mark.parametrize("kind", ["llama", "gemma2", "phi"])
@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_evaluation_is_token_weighted_and_independent_of_the_batches(kind: str, batch_size: int) -> None:
    sums = by_hand(kind)
    num_tokens = sum(example.num_supervised for example in EXAMPLES)
    nll = sum(value for value, _ in sums.values()) / num_tokens
    found = evaluate_model(tiny.model(kind), EXAMPLES, batch_size=batch_size)
    assert found == {
        "nll": pytest.approx(nll, rel=1e-5),
        "perplexity": pytest.approx(math.exp(nll), rel=1e-4),
        "token_accuracy": sum(top1 for _, top1 in sums.values()) / num_tokens,
        "num_tokens": num_tokens,
    }


def test_scores_come_in_the_order_given() -> None:
    sums = by_hand("llama")
    rows = score_examples(tiny.model(), EXAMPLES, checkpoint=2, step=40, batch_size=4)
    assert [row["example"] for row in rows] == [example.id for example in EXAMPLES]
    for row, example in zip(rows, EXAMPLES, strict=True):
        nll, top1 = sums[example.id]
        assert row == {
            "example": example.id, "checkpoint": 2, "step": 40, "nll_sum": pytest.approx(nll, rel=1e-5),
            "num_tokens": example.num_supervised, "top1_share": top1 / example.num_supervised,
            "source": "checkpoint",
        }  # fmt: skip


def test_the_mode_is_restored_and_dropout_is_off() -> None:
    model = tiny.model("gpt2", resid_pdrop=0.5).train()
    assert evaluate_model(model, EXAMPLES) == evaluate_model(model, EXAMPLES)
    assert model.training
    assert model.decoder.training
    model.eval()
    evaluate_model(model, EXAMPLES)
    assert not model.training


def test_no_examples_are_refused_and_progress_is_told() -> None:
    with pytest.raises(ValueError, match="examples: expected at least one, got none"):
        evaluate_model(tiny.model(), [])
    seen: list[tuple[int, int]] = []
    evaluate_model(
        tiny.model(), EXAMPLES, batch_size=4, progress=lambda done, total: seen.append((done, total))
    )
    assert seen == [(4, 9), (8, 9), (9, 9)]


def test_sample_answers_are_greedy_and_follow_the_chat_template() -> None:
    tokenizer, model = tiny.tokenizer(), tiny.model().train()
    messages = ({"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3"})
    example = Example(id="a", messages=messages)
    (answer,) = sample_answers(model, tokenizer, [example], max_new_tokens=5)
    assert (answer["id"], answer["prompt"], answer["expected"]) == ("a", "w1 w2", "w3")
    assert model.training
    ids = prompt_ids(example, tokenizer)
    assert (
        tokenizer.decode(ids).split() == "<|im_start|> user w1 w2 <|im_end|> <|im_start|> assistant".split()
    )
    plain = tiny.causal_lm()
    for _ in range(5):
        with torch.no_grad():
            ids.append(int(plain(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            break
    expected = tokenizer.decode(ids[7:], skip_special_tokens=True)
    assert answer["answer"].split() == expected.split()


def test_sample_answers_stop_at_the_trained_tokens_and_say_when_they_did_not() -> None:
    tokenizer, model = tiny.tokenizer(), tiny.model(seed=4)
    model.base.config.eos_token_id = model.base.generation_config.eos_token_id = None
    messages = ({"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3"})
    example = Example(id="a", messages=messages)
    (free,) = sample_answers(model, tokenizer, [example], max_new_tokens=8)
    words = free["answer"].split()
    assert free["stopped"] is False and len(words) == 8
    stop = tokenizer.convert_tokens_to_ids(words[3])
    first = words.index(words[3])
    (cut,) = sample_answers(model, tokenizer, [example], max_new_tokens=8, stop_ids=(stop,))
    assert cut["stopped"] is True and cut["answer"].split() == words[:first]
    (exact,) = sample_answers(model, tokenizer, [example], max_new_tokens=first + 1, stop_ids=(stop,))
    assert exact["stopped"] is True and exact["answer"] == cut["answer"]
    model.base.generation_config.eos_token_id = [60, stop]  # the model's own, without trained ones
    assert sample_answers(model, tokenizer, [example], max_new_tokens=8) == [cut]

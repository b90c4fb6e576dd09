"""Weights of tokens in the loss: against a weighted loss written in plain torch, and what they leave alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import sftmix.training.trainer as trainer_module
from sftmix.data.tokenized import TokenizedExample
from sftmix.evaluation.figures import evaluate_model, score_examples
from sftmix.model.causal_lm import SFTMixModel
from sftmix.scores.online import Row
from sftmix.training.metrics import Record, read_metrics
from sftmix.training.pairs import epoch_pairs
from sftmix.training.runs import train_pairs, train_plain
from sftmix.training.trainer import Trainer
from tests.recipe import tiny

EXAMPLES = tiny.examples(21)
WEIGHTED = tiny.weighted(EXAMPLES)
SPLIT = tiny.halves(EXAMPLES)
Found = Mapping[str, TokenizedExample]
Gradients = dict[str, Tensor]


def everywhere(weight: float) -> dict[str, TokenizedExample]:
    """Every supervised token at one weight."""
    return {
        name: replace(example, weights=tuple(weight * mark for mark in example.supervised))
        for name, example in EXAMPLES.items()
    }


def run(folder: Path, found: Found, *flags: str, model: SFTMixModel | None = None) -> Trainer:
    return train_pairs(tiny.config(*flags), model or tiny.model(), found, SPLIT, folder=folder)


def assert_close(one: Trainer, other: Trainer, tolerance: float) -> None:
    a, b = tiny.weights(one.model), tiny.weights(other.model)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=tolerance, msg=name)


def one_step(folder: Path, found: Found, patch: pytest.MonkeyPatch, *flags: str) -> tuple[Record, Gradients]:
    """The first step's record and its gradients, before clipping, of a model in float64."""
    gradients: Gradients = {}
    clip = trainer_module.clip_gradients

    def keep(weights: Any, limit: float) -> Tensor:
        gradients.update({name: w.grad.clone() for name, w in weights.masters.items()})
        return clip(weights, limit)

    with patch.context() as inner:
        inner.setattr(trainer_module, "clip_gradients", keep)
        run(folder, found, "train.max_steps=1", *flags, model=tiny.model(dtype=torch.float64))
    (record,) = read_metrics(folder / "metrics.jsonl")
    return record, {name.removeprefix("model."): value for name, value in gradients.items()}


def by_hand(found: Found, mu: float) -> tuple[dict[str, float], Gradients]:
    """The weighted loss of the first step in plain torch and float64: full logits, soft labels, no batches."""
    model = tiny.causal_lm().double()
    ntp, mixup, ntp_sum, mixup_sum = torch.zeros(()), torch.zeros(()), 0.0, 0.0
    for pair in epoch_pairs(SPLIT, seed=0, epoch=0, alpha=0.5)[:4]:
        lam = torch.tensor(pair.lam, dtype=torch.float32).item()
        parts = []
        for name in (pair.confident, pair.unconfident):
            example = found[str(name)]
            ids = torch.tensor([example.input_ids])
            hidden = model.model(ids).last_hidden_state[0]
            kept = [t for t, marked in enumerate(example.supervised) if marked]
            weight = torch.tensor(
                [1.0 if example.weights is None else example.weights[t] for t in kept]
            ).double()
            z, y = hidden[[t - 1 for t in kept]], ids[0, kept]
            ntp = ntp + (weight * F.cross_entropy(model.lm_head(z), y, reduction="none")).sum()
            ntp_sum += weight.sum().item()
            parts.append((z, F.one_hot(y, tiny.VOCAB).double(), weight))
        (z_c, y_c, w_c), (z_u, y_u, w_u) = parts
        m = min(len(z_c), len(z_u))
        z_x, y_x = (lam * c[:m] + (1 - lam) * u[:m] for c, u in ((z_c, z_u), (y_c, y_u)))
        w_x = lam * w_c[:m] + (1 - lam) * w_u[:m]
        mixup = mixup - (w_x[:, None] * y_x * model.lm_head(z_x).log_softmax(-1)).sum()
        mixup_sum += w_x.sum().item()
    loss = ntp / ntp_sum + mu * mixup / mixup_sum
    loss.backward()
    values = {"loss": loss, "ntp_loss": ntp / ntp_sum, "mixup_loss": mixup / mixup_sum}
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: value.item() for name, value in values.items()}, gradients


@pytest.mark.parametrize("impl", ["reference", "chunked"])
@pytest.mark.parametrize("size", [2, 8])
@pytest.mark.parametrize("kind", ["weighted", "plain"])
def test_a_weighted_step_is_the_equation_in_plain_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, impl: str, size: int, kind: str
) -> None:
    """Value, both parts and every gradient; the plain case shows that the test tells the two apart."""
    found = WEIGHTED if kind == "weighted" else EXAMPLES
    flags = (f"train.impl={impl}", f"train.micro_batch_size={size}", "mixup.weight=0.3")
    record, gradients = one_step(tmp_path, found, monkeypatch, *flags)
    expected, wanted = by_hand(found, 0.3)
    for name, value in expected.items():
        assert record[name] == pytest.approx(value, rel=1e-6), name
    assert record["loss"] == pytest.approx(record["ntp_loss"] + 0.3 * record["mixup_loss"], rel=1e-6)
    assert gradients.keys() == wanted.keys()
    for name, gradient in wanted.items():  # the optimizer's float32 is the only rounding
        scale = gradient.abs().max().item()
        torch.testing.assert_close(gradients[name].double(), gradient, rtol=0, atol=1e-6 * scale, msg=name)
    other, _ = by_hand(EXAMPLES if kind == "weighted" else WEIGHTED, 0.3)
    assert abs(other["loss"] - expected["loss"]) > 1e-3
    # Counts stay counts.
    names = [
        name
        for p in epoch_pairs(SPLIT, seed=0, epoch=0, alpha=0.5)[:4]
        for name in (p.confident, p.unconfident)
    ]
    assert record["num_tokens"] == sum(EXAMPLES[str(name)].num_supervised for name in names)


def test_half_a_weight_on_one_turn_halves_its_share(tmp_path: Path) -> None:
    """Two turns of 3 and 2 tokens: the first's share of the loss is 1.5 / 3.5 in place of 3 / 5."""
    example = TokenizedExample("a", tuple(range(8, 17)), tuple(mark == "x" for mark in "..xxx..xx"))
    light = replace(
        example, weights=tuple({2: 0.5, 3: 0.5, 4: 0.5, 7: 1.0, 8: 1.0}.get(t, 0.0) for t in range(9))
    )
    turns = [replace(example, id=i, supervised=tuple(t in kept for t in range(9)))
             for i, kept in (("first", {2, 3, 4}), ("second", {7, 8}))]  # fmt: skip
    first, second = (evaluate_model(tiny.model(), [turn])["nll"] for turn in turns)
    assert abs(first - second) > 0.1
    for found, share in ((example, 3 / 5), (light, 1.5 / 3.5)):
        folder = tmp_path / str(share)
        flags = ("reference.epochs=1", "train.max_steps=1")
        train_plain(tiny.config(*flags), tiny.model(), {"a": found}, folder=folder)
        (record,) = read_metrics(folder / "metrics.jsonl")
        assert record["loss"] == pytest.approx(share * first + (1 - share) * second, rel=1e-6)
        assert record["num_tokens"] == 5


@pytest.mark.parametrize("method", ["sftmix", "ntp"])
def test_one_weight_everywhere_is_none(tmp_path: Path, method: str) -> None:
    """1 and powers of 2 to the last bit of weights and losses, others to rounding."""
    flags = (f"train.method={method}",)
    plain = run(tmp_path / "plain", EXAMPLES, *flags)
    losses = [record["loss"] for record in read_metrics(tmp_path / "plain" / "metrics.jsonl")]
    for weight in (1.0, 0.5):
        folder = tmp_path / str(weight)
        assert_close(run(folder, everywhere(weight), *flags), plain, 0)
        assert [record["loss"] for record in read_metrics(folder / "metrics.jsonl")] == losses
    flags = (*flags, "optim.eps=1e-3")
    assert_close(
        run(tmp_path / "tenth", everywhere(0.1), *flags), run(tmp_path / "eps", EXAMPLES, *flags), 1e-6
    )


def test_without_weights_the_loss_is_called_as_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No tensor of ones, and the counts as ints: the numbers of a run without weights cannot move."""
    seen: list[dict[str, Any]] = []
    forward = SFTMixModel.forward

    def record(self: SFTMixModel, *tensors: Tensor, **options: Any) -> Any:
        seen.append(options)
        return forward(self, *tensors, **options)

    model = tiny.model()
    monkeypatch.setattr(SFTMixModel, "forward", record)
    run(tmp_path, EXAMPLES, model=model)
    assert len(seen) > 6
    assert all(options["row_weight"] is None and options["pair_weight"] is None for options in seen)
    assert {type(o[f"{part}_denominator"]) for o in seen for part in ("ntp", "mixup")} == {int}


@pytest.mark.parametrize("lam", ["pair", "token", "batch"])
def test_weighted_micro_batches_make_the_step_of_one_large_batch(tmp_path: Path, lam: str) -> None:
    flags = (f"mixup.lam={lam}", "optim.eps=1e-3")
    whole = run(tmp_path / "8", WEIGHTED, *flags, "train.micro_batch_size=8")
    assert_close(run(tmp_path / "2", WEIGHTED, *flags, "train.micro_batch_size=2"), whole, 1e-6)
    plain = tiny.weights(run(tmp_path / "plain", EXAMPLES, *flags, "train.micro_batch_size=8").model)
    assert not any(torch.equal(value, plain[name]) for name, value in tiny.weights(whole.model).items())


def test_bfloat16_models_take_weights(tmp_path: Path) -> None:
    """The reported parts still add up, and the loss is the float32 model's to bfloat16's rounding."""
    run(tmp_path / "16", WEIGHTED, "train.max_steps=1", model=tiny.model(dtype=torch.bfloat16))
    (record,) = read_metrics(tmp_path / "16" / "metrics.jsonl")
    expected, _ = by_hand(WEIGHTED, 0.2)
    assert record["loss"] == pytest.approx(expected["loss"], rel=0.02)
    assert record["loss"] == pytest.approx(record["ntp_loss"] + 0.2 * record["mixup_loss"], rel=1e-5)


def test_scores_and_evaluation_count_every_token_once(tmp_path: Path) -> None:
    """Perplexity and held-out figures do not know the weights; nor do the dynamics taken while training."""
    model = tiny.model()
    plain, weighted = list(EXAMPLES.values()), list(WEIGHTED.values())
    assert evaluate_model(model, weighted) == evaluate_model(model, plain)
    scores: list[Row] = score_examples(model, weighted, checkpoint=0, step=3)
    assert scores == score_examples(model, plain, checkpoint=0, step=3)
    config = tiny.config("optim.lr=1e-30", "optim.weight_decay=0", "reference.epochs=1")
    rows = train_plain(config, model, WEIGHTED, folder=tmp_path)
    for row, score in zip(rows, scores, strict=True):
        assert row == {**score, "nll_sum": pytest.approx(score["nll_sum"], rel=1e-5), "source": "online"}

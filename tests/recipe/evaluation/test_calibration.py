"""Calibration against loops over tokens, and of a model against the softmax of its own logits."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from sftmix.evaluation.calibration import calibration
from sftmix.evaluation.figures import evaluate_model, heldout_figures
from sftmix.evaluation.sums import Passes
from sftmix.evaluation.uncertainty import ratio_stderr
from tests.recipe import tiny

EXAMPLES = list(tiny.examples(9).values())


def by_loops(confidence: np.ndarray, correct: np.ndarray) -> tuple[float, float, float]:
    """Both calibration errors and the Brier score, a token at a time."""
    bins: list[list[int]] = [[] for _ in range(15)]
    for i, p in enumerate(confidence):
        bins[next(k for k in range(15) if p <= (k + 1) / 15 or k == 14)].append(i)
    order = sorted(range(len(confidence)), key=lambda i: (confidence[i], i))
    parts, at = [], 0
    for k in range(15):
        size = len(order) // 15 + (k < len(order) % 15)
        parts.append(order[at : at + size])
        at += size

    def error(groups: list[list[int]]) -> float:
        total = 0.0
        for group in groups:
            if group:
                gap = sum(float(correct[i]) for i in group) - sum(float(confidence[i]) for i in group)
                total += abs(gap) / len(confidence)
        return total

    brier = sum((float(p) - float(c)) ** 2 for p, c in zip(confidence, correct, strict=True))
    return error(bins), error(parts), brier / len(confidence)


@pytest.mark.parametrize("size", [1, 7, 15, 1000])
def test_errors_are_those_of_loops(size: int) -> None:
    draw = np.random.default_rng(size)
    confidence = draw.beta(2, 1, size)
    correct = draw.random(size) < confidence**2
    found = calibration(confidence, correct)
    ece, adaptive, brier = by_loops(confidence, correct)
    assert found["ece"] == pytest.approx(ece, abs=1e-12)
    assert found["ece_adaptive"] == pytest.approx(adaptive, abs=1e-12)
    assert found["brier"] == pytest.approx(brier, abs=1e-12)
    assert sum(b["count"] for b in found["equal_width"]) == size == found["num_tokens"]
    assert sum(b["count"] for b in found["adaptive"]) == size
    assert len(found["equal_width"]) == 15 and len(found["adaptive"]) == min(15, size)


def test_honest_probabilities_have_a_small_error_and_boasts_a_known_one() -> None:
    draw = np.random.default_rng(0)
    confidence = draw.random(200_000)
    honest = calibration(confidence, draw.random(200_000) < confidence)
    assert honest["ece"] < 0.01 and honest["ece_adaptive"] < 0.01
    sure = calibration(np.full(1000, 0.9), np.arange(1000) < 600)
    assert (
        sure["ece"] == pytest.approx(0.3) and sure["ece_adaptive"] > 0.3
    )  # bins of it are all right or all wrong
    only = next(b for b in sure["equal_width"] if b["count"])
    assert (only["count"], only["accuracy"]) == (1000, 0.6) and only["from"] < 0.9 <= only["to"]


def test_edges_belong_to_the_lower_bin_and_bad_input_is_refused() -> None:
    found = calibration([0.0, 1 / 15, 1.0, 1 + 1e-7], [False, True, True, True])
    assert [b["count"] for b in found["equal_width"]] == [2] + [0] * 13 + [2]
    assert found["equal_width"][1] == {
        "from": 1 / 15,
        "to": 2 / 15,
        "count": 0,
        "confidence": None,
        "accuracy": None,
    }
    for confidence in ([1.1], [float("nan")], [-0.1]):
        with pytest.raises(ValueError, match=r"confidence: expected values in \[0, 1\]"):
            calibration(confidence, [True])
    with pytest.raises(ValueError, match=r"expected the same shape \[N\]"):
        calibration([0.5], [True, False])


def from_logits(kind: str) -> tuple[np.ndarray, np.ndarray, list[dict[str, Any]]]:
    """The most likely token's probability and whether it was the answer's, of each example alone; and its sums."""
    model = tiny.causal_lm(kind)
    confidence, correct, rows = [], [], []
    for example in EXAMPLES:
        ids = torch.tensor([example.input_ids])
        kept = [t for t, loss in enumerate(example.supervised) if loss]
        with torch.no_grad():
            p = model(ids).logits[0, [t - 1 for t in kept]].double().softmax(-1)
        top, token = p.max(-1)
        hits = token == ids[0, kept]
        confidence.append(top.numpy())
        correct.append(hits.numpy())
        nll = -p[torch.arange(len(kept)), ids[0, kept]].log().sum().item()
        rows.append(
            {"example": example.id, "nll_sum": nll, "num_tokens": len(kept), "num_top1": int(hits.sum())}
        )
    return np.concatenate(confidence), np.concatenate(correct), rows


@pytest.mark.parametrize("kind", ["llama", "gemma2", "cohere"])  # plain, capped and scaled logits
@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_a_models_figures_are_those_of_its_own_logits(kind: str, impl: str) -> None:
    confidence, correct, expected = from_logits(kind)
    model = tiny.model(kind)
    figures, rows = heldout_figures(model, EXAMPLES, Passes(batch_size=4, impl=impl))
    ece, adaptive, brier = by_loops(confidence, correct)
    found = figures["calibration"]
    assert found["num_tokens"] == len(confidence) == figures["num_tokens"]
    assert found["confidence"] == pytest.approx(confidence.mean(), rel=1e-5)
    assert (found["ece"], found["brier"]) == (pytest.approx(ece, abs=1e-6), pytest.approx(brier, rel=1e-5))
    assert found["ece_adaptive"] == pytest.approx(adaptive, abs=1e-6)
    for row, own in zip(rows, expected, strict=True):
        assert row == {**own, "nll_sum": pytest.approx(own["nll_sum"], rel=1e-5)}
    sums, counts = [row["nll_sum"] for row in expected], [row["num_tokens"] for row in expected]
    assert figures["nll_stderr"] == pytest.approx(ratio_stderr(sums, counts), rel=1e-4)
    hits = [row["num_top1"] for row in expected]
    assert figures["token_accuracy_stderr"] == pytest.approx(ratio_stderr(hits, counts), rel=1e-9)
    plain = evaluate_model(model, EXAMPLES, batch_size=4, impl=impl)
    assert {name: figures[name] for name in plain} == plain


def test_a_model_that_gives_nan_has_no_calibration_and_figures_that_say_so() -> None:
    model = tiny.model()
    with torch.no_grad():
        model.base.model.norm.weight.fill_(float("nan"))
    figures, _ = heldout_figures(model, EXAMPLES, Passes())
    assert math.isnan(figures["nll"]) and figures["calibration"] is None

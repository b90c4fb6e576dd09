"""The Mixup term's weight over the run, the term alone and as a second loss, and training on one half."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from sftmix.training.metrics import read_metrics
from sftmix.training.pairs import epoch_pairs
from sftmix.training.runs import train_pairs
from tests.recipe import tiny

EXAMPLES = tiny.examples(16)
SPLIT = tiny.halves(EXAMPLES)


def records(folder: Path, *flags: str) -> list[dict[str, float]]:
    train_pairs(tiny.config(*flags), tiny.model(), EXAMPLES, SPLIT, folder=folder)
    return read_metrics(folder / "metrics.jsonl")


@pytest.mark.parametrize(
    "flags,weights",
    [
        ((), [0.2] * 4),
        (("mixup.schedule=linear",), [0.2, 0.15, 0.1, 0.05]),
        (("mixup.schedule=cosine",), [0.1 * (1 + math.cos(math.pi * k / 4)) for k in range(4)]),
        (("mixup.warmup_ratio=0.5",), [0.1, 0.2, 0.2, 0.2]),
        (("mixup.warmup_ratio=0.5", "mixup.schedule=linear", "mixup.weight=1"), [0.5, 1.0, 1.0, 0.5]),
        (("train.method=ntp", "mixup.schedule=linear"), [0.0] * 4),
    ],
)
def test_the_weight_follows_its_schedule(
    tmp_path: Path, flags: tuple[str, ...], weights: list[float]
) -> None:
    found = records(tmp_path, *flags)
    assert [record["mixup_weight"] for record in found] == pytest.approx(weights)
    for record, weight in zip(found, weights, strict=True):
        expected = record["ntp_loss"] + weight * (record["mixup_loss"] or 0)
        assert record["loss"] == pytest.approx(expected, rel=1e-5)


def by_hand(ntp_weight: float, mixup_weight: float) -> tuple[float, float]:
    """Loss and gradient norm of the first step, by autograd through the model's own logits."""
    model = tiny.causal_lm()
    pairs = epoch_pairs(SPLIT, seed=0, epoch=0, alpha=0.5)[:4]
    ntp, mixup, tokens, mixed = torch.zeros(()), torch.zeros(()), 0, 0
    for pair in pairs:
        logits, targets = [], []
        for name in (pair.confident, pair.unconfident or ""):
            ids = torch.tensor(EXAMPLES[name].input_ids)
            rows = torch.tensor([t for t, marked in enumerate(EXAMPLES[name].supervised) if marked])
            logits.append(model(ids[None]).logits[0][rows - 1])
            targets.append(ids[rows])
            ntp, tokens = ntp + F.cross_entropy(logits[-1], targets[-1], reduction="sum"), tokens + len(rows)
        size = min(map(len, targets))
        mixed += size
        a, b = (each[:size] for each in logits)
        logprob = (pair.lam * a + (1 - pair.lam) * b).log_softmax(-1)
        own, other = (logprob.gather(1, each[:size, None]).sum() for each in targets)
        mixup = mixup - pair.lam * own - (1 - pair.lam) * other
    loss = ntp_weight * ntp / tokens + mixup_weight * mixup / mixed
    loss.backward()
    squares = [p.grad.double().square().sum() for p in model.parameters() if p.grad is not None]
    return loss.item(), float(torch.stack(squares).sum().sqrt())


@pytest.mark.parametrize("ntp_weight,mixup_weight", [(0.0, 0.2), (0.0, 1.0), (1.0, 1.0), (0.5, 0.2)])
def test_the_term_alone_and_as_a_second_loss(tmp_path: Path, ntp_weight: float, mixup_weight: float) -> None:
    found = records(tmp_path, f"mixup.ntp_weight={ntp_weight}", f"mixup.weight={mixup_weight}")[0]
    loss, norm = by_hand(ntp_weight, mixup_weight)
    assert found["loss"] == pytest.approx(loss, rel=1e-5)
    assert found["grad_norm"] == pytest.approx(norm, rel=1e-4)


def test_next_token_training_has_no_part_of_it(tmp_path: Path) -> None:
    usual = records(tmp_path / "a", "train.method=ntp")
    other = records(tmp_path / "b", "train.method=ntp", "mixup.ntp_weight=0")
    assert [r["loss"] for r in usual] == [r["loss"] for r in other]


def test_a_run_goes_on_with_its_schedule_only(tmp_path: Path) -> None:
    flags = ("mixup.schedule=linear", "mixup.ntp_weight=0.5")
    whole = records(tmp_path / "whole", *flags)
    records(tmp_path / "cut", *flags)
    (newest,) = (tmp_path / "cut" / "checkpoints").glob("step-*4")
    for path in newest.iterdir():
        path.unlink()
    newest.rmdir()  # as if it had been killed in the second epoch
    assert [r["loss"] for r in records(tmp_path / "cut", *flags)] == [r["loss"] for r in whole]
    with pytest.raises(ValueError, match=r"mixup\.schedule"):
        records(tmp_path / "cut", "mixup.ntp_weight=0.5")


@pytest.mark.parametrize("use", ["confident", "unconfident"])
def test_a_control_trains_on_one_half_alone(
    tmp_path: Path, use: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = records(tmp_path, f"split.use={use}", "train.epochs=1")
    half = SPLIT.confident if use == "confident" else SPLIT.unconfident
    assert sum(r["num_tokens"] for r in found) == sum(EXAMPLES[name].num_supervised for name in half)
    assert all(r["mixup_loss"] > 0 for r in found)
    assert f"on the {use} half alone, 8 examples are left out" in capsys.readouterr().out


def test_the_share_that_the_shorter_partner_cuts_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def told(pairing: str) -> tuple[str, float]:
        found = records(tmp_path / pairing, f"mixup.pairing={pairing}", "train.epochs=1")
        tokens, mixed = (sum(r[key] for r in found) for key in ("num_tokens", "num_mixed"))
        return capsys.readouterr().out, 1 - 2 * mixed / tokens

    shares = {}
    for pairing in ("random", "length"):
        text, shares[pairing] = told(pairing)
        assert f"pairing {pairing}: {shares[pairing]:.1%} of the tokens that bear loss are cut" in text
    assert shares["length"] < 0.7 * shares["random"]

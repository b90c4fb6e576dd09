"""Training and scoring on packed rows against the padded ones: the same plan, losses, gradients, and weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sftmix.config import LoraConfig
from sftmix.data.tokenized import TokenizedExample
from sftmix.evaluation.figures import evaluate_model, score_examples
from sftmix.model.causal_lm import SFTMixModel, install_head
from sftmix.model.lora import apply_lora
from sftmix.model.packing import packs
from sftmix.training.batch import Batch, check_batch, collate_pairs, collate_plain
from sftmix.training.metrics import read_metrics
from sftmix.training.runs import train_pairs, train_plain
from sftmix.training.trainer import Trainer
from tests.recipe import tiny
from tests.recipe.model.architectures import causal_lm

EXAMPLES = tiny.examples(21)
SPLIT = tiny.halves(EXAMPLES)
KINDS = [
    "llama",
    "gpt2",
    "gemma2",
    "qwen3",
    "mixtral",
    "mistral",
    "gpt_oss",
    "mixtral_router_loss",
    "llama_tied",
]


def items(found: dict[str, TokenizedExample]) -> list[Any]:
    """Three pairs, one with a lambda for each token, and an example without partner."""
    e = list(found.values())
    size = min(e[2].num_supervised, e[3].num_supervised)
    per_token = np.linspace(0.1, 0.9, size, dtype=np.float32)
    return [(e[0], e[1], 0.25), (e[2], e[3], per_token), (e[4], None, 1.0), (e[5], e[6], 0.8)]


def both(pairs: Sequence[Any]) -> tuple[Batch, Batch]:
    padded, packed = (collate_pairs(pairs, pad_id=0, packed=is_packed) for is_packed in (False, True))
    check_batch(packed, tiny.VOCAB)
    return padded, packed


def result(model: SFTMixModel, batch: Batch, **options: Any) -> Any:
    inputs = (batch.input_ids, batch.attention_mask, batch.rows, batch.target, batch.lam)
    return model(
        *inputs, position_ids=batch.position_ids, starts=batch.starts, row_weight=batch.row_weight,
        pair_weight=batch.pair_weight, **options,
    )  # fmt: skip


def gradients(model: SFTMixModel, batch: Batch, **options: Any) -> tuple[Any, dict[str, Tensor]]:
    model.zero_grad()
    found = result(model, batch, **options)
    found.loss.backward()
    return found, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_one(model: SFTMixModel, pairs: Sequence[Any]) -> None:
    """A step on the packed batch is that on the padded one, but for rounding: in float64 where the model can."""
    padded, packed = both(pairs)
    if model.base.config.model_type in ("llama", "gpt2", "qwen3", "mistral"):
        model.double()
    eps = torch.finfo(model.head.weight.dtype).eps
    model.train()  # without dropout, which a row draws otherwise
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    (ours, ours_grad), (own, own_grad) = (gradients(model, batch) for batch in (packed, padded))
    for name in ("loss", "nll", "mixup_nll"):
        torch.testing.assert_close(
            getattr(ours, name), getattr(own, name), rtol=1e-6, atol=max(1e-6, 100 * eps)
        )
    assert ours_grad.keys() == own_grad.keys()
    largest = max(float(gradient.abs().max()) for gradient in own_grad.values())
    for name, gradient in own_grad.items():
        torch.testing.assert_close(ours_grad[name], gradient, rtol=0, atol=400 * eps * largest, msg=name)


@pytest.mark.parametrize("weighted", [False, True])
def test_the_plan_of_a_row_is_the_padded_one(weighted: bool) -> None:
    found = tiny.weighted(EXAMPLES) if weighted else dict(EXAMPLES)
    other = next(iter(found.values()))
    last = len(other.input_ids) - 1
    found[other.id] = replace(other, replaced=((last, 9),))
    padded, packed = both(items(found))
    assert packed.attention_mask is None and packed.starts is not None and packed.position_ids is not None
    cuts = list(pairwise(packed.starts))
    assert packed.input_ids.shape == packed.position_ids.shape == (1, packed.starts[-1])
    for (start, stop), name in zip(cuts, packed.ids, strict=True):
        assert tuple(packed.input_ids[0, start:stop].tolist()) == found[name].input_ids
        assert packed.position_ids[0, start:stop].tolist() == list(range(stop - start))
    same = ["target", "lam", "example", "row_weight", "pair_weight"]
    for name in same:
        ours, own = getattr(packed, name), getattr(padded, name)
        assert torch.equal(ours, own) if isinstance(own, Tensor) else ours is own
    assert (packed.row_weight is not None) == weighted and packed.ids == padded.ids and 9 in packed.target
    length = padded.input_ids.shape[1]
    offsets = torch.tensor(packed.starts)[packed.example]
    assert torch.equal(packed.rows - offsets, padded.rows - padded.example * length)


def test_a_row_of_one_sequence_and_of_one_token() -> None:
    one = TokenizedExample("one", (8, 9, 10), (False, True, True))
    short = TokenizedExample("short", (8, 9), (False, True))
    packed = collate_plain([one], pad_id=0, packed=True)
    assert packed.starts == (0, 3) and packed.rows.tolist() == [0, 1]
    packed = collate_plain([short, one, short], pad_id=0, packed=True)
    assert packed.starts == (0, 2, 5, 7) and packed.rows.tolist() == [0, 2, 3, 5]
    assert packed.example.tolist() == [0, 1, 1, 2]
    moved = packed.to("cpu")
    assert moved.starts == packed.starts and moved.attention_mask is None


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_those_of_the_padded_batch(kind: str) -> None:
    """mixtral_router_loss: its auxiliary loss is the mean over the tokens, and padding was none to it."""
    model = install_head(causal_lm(kind))
    assert packs(model, "on")
    assert (model.extra.aux_weight > 0) == (kind == "mixtral_router_loss")
    assert_one(model, items(EXAMPLES))
    assert_one(model, items(tiny.weighted(EXAMPLES)))


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_adapters_and_recomputed_activations(kind: str) -> None:
    model = apply_lora(tiny.model(kind), LoraConfig(rank=2))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    assert packs(model, "on")
    assert_one(model, items(EXAMPLES))
    _, packed = both(items(EXAMPLES))
    _, expected = gradients(model, packed)
    model.base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.base.enable_input_require_grads()
    assert_one(model, items(EXAMPLES))
    _, found = gradients(model, packed)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
def test_another_documents_tokens_change_no_bit_of_a_documents_losses(kind: str) -> None:
    model = tiny.model(kind)
    assert packs(model, "auto")
    found = list(EXAMPLES.values())[:6]
    before = result(model, collate_plain(found, pad_id=0, packed=True))
    for changed in range(len(found)):
        ids = tuple(7 + (token - 6) % (tiny.VOCAB - 7) for token in found[changed].input_ids)
        other = [replace(e, input_ids=ids) if i == changed else e for i, e in enumerate(found)]
        batch = collate_plain(other, pad_id=0, packed=True)
        nll = result(model, batch).nll
        kept = batch.example != changed
        assert torch.equal(nll[kept], before.nll[kept]) and not torch.equal(nll[~kept], before.nll[~kept])


def run(folder: Path, *flags: str, kind: str = "llama") -> Trainer:
    return train_pairs(
        tiny.config("optim.eps=1e-3", *flags), tiny.model(kind), EXAMPLES, SPLIT, folder=folder
    )


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_a_packed_run_ends_where_a_padded_one_does(kind: str, tmp_path: Path) -> None:
    runs = {name: run(tmp_path / name, f"train.packing={name}", kind=kind) for name in ("auto", "on", "off")}
    assert [runs[name].packed for name in runs] == [True, True, False]
    weights = {name: tiny.weights(found.model) for name, found in runs.items()}
    for name, weight in weights["off"].items():
        assert torch.equal(weights["on"][name], weights["auto"][name])
        torch.testing.assert_close(weights["auto"][name], weight, rtol=0, atol=2e-6, msg=name)
    records = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("auto", "off")]
    for ours, own in zip(*records, strict=True):
        for key in ("num_tokens", "num_mixed", "token_accuracy"):
            assert ours[key] == own[key]
        assert ours["loss"] == pytest.approx(own["loss"], rel=1e-5)


def test_the_reference_run_packs_too_and_its_online_scores_agree(tmp_path: Path) -> None:
    flags = ("reference.epochs=1", "optim.eps=1e-3")
    rows = [
        train_plain(tiny.config(*flags, f"train.packing={p}"), tiny.model(), EXAMPLES, folder=tmp_path / p)
        for p in ("on", "off")
    ]
    for ours, own in zip(*rows, strict=True):
        assert ours == {**own, "nll_sum": pytest.approx(own["nll_sum"], rel=1e-5)}


def test_a_model_that_cannot_pack_pads_or_is_refused_by_name(tmp_path: Path) -> None:
    for wanted in ("auto", "off"):
        model = install_head(causal_lm("mamba"))
        config = tiny.config(f"train.packing={wanted}", "train.max_steps=1")
        assert not train_pairs(config, model, EXAMPLES, SPLIT, folder=tmp_path / wanted).packed
    model = install_head(causal_lm("mamba"))
    with pytest.raises(
        ValueError, match=r"train\.packing: expected off or auto with MambaForCausalLM.*got on"
    ):
        train_pairs(tiny.config("train.packing=on"), model, EXAMPLES, SPLIT, folder=tmp_path / "on")


def test_a_checkpoint_knows_whether_its_run_packs(tmp_path: Path) -> None:
    padded = run(tmp_path, "train.packing=off", "train.epochs=1")
    # As in a checkpoint of before there was packing.
    assert padded.fingerprint["run"]["train.packing"] is None
    with pytest.raises(ValueError, match=r"another run: train\.packing is None there, 'on' here"):
        run(tmp_path, "train.epochs=1")
    assert run(tmp_path, "train.packing=off", "train.epochs=1").first_step == padded.total
    packed = run(tmp_path / "packed", "train.epochs=1")
    assert run(tmp_path / "packed", "train.packing=on", "train.epochs=1").first_step == packed.total
    with pytest.raises(ValueError, match=r"another run: train\.packing is 'on' there, None here"):
        run(tmp_path / "packed", "train.packing=off", "train.epochs=1")


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("batch_size", [1, 4, 32])
def test_figures_and_scores_do_not_depend_on_packing(kind: str, batch_size: int) -> None:
    model, found = tiny.model(kind), list(EXAMPLES.values())
    expected = evaluate_model(model, found, batch_size=4)
    scores = score_examples(model, found, checkpoint=0, step=1, batch_size=4)
    assert packs(model, "auto")
    ours = evaluate_model(model, found, batch_size=batch_size, packed=True)
    assert ours == {
        **expected,
        **{key: pytest.approx(expected[key], rel=1e-5) for key in ("nll", "perplexity")},
    }
    packed = score_examples(model, found, checkpoint=0, step=1, batch_size=batch_size, packed=True)
    for one, other in zip(packed, scores, strict=True):
        assert one == {**other, "nll_sum": pytest.approx(other["nll_sum"], rel=1e-5)}
    assert evaluate_model(model, found, batch_size=4) == expected  # padded again, bit for bit

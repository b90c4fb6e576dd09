"""``TrainingDynamicsCallback``: the scores of each epoch are those of the weights each batch was trained from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

from sftmix.scores.dynamics import read_dynamics
from sftmix.transformers import TrainingDynamicsCallback, patch_lm_head
from sftmix.transformers.callback import hashes_of
from tests.recipe import tiny

EXAMPLES = tiny.examples(13, longest=20)
OPTIONS: dict[str, Any] = {
    "per_device_train_batch_size": 4, "num_train_epochs": 2, "learning_rate": 0.0, "report_to": "none", "use_cpu": True,
    "disable_tqdm": True, "save_strategy": "no", "seed": 0,
}  # fmt: skip


def dataset(**changes: Any) -> Dataset:
    rows = []
    for example in EXAMPLES.values():
        labels = [i if s else -100 for i, s in zip(example.input_ids, example.supervised, strict=True)]
        rows.append({"id": example.id, "input_ids": list(example.input_ids), "labels": labels, **changes})
    return Dataset.from_list(rows)


def trainer(folder: Path, model: Any, **changes: Any) -> Trainer:
    tokenizer = tiny.tokenizer()
    arguments = TrainingArguments(str(folder), **{**OPTIONS, **changes})
    return Trainer(
        model, arguments, train_dataset=dataset(), processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
    )  # fmt: skip


def expected(model: Any) -> dict[str, tuple[float, int, float]]:
    found = {}
    for example in EXAMPLES.values():
        ids = torch.tensor([example.input_ids])
        with torch.no_grad():
            logits = model(ids).logits[0, :-1].float()
        bears = torch.tensor(example.supervised[1:])
        nll = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")[bears]
        top1 = (logits.argmax(-1) == ids[0, 1:])[bears].float()
        found[example.id] = (float(nll.sum()), len(nll), float(top1.mean()))
    return found


def check(path: Path, epochs: int = 2) -> None:
    """Without a learning rate every epoch scores the same weights."""
    found, truth = read_dynamics(path, "online"), expected(tiny.causal_lm())
    assert found.examples == sorted(EXAMPLES) and found.num_checkpoints == epochs
    for at, name in enumerate(found.examples):
        for epoch in range(epochs):
            assert found.nll_sum[epoch, at] == pytest.approx(truth[name][0], rel=1e-5)
            assert found.num_tokens[epoch, at] == truth[name][1]
            assert found.top1_share[epoch, at] == pytest.approx(truth[name][2], abs=1e-6)


@pytest.mark.parametrize("way", ["logits", "patched"])
def test_scores_of_trainer(tmp_path: Path, way: str) -> None:
    model = tiny.causal_lm()
    found = trainer(tmp_path, patch_lm_head(model) if way == "patched" else model)
    found.add_callback(TrainingDynamicsCallback(trainer=found))
    found.train()
    check(tmp_path / "dynamics.parquet")
    assert (tmp_path / "data_map.png").stat().st_size > 1000


@pytest.mark.parametrize("padding_free", [False, True])
def test_scores_of_trls_trainer(tmp_path: Path, padding_free: bool) -> None:
    trl = pytest.importorskip("trl")
    told = {
        **OPTIONS,
        "bf16": False,
        "gradient_checkpointing": True,
        "padding_free": padding_free,
        "max_length": None,
    }
    arguments = trl.SFTConfig(str(tmp_path), **told)
    found = trl.SFTTrainer(
        tiny.causal_lm(), arguments, train_dataset=dataset(source="here"), processing_class=tiny.tokenizer()
    )
    found.add_callback(TrainingDynamicsCallback(tmp_path / "scores" / "d.parquet", trainer=found))
    found.train()
    if (
        not padding_free
    ):  # whose attention on a CPU lets documents see each other, in TRL: the scores are of that
        check(tmp_path / "scores" / "d.parquet")
    assert read_dynamics(tmp_path / "scores" / "d.parquet").examples == sorted(EXAMPLES)


def test_training_moves_the_scores(tmp_path: Path) -> None:
    found = trainer(tmp_path, tiny.causal_lm(), learning_rate=0.01)
    found.add_callback(TrainingDynamicsCallback())
    found.train()
    scores = read_dynamics(tmp_path / "dynamics.parquet")
    assert scores.examples == sorted(map(str, range(len(EXAMPLES))))  # no trainer given: the rows' numbers
    assert scores.nll_sum[1].sum() < 0.99 * scores.nll_sum[0].sum()
    assert scores.step.tolist() == [[4] * 13, [8] * 13]


@pytest.mark.parametrize("step", [2, 4, 6])  # in the first epoch, at its end, in the second
def test_a_resumed_run_has_the_scores_of_a_whole_one(tmp_path: Path, step: int) -> None:
    told = {"learning_rate": 0.01, "save_strategy": "steps", "save_steps": 2}
    whole = trainer(tmp_path / "r", tiny.causal_lm(), **told)
    whole.add_callback(TrainingDynamicsCallback(tmp_path / "whole.parquet", trainer=whole))
    whole.train()
    again = trainer(tmp_path / "r", tiny.causal_lm(), **told)
    again.add_callback(TrainingDynamicsCallback(tmp_path / "again.parquet", trainer=again))
    again.train(resume_from_checkpoint=str(tmp_path / "r" / f"checkpoint-{step}"))
    assert (tmp_path / "again.parquet").read_bytes() == (tmp_path / "whole.parquet").read_bytes()


def test_an_epoch_that_is_not_whole_has_no_scores(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    found = trainer(tmp_path, tiny.causal_lm(), max_steps=6)
    found.add_callback(TrainingDynamicsCallback(trainer=found))
    found.train()
    check(tmp_path / "dynamics.parquet", epochs=1)
    assert "8 of 13 examples were met in epoch 1: it has no scores" in "".join(capfd.readouterr())


def test_what_cannot_be_told_apart_is_refused(tmp_path: Path) -> None:
    found = trainer(tmp_path, tiny.causal_lm())
    found.train_dataset = dataset(seq_lengths=[3])
    found.add_callback(TrainingDynamicsCallback(trainer=found))
    with pytest.raises(ValueError, match="packing: expected False"):
        found.train()
    other = trainer(tmp_path, tiny.causal_lm(), label_smoothing_factor=0.1)
    other.add_callback(TrainingDynamicsCallback(trainer=other))
    with pytest.raises(ValueError, match="labels: expected them among the model's inputs"):
        other.train()


def test_a_hash_does_not_depend_on_padding_or_neighbours() -> None:
    rows = [[5, 6, 7], [6, 5, 7, 0], [5], [5, 6, 7, 0]]
    alone = [int(hashes_of({"input_ids": torch.tensor([row])})[0]) for row in rows]
    assert len(set(alone)) == 4  # order and a trailing zero count
    left = torch.tensor([[0] * (6 - len(row)) + row for row in rows])
    right = torch.tensor([row + [0] * (6 - len(row)) for row in rows])
    for ids, mask in (
        (left, torch.tensor([[0] * (6 - len(row)) + [1] * len(row) for row in rows])),
        (right, torch.tensor([[1] * len(row) + [0] * (6 - len(row)) for row in rows])),
    ):
        assert hashes_of({"input_ids": ids, "attention_mask": mask})[0].tolist() == alone
    flat = {
        "input_ids": torch.tensor([[token for row in rows for token in row]]),
        "position_ids": torch.tensor([[t for row in rows for t in range(len(row))]]),
    }
    assert hashes_of(flat)[0].tolist() == alone
    long = torch.arange(9000)[None]
    assert int(hashes_of({"input_ids": long})[0]) != int(hashes_of({"input_ids": long.roll(1)})[0])

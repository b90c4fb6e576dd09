"""A tiny model, tokenizer and dataset for TRL's trainers, and ours on the same examples."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from sftmix.data.tokenized import TokenizedExample
from sftmix.trl import SFTMixConfig, SFTMixTrainer
from tests.recipe import tiny

EXAMPLES = tiny.examples(22, longest=20)
OPTIONS: dict[str, Any] = {
    "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_train_epochs": 2, "learning_rate": 0.01,
    "lr_scheduler_type": "constant", "weight_decay": 0.1, "use_cpu": True, "bf16": False, "save_strategy": "no",
    "report_to": "none", "logging_steps": 1, "disable_tqdm": True, "gradient_checkpointing": False, "seed": 0,
    "shuffle_dataset": False,
}  # fmt: skip
# Our loop with the same numbers: batches of 8, micro-batches of 4.
FLAGS = (
    "train.batch_size=8", "train.micro_batch_size=4", "train.epochs=2", "optim.lr=0.01", "optim.schedule=constant",
    "optim.warmup_ratio=0", "optim.weight_decay=0.1", "train.packing=off",
)  # fmt: skip


def dataset(examples: Mapping[str, TokenizedExample] = EXAMPLES, *, ids: bool = True) -> Dataset:
    """Examples in TRL's columns, with a column that nothing asks for."""
    rows = []
    for example in examples.values():
        labels = [i if s else -100 for i, s in zip(example.input_ids, example.supervised, strict=True)]
        row = {"input_ids": list(example.input_ids), "labels": labels, "source": "here"}
        rows.append({"id": example.id, **row} if ids else row)
    return Dataset.from_list(rows)


def config(folder: Path, **changes: Any) -> SFTMixConfig:
    return SFTMixConfig(str(folder), **{**OPTIONS, **changes})


def trainer(folder: Path, *, model: Any = None, rows: Dataset | None = None, **changes: Any) -> SFTMixTrainer:
    """On a tiny llama; options that are the trainer's own are passed to it, the rest to its configuration."""
    own = {
        name: changes.pop(name)
        for name in ("split", "dynamics", "peft_config", "eval_dataset", "callbacks", "optimizers")
        if name in changes
    }
    if not {"split", "dynamics"} & own.keys() and not {"reference", "dynamics"} & changes.keys():
        own["split"] = tiny.halves(dict(EXAMPLES))
    return SFTMixTrainer(
        tiny.causal_lm() if model is None else model, config(folder, **changes),
        train_dataset=dataset() if rows is None else rows, processing_class=tiny.tokenizer(), **own,
    )  # fmt: skip


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def assert_close(
    found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], atol: float
) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=0, atol=atol, msg=lambda text, n=name: f"{n}: {text}"
        )

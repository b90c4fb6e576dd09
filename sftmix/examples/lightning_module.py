"""SFTMix as a LightningModule.

    python -m sftmix.examples.lightning_module MODEL FILE.jsonl DYNAMICS.parquet OUT

FILE: JSON lines with ``prompt`` and ``completion``; DYNAMICS: their scores, by line number, such as ``sftmix score`` or
``TrainingDynamicsCallback`` leaves. The package lightning is needed.
"""

from __future__ import annotations

import sys
from typing import Any

import lightning
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from sftmix.config import MixupConfig
from sftmix.examples.plain_torch import read
from sftmix.model.causal_lm import install_head
from sftmix.scores.confidence import make_split
from sftmix.scores.dynamics import read_dynamics
from sftmix.transformers import PairCollator, PairDataset, PairSampler

BATCH = 8


class SFTMix(lightning.LightningModule):
    """A causal LM whose training step is the SFTMix loss of a batch of pairs."""

    def __init__(self, name: str, *, mixup_weight: float = 0.2, lr: float = 1e-4) -> None:
        super().__init__()
        self.model = install_head(AutoModelForCausalLM.from_pretrained(name))
        self.mixup_weight, self.lr = mixup_weight, lr

    def training_step(self, batch: dict[str, Any], index: int) -> torch.Tensor:
        out: Any = self.model(
            batch["input_ids"], batch["attention_mask"], batch["rows"], batch["target"], batch["lam"],
            mixup_weight=self.mixup_weight,
        )  # fmt: skip
        self.log("loss", out.loss, prog_bar=True)
        return out.loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


def main(name: str, data: str, dynamics: str, out: str, **options: Any) -> SFTMix:
    tokenizer = AutoTokenizer.from_pretrained(name)
    examples = read(data, tokenizer)
    module, mixup = SFTMix(name), MixupConfig()
    pairs = PairDataset(examples, make_split(read_dynamics(dynamics)), seed=0, alpha=mixup.alpha)
    loader = DataLoader(
        pairs, batch_size=BATCH, sampler=PairSampler(len(pairs)),
        collate_fn=PairCollator(
            mixup, seed=0, pad_id=tokenizer.pad_token_id or 0, vocab_size=module.model.vocab_size, packed=False,
            step_size=BATCH,
        ),
    )  # fmt: skip
    trainer = lightning.Trainer(
        **{"max_epochs": 1, "logger": False, "enable_checkpointing": False, **options}
    )
    trainer.fit(module, loader)
    module.model.base.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return module


if __name__ == "__main__":
    main(*sys.argv[1:])

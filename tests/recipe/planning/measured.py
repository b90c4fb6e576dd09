"""Real steps of the trainer, with what their tensors take, and the model of the same steps."""

from __future__ import annotations

import json
import random
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from sftmix.config import Config
from sftmix.data.tokenized import TokenizedExample
from sftmix.model.causal_lm import SFTMixModel, cast_parameters, install_head
from sftmix.model.lora import apply_lora
from sftmix.planning.activations import trace
from sftmix.planning.live import LiveBytes
from sftmix.planning.memory import Load, Memory, memory
from sftmix.planning.skeleton import Skeleton, build
from sftmix.training.batch import Batch
from sftmix.training.pairs import epoch_pairs
from sftmix.training.plan import Step, plan_steps
from sftmix.training.trainer import Trainer
from sftmix_kernels import LossBytes, SFTMixLoss, loss_bytes
from tests.recipe import tiny

LENGTH, PROMPT = 128, 32


@dataclass
class Case:
    """A model, and how it is trained."""

    kind: str
    sizes: dict[str, Any]
    dtype: str = "float32"
    sequences: int = 4  # of a micro-batch
    micro_batches: int = 1  # of a process and step
    flags: tuple[str, ...] = ()

    def config(self, processes: int = 1) -> Config:
        size = self.sequences * self.micro_batches * processes
        return tiny.config(
            f"train.batch_size={size}", f"train.micro_batch_size={self.sequences}", "train.epochs=1",
            f"model.dtype={self.dtype}", *self.flags,
        )  # fmt: skip

    def __str__(self) -> str:
        flags = " ".join(flag.removeprefix("train.") for flag in self.flags)
        tied = " tied" if self.sizes.get("tie_word_embeddings") else ""
        return f"{self.kind}{tied} {self.dtype} {self.sequences}x{self.micro_batches} {flags}".strip()


@dataclass
class Measured:
    """Bytes of a step that is not the first."""

    peak: int = 0
    between: int = 0  # when the step is over: parameters, main weights, moments
    after_forward: int = 0  # of the last micro-batch
    before_forward: int = 0
    peaks: list[int] = field(default_factory=list)


class Watched(Trainer):
    """Notes what is alive around the forward pass."""

    live: LiveBytes
    found: Measured

    def _loss(self, batch: Batch, sums_of_weights: tuple[float, float], *, aux_share: float) -> SFTMixLoss:
        self.found.before_forward = self.live.now
        loss = super()._loss(batch, sums_of_weights, aux_share=aux_share)
        self.found.after_forward = self.live.now
        return loss


def examples(count: int, vocab_size: int) -> dict[str, TokenizedExample]:
    """All but the first as long as can be, so that there is padding, and a mask."""
    draw, made = random.Random(0), {}
    for index in range(count):
        length = LENGTH if index else LENGTH - 8
        ids = tuple(draw.randrange(vocab_size) for _ in range(length))
        name = f"e{index:03d}"
        made[name] = TokenizedExample(name, ids, (False,) * PROMPT + (True,) * (length - PROMPT))
    return made


def built(case: Case) -> SFTMixModel:
    causal_lm = tiny.causal_lm(case.kind, **case.sizes)
    cast_parameters(causal_lm, getattr(torch, case.dtype))
    model = install_head(causal_lm)
    config = case.config()
    return apply_lora(model, config.lora) if config.train.tuning == "lora" else model


def measure(case: Case, live: LiveBytes, *, processes: int = 1, steps: int = 2) -> Measured:
    """Steps of ``case``; what is alive is asked of ``live`` after every operator."""
    config, model, found = case.config(processes), built(case), Measured()
    size = config.train.batch_size
    made = examples(size * steps, model.vocab_size)
    split = tiny.halves(made)

    def plan(epoch: int) -> list[Step]:
        pairs = epoch_pairs(split, seed=0, epoch=epoch, alpha=0.5)
        return plan_steps(pairs, made, epoch=epoch, batch_size=size, micro_batch_size=case.sequences)

    live.add([*model.parameters(), *model.buffers()])
    with tempfile.TemporaryDirectory() as folder, live:
        trainer = Watched(
            config, model, made, Path(folder), plan=plan, epochs=1, mixup_weight=0.2, stage="train"
        )
        trainer.live, trainer.found = live, found
        model.train()
        for step in plan(0):
            live.peak = live.now
            trainer._train_step(step)
            found.peaks.append(live.peak)
        found.peak, found.between = live.peak, live.now
    return found


def modelled(case: Case, *, shards: int = 1) -> tuple[Memory, Skeleton, LossBytes]:
    """The plan's memory of the same steps, from a config.json."""
    config = case.config()
    with tempfile.TemporaryDirectory() as folder:
        numbers = {"model_type": case.kind, **tiny.ARCHITECTURES[case.kind], **case.sizes}
        (Path(folder) / "config.json").write_text(json.dumps(numbers))
        told = tiny.config(f"model.name={folder}", f"model.dtype={case.dtype}").model
        skeleton, two = build(told, config.train.tuning, config.lora)
    kind = config.train.gradient_checkpointing
    kept = trace(two, sequences=case.sequences, length=LENGTH, checkpointing=kind)
    rows = case.sequences * (LENGTH - PROMPT)
    loss = loss_bytes(
        rows, skeleton.vocab_size, skeleton.hidden_size, skeleton.dtype, num_pairs=rows // 2,
        dweight=skeleton.head_trained,
    )  # fmt: skip
    load = Load(case.sequences, LENGTH, rows, rows // 2, case.micro_batches > 1)
    return memory(skeleton, kept, loss, load, shards=shards, on_cpu=True), skeleton, loss

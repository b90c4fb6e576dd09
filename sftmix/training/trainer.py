"""The training loop: one for the reference run, the next-token baseline and SFTMix.

The three differ in their plan (pairs or single examples) and in ``mixup_weight`` alone. Every micro-batch of
a step gets the step's global sums of weights as denominators (token counts, where all weigh 1), so its loss is
a share of the step's loss: summing over micro-batches and processes gives what one large batch would. The host
reads results once a step.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch

from sftmix.config import Config
from sftmix.data.digest import examples_digest
from sftmix.data.tokenized import TokenizedExample
from sftmix.model.causal_lm import SFTMixModel
from sftmix.model.lora import is_lora
from sftmix.model.packing import packs
from sftmix.model.parallel import join_world, shard, sum_over_world
from sftmix.progress import say
from sftmix.rank import is_main
from sftmix.scores.halves import Split
from sftmix.scores.online import OnlineDynamics, Row
from sftmix.training import checkpoint
from sftmix.training.batch import Batch, blank_batch, check_batch
from sftmix.training.metrics import MetricsWriter, Record, StepResults
from sftmix.training.optim import (
    TrainableWeights,
    build_optimizer,
    clip_gradients,
    learning_rate,
    set_learning_rate,
)
from sftmix.training.pairs import epoch_order, epoch_pairs
from sftmix.training.plan import Step, collate_chunk, denominators, digest, plain_entries, plan_steps
from sftmix.training.randomness import own_randomness, seed_chunk
from sftmix_kernels import SFTMixLoss

Progress = Callable[[int, int, Record], None]  # (step, total, record)
OnPoint = Callable[[int, int], None]  # (index of the scoring point, step)


def train_pairs(
    config: Config, model: SFTMixModel, examples: Mapping[str, TokenizedExample], split: Split, *,
    folder: str | Path, pad_id: int = 0, progress: Progress | None = None,
    identity: Mapping[str, Any] | None = None,
) -> Trainer:  # fmt: skip
    """Train on pairs of confident and unconfident examples, ``config.train.method`` being sftmix or ntp.

    Both draw the same batches; they differ in the weight of the Mixup term, which is 0 for ntp. Resumes from
    ``folder/checkpoints`` when a checkpoint is there. Raises ``ValueError`` for a checkpoint of another run
    and for a loss that is not finite. ``identity``: see ``Trainer``.
    """

    def plan(epoch: int) -> list[Step]:
        entries = epoch_pairs(split, seed=config.seed, epoch=epoch, alpha=config.mixup.alpha)
        return plan_steps(entries, examples, epoch=epoch, **_sizes(config))

    weight = config.mixup.weight if config.train.method == "sftmix" else 0.0
    trainer = Trainer(
        config, model, examples, Path(folder), plan=plan, epochs=config.train.epochs, mixup_weight=weight,
        stage=f"train-{config.train.method}", pad_id=pad_id, progress=progress, identity=identity,
    )  # fmt: skip
    trainer.run()
    return trainer


def train_plain(
    config: Config, model: SFTMixModel, examples: Mapping[str, TokenizedExample], *,
    folder: str | Path, pad_id: int = 0, on_point: OnPoint | None = None, progress: Progress | None = None,
    identity: Mapping[str, Any] | None = None,
) -> list[Row]:  # fmt: skip
    """The reference run: next-token prediction on single examples for ``config.reference.epochs`` epochs.

    ``on_point(index, step)`` is called at ``reference.checkpoints_per_epoch`` evenly spaced steps of each
    epoch, on every process; a resumed run calls it again for the points of the epoch it repeats. Returns the
    online dynamics: one row per example and epoch, taken while training, as ``write_dynamics`` wants them.
    ``identity``: see ``Trainer``.
    """

    def plan(epoch: int) -> list[Step]:
        entries = plain_entries(epoch_order(list(examples), seed=config.seed, epoch=epoch))
        return plan_steps(entries, examples, epoch=epoch, **_sizes(config))

    trainer = Trainer(
        config, model, examples, Path(folder), plan=plan, epochs=config.reference.epochs, mixup_weight=0.0,
        stage="reference", pad_id=pad_id, progress=progress, on_point=on_point,
        points_per_epoch=config.reference.checkpoints_per_epoch, online=True, identity=identity,
    )  # fmt: skip
    trainer.run()
    return trainer.online.rows


def _sizes(config: Config) -> dict[str, int]:
    return {"batch_size": config.train.batch_size, "micro_batch_size": config.train.micro_batch_size}


def point_steps(steps: int, points: int) -> list[int]:
    """The steps of an epoch (from 1) after which an evenly spaced scoring point comes, the last one included.

    Raises ``ValueError`` for more points than steps.
    """
    if points > steps:
        raise ValueError(
            f"reference.checkpoints_per_epoch: expected at most the epoch's {steps} steps, got {points}"
        )
    return [math.ceil(steps * (index + 1) / points) for index in range(points)]


class Trainer:
    """Runs a plan from its start, or from the newest checkpoint in ``folder``, to its end.

    ``plan(epoch)`` gives an epoch's steps, as many in every epoch. Under torchrun it joins the process group
    and shards the model; files and ``progress`` are the first process's. ``step`` counts the optimizer steps
    done, ``total`` those of the run, and ``first_step`` is where this process began. ``identity`` is what a resumed
    run must share beside its settings, by name: ``examples``, their digest (made here when it is not given), and
    whatever else the caller knows, such as the base model's files. Dropout is drawn from the seed, ``stage``, the step
    and the chunk (``randomness``); the caller's random states come back when ``run`` ends.
    """

    def __init__(
        self, config: Config, model: SFTMixModel, examples: Mapping[str, TokenizedExample], folder: Path, *,
        plan: Callable[[int], list[Step]], epochs: int, mixup_weight: float, stage: str, pad_id: int = 0,
        progress: Progress | None = None, on_point: OnPoint | None = None, points_per_epoch: int = 1,
        online: bool = False, identity: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self.config, self.examples, self.folder, self.plan = config, examples, folder, plan
        self.mixup_weight, self.stage = mixup_weight, stage
        # Padding is masked and bears no loss: any token of the vocabulary serves.
        self.pad_id = pad_id if 0 <= pad_id < model.vocab_size else 0
        self.progress, self.on_point = progress, on_point
        if is_lora(model) != (config.train.tuning == "lora"):
            kind = "adapters" if config.train.tuning == "lora" else "no adapters"
            raise ValueError(f"model: expected {kind} with train.tuning={config.train.tuning}")
        first = plan(0)
        self.steps_per_epoch = len(first)
        self.points = point_steps(len(first), points_per_epoch)
        self.total = min(len(first) * epochs, config.train.max_steps or len(first) * epochs)
        self.step = self.first_step = 0
        self.world = join_world(model.device)
        if config.train.gradient_checkpointing:
            model.base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.auxiliary = model.extra.aux_weight
        self.packed = packs(model, config.train.packing)  # measured before the model is sharded
        told = dict(identity or {})
        if "examples" not in told:
            told["examples"] = examples_digest(examples)
        run = {**self._run_fingerprint(first), **told}
        self.fingerprint = {"fingerprint": checkpoint.fingerprint(model), "run": run}
        self.model = shard(model, self.world)
        self.weights = TrainableWeights(self.model)
        self.optimizer = build_optimizer(self.weights, config.optim)
        self.online = OnlineDynamics(examples, enabled=online)

    def run(self) -> None:
        """Train to the end. Raises ``ValueError`` for a loss that is not finite; checkpoints stay."""
        self._resume()
        self.model.train()
        path = self.folder / "metrics.jsonl"
        writer = MetricsWriter(path, step=self.step) if is_main() else None
        try:
            with own_randomness(self.model.device):
                while self.step < self.total:
                    self._run_epoch(self.step // self.steps_per_epoch, writer)
        finally:
            self.model.eval()
            self.weights.release()
            if writer is not None:
                writer.close()

    def _run_epoch(self, epoch: int, writer: MetricsWriter | None) -> None:
        steps = self.plan(epoch)
        assert len(steps) == self.steps_per_epoch, "every epoch has as many steps"
        for step in steps[self.step - epoch * self.steps_per_epoch :]:
            record = self._train_step(step)
            due = self.step % self.config.train.log_every == 0 or self.step == self.total
            if writer is not None and due:
                writer.write(record)
            if self.progress is not None and is_main():
                self.progress(self.step, self.total, record)
            if self.on_point is not None and step.index + 1 in self.points:
                self.model.eval()
                self.on_point(epoch * len(self.points) + self.points.index(step.index + 1), self.step)
                self.model.train()
            if self.step == self.total:
                break
        self.online.close_epoch(epoch, self.step, self.world)
        self._save()

    def _train_step(self, step: Step) -> Record:
        """One optimizer step; its record. Everything is queued before the one read of the results."""
        started = time.perf_counter()
        lr = learning_rate(self.config.optim, self.step, self.total)
        set_learning_rate(self.optimizer, lr)
        sums_of_weights = denominators(step, self.examples, mixup=self.config.mixup, seed=self.config.seed)
        results = StepResults(step, self.model.device, sums_of_weights)
        for start in range(0, len(step.chunks), self.world.size):
            self._train_chunk(step, start + self.world.rank, results)
        grad_norm = clip_gradients(self.weights, self.config.optim.max_grad_norm)
        self.optimizer.step()
        self.weights.zero_grad()
        self.weights.copy_to_model()
        self.step += 1
        sums = sum_over_world(results.sums(), self.world)
        values = torch.cat([sums, grad_norm.detach().to(sums).view(1)]).tolist()
        results.check(self.step, values)
        # The epoch as it is after the step: 1.0 when every example was seen once.
        record = {"step": self.step, "epoch": step.epoch + (step.index + 1) / self.steps_per_epoch, "lr": lr}
        return {
            **record,
            **results.record(values, self.mixup_weight, auxiliary=bool(self.auxiliary)),
            **_cost(step, started, self.model),
        }

    def _train_chunk(self, step: Step, index: int, results: StepResults) -> None:
        """Forward and backward of one chunk; a process with none left takes part with a blank one."""
        if index < len(step.chunks):
            batch = collate_chunk(
                step.chunks[index], step, self.examples,
                mixup=self.config.mixup, seed=self.config.seed, pad_id=self.pad_id, packed=self.packed,
            )  # fmt: skip
            check_batch(batch, self.model.vocab_size)
        else:
            batch = blank_batch(self.pad_id)
        ids = batch.ids
        share = _weight_sum(batch) / results.denominators[0]
        batch = batch.to(self.model.device, non_blocking=True)
        seed_chunk(self.config.seed, self.stage, self.step, index)
        loss = self._loss(batch, results.denominators, aux_share=share)
        loss.loss.backward()
        if index < len(step.chunks):
            results.add(index, loss, batch, aux=self.model.aux_loss, share=share)
            self.online.add(loss.nll, loss.is_top1, batch.example, ids)

    def _loss(self, batch: Batch, sums_of_weights: tuple[float, float], *, aux_share: float) -> SFTMixLoss:
        options: dict[str, Any] = {"mixup_weight": self.mixup_weight, "impl": self.config.train.impl}
        options["aux_share"] = aux_share
        # Python numbers: FSDP does not round them, as it might a tensor.
        options["ntp_denominator"], options["mixup_denominator"] = sums_of_weights
        options["row_weight"], options["pair_weight"] = batch.row_weight, batch.pair_weight
        options["position_ids"], options["starts"] = batch.position_ids, batch.starts
        tensors = (batch.input_ids, batch.attention_mask, batch.rows, batch.target, batch.lam)
        return cast(SFTMixLoss, self.model(*tensors, **options))

    def _run_fingerprint(self, first: list[Step]) -> dict[str, Any]:
        """The settings that a resumed run must share."""
        config = self.config
        lora = dataclasses.asdict(config.lora) if config.train.tuning == "lora" else None
        settings: dict[str, Any] = {
            "seed": config.seed, "steps": self.total, "train.batch_size": config.train.batch_size,
            "train.tuning": config.train.tuning, "lora": lora, "mixup weight": self.mixup_weight,
            "mixup.lam": config.mixup.lam if self.mixup_weight else None,
            "examples and pairs of the first epoch": digest(first, lam=self.mixup_weight > 0),
        }  # fmt: skip
        settings["train.packing"] = "on" if self.packed else None  # None is what older checkpoints say
        if self.auxiliary:  # it is the mean over chunks of what each is by itself
            settings["train.micro_batch_size"] = config.train.micro_batch_size
        return {**settings, **{f"optim.{k}": v for k, v in dataclasses.asdict(config.optim).items()}}

    def _save(self) -> None:
        checkpoint.save_checkpoint(
            self.folder / "checkpoints", self.weights, self.optimizer,
            meta={"step": self.step, **self.fingerprint}, extra={"online": self.online.rows},
        )  # fmt: skip

    def _resume(self) -> None:
        """Go on from the newest whole checkpoint; a damaged one is said, and removed once an older one is read."""
        found = checkpoint.complete_checkpoints(self.folder / "checkpoints")
        damaged: list[Path] = []
        while found:
            path = found.pop()
            try:
                state = checkpoint.load_checkpoint(path, self.weights, self.optimizer, self.fingerprint)
            except checkpoint.DamagedError as error:
                say(f"{self.stage}: {error}; going back to {found[-1].name if found else 'the beginning'}")
                damaged.append(path)
                continue
            self.step = self.first_step = int(state["step"])
            self.online.rows = state["extra"]["online"]
            break
        checkpoint.remove(damaged)


def _weight_sum(batch: Batch) -> float:
    """Sum of the weights of a batch's rows, on the CPU: its share of the step is this over the step's sum."""
    return len(batch.rows) if batch.row_weight is None else float(batch.row_weight.double().sum())


def _cost(step: Step, started: float, model: SFTMixModel) -> Record:
    seconds = time.perf_counter() - started
    cost: Record = {"seconds": seconds, "tokens_per_second": step.num_supervised / seconds}
    if model.device.type == "cuda":
        cost["peak_memory_bytes"] = torch.cuda.max_memory_allocated(model.device)
    return cost

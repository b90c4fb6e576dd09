"""The training loop: one for the reference run, the next-token baseline and SFTMix.

The three differ in their plan (pairs or single examples) and in ``mixup_weight`` alone. Every micro-batch of
a step gets the step's global sums of weights as denominators (token counts, where all weigh 1), so its loss is
a share of the step's loss: summing over micro-batches and processes gives what one large batch would. The host
reads results once a step.
"""

from __future__ import annotations

import dataclasses
import time
from bisect import bisect_left
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from sftmix.config import Config, MixupConfig
from sftmix.data.digest import examples_digest
from sftmix.data.tokenized import TokenizedExample
from sftmix.model.causal_lm import SFTMixModel
from sftmix.model.flops import ModelFlops
from sftmix.model.lora import is_lora
from sftmix.model.packing import packs
from sftmix.model.parallel import join_world, shard
from sftmix.progress import say
from sftmix.rank import is_main
from sftmix.scores.online import OnlineDynamics
from sftmix.training import checkpoint
from sftmix.training.batch import Batch, blank_batch, check_batch
from sftmix.training.blocks import compile_blocks, recompute
from sftmix.training.metrics import MetricsWriter, Record, StepResults, peak_memory, utilisation
from sftmix.training.optim import (
    TrainableWeights,
    build_optimizer,
    clip_gradients,
    learning_rate,
    scheduled,
    set_learning_rate,
)
from sftmix.training.plan import Step, collate_chunk, denominators, digest, most_rows, point_steps
from sftmix.training.randomness import own_randomness, seed_chunk
from sftmix.training.saving import Saver
from sftmix.training.signals import Stopped
from sftmix_kernels import SFTMixLoss

Progress = Callable[[int, int, Record], None]  # (step, total, record)
OnPoint = Callable[[int, int], None]  # (index of the scoring point, step)


class Trainer:
    """Runs a plan from its start, or from the newest checkpoint in ``folder``, to its end.

    ``plan(epoch)`` gives an epoch's steps, as many in every epoch. Under torchrun it joins the process group
    and shards the model; files and ``progress`` are the first process's. ``step`` counts the optimizer steps
    done, ``total`` those of the run, and ``first_step`` is where this process began. ``identity`` is what a resumed
    run must share beside its settings, by name: ``examples``, their digest (made here when it is not given), and
    whatever else the caller knows, such as the base model's files. Dropout is drawn from the seed, ``stage``, the step
    and the chunk (``randomness``); the caller's random states come back when ``run`` ends.

    A checkpoint is written after every epoch, at the end, and as often as ``train.checkpoint_every`` says. SIGTERM,
    SIGINT and SIGUSR1 end the run after a checkpoint of the step that is under way (``Stopped``, exit code 128 + the
    signal). A step whose loss or gradient is not finite is left out, with a word; ``train.max_bad_steps`` in a
    row may be.
    """

    def __init__(
        self, config: Config, model: SFTMixModel, examples: Mapping[str, TokenizedExample], folder: Path, *,
        plan: Callable[[int], list[Step]], epochs: int, mixup_weight: float, stage: str, pad_id: int = 0,
        progress: Progress | None = None, on_point: OnPoint | None = None, points_per_epoch: int = 1,
        online: bool = False, identity: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self.config, self.examples, self.folder, self.plan = config, examples, folder, plan
        self.mixup_weight, self.stage = mixup_weight, stage  # the weight is the schedule's peak
        self.ntp_weight = config.mixup.ntp_weight if mixup_weight else 1.0
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
        self.step = self.first_step = self.bad_steps = 0
        self.world = join_world(model.device)
        recompute(model, config.train.gradient_checkpointing)
        if config.train.compile:
            compile_blocks(model)
        self.auxiliary, self.flops = model.extra.aux_weight, ModelFlops(model)
        self.packed = packs(
            model, config.train.packing, compiled=config.train.compile
        )  # before it is sharded
        told = dict(identity or {})
        if "examples" not in told:
            told["examples"] = examples_digest(examples)
        run = {**self._run_fingerprint(first), **told}
        self.fingerprint = {"fingerprint": checkpoint.fingerprint(model), "run": run}
        self.model = shard(
            model, self.world, head_sharding=config.train.head_sharding, rows=most_rows(first, examples),
            replicas=config.train.replicas,
        )  # fmt: skip
        self.device = self.model.device  # sharding moves a model that was read on the CPU
        self.weights = TrainableWeights(self.model)
        self.optimizer = build_optimizer(self.weights, config.optim)
        self.online = OnlineDynamics(examples, enabled=online)
        self.saver = Saver(folder / "checkpoints", config.train)

    def run(self) -> None:
        """Train to the end. Raises ``ValueError`` for losses that are not finite, ``Stopped`` after a signal."""
        self._resume()
        self.saver.begin(self.first_step)
        self.model.train()
        path = self.folder / "metrics.jsonl"
        report_to = self.config.train.report_to
        writer = (
            MetricsWriter(path, step=self.step, report_to=report_to, run=self.config) if is_main() else None
        )
        try:
            with own_randomness(self.device), self.saver.signals.caught():
                while self.step < self.total:
                    self._run_epoch(self.step // self.steps_per_epoch, writer)
                self.saver.settle()
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
            ends = step.index + 1 == self.steps_per_epoch
            if writer is not None and (
                self.step % self.config.train.log_every == 0 or self.step == self.total
            ):
                writer.write(record)
            if self.progress is not None and is_main():
                self.progress(self.step, self.total, record)
            # A run that max_steps ends is scored where it ends.
            if self.on_point is not None and (step.index + 1 in self.points or self.step == self.total):
                self.model.eval()
                self.on_point(epoch * len(self.points) + bisect_left(self.points, step.index + 1), self.step)
                self.model.train()
            if ends:
                self.online.close_epoch(epoch, self.step, self.world)
            if ends or self.step == self.total or self.due:
                self._save(epoch)
            if self.signal:
                self.saver.settle()
                raise Stopped(self.signal, f"{self.stage} step {self.step} of {self.total}")
            if self.step == self.total:
                break

    def _train_step(self, step: Step) -> Record:
        """One optimizer step; its record. Its forward and backward are queued before the one read of the results."""
        started, self.data_seconds = time.perf_counter(), 0.0
        lr, mixup = learning_rate(self.config.optim, self.step, self.total), self._mixup_now()
        set_learning_rate(self.optimizer, lr)
        sums_of_weights = denominators(step, self.examples, mixup=self.config.mixup, seed=self.config.seed)
        results = StepResults(step, self.device, sums_of_weights)
        for start in range(0, len(step.chunks), self.world.size):
            self._train_chunk(step, start + self.world.rank, results)
        grad_norm = clip_gradients(self.weights, self.config.optim.max_grad_norm)
        values, words = results.exchange(grad_norm, self.saver.word(), self.world)
        self.step += 1
        self.due, self.signal = self.saver.heard(words, self.step)
        skipped = self._is_bad(results.problem(self.step, values))
        if not skipped:
            self.optimizer.step()
            self.weights.copy_to_model()
        self.weights.zero_grad()
        # The epoch as it is after the step: 1.0 when every example was seen once.
        record = {"step": self.step, "epoch": step.epoch + (step.index + 1) / self.steps_per_epoch, "lr": lr}
        return {
            **record,
            **results.record(values, mixup, auxiliary=bool(self.auxiliary)),
            **({"skipped": True} if skipped else {}),
            **self._cost(step, started),
        }

    def _is_bad(self, problem: str | None) -> bool:
        """Whether the step is to be left out; ``ValueError`` where too many in a row were."""
        self.bad_steps = 0 if problem is None else self.bad_steps + 1
        if problem is None:
            return False
        if self.bad_steps > self.config.train.max_bad_steps:
            raise ValueError(f"{problem}; the checkpoints before it are kept")
        say(f"warning: {self.stage}: left out, {problem}")
        return True

    def _cost(self, step: Step, started: float) -> Record:
        """What the step took; the newest checkpoint's stall is told once."""
        seconds = time.perf_counter() - started
        cost: Record = {
            "seconds": seconds, "data_seconds": self.data_seconds, "tokens_per_second": step.num_supervised / seconds,
            "peak_memory_bytes": peak_memory(self.device),
            **utilisation(self.flops.of(step.lengths(self.examples), step.num_supervised), seconds, self.world.size),
        }  # fmt: skip
        if self.saver.stall:
            cost["checkpoint_seconds"], self.saver.stall = self.saver.stall, 0.0
        return cost

    def _train_chunk(self, step: Step, index: int, results: StepResults) -> None:
        """Forward and backward of one chunk; a process with none left takes part with a blank one."""
        began = time.perf_counter()
        if index < len(step.chunks):
            batch = collate_chunk(
                step.chunks[index], step, self.examples,
                mixup=self.config.mixup, seed=self.config.seed, pad_id=self.pad_id, packed=self.packed,
            )  # fmt: skip
            check_batch(batch, self.model.vocab_size)
        else:
            batch = blank_batch(self.pad_id)
        self.data_seconds += time.perf_counter() - began
        ids = batch.ids
        share = _weight_sum(batch) / results.denominators[0]
        batch = batch.to(self.device, non_blocking=True)
        seed_chunk(self.config.seed, self.stage, self.step, index)
        loss = self._loss(batch, results.denominators, aux_share=share)
        loss.loss.backward()
        if index < len(step.chunks):
            results.add(index, loss, batch, aux=self.model.aux_loss, share=share)
            self.online.add(loss.nll, loss.is_top1, batch.example, ids)

    def _loss(self, batch: Batch, sums_of_weights: tuple[float, float], *, aux_share: float) -> SFTMixLoss:
        options: dict[str, Any] = {"mixup_weight": self._mixup_now(), "impl": self.config.train.impl}
        options["aux_share"] = aux_share
        # Python numbers: FSDP does not round them, as it might a tensor.
        options["ntp_denominator"], options["mixup_denominator"] = sums_of_weights
        options["row_weight"], options["pair_weight"] = self._row_weight(batch), batch.pair_weight
        options["position_ids"], options["starts"] = batch.position_ids, batch.starts
        tensors = (batch.input_ids, batch.attention_mask, batch.rows, batch.target, batch.lam)
        return cast(SFTMixLoss, self.model(*tensors, **options))

    def _mixup_now(self) -> float:
        """mu in the step that comes next."""
        mixup = self.config.mixup
        return scheduled(self.mixup_weight, mixup.schedule, mixup.warmup_ratio, self.step, self.total)

    def _row_weight(self, batch: Batch) -> Tensor | None:
        """The rows' weights [N] with that of the next-token term; None where all are 1."""
        if self.ntp_weight == 1:
            return batch.row_weight
        ones = torch.ones(batch.rows.numel(), device=batch.rows.device)
        return self.ntp_weight * (ones if batch.row_weight is None else batch.row_weight)

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
        if self.mixup_weight:  # a default is not named: older checkpoints do not name it
            added = {name: getattr(config.mixup, name) for name in ("ntp_weight", "schedule", "warmup_ratio")}
            settings |= {f"mixup.{k}": v for k, v in added.items() if v != getattr(MixupConfig(), k)}
        settings["train.packing"] = "on" if self.packed else None  # None is what older checkpoints say
        if self.auxiliary:  # it is the mean over chunks of what each is by itself
            settings["train.micro_batch_size"] = config.train.micro_batch_size
        return {**settings, **{f"optim.{k}": v for k, v in dataclasses.asdict(config.optim).items()}}

    def _save(self, epoch: int) -> None:
        meta = {"step": self.step, "bad_steps": self.bad_steps, **self.fingerprint}
        online = self.online.so_far(epoch, self.world)
        self.saver.save(
            checkpoint.snapshot(
                self.weights, self.optimizer, copy=self.saver.beside, meta=meta, online=online
            )
        )

    def _resume(self) -> None:
        """Go on from the newest whole checkpoint; a damaged one is said, and removed once an older one is read."""
        found = checkpoint.complete_checkpoints(self.folder / "checkpoints")
        damaged: list[Path] = []
        while found:
            path = found.pop()
            try:
                state = checkpoint.load_checkpoint(path, self.weights, self.optimizer, self._expected(path))
            except checkpoint.DamagedError as error:
                say(f"{self.stage}: {error}; going back to {found[-1].name if found else 'the beginning'}")
                damaged.append(path)
                continue
            self.step = self.first_step = int(state.meta["step"])
            self.bad_steps = int(state.meta["bad_steps"])
            self.online.restore(state.online, self.step // self.steps_per_epoch)
            if self.step < self.total:
                say(f"{self.stage}: goes on after step {self.step} of {self.total}")
            break
        checkpoint.remove(damaged)

    def _expected(self, path: Path) -> dict[str, Any]:
        """What the checkpoint must say; a finished run may be given more steps, with a word about its schedule."""
        done = checkpoint.finished_steps(path)
        if done is None or done >= self.total:
            return self.fingerprint
        say(
            f"{self.stage}: {done} steps were finished; the next {self.total - done} follow the schedule of "
            f"{self.total} steps from there, which is not what one run of {self.total} steps gives"
        )
        run = {**self.fingerprint["run"], "steps": done}
        return {**self.fingerprint, "run": run}


def _weight_sum(batch: Batch) -> float:
    """Sum of the weights of a batch's rows, on the CPU: its share of the step is this over the step's sum."""
    return len(batch.rows) if batch.row_weight is None else float(batch.row_weight.double().sum())

"""The ways of training that ``bench.loop`` times, each in a thread that does one step when it is its turn."""

from __future__ import annotations

import json
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WAYS = ("bare", "ntp", "sftmix", "trl")
BATCH = 8
SETTINGS = (
    "train.tuning=full", f"train.batch_size={BATCH}", f"train.micro_batch_size={BATCH}", "data.max_length=256",
    "train.epochs=1", "reference.epochs=1", "reference.checkpoints_per_epoch=1", "reference.dynamics=online",
    "optim.lr=1e-5", "evaluate.num_samples=0",
)  # fmt: skip


class Ground:
    """What all ways share: examples, halves, the steps of an epoch, and where the model is read from.

    ``longest``: the examples with the most tokens of all there are, rather than the first.
    """

    def __init__(self, folder: Path, pairs: int, flags: Sequence[str], *, longest: bool = False) -> None:
        from sftmix.config import override
        from sftmix.demo.job import prepare
        from sftmix.model.dtype import settle_dtype
        from sftmix.run.session import Session
        from sftmix.scores.halves import Split
        from sftmix.training.pairs import epoch_pairs
        from sftmix.training.plan import plan_steps

        config, _ = prepare(str(folder), minutes=1, flags=[])
        limit = [] if longest else [f"data.limit={pairs}"]
        config = settle_dtype(override(config, [*SETTINGS, *limit, *flags]), torch.device("cpu"))
        self.session = Session(config)
        self.config, self.examples = self.session.config, dict(self.session.train)
        if longest:
            by_length = sorted(self.examples.values(), key=lambda row: (-len(row.input_ids), row.id))
            self.examples = {row.id: row for row in by_length[:pairs]}
        names = sorted(self.examples)
        self.halves = Split(names[: len(names) // 2], names[len(names) // 2 :])
        entries = epoch_pairs(self.halves, seed=config.seed, epoch=0, alpha=config.mixup.alpha)
        self.steps = plan_steps(entries, self.examples, epoch=0, batch_size=BATCH, micro_batch_size=BATCH)
        self.source = self.session.models.source

    def model(self) -> Any:
        from sftmix.model.load import load_model

        return load_model(self.source, device=DEVICE, tuning="full")[0]


class Turn:
    """A way of training in a thread of its own, which waits at the end of every step until it is told to go on."""

    def __init__(self, way: Callable[[Callable[[], None]], None]) -> None:
        self._go, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._error: BaseException | None = None
        self._ended = False
        self._began = self.seconds = 0.0
        self._thread = threading.Thread(target=self._run, args=(way,), daemon=True)
        self._thread.start()

    def _run(self, way: Callable[[Callable[[], None]], None]) -> None:
        self._wait()
        try:
            way(self._end_of_step)
        except BaseException as error:
            self._error = error
        self._ended = True
        self._done.release()

    def _wait(self) -> None:
        self._go.acquire()
        self._began = time.perf_counter()

    def _end_of_step(self) -> None:
        self.seconds = time.perf_counter() - self._began
        self._done.release()
        self._wait()

    def next(self) -> float:
        """Let it do one step more; the seconds from the end of its last step, without the waiting."""
        self._go.release()
        self._done.acquire()
        if self._error is not None:
            raise self._error
        if self._ended:
            raise ValueError("steps: the way of training has none left")
        return self.seconds

    def finish(self) -> None:
        """Let it end: nothing waits for it any more."""
        while not self._ended:
            self._go.release()
            self._done.acquire()
        self._thread.join()
        if self._error is not None:
            raise self._error


class Ours:
    """Our trainer; ``method`` is ntp or sftmix."""

    def __init__(self, ground: Ground, method: str, folder: Path) -> None:
        self.ground, self.method, self.folder = ground, method, folder
        self.model = ground.model()

    def __call__(self, end_of_step: Callable[[], None], steps: int) -> None:
        from sftmix.config import override
        from sftmix.training.runs import train_pairs

        flags = [f"train.method={self.method}", f"train.max_steps={steps}", "train.checkpoint_every=9 h"]
        train_pairs(
            override(self.ground.config, flags), self.model, self.ground.examples, self.ground.halves,
            folder=self.folder, progress=lambda *_: end_of_step(),
        )  # fmt: skip

    def data_seconds(self) -> float:
        """The median over steps of the seconds that making batches took."""
        lines = (self.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return statistics.median(json.loads(line)["data_seconds"] for line in lines)


class Bare:
    """The same steps of next-token training without a loop around them, their batches made beforehand."""

    def __init__(self, ground: Ground) -> None:
        from sftmix.model.packing import packs
        from sftmix.training.plan import collate_chunk

        self.model, self.optim = ground.model(), ground.config.optim
        packed = packs(self.model, ground.config.train.packing)
        self.batches = [
            collate_chunk(
                step.chunks[0], step, ground.examples, mixup=ground.config.mixup, seed=0, pad_id=0, packed=packed
            )
            for step in ground.steps
        ]  # fmt: skip

    def __call__(self, end_of_step: Callable[[], None], steps: int) -> None:
        from sftmix.training.optim import TrainableWeights, build_optimizer, clip_gradients

        self.model.train()
        weights = TrainableWeights(self.model)
        optimizer = build_optimizer(weights, self.optim)
        for made in self.batches[:steps]:
            batch = made.to(DEVICE)
            loss = self.model(
                batch.input_ids, batch.attention_mask, batch.rows, batch.target, batch.lam, mixup_weight=0.0,
                ntp_denominator=len(batch.rows), mixup_denominator=max(1, len(batch.lam)),
                position_ids=batch.position_ids, starts=batch.starts,
            ).loss  # fmt: skip
            loss.backward()
            clip_gradients(weights, 1.0)
            optimizer.step()
            weights.zero_grad()
            weights.copy_to_model()
            loss.item()
            end_of_step()
        weights.release()


class Trl:
    """``SFTTrainer`` on the same sequences in the same order, in the same data type, nothing recomputed."""

    def __init__(self, ground: Ground, folder: Path) -> None:
        from transformers import AutoModelForCausalLM

        dtype = getattr(torch, ground.config.model.dtype)
        model: Any = AutoModelForCausalLM.from_pretrained(ground.source.name, dtype=dtype)
        self.model, self.folder = model.to(DEVICE), folder
        self.tokenizer = ground.session.tokenizer
        rows = [ground.examples[name] for step in ground.steps for name in step.ids()]
        self.rows = [
            {"input_ids": list(row.input_ids), "completion_mask": [int(bears) for bears in row.supervised]}
            for row in rows
        ]

    def __call__(self, end_of_step: Callable[[], None], steps: int) -> None:
        from datasets import Dataset
        from torch.utils.data import SequentialSampler
        from transformers import TrainerCallback
        from trl import SFTConfig, SFTTrainer

        class Clock(TrainerCallback):  # type: ignore[misc]
            def on_step_end(self, *args: Any, **kwargs: Any) -> None:
                end_of_step()

        class InOrder(SFTTrainer):  # type: ignore[misc]
            def _get_train_sampler(self, dataset: Any = None) -> Any:
                return SequentialSampler(dataset or self.train_dataset)

        options = SFTConfig(
            output_dir=str(self.folder), per_device_train_batch_size=BATCH, max_steps=steps, learning_rate=1e-5,
            use_cpu=DEVICE.type == "cpu",
            gradient_checkpointing=False, bf16=False, save_strategy="no", report_to="none", logging_steps=1,
            disable_tqdm=True, max_length=None, completion_only_loss=True, dataloader_num_workers=0,
        )  # fmt: skip
        trainer = InOrder(
            model=self.model, args=options, train_dataset=Dataset.from_list(self.rows[: BATCH * steps]),
            processing_class=self.tokenizer, callbacks=[Clock()],
        )  # fmt: skip
        trainer.train()


def make(way: str, ground: Ground, folder: Path) -> Any:
    """A way of training by its name, with a model of its own."""
    if way == "bare":
        return Bare(ground)
    return Trl(ground, folder / way) if way == "trl" else Ours(ground, way, folder / way)


def known() -> tuple[str, ...]:
    """The ways that can run here: trl's needs its package."""
    return WAYS if find_spec("trl") else WAYS[:3]

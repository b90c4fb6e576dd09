"""The ways of training that ``bench.loop`` times, each in a process that does one step when it is its turn.

``python -m bench.loop_ways WAY --folder F ...``, which ``Turn`` starts: a line on its input is a turn, and a line of
JSON on its output says what the step took. A process each: as threads of one, some ways took twice as long.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TextIO

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WAYS = ("bare", "ntp", "sftmix", "trl", "padded")
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
    """A way of training in a process of its own, which waits at the end of every step until it is told to go on."""

    def __init__(self, command: Sequence[str]) -> None:
        self._command = " ".join(command)
        self._child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.about: dict[str, Any] = {}  # what it said at its end

    def _ask(self) -> dict[str, Any]:
        assert self._child.stdin is not None and self._child.stdout is not None
        self._child.stdin.write("\n")
        self._child.stdin.flush()
        line = self._child.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._command}: ended with {self._child.wait()}")
        told: dict[str, Any] = json.loads(line)
        return told

    def next(self) -> float:
        """Let it do one step more; the seconds from the end of its last step, without the waiting."""
        told = self._ask()
        if "seconds" not in told:
            raise ValueError("steps: the way of training has none left")
        return float(told["seconds"])

    def finish(self) -> None:
        """Let it end: nothing waits for it any more."""
        while "seconds" in (told := self._ask()):
            pass
        self.about = told
        self._child.communicate()
        if self._child.returncode:
            raise RuntimeError(f"{self._command}: ended with {self._child.returncode}")


class Pace:
    """The child's end of ``Turn``: what the way of training calls at the end of every step."""

    def __init__(self, turns: TextIO, told: TextIO) -> None:
        self._turns, self._told = turns, told
        self._began = 0.0

    def wait(self) -> None:
        if not self._turns.readline():
            raise SystemExit("the process that gives turns is gone")
        self._began = time.perf_counter()

    def end_of_step(self) -> None:
        seconds = time.perf_counter() - self._began
        self.tell({"seconds": seconds})
        self.wait()

    def tell(self, what: dict[str, Any]) -> None:
        self._told.write(json.dumps(what) + "\n")
        self._told.flush()


class Ours:
    """Our trainer; ``method`` is ntp or sftmix, or padded, which is ntp without packing."""

    def __init__(self, ground: Ground, method: str, folder: Path) -> None:
        self.ground, self.folder = ground, folder
        self.flags = (
            ["train.method=ntp", "train.packing=off"] if method == "padded" else [f"train.method={method}"]
        )
        self.model = ground.model()

    def __call__(self, end_of_step: Callable[[], None], steps: int) -> None:
        from sftmix.config import override
        from sftmix.training.runs import train_pairs

        flags = [*self.flags, f"train.max_steps={steps}", "train.checkpoint_every=9 h"]
        train_pairs(
            override(self.ground.config, flags), self.model, self.ground.examples, self.ground.halves,
            folder=self.folder, progress=lambda *_: end_of_step(),
        )  # fmt: skip


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


def command(
    way: str, folder: Path, *, steps: int, pairs: int, longest: bool, flags: Sequence[str]
) -> list[str]:
    """What starts a way of training that takes turns; ``folder``: one that bench.loop prepared."""
    words = [sys.executable, "-m", "bench.loop_ways", way, "--folder", str(folder), "--steps", str(steps)]
    return [
        *words,
        "--pairs",
        str(pairs),
        *["--longest"] * longest,
        *(p for flag in flags for p in ("--set", flag)),
    ]


def resident(peak: bool) -> int:
    """Bytes of this process in memory, or the most of them so far."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    name = "VmHWM:" if peak else "VmRSS:"
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def main() -> None:
    told = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a trainer prints is not for the process that gives turns
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("way", choices=WAYS)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--pairs", type=int, required=True)
    parser.add_argument("--longest", action="store_true")
    parser.add_argument("--set", action="append", default=[])
    options = parser.parse_args()
    ground = Ground(options.folder, options.pairs, options.set, longest=options.longest)
    pace = Pace(sys.stdin, told)
    with tempfile.TemporaryDirectory() as temporary:
        way = make(options.way, ground, Path(temporary))
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak is counted from here
        pace.wait()
        way(pace.end_of_step, options.steps)
        peak = torch.cuda.max_memory_allocated() if DEVICE.type == "cuda" else resident(peak=True)
        pace.tell({"peak": peak})


def known() -> tuple[str, ...]:
    """The ways that can run here: trl's needs its package."""
    return tuple(way for way in WAYS if way != "trl" or find_spec("trl"))


if __name__ == "__main__":
    main()

"""The training loop beside a bare one and TRL's trainer, and what a run costs around it: ``python -m bench.loop``.

SmolLM2-135M-Instruct, all weights, 8 sequences a step of at most 256 tokens: questions and answers from the docstrings
of Python's standard library, the same in every step of every way. The ways take turns in rounds of a few steps; a step
is timed from the end of the one before. ``bare`` has its batches made beforehand and does nothing but forward,
backward, clipping and the optimizer's step, on our model and loss. ``trl`` is ``SFTTrainer`` on the model as
transformers reads it, in the same data type and attention, without gradient checkpointing; it needs the package trl.
Then: the seconds of a whole run's stages beside plain fine-tuning's, a checkpoint's stall, and reading one. The record
goes to bench/results/loop.json and a section of RESULTS.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from bench.loop_words import section
from bench.machine import commit, device_name

RECORD = Path(__file__).with_name("results") / "loop.json"
PACKAGES = ("torch", "transformers", "trl")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WAYS = ("bare", "ntp", "sftmix", "trl")
SETTINGS = (
    "train.tuning=full", "train.batch_size=8", "train.micro_batch_size=8", "data.max_length=256", "train.epochs=1",
    "reference.epochs=1", "reference.checkpoints_per_epoch=1", "reference.dynamics=online", "optim.lr=1e-5",
    "evaluate.num_samples=0",
)  # fmt: skip


class Ground:
    """What all ways share: examples, halves, the steps of an epoch, and where the model is read from."""

    def __init__(self, folder: Path, pairs: int, flags: Sequence[str]) -> None:
        from sftmix.config import override
        from sftmix.demo.job import prepare
        from sftmix.model.dtype import settle_dtype
        from sftmix.run.session import Session
        from sftmix.scores.halves import Split
        from sftmix.training.pairs import epoch_pairs
        from sftmix.training.plan import plan_steps

        config, _ = prepare(str(folder), minutes=1, flags=[])
        config = settle_dtype(
            override(config, [*SETTINGS, f"data.limit={pairs}", *flags]), torch.device("cpu")
        )
        self.session = Session(config)
        self.config, self.examples = self.session.config, dict(self.session.train)
        names = sorted(self.examples)
        self.halves = Split(names[: len(names) // 2], names[len(names) // 2 :])
        entries = epoch_pairs(self.halves, seed=config.seed, epoch=0, alpha=config.mixup.alpha)
        self.steps = plan_steps(entries, self.examples, epoch=0, batch_size=8, micro_batch_size=8)
        self.source = self.session.models.source

    def model(self) -> Any:
        from sftmix.model.load import load_model

        return load_model(self.source, device=DEVICE, tuning="full")[0]


class Ours:
    """Rounds of our trainer on one model; ``method`` is ntp or sftmix."""

    def __init__(self, ground: Ground, model: Any, method: str) -> None:
        self.ground, self.model, self.method = ground, model, method

    def round(self, steps: int, folder: Path) -> list[float]:
        """Seconds of each step but the first, from the end of the one before."""
        from sftmix.config import override
        from sftmix.training.runs import train_pairs

        config = override(self.ground.config, [f"train.method={self.method}", f"train.max_steps={steps}"])
        ends: list[float] = []
        train_pairs(
            config, self.model, self.ground.examples, self.ground.halves, folder=folder,
            progress=lambda *_: ends.append(time.perf_counter()),
        )  # fmt: skip
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        self.data_share = statistics.median(r["data_seconds"] / r["seconds"] for r in map(json.loads, lines))
        return [b - a for a, b in pairwise(ends)]


class Bare:
    """The same steps without a loop around them."""

    def __init__(self, ground: Ground, model: Any) -> None:
        from sftmix.model.packing import packs
        from sftmix.training.plan import collate_chunk

        self.model = model
        packed = packs(model, ground.config.train.packing)
        self.batches = [
            collate_chunk(
                step.chunks[0], step, ground.examples, mixup=ground.config.mixup, seed=0, pad_id=0, packed=packed
            )
            for step in ground.steps
        ]  # fmt: skip
        self.optim = ground.config.optim

    def round(self, steps: int, folder: Path) -> list[float]:
        from sftmix.training.optim import TrainableWeights, build_optimizer, clip_gradients

        self.model.train()
        weights = TrainableWeights(self.model)
        optimizer = build_optimizer(weights, self.optim)
        ends = []
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
            ends.append(time.perf_counter())
        weights.release()
        self.model.eval()
        return [b - a for a, b in pairwise(ends)]


class Trl:
    """``SFTTrainer`` on the same sequences in the same order."""

    def __init__(self, ground: Ground) -> None:
        from transformers import AutoModelForCausalLM

        dtype = getattr(torch, ground.config.model.dtype)
        model: Any = AutoModelForCausalLM.from_pretrained(ground.source.name, dtype=dtype)
        self.model = model.to(DEVICE)
        self.tokenizer = ground.session.tokenizer
        rows = [ground.examples[name] for step in ground.steps for name in step.ids()]
        self.rows = [
            {"input_ids": list(row.input_ids), "completion_mask": [int(bears) for bears in row.supervised]}
            for row in rows
        ]

    def round(self, steps: int, folder: Path) -> list[float]:
        from datasets import Dataset
        from torch.utils.data import SequentialSampler
        from transformers import TrainerCallback
        from trl import SFTConfig, SFTTrainer

        ends: list[float] = []

        class Clock(TrainerCallback):  # type: ignore[misc]
            def on_step_end(self, *args: Any, **kwargs: Any) -> None:
                ends.append(time.perf_counter())

        class InOrder(SFTTrainer):  # type: ignore[misc]
            def _get_train_sampler(self, dataset: Any = None) -> Any:
                return SequentialSampler(dataset or self.train_dataset)

        options = SFTConfig(
            output_dir=str(folder), per_device_train_batch_size=8, max_steps=steps, learning_rate=1e-5,
            use_cpu=DEVICE.type == "cpu",
            gradient_checkpointing=False, bf16=False, save_strategy="no", report_to="none", logging_steps=1,
            disable_tqdm=True, max_length=None, completion_only_loss=True, dataloader_num_workers=0,
        )  # fmt: skip
        trainer = InOrder(
            model=self.model, args=options, train_dataset=Dataset.from_list(self.rows[: 8 * steps]),
            processing_class=self.tokenizer, callbacks=[Clock()],
        )  # fmt: skip
        trainer.train()
        return [b - a for a, b in pairwise(ends)]


def compare(ground: Ground, ways: Sequence[str], *, rounds: int, steps: int) -> dict[str, Any]:
    """Seconds of each way's steps by round, and the tokens of a step."""
    model = ground.model()
    made: dict[str, Any] = {}
    for way in ways:
        made[way] = (
            Bare(ground, model)
            if way == "bare"
            else Trl(ground)
            if way == "trl"
            else Ours(ground, model, way)
        )
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory() as temporary:
        for number in range(-1, rounds):  # the first warms up
            turn = max(number, 0) % len(ways)  # each round begins one way later
            for way in [*ways[turn:], *ways[:turn]]:
                found = made[way].round(2 if number < 0 else steps, Path(temporary) / f"{way}{number}")
                if number >= 0:
                    seconds[way] += found
    told = [[step.num_supervised, sum(step.lengths(ground.examples))] for step in ground.steps[1:steps]]
    return {
        "seconds": seconds, "tokens": told * rounds,
        "data_share": {way: made[way].data_share for way in ways if way in ("ntp", "sftmix")},
    }  # fmt: skip


def pipeline(ground: Ground) -> dict[str, float]:
    """Seconds of each stage of a run with online dynamics, and of next-token training on the same batches."""
    from sftmix.run import stages

    session, seconds = ground.session, {}
    todo: list[tuple[str, Callable[[], Any]]] = [
        ("reference", lambda: stages.reference(session)), ("score", lambda: stages.score(session)),
        ("split", lambda: stages.split(session)), ("train-ntp", lambda: stages.train(session, "ntp")),
        ("train-sftmix", lambda: stages.train(session, "sftmix")),
    ]  # fmt: skip
    for name, stage in todo:
        started = time.perf_counter()
        stage()
        seconds[name] = time.perf_counter() - started
    return seconds


def saving(ground: Ground) -> dict[str, float]:
    """Seconds that a checkpoint stops the training for, written at once and beside it, and that reading one takes."""
    from sftmix.training.checkpoint import load_checkpoint, snapshot
    from sftmix.training.optim import TrainableWeights, build_optimizer
    from sftmix.training.saving import Saver

    weights = TrainableWeights(ground.model())
    optimizer = build_optimizer(weights, ground.config.optim)
    for master in weights.masters.values():
        master.grad = torch.zeros_like(master)
    optimizer.step()
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as temporary:
        for step, name in enumerate(("at once", "beside"), start=1):
            train = ground.config.train
            saver = Saver(Path(temporary) / name, train)
            saver.beside = name == "beside"
            started = time.perf_counter()
            state = snapshot(weights, optimizer, copy=saver.beside, meta={"step": step}, online=[])
            saver.save(state)
            found[name] = time.perf_counter() - started
            saver.settle()
        path = Path(temporary) / "beside" / "step-00000002"
        found["bytes"] = sum(file.stat().st_size for file in path.iterdir())
        started = time.perf_counter()
        load_checkpoint(path, weights, optimizer, {})
        found["reading"] = time.perf_counter() - started
    return found


def measure(
    ways: Sequence[str], *, rounds: int, steps: int, pairs: int, flags: Sequence[str], command: str
) -> Any:
    with tempfile.TemporaryDirectory() as temporary:
        ground = Ground(Path(temporary) / "run", max(pairs, 8 * steps), flags)
        return {
            **compare(ground, ways, rounds=rounds, steps=steps), "dtype": ground.config.model.dtype,
            "saving": saving(ground), "stages": pipeline(ground), "device": device_name(DEVICE.type),
            "versions": {name: metadata.version(name) for name in PACKAGES if find_spec(name)},
            "threads": torch.get_num_threads(), "commit": commit(), "command": command,
        }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.loop", description=__doc__)
    parser.add_argument("--ways", default=",".join(WAYS[: 4 if find_spec("trl") else 3]))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5, help="a round and way")
    parser.add_argument("--pairs", type=int, default=64, help="training examples of the whole run")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KNOB=VALUE", help="knobs of the recipe"
    )
    parser.add_argument("--out", type=Path, default=RECORD)
    options = parser.parse_args(argv)
    told = [f"--{k} {v}" for k, v in vars(options).items() if k in ("ways", "rounds", "steps", "pairs")]
    told += [f"--set {flag}" for flag in options.set]
    record = measure(
        options.ways.split(","), rounds=options.rounds, steps=options.steps, pairs=options.pairs,
        flags=options.set, command=" ".join(["python -m bench.loop", *told]),
    )  # fmt: skip
    options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(section(record))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""The training loop beside a bare one and TRL's trainer, and what a run costs around it: ``python -m bench.loop``.

SmolLM2-135M-Instruct, all weights, 8 sequences a step of at most 256 tokens: questions and answers from the docstrings
of Python's standard library, the same in every step of every way; ``--longest`` takes the longest of them. Each way
trains a model of its own in a process of its own, and two or three take turns step by step, so that what the machine
does besides falls on them alike. ``bare`` has its batches made beforehand and does nothing but forward, backward,
clipping and the optimizer's step, on our model and loss. ``padded`` is our next-token training without packing.
``trl`` is ``SFTTrainer`` on the model as transformers reads it, in the same data type and attention, without gradient
checkpointing; it needs the package trl. Then where a step's time goes by torch's profiler, the host's part of our
loop, peak memory, the seconds of a whole run's stages beside plain fine-tuning's, a checkpoint's stall, and reading
one. The records go to bench/results and sections of RESULTS.md.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from bench.loop_profile import by_kind, host_work
from bench.loop_ways import BATCH, DEVICE, Ground, Turn, command, known, make
from bench.loop_words import section
from bench.machine import commit, device_name

RECORDS = (
    Path(__file__).with_name("results") / "loop.json",
    Path(__file__).with_name("results") / "loop_long.json",
)
PACKAGES = ("torch", "transformers", "trl")
WARM_UP = 2
# Ways that take turns together: few at a time, as each holds a model, its gradients and its moments.
SESSIONS = (("bare", "ntp"), ("ntp", "sftmix", "padded"), ("sftmix", "trl"))


def compare(ground: Ground, options: argparse.Namespace, folder: Path, pairs: int) -> dict[str, Any]:
    """Seconds of each way's steps by session, what a step of them holds, and peak memory."""
    asked, sessions = options.ways.split(","), []
    memory: dict[str, int] = {}
    for ways in ([way for way in session if way in asked] for session in SESSIONS):
        if len(ways) > 1:
            seconds, peaks = take_turns(ways, options, folder, pairs)
            sessions.append(seconds)
            memory |= peaks
    steps = ground.steps[WARM_UP : WARM_UP + options.steps]
    told = [[step.num_supervised, sum(step.lengths(ground.examples))] for step in steps]
    return {"sessions": sessions, "tokens": told, "memory": memory}


def take_turns(
    ways: Sequence[str], options: argparse.Namespace, folder: Path, pairs: int
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Seconds of each way's steps, and each process's peak memory in bytes."""
    steps = WARM_UP + options.steps
    told: Any = {"steps": steps, "pairs": pairs, "longest": options.longest, "flags": options.set}
    turns = {way: Turn(command(way, folder, **told)) for way in ways}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for step in range(steps):
        at = step % len(ways)
        for way in [*ways[at:], *ways[:at]]:
            took = turns[way].next()
            if step >= WARM_UP:
                seconds[way].append(took)
    for turn in turns.values():
        turn.finish()
    return seconds, {way: turn.about["peak"] for way, turn in turns.items()}


def profiles(ground: Ground, ways: Sequence[str], folder: Path) -> dict[str, dict[str, float]]:
    """Milliseconds a step by kind of operator, each way by itself, three steps after one."""
    return {way: by_kind(make(way, ground, folder), skip=1, steps=3) for way in ways if way != "bare"}


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


def measure(options: argparse.Namespace, command: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as temporary:
        folder, pairs = Path(temporary), BATCH * (WARM_UP + options.steps)
        ground = Ground(folder / "run", pairs, options.set, longest=options.longest)
        found = compare(ground, options, folder / "run", pairs)
        found["profile"] = profiles(ground, options.ways.split(","), folder / "profiles")
        found["host"] = host_work(ground)
        if not options.longest:
            found |= {"saving": saving(ground), "stages": pipeline(ground)}
        return {
            **found, "dtype": ground.config.model.dtype, "device": device_name(DEVICE.type), "longest": options.longest,
            "versions": {name: metadata.version(name) for name in PACKAGES if find_spec(name)},
            "threads": torch.get_num_threads(), "commit": commit(), "command": command,
        }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.loop", description=__doc__)
    parser.add_argument("--ways", default=",".join(known()))
    parser.add_argument("--steps", type=int, default=20, help="that each way is timed for")
    parser.add_argument(
        "--longest",
        action="store_true",
        help="the longest texts, and the steps alone, without a run's stages",
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KNOB=VALUE", help="knobs of the recipe"
    )
    parser.add_argument("--out", type=Path, help="default: loop.json, or loop_long.json, in bench/results")
    options = parser.parse_args(argv)
    told = [f"--ways {options.ways}", f"--steps {options.steps}", *["--longest"] * options.longest]
    told += [f"--set {flag}" for flag in options.set]
    record = measure(options, " ".join(["python -m bench.loop", *told]))
    out = options.out or RECORDS[options.longest]
    out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(section(record))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Kills a run at random moments, over all stages, until it ends: it must equal one that nobody disturbed.

``python -m tests.recipe.run.soak FOLDER [--kills 20] [--seed 0] [--kind full]``; ``make soak`` runs every kind. Each
start is a child forked from a process that has imported everything, so that most of its life is work. A child is
killed (SIGKILL, or SIGTERM, which it may answer with a checkpoint) at a random moment of a stage drawn beforehand:
the stages and how long each lasts are seen in the undisturbed run, so that a slow machine is killed in as many of
them as a fast one. What a child left is taken up by the next.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sftmix.training.signals import Stopped, end_at_signals
from tests.recipe import tiny
from tests.recipe.run.small import same, sftmix, trained

FLAGS = [
    "--model.dtype", "float32", "--train.batch_size=4", "train.micro_batch_size=2", "--train.epochs", "2",
    "--optim.lr", "0.01", "--reference.epochs", "2", "--data.heldout_fraction", "0.2", "--evaluate.max_new_tokens", "3",
    "--reference.checkpoints_per_epoch=2", "--evaluate.batch_size=2",
]  # fmt: skip
KINDS = {
    "full": ["--reference.dynamics=both", "--train.checkpoint_every=1 step"],
    "online": ["--reference.dynamics=online", "--train.checkpoint_every=3 steps"],
    "beside": ["--train.checkpoint_every=1 step", "--train.async_checkpoint=true"],
    "dropout": [
        "--train.checkpoint_every=2 steps",
        "--train.tuning=lora",
        "--lora.dropout=0.3",
        "--export=both",
    ],
    "epochs": ["--train.checkpoint_every=1 h"],
}


def material(folder: Path) -> tuple[Path, Path]:
    """A tiny model and 30 conversations in its words."""
    tiny.causal_lm().save_pretrained(folder / "model")
    tiny.tokenizer().save_pretrained(folder / "model")
    draw = random.Random(0)
    rows = [
        {"prompt": words(draw, 3), "completion": words(draw, 2 + n % 7)} for n in range(30)
    ]  # about 24 of them train: six steps an epoch
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "model", folder / "pairs.jsonl"


def words(draw: random.Random, count: int) -> str:
    return " ".join(f"w{draw.randrange(50)}" for _ in range(count))


def start(call: Callable[[], Any], log: Path) -> int:
    """Fork a child that makes the call; its process id. Its exit code is 0, the signal's, or 1 with a traceback."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        with log.open("a") as out:
            os.dup2(out.fileno(), 1)
            os.dup2(out.fileno(), 2)
        end_at_signals()
        call()
        code = 0
    except Stopped as stopped:
        code = int(stopped.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def ended(child: int) -> int | None:
    """The exit code of a child that is done, None while it runs."""
    done, status = os.waitpid(child, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if done else None


def watch(child: int, folder: Path) -> dict[str, float]:
    """Let a run end: every stage it was seen in, in order, and the seconds it was seen there. It must end well."""
    seen: dict[str, float] = {}
    begun = last = time.monotonic()
    while (code := ended(child)) is None:
        assert time.monotonic() - begun < 300
        time.sleep(0.002)
        now = time.monotonic()
        stage = stage_of(folder)
        seen[stage], last = seen.get(stage, 0.0) + now - last, now
    assert code == 0, code
    return seen


def kill_in(
    child: int, folder: Path, stage: str, seen: dict[str, float], part: float, number: int
) -> int | None:
    """Send the signal at such a part of that stage, or of a later one if that is behind it already.

    The exit code; None where the child died of the signal.
    """
    order = list(seen)
    moment: float | None = None
    at_start = 0.0 if stage == "before" else seen["before"]  # an earlier child's stage goes on after so long
    deadline = time.monotonic() + 300
    while moment is None or time.monotonic() < moment:
        if (code := ended(child)) is not None:
            return code
        assert time.monotonic() < deadline
        now = stage_of(folder)
        if moment is None and (now not in seen or order.index(now) >= order.index(stage)):
            moment = time.monotonic() + at_start + part * seen[stage]
        at_start = 0.0
        time.sleep(0.002)
    os.kill(child, number)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    return None if code in (-number, 128 + number) else code


def soak(folder: Path, kind: str, *, kills: int, seed: int) -> dict[str, Any]:
    """Kill a run of one kind so often and let it end; what happened. ``AssertionError`` where it is another run."""
    files = material(folder)

    def run(name: str) -> Callable[[], Any]:
        return lambda: sftmix(
            "run", "--model", files[0], "--data", files[1], "--run-dir", folder / name, *FLAGS, *KINDS[kind]
        )

    log = folder / "log.txt"
    seen = watch(start(run("whole"), log), folder / "whole")
    draw = random.Random(seed)
    killed: list[str] = []
    while len(killed) < kills:  # one run at a time, killed on its way at moments in the order of the stages
        worth = [stage for stage, seconds in seen.items() if seconds > 0.05]
        drawn = draw.sample(worth, min(len(worth), kills - len(killed)))
        for stage in sorted(drawn, key=worth.index):
            number = draw.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM])
            code = kill_in(start(run("killed"), log), folder / "killed", stage, seen, draw.random(), number)
            assert code in (None, 0), log.read_text()[-3000:]
            killed.append("ended" if code == 0 else stage_of(folder / "killed"))
        watch(start(run("killed"), log), folder / "killed")
        compare(folder)
        shutil.rmtree(folder / "killed")
    return {
        "kind": kind,
        "seed": seed,
        "seconds": {k: round(v, 2) for k, v in seen.items()},
        "killed_in": killed,
    }


def stage_of(folder: Path) -> str:
    """The stage that was begun last; ``before`` where none was."""
    path = folder / "stages.json"
    record = json.loads(path.read_text()) if path.exists() else {}
    begun = [stage for stage, entry in record.items() if entry["state"] == "begun"]
    return begun[-1] if begun else (f"after {list(record)[-1]}" if record else "before")


def compare(folder: Path) -> None:
    """Exported weights, scores, halves, held-out figures and every record's numbers are the same, to the bit."""
    one, other = folder / "whole", folder / "killed"
    for method in ("ntp", "sftmix"):
        assert same(trained(one, method), trained(other, method)), method
    for name in ("dynamics.parquet", "split.parquet", "evaluation.json"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    for stage in ("reference", "train-ntp", "train-sftmix"):
        assert losses(one / stage) == losses(other / stage), stage


def losses(stage: Path) -> list[Any]:
    lines = (stage / "metrics.jsonl").read_text().splitlines()
    return [[json.loads(line)[key] for key in ("step", "loss", "grad_norm", "lr")] for line in lines]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", choices=sorted(KINDS), action="append")
    options = parser.parse_args()
    torch.set_num_threads(1)  # and no thread pool that a fork would lose
    import sftmix.run.stages  # before the forks: every import of a run

    assert sftmix.run.stages
    for kind in options.kind or sorted(KINDS):
        folder = options.folder / f"{kind}-{options.seed}"
        folder.mkdir(parents=True)
        print(json.dumps(soak(folder, kind, kills=options.kills, seed=options.seed)), flush=True)


if __name__ == "__main__":
    main()

"""Checkpoints in the middle of an epoch, signals, a writer beside the training, and runs that are lengthened."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from sftmix.config import load_config
from sftmix.model.causal_lm import SFTMixModel
from sftmix.sections import interval
from sftmix.training import saving
from sftmix.training.checkpoint import complete_checkpoints
from sftmix.training.metrics import Record, read_metrics
from sftmix.training.runs import train_pairs, train_plain
from sftmix.training.signals import Stopped
from sftmix.training.trainer import Trainer
from tests.recipe import tiny
from tests.recipe.hurt import hurt
from tests.recipe.training.test_trainer import MODELS, Killed, kill_at, same

EXAMPLES = tiny.examples(41)  # six steps an epoch
SPLIT = tiny.halves(EXAMPLES)


def run(folder: Path, *flags: str, model: SFTMixModel | None = None, progress: Any = None) -> Trainer:
    model = tiny.model() if model is None else model
    return train_pairs(tiny.config(*flags), model, EXAMPLES, SPLIT, folder=folder, progress=progress)


def names(folder: Path) -> list[int]:
    return [int(path.name[-8:]) for path in complete_checkpoints(folder / "checkpoints")]


def without_times(folder: Path) -> list[Record]:
    told = (
        "seconds",
        "data_seconds",
        "tokens_per_second",
        "peak_memory_bytes",
        "checkpoint_seconds",
        "model_tflops",
        "model_flops_utilisation",
    )
    return [{k: v for k, v in r.items() if k not in told} for r in read_metrics(folder / "metrics.jsonl")]


@pytest.mark.parametrize(
    "text, seconds, steps",
    [("10 min", 600, None), ("90s", 90, None), ("2 hours", 7200, None), ("0.5 h", 1800, None), ("7 steps", None, 7),
     ("1 step", None, 1), (" 10 MIN ", 600, None)],
)  # fmt: skip
def test_an_interval_is_a_time_or_a_number_of_steps(
    text: str, seconds: float | None, steps: int | None
) -> None:
    found = interval("train.checkpoint_every", text)
    assert (found.seconds, found.steps) == (seconds, steps)


@pytest.mark.parametrize("text", ["10", "ten minutes", "0 min", "-3 steps", "1.5 steps", "min", "10 days"])
def test_another_interval_is_refused_with_the_configuration(text: str) -> None:
    with pytest.raises(ValueError, match=r"train\.checkpoint_every: expected a time or a number of steps"):
        load_config(None, ["run_dir=r", "model.name=m", "data.train=d", f"train.checkpoint_every={text}"])


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("stops", [(1,), (4,), (6,), (7, 9), (2, 3, 11)])
def test_killed_at_any_step_it_goes_on_bit_for_bit(tmp_path: Path, kind: str, stops: tuple[int, ...]) -> None:
    """Also twice in one epoch and at its edge; with dropout; every number of metrics.jsonl is the same."""
    flags = ["train.checkpoint_every=1 step", *(["train.tuning=lora"] if kind == "lora" else [])]
    whole = run(tmp_path / "whole", *flags, model=MODELS[kind]())
    for stop in stops:
        with pytest.raises(Killed):
            run(tmp_path / "killed", *flags, model=MODELS[kind](), progress=kill_at(stop))
    again = run(tmp_path / "killed", *flags, model=MODELS[kind]())
    assert again.first_step == stops[-1] - 1  # the kill comes between the step and its checkpoint
    assert same(whole, again)
    for name, master in whole.weights.masters.items():
        assert torch.equal(master, again.weights.masters[name])
        one, other = whole.optimizer.state[master], again.optimizer.state[again.weights.masters[name]]
        assert one.keys() == other.keys()
        assert all(torch.equal(value, other[key]) for key, value in one.items())
    assert without_times(tmp_path / "whole") == without_times(tmp_path / "killed")


def test_killed_inside_a_step_between_two_micro_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(tmp_path / "whole")
    calls: list[int] = []
    real = Trainer._train_chunk

    def kill(self: Trainer, step: Any, index: int, results: Any) -> None:
        calls.append(index)
        if len(calls) == 10:
            assert index > 0
            raise Killed
        real(self, step, index, results)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_train_chunk", kill)
        with pytest.raises(Killed):
            run(tmp_path / "killed", "train.checkpoint_every=2 steps")
    assert names(tmp_path / "killed") == [2, 4]
    assert same(whole, run(tmp_path / "killed", "train.checkpoint_every=2 steps"))


def test_online_scores_of_half_an_epoch_are_in_the_checkpoint(tmp_path: Path) -> None:
    config = tiny.config("train.checkpoint_every=1 step")
    expected = train_plain(config, tiny.model(), EXAMPLES, folder=tmp_path / "whole")
    for stop in (3, 6, 8):
        with pytest.raises(Killed):
            train_plain(config, tiny.model(), EXAMPLES, folder=tmp_path / "killed", progress=kill_at(stop))
    assert train_plain(config, tiny.model(), EXAMPLES, folder=tmp_path / "killed") == expected
    assert len(expected) == 2 * len(EXAMPLES)


def test_the_clock_decides_and_so_many_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(saving.time, "monotonic", lambda: now[0])

    def tick(step: int, total: int, record: Record) -> None:
        now[0] += 20.0

    flags = ("train.checkpoint_every=1 min", "train.keep_checkpoints=9")
    run(tmp_path, *flags, progress=tick)
    # The time of a step is told after it: due after the fourth, seventh (an epoch's end between them) and so on.
    assert names(tmp_path) == [4, 6, 10, 12]


def test_by_default_ten_minutes_and_two(tmp_path: Path) -> None:
    config = tiny.config()
    assert interval("", config.train.checkpoint_every).seconds == 600
    run(tmp_path)
    assert names(tmp_path) == [6, 12]


def test_no_step_is_written_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last step is an epoch's end, the run's end and one that is due; a finished run writes nothing."""
    written: list[int] = []
    real = saving.write

    def note(folder: Path, found: saving.Snapshot, **options: Any) -> Path:
        written.append(int(found.meta["step"]))
        return real(folder, found, **options)

    monkeypatch.setattr(saving, "write", note)
    for _ in range(2):
        run(tmp_path, "train.checkpoint_every=3 steps")
    assert written == [3, 6, 9, 12]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
@pytest.mark.parametrize("beside", [False, True])
def test_a_signal_ends_the_run_after_its_step_is_saved(tmp_path: Path, number: int, beside: bool) -> None:
    flags = (f"train.async_checkpoint={str(beside).lower()}",)
    whole = run(tmp_path / "whole")

    def send(step: int, total: int, record: Record) -> None:
        if step == 3:
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    with pytest.raises(Stopped) as stopped:
        run(tmp_path / "stopped", *flags, progress=send)
    assert stopped.value.code == 128 + number
    assert signal.getsignal(number) == before
    assert names(tmp_path / "stopped") == [4]  # the signal came after step 3 was done
    again = run(tmp_path / "stopped", *flags)
    assert (again.first_step, again.step) == (4, 12)
    assert same(whole, again)


def test_a_forked_worker_that_is_signalled_too_says_nothing() -> None:
    """A scheduler signals every process of a job; the worker's inherited handler must not speak for the run."""
    program = (
        "import os, signal, sys, time\n"
        "from sftmix.training.signals import end_at_signals\n"
        "end_at_signals()\n"
        "ready, say = os.pipe()\n"
        "child = os.fork()\n"
        "if not child:\n"
        "    os.write(say, b'.')\n"
        "    time.sleep(60)\n"
        "    os._exit(9)\n"
        "os.read(ready, 1)\n"
        "os.kill(child, signal.SIGTERM)\n"
        "_, status = os.waitpid(child, 0)\n"
        "print(os.waitstatus_to_exitcode(status), flush=True)\n"
        "os.kill(os.getpid(), signal.SIGTERM)\n"
        "time.sleep(60)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip()) == (143, "143")
    assert done.stderr.count("sftmix: ") == 1 and "Traceback" not in done.stderr


def test_a_second_ctrl_c_ends_at_once(tmp_path: Path) -> None:
    def send(step: int, total: int, record: Record) -> None:
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, progress=send)
    assert names(tmp_path) == []


def test_in_another_thread_signals_are_left_alone(tmp_path: Path) -> None:
    done: list[int] = []
    thread = threading.Thread(target=lambda: done.append(run(tmp_path).step))
    thread.start()
    thread.join()
    assert done == [12]


def test_a_checkpoint_beside_the_training_holds_its_own_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights change while it is written: tensors that are on the CPU already must have been copied."""
    expected: dict[int, dict[str, torch.Tensor]] = {}
    model = tiny.model()
    real = saving.write

    def slowly(target: Path, found: Any, *, group: Any = None) -> None:
        if threading.current_thread() is not threading.main_thread():
            time.sleep(0.2)
        real(target, found, group=group)

    def note(step: int, total: int, record: Record) -> None:
        expected[step] = tiny.weights(model)

    monkeypatch.setattr(saving, "write", slowly)
    flags = ("train.async_checkpoint=true", "train.checkpoint_every=4 steps", "train.keep_checkpoints=9")
    trainer = run(tmp_path, *flags, model=model, progress=note)
    assert names(tmp_path) == [4, 6, 8, 12]
    for path in complete_checkpoints(tmp_path / "checkpoints"):
        found = tiny.saved(path, trainer.weights.masters)
        assert all(torch.equal(v, expected[int(path.name[-8:])][n]) for n, v in found.items())


def test_what_goes_wrong_beside_the_training_is_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(target: Path, found: Any, *, group: Any = None) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saving, "write", full)
    with pytest.raises(OSError, match="No space left"):
        run(tmp_path, "train.async_checkpoint=true", "train.epochs=1")


@pytest.mark.parametrize(
    "first, then", [(["train.epochs=1"], []), (["train.max_steps=4"], ["train.max_steps=9"])]
)
def test_a_finished_run_may_be_lengthened(
    tmp_path: Path, capfd: Any, first: list[str], then: list[str]
) -> None:
    """From its last step on, with the longer run's schedule there; it is said that this is no single run."""
    done = run(tmp_path, *first)
    seen: list[float] = []
    again = run(tmp_path, *then, progress=lambda step, total, record: seen.append(record["lr"]))
    assert again.first_step == done.total
    assert again.step == again.total > done.total
    whole = run(tmp_path / "whole", *then)
    expected = [record["lr"] for record in read_metrics(tmp_path / "whole" / "metrics.jsonl")]
    assert seen == expected[done.total :]
    assert not same(again, whole)
    assert "which is not what one run of" in capfd.readouterr().out


def test_a_stray_file_in_a_checkpoint_is_nobodys_business(tmp_path: Path) -> None:
    run(tmp_path, "train.epochs=1")
    newest = complete_checkpoints(tmp_path / "checkpoints")[-1]
    (newest / ".DS_Store").write_bytes(b"x")
    shard = next(newest.glob("*.safetensors"))
    (newest / f"copy of {shard.name}").write_bytes(shard.read_bytes())
    assert run(tmp_path).first_step == 6


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damaged_online_scores_give_way_to_the_checkpoint_before(
    tmp_path: Path, damage: str, capfd: Any
) -> None:
    config = tiny.config("train.checkpoint_every=1 step")
    expected = train_plain(config, tiny.model(), EXAMPLES, folder=tmp_path / "whole")
    with pytest.raises(Killed):
        train_plain(config, tiny.model(), EXAMPLES, folder=tmp_path / "killed", progress=kill_at(5))
    path = complete_checkpoints(tmp_path / "killed" / "checkpoints")[-1] / "online.parquet"
    hurt(path, damage)
    assert train_plain(config, tiny.model(), EXAMPLES, folder=tmp_path / "killed") == expected
    assert "going back to step-00000003" in capfd.readouterr().out

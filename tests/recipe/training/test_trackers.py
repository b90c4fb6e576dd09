"""The metrics go where they were asked to, by the calls that those packages have; another name is refused."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from sftmix.config import load_config
from sftmix.training.metrics import read_metrics
from sftmix.training.runs import train_pairs
from sftmix.training.trackers import check_trackers
from tests.recipe import tiny

NEEDED = ["run_dir=r", "model.name=m", "data.train=d"]


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str) -> list[tuple[str, Any]]:
    """A package of that name which notes its calls."""
    calls: list[tuple[str, Any]] = []
    module: Any = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    module.init = lambda **options: calls.append(("init", options))
    module.log = lambda record, step: calls.append(("log", (record, step)))
    module.finish = lambda: calls.append(("finish", None))
    monkeypatch.setitem(sys.modules, name, module)
    return calls


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_each_record_is_logged_at_its_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    calls = stand_in(monkeypatch, name)
    examples = tiny.examples(12)
    config = tiny.config(f"train.report_to={name}", "train.max_steps=3")
    folder = tmp_path / "run" / "train-sftmix"
    train_pairs(config, tiny.model(), examples, tiny.halves(examples), folder=folder)
    kinds = [kind for kind, _ in calls]
    assert kinds == ["init", "log", "log", "log", "finish"]
    assert calls[0][1]["project"] == "sftmix" and calls[0][1]["name"] == "run-train-sftmix"
    assert calls[0][1]["config"]["train"]["max_steps"] == 3
    assert ("dir" in calls[0][1]) == (name == "wandb")
    for (_, (record, step)), written in zip(calls[1:-1], read_metrics(folder / "metrics.jsonl"), strict=True):
        assert step == written["step"]
        assert record == {k: v for k, v in written.items() if isinstance(v, int | float)}


def test_tensorboard_gets_every_number(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    examples = tiny.examples(12)
    config = tiny.config("train.report_to=tensorboard", "train.max_steps=3")
    train_pairs(config, tiny.model(), examples, tiny.halves(examples), folder=tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3]


def test_what_is_not_installed_or_unknown_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"expected installed packages, got wandb, which is missing"):
        check_trackers("wandb")
    with pytest.raises(ValueError, match=r"expected names of tensorboard, wandb, trackio, got 'mlflow'"):
        load_config(None, [*NEEDED, "train.report_to=tensorboard,mlflow"])

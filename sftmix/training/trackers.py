"""Where the metrics go beside metrics.jsonl: TensorBoard, Weights & Biases, trackio, by name and where installed.

None is used that was not asked for: their packages may want a login or a network. Each gets every number of a record
under its name, at the record's step. wandb and trackio go by their own environment variables (say, WANDB_MODE).
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from sftmix.config import Config


class Tracker(Protocol):
    """Takes the records of one training stage."""

    def log(self, record: Mapping[str, Any]) -> None: ...
    def close(self) -> None: ...


def open_trackers(report_to: str | None, folder: Path, config: Config | None) -> list[Tracker]:
    """The trackers named in ``report_to`` (with commas) for the stage whose folder this is; none for None."""
    names = check_trackers(report_to)
    settings = {} if config is None else dataclasses.asdict(config)
    made: list[Tracker] = []
    for name in names:
        made.append(_TensorBoard(folder) if name == "tensorboard" else _Run(name, folder, settings))
    return made


def check_trackers(report_to: str | None) -> list[str]:
    """The names in ``report_to``. Raises ``ValueError`` for one whose package is not installed."""
    names = [name.strip() for name in (report_to or "").split(",") if name.strip()]
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ValueError(
                f"train.report_to: expected installed packages, got {name}, which is missing: pip install {name}"
            )
    return names


def _numbers(record: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in record.items() if isinstance(value, int | float)}


class _TensorBoard:
    """Event files in ``tensorboard/`` beside metrics.jsonl."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"))

    def log(self, record: Mapping[str, Any]) -> None:
        for name, value in _numbers(record).items():
            if name != "step":
                self._writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        self._writer.close()


class _Run:
    """wandb and trackio, whose calls have the same names: a run of the project sftmix per stage."""

    def __init__(self, name: str, folder: Path, settings: dict[str, Any]) -> None:
        self._module: Any = importlib.import_module(name)
        where = {"dir": str(folder)} if name == "wandb" else {}
        title = f"{folder.parent.name}-{folder.name}"
        self._module.init(project="sftmix", name=title, config=settings, **where)

    def log(self, record: Mapping[str, Any]) -> None:
        self._module.log(_numbers(record), step=record["step"])

    def close(self) -> None:
        self._module.finish()

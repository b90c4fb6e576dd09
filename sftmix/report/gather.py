"""What the files of a run folder say, whatever stage the run has come to; what is missing is told, not guessed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml  # type: ignore[import-untyped]

from sftmix.config import CONFIG_FILE, describe
from sftmix.report.examples import Scores, scores
from sftmix.run.folder import FILES, RunFolder, read_evaluation
from sftmix.scores.confidence import read_split
from sftmix.scores.dynamics import read_dynamics
from sftmix.scores.halves import Split
from sftmix.training.metrics import Record, read_metrics

RUNS = ("reference", "train-ntp", "train-sftmix")
T = TypeVar("T")


@dataclass
class Found:
    """One run: what could be read, and ``notes`` on what could not."""

    folder: RunFolder
    settings: dict[str, Any] = field(default_factory=dict)  # every knob by its dotted name
    record: dict[str, Any] = field(default_factory=dict)  # stages.json
    account: dict[str, Any] = field(default_factory=dict)  # data.json
    scores: Scores | None = None
    split: Split | None = None
    evaluation: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, list[Record]] = field(default_factory=dict)  # by run
    notes: list[str] = field(default_factory=list)

    def read(self, path: Path, what: str, reading: Callable[[Path], T], *, stage: str | None) -> T | None:
        """What ``reading`` gives for a file; None, with a note, where it is missing or damaged."""
        if not path.exists():
            if stage is not None:
                self.notes.append(f"{what}: not there, `sftmix {stage}` makes it")
            return None
        try:
            return reading(path)
        except (ValueError, OSError) as error:
            self.notes.append(f"{what}: cannot be read: {' '.join(str(error).split())}")
            return None


def gather(path: str | Path) -> Found:
    """Everything that a report shows of the run folder ``path`` and that its files hold.

    Raises ``ValueError`` for what is not a run folder, and for settings that cannot be read.
    """
    folder = RunFolder(path)
    if not (folder.path / CONFIG_FILE).is_file():
        raise ValueError(f"run_dir: expected a run folder with {CONFIG_FILE}, got {path}")
    found = Found(folder, settings=_settings(folder.path / CONFIG_FILE))
    try:
        found.record = folder.record()
    except ValueError as error:
        found.notes.append(f"record of the stages: {error}")
    found.account = found.read(folder.data, "data.json", _json_object, stage=None) or {}
    by = found.settings.get("split.by", "median")
    without = by in ("random", "given")
    if without and not folder.dynamics.exists():
        found.notes.append(f"scores: none, the split is {by} (split.by)")
    dynamics = found.read(
        folder.dynamics, "scores (dynamics.parquet)", read_dynamics, stage=None if without else "score"
    )
    found.split = found.read(folder.split, "halves (split.parquet)", read_split, stage="split")
    if dynamics is not None:
        try:
            found.scores = scores(dynamics, found.split)
        except ValueError as error:
            found.notes.append(f"halves (split.parquet): not those of the scores: {error}")
            found.scores, found.split = scores(dynamics, None), None
    for name in RUNS:
        found.metrics[name] = (
            found.read(folder.path / name / "metrics.jsonl", f"curves of {name}", read_metrics, stage=None)
            or []
        )
    for stage in ("reference", "train-ntp", "train-sftmix"):
        if found.record.get(stage, {}).get("state") == "begun":
            found.notes.append(f"{stage}: begun and not finished, its curves end where it stopped")
    if not found.metrics["train-sftmix"]:
        found.notes.append("SFTMix: not trained in this folder, so there is no λ and no Mixup loss")
    found.evaluation = (
        found.read(folder.evaluation, "held-out figures (evaluation.json)", _evaluation, stage="evaluate")
        or {}
    )
    return found


def stages(found: Found) -> list[tuple[str, str]]:
    """The stages and their state: finished, begun, or not begun."""
    return [(stage, str(found.record.get(stage, {}).get("state", "not recorded"))) for stage in FILES]


def changed(settings: dict[str, Any]) -> list[tuple[str, Any, bool]]:
    """Every knob with its value, and whether that is its default."""
    defaults = {name: default for name, default, _ in describe()}
    return [(name, value, name in defaults and defaults[name] == value) for name, value in settings.items()]


def _settings(path: Path) -> dict[str, Any]:
    """config.yaml by dotted names; read as it is, for a page may be of an earlier version's run."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: expected YAML, got {' '.join(str(error).split())[:120]}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected knobs by name, got {str(values)[:60]!r}")
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat.update({f"{name}.{inner}": item for inner, item in value.items()})
        else:
            flat[str(name)] = value
    return flat


def _json_object(path: Path) -> dict[str, Any]:
    value = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected an object, got {str(value)[:60]}")
    return value


def _evaluation(path: Path) -> dict[str, Any]:
    """Figures by model, each with all that the tables show."""
    results = read_evaluation(path)
    for label, figures in results.items():
        missing = [
            key
            for key in ("perplexity", "token_accuracy", "num_tokens", "num_examples")
            if key not in figures
        ]
        if missing:
            raise ValueError(f"{path}: expected {missing[0]} of {label}, got {', '.join(figures)}")
    return results

"""The run folder: where every stage's files are, and with which settings each stage was begun or finished.

config.yaml             the resolved configuration
stages.json             by stage: begun or finished, the settings its result depends on, what tells them apart, and the
                        SHA-256 of the files that it left
data.json               what became of the rows: used, left out and why, ignored fields, counts of tokens
tokens/                 the tokenised examples, named by all that they depend on
base/                   a GGUF model as safetensors, so that it is dequantised once
reference/              point-000/ … (weights to score), point-000.json … (their steps), checkpoints/,
                        metrics.jsonl, online.parquet
scoring/                score under way: what is scored so far; removed at its end
dynamics.parquet        score: per example and scoring point
split.parquet           split: the two halves
train-sftmix/           checkpoints/, metrics.jsonl, model/ (what from_pretrained loads), adapter/ (with export);
                        train-ntp/ the same
evaluation.json         evaluate: held-out figures, benchmarks and sample answers by model
evaluation/             heldout.parquet (each example's sums), tasks/ (built-in benchmarks as they were asked, and by
                        model what was answered), answers/ (by model, for other judges)
plots/                  data_map.png, loss_curves.png, confidence.png
report.html             plot: everything about the run on one page
.lock                   held by the program that works in the folder
"""

from __future__ import annotations

import errno
import json
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sftmix.files import replacing
from sftmix.rank import is_main

Settings = dict[str, Any]
# What each stage leaves in the folder, in the order of the stages; the two training runs stand side by side.
FILES = {
    "reference": "reference", "score": "dynamics.parquet", "split": "split.parquet", "train-ntp": "train-ntp",
    "train-sftmix": "train-sftmix", "evaluate": "evaluation.json", "plot": "plots",
}  # fmt: skip
REPORT = "report.html"
EXTRA = {"evaluate": "evaluation", "plot": REPORT}  # beside it, where there is any
_RANK = {"reference": 0, "score": 1, "split": 2, "train-ntp": 3, "train-sftmix": 3, "evaluate": 4, "plot": 5}
RESTARTS = ("reference", "score", "split", "train", "train-ntp", "train-sftmix", "evaluate", "plot", "all")


def stage_names(methods: Sequence[str]) -> tuple[str, ...]:
    """The stages of a whole run that trains with ``methods``."""
    return ("reference", "score", "split", *(f"train-{method}" for method in methods), "evaluate", "plot")


def stages_from(restart: str | None) -> tuple[str, ...]:
    """The stages that ``--restart`` does anew: the one named and all that come after it; none for None.

    ``train`` is both training runs; one of the two alone leaves the other. Raises ``ValueError`` for another name.
    """
    if restart is None:
        return ()
    if restart not in RESTARTS:
        raise ValueError(f"restart: expected one of {', '.join(RESTARTS)}, got {restart!r}")
    rank = {"all": 0, "train": _RANK["train-ntp"]}.get(restart, _RANK.get(restart, 0))
    return tuple(
        stage
        for stage in FILES
        if _RANK[stage] > rank or restart in (stage, "all") or stage.startswith(f"{restart}-")
    )


class RunFolder:
    """Paths inside one run folder, and the record of its finished stages."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.base = self.path / "base"
        self.reference = self.path / "reference"
        self.online = self.reference / "online.parquet"
        self.tokens = self.path / "tokens"
        self.data = self.path / "data.json"
        self.scoring = self.path / "scoring"
        self.dynamics = self.path / "dynamics.parquet"
        self.split = self.path / "split.parquet"
        self.evaluation = self.path / "evaluation.json"
        self.heldout = self.path / "evaluation" / "heldout.parquet"
        self.tasks = self.path / "evaluation" / "tasks"
        self.answers = self.path / "evaluation" / "answers"
        self.plots = self.path / "plots"
        self.report = self.path / REPORT
        self._stages = self.path / "stages.json"

    def point(self, index: int) -> Path:
        """The weights of scoring point ``index``."""
        return self.reference / f"point-{index:03d}"

    def point_step(self, index: int) -> Path:
        """The optimizer step of scoring point ``index``."""
        return self.reference / f"point-{index:03d}.json"

    def train(self, method: str) -> Path:
        """The folder of the ``sftmix`` or ``ntp`` run."""
        return self.path / f"train-{method}"

    def model(self, method: str) -> Path:
        """The trained model as ``from_pretrained`` loads it."""
        return self.train(method) / "model"

    def adapter(self, method: str) -> Path:
        """The trained adapter as peft loads it."""
        return self.train(method) / "adapter"

    def exports(self, method: str, export: str) -> list[Path]:
        """What a finished training run holds with the knob ``export``."""
        kept = {"merged": [self.model], "adapter": [self.adapter], "both": [self.model, self.adapter]}
        return [path(method) for path in kept[export]]

    def exported(self, method: str) -> Path | None:
        """What the training run left to evaluate: the model, else the adapter; None where it is not finished."""
        return next((path for path in (self.model(method), self.adapter(method)) if path.exists()), None)

    def record(self) -> dict[str, Settings]:
        """By stage: ``state`` (begun or finished), ``settings`` and ``about``.

        Raises ``ValueError`` if the file does not parse.
        """
        if not self._stages.exists():
            return {}
        try:
            record = json.loads(self._stages.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{self._stages}: expected JSON, got text that does not parse ({error}); delete it to let every "
                "stage look for itself"
            ) from error
        if not isinstance(record, dict) or not all(isinstance(value, dict) for value in record.values()):
            raise ValueError(f"{self._stages}: expected an object of objects, got {str(record)[:60]}")
        return record

    def is_finished(self, stage: str, settings: Settings) -> bool:
        """Whether ``stage`` was finished with exactly these settings."""
        found = self.record().get(stage, {})
        return found.get("state") == "finished" and found.get("settings") == json.loads(json.dumps(settings))

    def note(
        self,
        stage: str,
        state: str,
        settings: Settings,
        about: Settings,
        files: Mapping[str, str] | None = None,
        before: Sequence[str] = (),
    ) -> None:
        """Record that ``stage`` is begun or finished, with its settings and the sums of its files (checksums.py).

        ``before``: how it was lengthened after it was finished, which is kept. The record is whole at any moment.
        """
        record = self.record()
        entry = {"state": state, "settings": settings, "about": about, "files": dict(files or {})}
        lengthened = [*record.get(stage, {}).get("lengthened", ()), *before]
        self._write({**record, stage: {**entry, **({"lengthened": lengthened} if lengthened else {})}})

    def rewind(self, step: int) -> None:
        """Remove the reference's checkpoints of ``step`` and later, so that it trains from the one before."""
        for path in (self.reference / "checkpoints").glob("step-*"):
            if int(path.name.partition("-")[2]) >= step:
                shutil.rmtree(path)

    def discard(self, stage: str, damaged: Iterable[str]) -> None:
        """Remove what must go for ``stage`` to make the ``damaged`` files (paths within the folder) again.

        Of the reference: the points, and the checkpoints from the first of them on. Of a training run: the export.
        """
        parts = [name.split("/") for name in damaged]
        if stage == "reference":
            points = {int(found[1]) for _, name, *_ in parts if (found := re.match(r"point-(\d+)", name))}
            steps = [self._step_of(index) for index in points]
            for index in points:
                shutil.rmtree(self.point(index), ignore_errors=True)
                self.point_step(index).unlink(missing_ok=True)
            if steps:
                self.rewind(min(steps))
        elif stage.startswith("train-"):
            for name in {inner for _, inner, *_ in parts}:
                shutil.rmtree(self.path / FILES[stage] / name, ignore_errors=True)

    def _step_of(self, index: int) -> int:
        """The optimizer step of a scoring point; 0 where its file cannot be read."""
        try:
            return int(json.loads(self.point_step(index).read_text(encoding="utf-8"))["step"])
        except (OSError, ValueError, KeyError, TypeError):
            return 0

    def remove(self, stages: tuple[str, ...]) -> list[str]:
        """Delete the files and records of ``stages``; the names of the files and folders that were there."""
        record = self.record()
        if record.keys() & set(
            stages
        ):  # first: files without a record are looked at, a record without files is not
            self._write({stage: entry for stage, entry in record.items() if stage not in stages})
        removed = []
        if "score" in stages:
            self.remove_scoring()
        for name in [name for stage in stages for name in (FILES[stage], EXTRA.get(stage)) if name]:
            path = self.path / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
                removed.append(f"{name}/")
            elif path.exists() or path.is_symlink():
                path.unlink()
                removed.append(name)
        return removed

    def remove_scoring(self) -> None:
        """Remove what a scoring pass under way has kept, by the main process."""
        if is_main():
            shutil.rmtree(self.scoring, ignore_errors=True)

    def has_left(self, stage: str) -> bool:
        """Whether ``stage`` has left anything that a later start could take up: a checkpoint, a point, scores."""
        place = self.path / FILES[stage]
        left = [path for path in place.glob("*") if path.name != "metrics.jsonl"] if place.is_dir() else []
        return place.is_file() or any(left) or (stage == "score" and self.scoring.exists())

    def _write(self, record: dict[str, Settings]) -> None:
        if not self.path.is_dir():
            raise FileNotFoundError(errno.ENOENT, "it was deleted while the run was at work", str(self.path))
        with replacing(self._stages) as temporary:
            temporary.write_text(json.dumps(record, indent=1, default=str) + "\n", encoding="utf-8")


def read_evaluation(path: str | Path) -> dict[str, Any]:
    """What ``sftmix evaluate`` wrote. Raises ``ValueError`` if it is missing or does not parse."""
    try:
        results = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: expected the results of `sftmix evaluate`, got {error}") from error
    if not isinstance(results, dict) or not all(isinstance(v, dict) and "nll" in v for v in results.values()):
        raise ValueError(f"{path}: expected figures by model, got {str(results)[:60]}")
    return results

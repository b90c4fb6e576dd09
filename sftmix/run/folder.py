"""The run folder: where every stage's files are, and which stages are done with which settings.

config.yaml             the resolved configuration
stages.json             settings of each finished stage; one that finds its own there has nothing to do
data.json               what became of the rows: used, left out and why, ignored fields, counts of tokens
tokens/                 the tokenised examples, named by all that they depend on
base/                   a GGUF model as safetensors, so that it is dequantised once
reference/              point-000/ … (weights to score), point-000.json … (their steps), checkpoints/,
                        metrics.jsonl, online.parquet
dynamics.parquet        score: per example and scoring point
split.parquet           split: the two halves
train-sftmix/           checkpoints/, metrics.jsonl, model/ (what from_pretrained loads); train-ntp/ the same
evaluation.json         evaluate: held-out figures and sample answers by model
plots/                  data_map.png, loss_curves.png, confidence.png
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sftmix.files import replacing

Settings = dict[str, Any]


class RunFolder:
    """Paths inside one run folder, and the record of its finished stages."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.base = self.path / "base"
        self.reference = self.path / "reference"
        self.online = self.reference / "online.parquet"
        self.tokens = self.path / "tokens"
        self.data = self.path / "data.json"
        self.dynamics = self.path / "dynamics.parquet"
        self.split = self.path / "split.parquet"
        self.evaluation = self.path / "evaluation.json"
        self.plots = self.path / "plots"
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

    def finished(self) -> dict[str, Settings]:
        """Settings of the stages that are done. Raises ``ValueError`` if the record does not parse."""
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
        return self.finished().get(stage) == json.loads(json.dumps(settings))

    def finish(self, stage: str, settings: Settings) -> None:
        """Record that ``stage`` is done; the file is whole at any moment."""
        record = {**self.finished(), stage: settings}
        with replacing(self._stages) as temporary:
            temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

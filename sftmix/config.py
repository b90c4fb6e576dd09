"""Every knob of the recipe: dataclasses, one YAML file, and dotted flags that win over the file.

``load_config("run.yaml", ["train.epochs=2"])`` reads the file, applies the flags, checks types and
ranges, and returns a frozen ``Config``; ``save_config`` and ``read_config`` carry it through the run
folder. Defaults are those of the SFTMix paper (arXiv 2410.05248) wherever it states one.
"""

from __future__ import annotations

import dataclasses
import os
import re
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from sftmix.files import replacing
from sftmix.knobs import check_range, check_type, collect_knobs, knob, parse_flags, read_yaml, sections
from sftmix.sections import (
    TRACKERS,
    DataConfig,
    EvaluateConfig,
    LoraConfig,
    MixupConfig,
    ModelConfig,
    OptimConfig,
    ReferenceConfig,
    SplitConfig,
    TrainConfig,
    interval,
)

CONFIG_FILE = "config.yaml"
REQUIRED = "(required)"  # shown by describe() in place of a default


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run; ``run_dir``, ``model.name`` and ``data.train`` have no default."""

    run_dir: str = knob("folder that every stage reads and writes")
    seed: int = knob("seed of pairing, lambda, dropout, sampling and initial adapters", 0, at_least=0)
    export: str = knob(
        "what a LoRA run writes: the model with its adapters merged, the adapter alone, or both",
        "merged",
        choices=("merged", "adapter", "both"),
    )
    model: ModelConfig
    data: DataConfig
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    split: SplitConfig = field(default_factory=SplitConfig)
    mixup: MixupConfig = field(default_factory=MixupConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)

    def validate(self) -> None:
        """Raise ``ValueError`` naming the first knob whose value has a wrong type or is out of its range."""
        values = _flatten(self)
        for key, leaf in _KNOBS.items():
            check_range(key, check_type(key, values[key], leaf), leaf.field.metadata)
        if self.lora.layers is not None:
            found = re.fullmatch(r"(\d+):(\d+)", self.lora.layers)
            if not found or int(found[1]) >= int(found[2]):
                raise ValueError(
                    f"lora.layers: expected start:stop with start < stop, got {self.lora.layers!r}"
                )
        if self.export != "merged" and self.train.tuning != "lora":
            raise ValueError(
                f"export: expected merged with train.tuning=full, which has no adapter, got {self.export}"
            )
        if self.export != "merged" and self.model.added_tokens is not None:
            raise ValueError(
                "export: expected merged with model.added_tokens, for which an adapter's base has no rows, got "
                f"{self.export}"
            )
        by, file = self.split.by, self.split.file
        if (by == "given") != (file is not None):
            expected = "a file" if by == "given" else "none"
            raise ValueError(f"split.file: expected {expected} with split.by={by}, got {file or 'none'}")
        if by != "quantile" and self.split.confident_share != SplitConfig.confident_share:
            raise ValueError(
                f"split.confident_share: expected {SplitConfig.confident_share} with split.by={by}, got "
                f"{self.split.confident_share}: it is the quantile's"
            )
        if by in ("random", "given") and self.reference.scores is not None:
            raise ValueError(
                f"reference.scores: expected none with split.by={by}, without scores, got {self.reference.scores}"
            )
        if self.mixup.weight == self.mixup.ntp_weight == 0:
            raise ValueError(
                "mixup.ntp_weight: expected more than 0 beside mixup.weight=0, which leaves no loss, got 0"
            )
        interval("train.checkpoint_every", self.train.checkpoint_every)
        for name in (self.train.report_to or TRACKERS[0]).split(","):
            if name.strip() not in TRACKERS:
                raise ValueError(f"train.report_to: expected names of {', '.join(TRACKERS)}, got {name!r}")
        names = [name.strip() for name in self.lora.target_modules.split(",")]
        if "" in names:
            raise ValueError(
                "lora.target_modules: expected all-linear or module names, separated by commas, got "
                f"{self.lora.target_modules!r}"
            )


_KNOBS = collect_knobs(Config)
_SECTIONS = sections(_KNOBS)


def describe() -> list[tuple[str, Any, str]]:
    """Every knob as (dotted name, default, one-line help); a knob without default shows ``REQUIRED``."""
    rows = []
    for key, leaf in _KNOBS.items():
        default = REQUIRED if leaf.field.default is dataclasses.MISSING else leaf.field.default
        rows.append((key, default, leaf.field.metadata["help"]))
    return rows


def load_config(path: str | os.PathLike[str] | None, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file (``None``: no file), apply flags such as ``"train.epochs=2"``, and validate.

    Raises ``ValueError`` for a file that is missing or not YAML, an unknown knob (naming the nearest
    one), a value of the wrong type or out of range, and a required knob without a value. A chat template
    that is not where it is looked for is taken from beside the file.
    """
    values = {} if path is None else read_yaml(Path(path), _KNOBS)
    template = values.get("data.chat_template")
    if path is not None and template and not Path(template).exists():
        beside = Path(path).parent / template
        values["data.chat_template"] = str(beside) if beside.exists() else template
    values.update(parse_flags(overrides, _KNOBS))
    return _build(values)


def override(config: Config, overrides: Sequence[str]) -> Config:
    """A copy of ``config`` with flags such as ``"train.epochs=2"`` applied and everything validated."""
    return _build({**_flatten(config), **parse_flags(overrides, _KNOBS)})


def as_yaml(config: Config) -> str:
    """The resolved configuration as YAML, every knob with its value."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True)


def save_config(config: Config, path: str | os.PathLike[str]) -> None:
    """Write the resolved configuration as YAML; the file is whole or absent."""
    config.validate()
    text = as_yaml(config)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_config(run_dir: str | os.PathLike[str]) -> Config:
    """Read back ``run_dir/config.yaml``; a run folder that was moved gets its present path."""
    values = read_yaml(Path(run_dir) / CONFIG_FILE, _KNOBS)
    return _build({**values, "run_dir": os.fspath(run_dir)})


def _flatten(config: Config) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in dataclasses.asdict(config).items():
        if isinstance(value, dict):
            flat.update({f"{name}.{key}": item for key, item in value.items()})
        else:
            flat[name] = value
    return flat


def _build(values: dict[str, Any]) -> Config:
    """A validated ``Config`` from flat, already typed values."""
    nested: dict[str, Any] = {section: {} for section in _SECTIONS}
    for key, leaf in _KNOBS.items():
        if key not in values:
            if leaf.field.default is dataclasses.MISSING:
                raise ValueError(f"{key}: expected a value, got none (set it in the YAML file or as {key}=…)")
            continue
        section, _, name = key.rpartition(".")
        (nested[section] if section else nested)[name] = values[key]
    hints = typing.get_type_hints(Config)
    for section in _SECTIONS:
        nested[section] = hints[section](**nested[section])
    config = Config(**nested)
    config.validate()
    return config

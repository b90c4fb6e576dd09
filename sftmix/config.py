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

CONFIG_FILE = "config.yaml"
REQUIRED = "(required)"  # shown by describe() in place of a default


@dataclass(frozen=True)
class ModelConfig:
    """The language model that is trained."""

    name: str = knob("model to train: a local folder or a hub id")
    gguf_file: str | None = knob("file name of a GGUF checkpoint inside the model's folder", None)
    dtype: str = knob(
        "data type of the model's parameters; auto: bfloat16 where the device multiplies it, else float32",
        "auto",
        choices=("auto", "float32", "bfloat16"),
    )
    attn_implementation: str | None = knob("attention implementation passed to transformers", None)
    revision: str | None = knob("revision of a hub model", None)
    trust_remote_code: bool = knob(
        "run Python code that the model's folder or repository brings along", False
    )
    added_tokens: str | None = knob(
        "tokens to add to the vocabulary, with commas; embedding and head get rows for them", None
    )


@dataclass(frozen=True)
class DataConfig:
    """Where the examples come from, and how they become tokens."""

    train: str = knob(
        "training examples: a file, folder, glob, several of them with commas, or a datasets id"
    )
    split: str = knob("split to read when train is a datasets id or a saved DatasetDict", "train")
    configuration: str | None = knob("configuration to read when train is a datasets id", None)
    heldout: str | None = knob("held-out examples, same forms; null: a part of the training examples", None)
    heldout_split: str | None = knob("split of heldout; must be given where heldout is a datasets id", None)
    heldout_configuration: str | None = knob("configuration of heldout when it is a datasets id", None)
    heldout_fraction: float = knob(
        "share of the training examples held out (by a hash of the id) when heldout is null; 0: none",
        0.05,
        at_least=0,
        below=1,
    )
    allow_overlap: bool = knob("go on although held-out examples are among the training examples", False)
    limit: int | None = knob("use only the first so many examples", None, at_least=1)
    streaming: bool = knob("read a datasets id as a stream, so that limit saves the download", False)
    form: str | None = knob(
        "form of the rows where their columns allow several; `sftmix data --help` lists them", None
    )
    columns: str | None = knob("other names of columns, e.g. question=query,answer=reply", None)
    supervise: str = knob(
        "turns that bear loss; all: every answer, of a prompt-completion row the completion",
        "all",
        choices=("all", "last", "completion", "marked"),
    )
    bad_rows: str = knob(
        "rows that cannot be used: refuse them all, or drop them, counted",
        "refuse",
        choices=("refuse", "drop"),
    )
    max_length: int | None = knob(
        "longest sequence, in tokens; null: the model's positions, at most 2048", None, at_least=2
    )
    too_long: str = knob(
        "longer examples: drop, cut (the answer loses its end), cut_prompt (on its left), or refuse",
        "cut",
        choices=("drop", "cut", "cut_prompt", "refuse"),
    )
    chat_template: str | None = knob("path of a Jinja chat template that overrides the tokenizer's", None)
    template_arguments: str | None = knob("arguments of the chat template, a JSON object", None)
    template_drops: str = knob(
        "text that the chat template leaves out (say, earlier reasoning): refuse the row, or use it",
        "refuse",
        choices=("refuse", "allow"),
    )
    date: str | None = knob(
        "date that a chat template prints, YYYY-MM-DD; null: the day the run was begun", None
    )
    end_token: str | None = knob("token put after answers that the chat template leaves without an end", None)
    special_tokens: str = knob(
        "a special token's string in the examples' text: text keeps it text, token lets it become the token",
        "text",
        choices=("text", "token"),
    )
    num_workers: int | None = knob(
        "processes that tokenise; null: one per core where it pays", None, at_least=1
    )


@dataclass(frozen=True)
class ReferenceConfig:
    """The next-token run whose checkpoints score every example."""

    model: str | None = knob("reference model, e.g. a smaller one; null: model.name", None)
    epochs: int = knob("epochs of the reference run", 3, at_least=1)
    checkpoints_per_epoch: int = knob("scoring points per epoch, evenly spaced", 1, at_least=1)
    dynamics: str = knob(
        "score saved checkpoints (the paper), the training steps themselves, or both",
        "checkpoint",
        choices=("checkpoint", "online", "both"),
    )
    scores: str | None = knob("a ready dynamics.parquet, used in place of the reference run", None)


@dataclass(frozen=True)
class MixupConfig:
    """The Mixup regulariser."""

    alpha: float = knob("lambda is drawn from Beta(alpha, alpha)", 0.5, above=0)
    weight: float = knob("weight mu of the Mixup term; 0 is plain next-token prediction", 0.2, at_least=0)
    lam: str = knob(
        "one lambda per pair, per mixed token, or per optimizer step",
        "pair",
        choices=("pair", "token", "batch"),
    )


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and its learning-rate schedule."""

    lr: float = knob("peak learning rate", 2e-6, above=0)
    weight_decay: float = knob("decoupled weight decay", 0.1, at_least=0)
    beta1: float = knob("AdamW beta1", 0.9, at_least=0, below=1)
    beta2: float = knob("AdamW beta2", 0.999, at_least=0, below=1)
    eps: float = knob("AdamW epsilon", 1e-8, above=0)
    warmup_ratio: float = knob("share of all steps spent warming up", 0.1, at_least=0, below=1)
    schedule: str = knob("decay after the warm-up", "cosine", choices=("cosine", "linear", "constant"))
    max_grad_norm: float = knob("gradients are clipped to this global norm", 1.0, above=0)


@dataclass(frozen=True)
class TrainConfig:
    """The training loop."""

    method: str = knob("SFTMix or plain next-token prediction", "sftmix", choices=("sftmix", "ntp"))
    epochs: int = knob("passes over the training examples", 3, at_least=1)
    batch_size: int = knob("sequences per optimizer step over all processes", 32, at_least=2, even=True)
    micro_batch_size: int = knob("sequences per forward pass and process", 8, at_least=2, even=True)
    packing: str = knob(
        "several sequences in a row, unpadded; auto: where it is cheap", "auto", choices=("auto", "on", "off")
    )
    tuning: str = knob("train all parameters or LoRA adapters", "full", choices=("full", "lora"))
    max_steps: int | None = knob("stop after so many optimizer steps", None, at_least=1)
    log_every: int = knob("optimizer steps between metric records", 1, at_least=1)
    gradient_checkpointing: bool = knob("recompute activations in the backward pass", False)
    impl: str | None = knob(
        "loss implementation; null: by device", None, choices=("reference", "chunked", "fused")
    )


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters, used when ``train.tuning`` is ``lora``."""

    rank: int = knob("rank of each adapter", 16, at_least=1)
    alpha: int = knob("adapters are scaled by alpha / rank", 32, at_least=1)
    dropout: float = knob("dropout before each adapter", 0.0, at_least=0, below=1)
    rslora: bool = knob("scale adapters by alpha / sqrt(rank) (rsLoRA)", False)
    dora: bool = knob("weight-decomposed adapters (DoRA)", False)
    target_modules: str = knob(
        "all-linear (the head excepted), names of modules or of fused experts' weights, with commas",
        "all-linear",
    )
    modules_to_save: str | None = knob(
        "modules trained whole beside the adapters, e.g. embed_tokens,lm_head", None
    )
    layers: str | None = knob("adapt only layers start:stop, e.g. 20:30; null: all", None)


@dataclass(frozen=True)
class EvaluateConfig:
    """Held-out evaluation."""

    batch_size: int = knob("sequences per forward pass", 8, at_least=1)
    num_samples: int = knob("sample answers to print", 3, at_least=0)
    max_new_tokens: int = knob("longest sample answer, in tokens", 64, at_least=1)
    limit: int | None = knob("evaluate only the first so many held-out examples", None, at_least=1)


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
    one), a value of the wrong type or out of range, and a required knob without a value.
    """
    values = {} if path is None else read_yaml(Path(path), _KNOBS)
    values.update(parse_flags(overrides, _KNOBS))
    return _build(values)


def override(config: Config, overrides: Sequence[str]) -> Config:
    """A copy of ``config`` with flags such as ``"train.epochs=2"`` applied and everything validated."""
    return _build({**_flatten(config), **parse_flags(overrides, _KNOBS)})


def save_config(config: Config, path: str | os.PathLike[str]) -> None:
    """Write the resolved configuration as YAML; the file is whole or absent."""
    config.validate()
    text = yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True)
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

"""The configuration: defaults, flags, types, ranges, and the round trip through the run folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from sftmix.config import (
    REQUIRED,
    Config,
    DataConfig,
    ModelConfig,
    OptimConfig,
    describe,
    load_config,
    override,
    read_config,
    save_config,
)

NEEDED = ["run_dir=runs/a", "model.name=m", "data.train=d.jsonl"]

PAPER = {
    "mixup.alpha": 0.5,
    "mixup.weight": 0.2,
    "mixup.lam": "pair",
    "optim.lr": 2e-6,
    "optim.weight_decay": 0.1,
    "optim.warmup_ratio": 0.1,
    "optim.schedule": "cosine",
    "train.batch_size": 32,
    "train.epochs": 3,
    "train.method": "sftmix",
    "reference.dynamics": "checkpoint",
    "reference.checkpoints_per_epoch": 1,
}


def load(*flags: str) -> Config:
    return load_config(None, [*NEEDED, *flags])


def test_every_knob_has_a_one_line_help() -> None:
    rows = describe()
    assert len(rows) == len({key for key, _, _ in rows}) > 40
    for key, _, text in rows:
        assert text.strip(), key
        assert "\n" not in text, key
        assert len(text) <= 100, key


def test_defaults_are_the_papers() -> None:
    defaults = {key: default for key, default, _ in describe()}
    assert {key: defaults[key] for key in PAPER} == PAPER
    assert {key for key, value in defaults.items() if value == REQUIRED} == {
        "run_dir",
        "model.name",
        "data.train",
    }


def test_described_defaults_are_the_loaded_ones() -> None:
    config = load()
    for key, default, _ in describe():
        if default != REQUIRED:
            section, _, name = key.rpartition(".")
            assert getattr(getattr(config, section) if section else config, name) == default, key


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "run_dir: out\nmodel: {name: m}\ndata:\n  train: d\n"
        "train:\n  epochs: 5\n  batch_size: 8\noptim: {lr: 1e-4}\n"
    )
    config = load_config(file, ["train.epochs=2", "--train.micro-batch-size=4"])
    assert (config.train.epochs, config.train.batch_size, config.train.micro_batch_size) == (2, 8, 4)
    assert config.optim.lr == 1e-4  # YAML reads 1e-4 as a string


@pytest.mark.parametrize("text", ["null", "none", "None", ""])
def test_null_clears_an_optional(tmp_path: Path, text: str) -> None:
    config = load("data.limit=7", "model.revision=main", f"data.limit={text}", f"model.revision={text}")
    assert config.data.limit is None
    assert config.model.revision is None


def test_types_of_flags() -> None:
    config = load("optim.lr=1", "train.gradient_checkpointing=True", "data.limit=12", "lora.layers=20:30")
    assert repr(config.optim.lr) == "1.0"
    assert config.train.gradient_checkpointing == "full"  # a bool, as it once was
    assert (config.data.limit, config.lora.layers) == (12, "20:30")


@pytest.mark.parametrize(
    "flag, message",
    [
        ("train.epoch=2", "train.epoch: unknown knob; did you mean train.epochs?"),
        ("mixup.lambda=pair", "did you mean mixup.lam"),
        ("alpha=0.5", "did you mean mixup.alpha or lora.alpha"),
        ("train=3", "train: unknown knob; did you mean train.method"),
        ("train.epochs", "expected name=value, got 'train.epochs'"),
        ("train.epochs=two", "train.epochs: expected int, got 'two'"),
        ("train.epochs=2.5", "train.epochs: expected int, got '2.5'"),
        ("train.epochs=null", "train.epochs: expected int, got 'null'"),
        ("optim.lr=fast", "optim.lr: expected float, got 'fast'"),
        ("data.limit=x", "data.limit: expected int or null, got 'x'"),
        ("train.compile=1", "expected bool, got '1'"),
        ("train.gradient_checkpointing=1", "expected one of none, selective, full, got '1'"),
        ("mixup.alpha=0", "mixup.alpha: expected more than 0, got 0.0"),
        ("mixup.weight=-0.1", "mixup.weight: expected at least 0, got -0.1"),
        ("mixup.weight=nan", "mixup.weight: expected a finite number, got nan"),
        ("optim.lr=inf", "optim.lr: expected a finite number"),
        ("optim.lr=0", "optim.lr: expected more than 0"),
        ("optim.warmup_ratio=1", "optim.warmup_ratio: expected less than 1, got 1.0"),
        ("optim.warmup_ratio=-0.1", "optim.warmup_ratio: expected at least 0"),
        ("optim.beta2=1", "optim.beta2: expected less than 1"),
        ("optim.schedule=step", "expected one of cosine, linear, constant, got 'step'"),
        ("train.batch_size=3", "train.batch_size: expected an even number, got 3"),
        ("train.batch_size=0", "train.batch_size: expected at least 2, got 0"),
        ("train.micro_batch_size=5", "train.micro_batch_size: expected an even number"),
        ("train.method=dpo", "expected one of sftmix, ntp, got 'dpo'"),
        ("train.tuning=qlora", "expected one of full, lora"),
        ("train.impl=cuda", "expected one of reference, chunked, fused"),
        ("train.epochs=0", "train.epochs: expected at least 1"),
        ("mixup.lam=step", "expected one of pair, token, batch"),
        ("reference.dynamics=none", "expected one of checkpoint, online, both"),
        ("model.dtype=float16", "expected one of auto, float32, bfloat16"),
        ("data.heldout_fraction=1", "data.heldout_fraction: expected less than 1"),
        ("data.max_length=1", "data.max_length: expected at least 2"),
        ("lora.layers=30:20", "lora.layers: expected start:stop with start < stop"),
        ("lora.layers=all", "lora.layers: expected start:stop"),
        ("lora.target_modules=q_proj,,v_proj", "lora.target_modules: expected"),
        ("seed=-1", "seed: expected at least 0"),
        ("run_dir=", "run_dir: expected a non-empty string"),
    ],
)
def test_bad_flags_are_refused_by_name(flag: str, message: str) -> None:
    with pytest.raises(ValueError) as error:
        load(flag)
    assert message in str(error.value)


@pytest.mark.parametrize("missing", NEEDED)
def test_required_knobs(missing: str) -> None:
    with pytest.raises(ValueError, match=f"{missing.split('=')[0]}: expected a value, got none"):
        load_config(None, [flag for flag in NEEDED if flag != missing])


@pytest.mark.parametrize(
    "text, message",
    [
        ("train: {epochs: '2'}", "train.epochs: expected int, got '2'"),
        ("train: {epochs: 2.0}", "train.epochs: expected int, got 2.0"),
        ("train: {epochs: true}", "train.epochs: expected int, got True"),
        ("optim: {lr: true}", "optim.lr: expected float, got True"),
        ("model: {revision: 12}", "model.revision: expected str or null, got 12"),
        ("train: 3", "train: expected a mapping of knobs, got 3"),
        ("optim: {learning_rate: 1.0}", "optim.learning_rate: unknown knob"),
        ("tarin: {epochs: 1}", "unknown knob; did you mean train"),
        ("- 1\n- 2", "expected a YAML mapping of knobs, got list"),
        ("", "expected a YAML mapping of knobs, got NoneType"),
        ("train: {epochs: [", "does not parse"),
        ("seed: 1\nseed: 2", "seed: expected once, got it twice"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(ValueError) as error:
        load_config(file, NEEDED)
    assert message in str(error.value)


def test_missing_and_binary_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected a YAML file, got No such file"):
        load_config(tmp_path / "none.yaml", NEEDED)
    (tmp_path / "bin.yaml").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(ValueError, match="does not parse"):
        load_config(tmp_path / "bin.yaml", NEEDED)


def test_round_trip_through_the_run_folder(tmp_path: Path) -> None:
    config = load(
        f"run_dir={tmp_path}",
        "optim.lr=3.3e-7",
        "optim.eps=1e-300",
        "model.name=modèle: 'x' # not a comment",
        "data.limit=null",
        "lora.layers=1:2",
        "model.revision=123",
        "data.heldout=no",
    )
    save_config(config, tmp_path / "config.yaml")
    assert read_config(tmp_path) == config
    assert [item.name for item in tmp_path.iterdir()] == ["config.yaml"]


def test_a_moved_run_folder_knows_its_place(tmp_path: Path) -> None:
    save_config(load("run_dir=elsewhere"), tmp_path / "config.yaml")
    assert read_config(tmp_path).run_dir == str(tmp_path)


def test_a_half_written_config_is_refused(tmp_path: Path) -> None:
    save_config(load(), tmp_path / "config.yaml")
    text = (tmp_path / "config.yaml").read_text()
    (tmp_path / "config.yaml").write_text(text[: text.index("model:")])
    with pytest.raises(ValueError, match=r"model\.name: expected a value, got none"):
        read_config(tmp_path)
    with pytest.raises(ValueError, match=r"config\.yaml: expected a YAML file, got No such file"):
        read_config(tmp_path / "empty")


def test_override_keeps_the_rest() -> None:
    config = load("train.epochs=5")
    changed = override(config, ["mixup.weight=0", "train.method=ntp"])
    assert (changed.mixup.weight, changed.train.method, changed.train.epochs) == (0.0, "ntp", 5)
    assert config.mixup.weight == 0.2
    with pytest.raises(ValueError, match="even"):
        override(config, ["train.batch_size=7"])


def test_a_config_built_in_code_is_validated_on_save(tmp_path: Path) -> None:
    config = Config(run_dir="r", model=ModelConfig("m"), data=DataConfig("d"))
    config.validate()
    for bad in (OptimConfig(lr=-1.0), OptimConfig(lr="fast")):  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"optim\.lr: expected"):
            save_config(replace(config, optim=bad), tmp_path / "config.yaml")
    assert not list(tmp_path.iterdir())

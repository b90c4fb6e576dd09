"""Checkpoints on disk: whole or absent, damaged ones and those of something else refused by name."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sftmix.config import LoraConfig
from sftmix.model.causal_lm import SFTMixModel
from sftmix.model.lora import apply_lora, is_lora
from sftmix.training import tensor_files
from sftmix.training.checkpoint import (
    complete_checkpoints,
    load_trainable,
    save_trainable,
)
from sftmix.training.metrics import MetricsWriter, read_metrics
from sftmix.training.runs import train_pairs
from sftmix.training.trainer import Trainer
from tests.recipe import tiny
from tests.recipe.hurt import hurt

EXAMPLES = tiny.examples(12)


def run(folder: Path, *flags: str, model: SFTMixModel | None = None, count: int = 12) -> Trainer:
    examples = dict(list(EXAMPLES.items())[:count])
    model = tiny.model() if model is None else model
    return train_pairs(tiny.config(*flags), model, examples, tiny.halves(examples), folder=folder)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    run(folder)
    return folder


@pytest.fixture
def folder(trained: Path, tmp_path: Path) -> Path:
    """A finished run that a test may damage."""
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


# weights/, exp_avg/ and exp_avg_sq/ by the order of their names
MOMENTS, WEIGHTS = (f"shard-00001-model-{n:05d}-of-00003.safetensors" for n in (1, 3))


def assert_same_state(one: Path, other: Path, trainer: Trainer) -> None:
    """The newest checkpoints of two folders hold the same bits."""
    masters = trainer.weights.masters
    for kind in ("weights", "exp_avg", "exp_avg_sq"):
        a, b = (tiny.saved(newest(folder), masters, kind) for folder in (one, other))
        assert all(torch.equal(a[name], b[name]) for name in masters), kind


def newest(folder: Path) -> Path:
    return complete_checkpoints(folder / "checkpoints")[-1]


def test_the_newest_two_are_kept(tmp_path: Path) -> None:
    run(tmp_path, "train.epochs=4")
    names = [path.name for path in complete_checkpoints(tmp_path / "checkpoints")]
    assert names == ["step-00000006", "step-00000008"]


@pytest.mark.parametrize("file", [WEIGHTS, MOMENTS, "meta.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_the_one_before_a_damaged_checkpoint_is_taken(
    trained: Path, folder: Path, file: str, damage: str, capfd: Any
) -> None:
    """It is said, and the run ends in the same bits; the damaged one is replaced."""
    path = newest(folder) / file
    hurt(path, damage)
    again = run(folder)
    assert (again.first_step, again.step) == (2, 4)
    if (file, damage) == ("meta.json", "remove"):  # it looks like one that was never finished
        return
    assert "going back to step-00000002" in capfd.readouterr().out
    assert_same_state(trained, folder, again)


def test_without_a_whole_checkpoint_it_begins_anew(trained: Path, folder: Path, capfd: Any) -> None:
    for path in complete_checkpoints(folder / "checkpoints"):
        (path / MOMENTS).write_bytes(b"")
    again = run(folder)
    assert (again.first_step, again.step) == (0, 4)
    assert "going back to the beginning" in capfd.readouterr().out
    assert_same_state(trained, folder, again)


def test_a_whole_checkpoint_of_another_run_is_refused_also_behind_a_damaged_one(folder: Path) -> None:
    (newest(folder) / MOMENTS).write_bytes(b"")
    before = sorted(folder.rglob("*"))
    with pytest.raises(ValueError, match="belongs to another run: seed is"):
        run(folder, "seed=7")
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"sha256": 3}', '{"sha256": {}}'])
def test_damaged_meta_data_are_those_of_a_damaged_checkpoint(folder: Path, text: str) -> None:
    (newest(folder) / "meta.json").write_text(text)
    assert run(folder).first_step == 2


def test_a_half_written_checkpoint_is_passed_over(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A crash while writing leaves the folder under its temporary name, or one without meta data."""
    last = newest(folder)
    (last / "meta.json").unlink()
    shutil.copytree(last, last.with_name(".step-00000009.tmp"))
    again = run(folder)
    assert (again.first_step, again.step) == (2, 4)
    assert newest(folder) == last


def test_a_crash_while_writing_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path / "whole")
    calls: list[Path] = []
    real = tensor_files.save_file

    def crash(values: Any, path: Path) -> None:
        calls.append(path)
        real(values, path)
        if len(calls) == 5:
            path.write_bytes(path.read_bytes()[:100])
            raise OSError("no space left on device")

    monkeypatch.setattr(tensor_files, "save_file", crash)
    with pytest.raises(OSError, match="no space"):
        run(tmp_path / "run")
    monkeypatch.setattr(tensor_files, "save_file", real)
    assert [path.name for path in complete_checkpoints(tmp_path / "run" / "checkpoints")] == ["step-00000002"]
    model = tiny.model()
    run(tmp_path / "run", model=model)
    load = tiny.model()
    load_trainable(load, newest(tmp_path / "whole"))
    assert all(torch.equal(v, tiny.weights(load)[n]) for n, v in tiny.weights(model).items())


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda: tiny.model("qwen3"), "model class is 'LlamaForCausalLM' there, 'Qwen3ForCausalLM' here"),
        (lambda: tiny.model(rms_norm_eps=1e-3), "model configuration is"),
        (lambda: apply_lora(tiny.model(), LoraConfig(rank=2)), "trainable parameters is"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(folder: Path, change: Any, message: str) -> None:
    model = change()
    flags = ["train.tuning=lora"] if is_lora(model) else []
    with pytest.raises(ValueError, match=f"belongs to another run: {message}"):
        run(folder, *flags, model=model)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["train.epochs=1"], "steps is 4 there, 2 here"),
        (["train.method=ntp"], "mixup weight is 0.2 there, 0.0 here"),
        (["seed=1"], "seed is 0 there, 1 here"),
        (["optim.lr=0.02"], "optim.lr is 0.01 there, 0.02 here"),
        (["mixup.alpha=0.7"], "examples and pairs of the first epoch"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(folder: Path, flags: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(folder, *flags)


def test_other_examples_are_refused_and_settings_without_effect_are_not(folder: Path) -> None:
    run(folder, "train.micro_batch_size=2", "train.log_every=5", "train.gradient_checkpointing=true")
    with pytest.raises(ValueError, match="examples and pairs of the first epoch"):
        run(folder, count=11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trainable_weights_round_trip(tmp_path: Path, dtype: torch.dtype) -> None:
    model = tiny.model("qwen3", dtype=dtype)
    with torch.no_grad():
        model.head.weight.add_(1)
    save_trainable(model, tmp_path / "point")
    other = tiny.model("qwen3", dtype=dtype)
    load_trainable(other, tmp_path / "point")
    assert all(torch.equal(value, tiny.weights(other)[name]) for name, value in tiny.weights(model).items())
    assert other.is_tied
    with pytest.raises(ValueError, match="model class is 'Qwen3ForCausalLM' there"):
        load_trainable(tiny.model("llama"), tmp_path / "point")


def test_adapters_alone_are_saved_and_loaded(tmp_path: Path) -> None:
    model = apply_lora(tiny.model(), LoraConfig(rank=2), seed=1)
    save_trainable(model, tmp_path / "point")
    assert sum(path.stat().st_size for path in tensor_files.tensor_files(tmp_path / "point")) < 20_000
    other = apply_lora(tiny.model(), LoraConfig(rank=2), seed=2)
    load_trainable(other, tmp_path / "point")
    assert all(torch.equal(value, tiny.weights(other)[name]) for name, value in tiny.weights(model).items())


def test_the_masters_of_a_bfloat16_model_are_in_the_checkpoint(tmp_path: Path) -> None:
    """Rounded weights alone could not go on bit for bit."""
    trainer = run(tmp_path, model=tiny.model(dtype=torch.bfloat16))
    values = tiny.saved(newest(tmp_path), trainer.weights.masters)
    assert all(torch.equal(values[name], weight) for name, weight in trainer.weights.masters.items())
    kept = {value.dtype for value in load_file(newest(tmp_path) / WEIGHTS).values()}
    assert kept == {torch.float32}


def test_metrics_lines_are_on_disk_at_once_and_later_ones_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    writer = MetricsWriter(path)
    for step in range(1, 5):
        writer.write({"step": step, "loss": 0.5})
        assert [record["step"] for record in read_metrics(path)] == list(range(1, step + 1))
    with path.open("a") as file:
        file.write('{"step": 5, "lo')  # a crash in the middle of a line
    assert len(read_metrics(path)) == 4
    writer.close()
    MetricsWriter(path, step=2).close()
    assert [record["step"] for record in read_metrics(path)] == [1, 2]
    path.write_text('{"step": 1}\nnonsense\n{"step": 3}\n')
    with pytest.raises(ValueError, match="expected JSON in line 2, got 'nonsense'"):
        read_metrics(path)
    path.write_text('{"loss": 1}\n')
    with pytest.raises(ValueError, match="expected a step in line 1"):
        read_metrics(path)

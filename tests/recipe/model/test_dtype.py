"""``model.dtype=auto``: what is taken, said, recorded and kept."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
import yaml

from sftmix import cli
from sftmix.config import Config, load_config, read_config
from sftmix.model import dtype
from sftmix.model.load import load_model
from sftmix.run.session import Session
from sftmix.run.start import record
from sftmix_kernels import ProductSupport
from tests.recipe import tiny

CPU = torch.device("cpu")


def products(monkeypatch: pytest.MonkeyPatch, in_hardware: bool) -> None:
    """A device with 16-bit products, or without."""
    found = {torch.float32: True, torch.bfloat16: in_hardware}
    monkeypatch.setattr(
        dtype, "product_support", lambda kind, device: ProductSupport(found[kind], "as a test says")
    )
    monkeypatch.setattr(dtype, "product_factor", lambda kind, device: 38.0)


@pytest.mark.parametrize("in_hardware,taken", [(True, "bfloat16"), (False, "float32")])
def test_auto_follows_the_device_and_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], in_hardware: bool, taken: str
) -> None:
    products(monkeypatch, in_hardware)
    config = load_config(None, ["run_dir=run", "model.name=tiny", "data.train=none"])
    assert config.model.dtype == "auto"
    settled = dtype.settle_dtype(config, CPU)
    assert settled.model.dtype == taken
    assert settled == dataclasses.replace(config, model=dataclasses.replace(config.model, dtype=taken))
    assert capsys.readouterr().out.splitlines() == [f"model.dtype: {taken} (as a test says)"]
    dtype.warn_if_slow(settled, CPU)
    assert dtype.settle_dtype(settled, CPU) is settled
    assert capsys.readouterr().out == ""


def test_bfloat16_by_name_is_taken_and_warned_of_once_with_the_factor(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    products(monkeypatch, False)
    tiny.causal_lm().save_pretrained(tmp_path / "m")
    flags = [f"model.name={tmp_path / 'm'}", "data.train=none", "model.dtype=bfloat16"]
    config = cli.resolve(str(tmp_path / "run"), None, flags)
    Session(config)
    assert config.model.dtype == "bfloat16"
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "dtype" in line]
    assert line.startswith("warning: model.dtype=bfloat16 is slow here") and "takes 38 times as long" in line


def resolve(folder: Path, file: Path | None, flags: list[str]) -> Config:
    """What a command is set to, recorded as one that is not refused records it."""
    config = cli.resolve(str(folder), file, flags)
    record(config)
    return config


def test_the_run_folder_keeps_what_was_decided(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A run begun on one kind of machine goes on with its type on another, whichever way it is started again."""
    products(monkeypatch, False)
    flags = ["model.name=tiny", "data.train=none"]
    assert resolve(tmp_path, None, flags).model.dtype == "float32"
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["model"]["dtype"] == "float32"
    capsys.readouterr()
    products(monkeypatch, True)
    assert resolve(tmp_path, None, []).model.dtype == "float32"
    assert "model.dtype:" not in capsys.readouterr().out
    assert resolve(tmp_path, None, ["model.dtype=auto"]).model.dtype == "float32"
    assert "model.dtype: float32 (recorded in the run folder)" in capsys.readouterr().out
    (tmp_path / "other.yaml").write_text(
        f"model: {{name: tiny}}\ndata: {{train: none}}\nrun_dir: {tmp_path}\n"
    )
    assert resolve(tmp_path, tmp_path / "other.yaml", []).model.dtype == "float32"
    assert read_config(tmp_path).model.dtype == "float32"
    assert resolve(tmp_path, None, ["model.dtype=bfloat16"]).model.dtype == "bfloat16"  # named: taken


@pytest.mark.parametrize("in_hardware,taken", [(True, torch.bfloat16), (False, torch.float32)])
def test_a_model_loaded_with_auto_has_the_devices_type(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, in_hardware: bool, taken: torch.dtype
) -> None:
    products(monkeypatch, in_hardware)
    tiny.causal_lm().save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    config = tiny.config(f"model.name={tmp_path}", "model.dtype=auto")
    model, _ = load_model(config.model)
    assert model.dtype == taken and {p.dtype for p in model.parameters()} == {taken}
    assert Session(config).config.model.dtype == str(taken).removeprefix("torch.")

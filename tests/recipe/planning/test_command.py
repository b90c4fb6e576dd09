"""``sftmix plan``: words, JSON, knobs as flags, and bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sftmix.cli import app
from tests.recipe.planning.configs import PUBLIC, folder


def run(*words: str) -> str:
    done = CliRunner().invoke(app, ["plan", *words])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.output


def test_a_plan_in_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(folder("SmolLM2-135M", tmp_path))
    text = run("--model", model, "--gpus", "8", "--tokens", "1000000")
    for part in (
        "134,515,008 parameters",
        "8 x H100-80",
        "AdamW moments",
        "all-gather",
        "tokens/s",
        "train sftmix",
    ):
        assert part in text, part
    assert "fits: " in text and "assumed, not measured" in text


def test_a_plan_as_json_with_knobs_and_a_file(tmp_path: Path) -> None:
    model = folder("SmolLM2-135M", tmp_path) / "config.json"
    knobs = tmp_path / "knobs.yaml"
    knobs.write_text("train:\n  batch_size: 64\n")
    words = [
        "--model",
        str(model),
        "--config",
        str(knobs),
        "--json",
        "--train.tuning",
        "lora",
        "--lora.rank=8",
    ]
    found = json.loads(
        run(*words, "--gpu", "RTX4090", "--gpu-memory", "20", "--train.gradient_checkpointing", "full")
    )
    assert found["gpu"]["memory_bytes"] == 20 * 10**9
    assert found["model"]["trained"] < found["model"]["parameters"] < 1.05 * PUBLIC["SmolLM2-135M"][1]
    assert found["load"]["micro_batches_per_gpu"] == 8 and found["load"]["checkpointing"] == "full"
    assert found["memory"]["fits"] and found["would_fit"] == []


def test_bad_input_is_one_value_error(tmp_path: Path) -> None:
    model = str(folder("SmolLM2-135M", tmp_path))
    with pytest.raises(ValueError, match="gpu: expected one of"):
        run("--model", model, "--gpu", "abacus")
    with pytest.raises(ValueError, match=r"model\.name: expected a value, got none"):
        run("--gpus", "2")
    with pytest.raises(ValueError, match=r"train\.batch_sise"):
        run("--model", model, "--train.batch_sise", "4")

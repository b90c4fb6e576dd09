"""The examples in ``sftmix/examples`` run, on a tiny model, and leave a model that plain transformers loads."""

from __future__ import annotations

import json
import random
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from sftmix.examples import plain_torch
from sftmix.scores.dynamics import write_dynamics
from tests.recipe import tiny


@pytest.fixture
def material(tmp_path: Path) -> tuple[str, str]:
    """A tiny model and 22 questions with answers, in its words."""
    tiny.causal_lm().save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    draw = random.Random(0)

    def words(count: int) -> str:
        return " ".join(f"w{draw.randrange(50)}" for _ in range(count))

    rows = [{"prompt": words(3), "completion": " " + words(2 + n % 7)} for n in range(22)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path / "model"), str(tmp_path / "rows.jsonl")


def assert_trained(out: Path, model: str) -> None:
    found, before = (
        dict(AutoModelForCausalLM.from_pretrained(each).named_parameters()) for each in (out, model)
    )
    assert found.keys() == before.keys()
    assert any(not torch.equal(found[name], value) for name, value in before.items())


def test_a_plain_loop(material: tuple[str, str], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    split = plain_torch.main(*material, str(tmp_path / "out"))
    assert len(split.confident) == len(split.unconfident) == 11
    assert capfd.readouterr().out.count("loss ") == 3  # 11 pairs, four a batch
    assert_trained(tmp_path / "out", material[0])


def test_a_lightning_module(material: tuple[str, str], tmp_path: Path) -> None:
    from sftmix.examples import lightning_module

    rows = [
        {"example": str(n), "checkpoint": 0, "step": 1, "nll_sum": 1.0 + n, "num_tokens": 3, "top1_share": 0.5,
         "source": "online"}
        for n in range(22)
    ]  # fmt: skip
    write_dynamics(tmp_path / "dynamics.parquet", rows)
    lightning_module.main(
        *material, str(tmp_path / "dynamics.parquet"), str(tmp_path / "out"),
        accelerator="cpu", enable_progress_bar=False, enable_model_summary=False, default_root_dir=str(tmp_path),
    )  # fmt: skip
    assert_trained(tmp_path / "out", material[0])


@pytest.mark.skipif(not find_spec("trl"), reason="needs trl, which needs Python 3.11")
def test_a_trl_script(material: tuple[str, str], tmp_path: Path) -> None:
    from sftmix.examples import trl_script

    model, data = material
    trainer = trl_script.main([
        "--model_name_or_path", model, "--dataset_name", data, "--output_dir", str(tmp_path / "out"),
        "--reference", "online", "--per_device_train_batch_size", "4", "--num_train_epochs", "1", "--use_cpu",
        "--bf16", "false", "--report_to", "none", "--dtype", "float32", "--learning_rate", "0.01",
    ])  # fmt: skip
    assert len(trainer.dynamics_rows) == 22
    assert_trained(tmp_path / "out", model)

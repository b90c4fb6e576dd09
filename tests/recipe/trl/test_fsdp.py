"""accelerate's FSDP2 around the trainer's model, two gloo processes: one process's steps, saved, read and resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.kernels.ranks import launch
from tests.once import made_once
from tests.recipe import tiny
from tests.recipe.trl.fsdp_ranks import WAYS, made
from tests.recipe.trl.small import assert_close, weights

EXACT = [way for way in WAYS if way != "bfloat16"]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_once(
        tmp_path_factory, "trl_fsdp", lambda folder: launch("tests.recipe.trl.fsdp_ranks", folder, 2)
    )


def left(out: Path, name: str) -> dict[str, Any]:
    return torch.load(out / f"{name}.pt", weights_only=False)


@pytest.mark.parametrize("way", EXACT)
def test_two_sharded_processes_train_as_one(out: Path, tmp_path: Path, way: str) -> None:
    """Untied and tied heads, a softcap with a lambda a token, adapters; losses, gradient norms, scores, evaluation."""
    found = left(out, way)
    assert found["is_fsdp2"] and "DTensor" in found["kinds"]
    alone = made(tmp_path, way)
    alone.train()
    assert_close(found["weights"], weights(alone.model), 2e-5)
    for key in ("loss", "grad_norm", "ntp_loss", "mixup_loss", "mean_token_accuracy", "entropy"):
        one, two = (
            [r[key] for r in log if key in r and "loss" in r]
            for log in (alone.state.log_history, found["log"])
        )
        assert two == pytest.approx(one, rel=2e-4) and len(two) == 6, key
    assert [row["example"] for row in found["rows"]] == [row["example"] for row in alone.dynamics_rows]
    assert found["eval_loss"] == pytest.approx(alone.evaluate(alone.train_dataset)["eval_loss"], rel=1e-5)


def test_the_head_gets_its_whole_weight_and_nothing_of_the_loss_is_rounded(out: Path) -> None:
    """In bfloat16 FSDP2 casts what a module is given: not lambda, and counts are numbers."""
    found = left(out, "bfloat16")
    assert found["log"][0]["loss"] == pytest.approx(left(out, "untied")["log"][0]["loss"], rel=0.02)
    assert len(found["seen"]) == 12
    for call in found["seen"]:
        assert call["is_whole"] and call["hidden"] == call["weight"] == torch.bfloat16
        assert call["lam"].dtype == torch.float32 and all(isinstance(n, int) for n in call["denominators"])
    lam = torch.cat([call["lam"] for call in found["seen"]])
    assert torch.equal(lam, torch.cat([call["lam"] for call in left(out, "untied")["seen"]]))
    assert not torch.equal(lam, lam.bfloat16().float())
    assert {value.dtype for value in found["weights"].values()} == {torch.float32}


@pytest.mark.parametrize("way", EXACT)
def test_what_it_saves_is_a_plain_model(out: Path, way: str) -> None:
    found, folder = left(out, way), out / way / "model"
    if way == "lora":
        plain = PeftModel.from_pretrained(tiny.causal_lm(WAYS[way][0]), folder)
    else:
        plain = AutoModelForCausalLM.from_pretrained(folder)
    assert_close(weights(plain), found["weights"], 0)


@pytest.mark.parametrize("state", ["FULL_STATE_DICT", "SHARDED_STATE_DICT"])
def test_a_resumed_run_ends_in_the_same_bits(out: Path, state: str) -> None:
    found, whole = left(out, state), left(out, "untied")
    assert_close(found["weights"], whole["weights"], 0)
    assert found["rows"] == whole["rows"]


def test_a_reference_run_is_refused_where_weights_cannot_be_put_back(out: Path) -> None:
    assert "reference: expected None with sharded weights, got 'online'" in (out / "online.txt").read_text()

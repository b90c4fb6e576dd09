"""Two processes (gloo, DDP) train one process's steps: both denominators are those of the whole step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.kernels.ranks import launch
from tests.once import made_once
from tests.recipe import tiny
from tests.recipe.trl.small import assert_close, dataset, trainer, weights

EXAMPLES = tiny.examples(24, longest=20)
EVEN_OUT = tiny.examples(22, longest=20)  # those of the uneven run


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_once(
        tmp_path_factory, "trl_ranks", lambda folder: launch("tests.recipe.trl.ranks", folder, 2)
    )


@pytest.mark.parametrize("name, changes", [("mixed", {}), ("token", {"mixup_lam": "token"})])
def test_two_processes_train_as_one(out: Path, tmp_path: Path, name: str, changes: dict[str, Any]) -> None:
    alone = trainer(tmp_path, rows=dataset(EXAMPLES), split=tiny.halves(EXAMPLES), **changes)
    alone.train()
    found = torch.load(out / f"{name}.pt", weights_only=False)
    assert_close(found["weights"], weights(alone.model), 2e-5)
    for key in ("loss", "grad_norm", "ntp_loss", "mean_token_accuracy", "num_tokens", "entropy"):
        one, two = ([r[key] for r in log if key in r] for log in (alone.state.log_history, found["log"]))
        assert two == pytest.approx(one, rel=2e-4), key
    for one, two in zip(alone.dynamics_rows, found["rows"], strict=True):
        assert {k: v for k, v in one.items() if k != "nll_sum"} == {
            k: v for k, v in two.items() if k != "nll_sum"
        }
        assert two["nll_sum"] == pytest.approx(one["nll_sum"], rel=1e-4)


def test_resumed_in_the_middle_of_an_epoch_the_bits_are_the_same(out: Path) -> None:
    """Of the second epoch, whose pairs are not the first one's."""
    if not (out / "resumed.pt").exists():
        pytest.skip(
            "this torch cannot read an optimizer's state onto the device cpu:0, as transformers asks it to"
        )
    ends = torch.load(out / "resumed.pt", weights_only=False)
    assert_close(ends["again"][0], ends["whole"][0], 0)
    assert ends["again"][1] == ends["whole"][1] and len(ends["whole"][1]) == 2 * len(EXAMPLES)


def test_an_uneven_number_of_batches_scores_every_example_once(out: Path) -> None:
    found = torch.load(out / "uneven.pt", weights_only=False)
    assert found["steps"] == 6
    for epoch in range(2):
        names = [row["example"] for row in found["rows"] if row["checkpoint"] == epoch]
        assert sorted(names) == sorted(EVEN_OUT)


def test_the_reference_runs_on_two_processes(out: Path, tmp_path: Path) -> None:
    alone = trainer(tmp_path, rows=dataset(EXAMPLES), reference="online", num_train_epochs=1)
    alone.train()
    found = torch.load(out / "online.pt", weights_only=False)
    assert found["split"] == alone.split.confident
    assert_close(found["weights"], weights(alone.model), 2e-5)

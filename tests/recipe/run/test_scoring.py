"""A scoring pass that is stopped goes on after what it kept, with the same batches, to the same bits."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from sftmix.run import scoring
from sftmix.run.folder import RunFolder
from sftmix.scores.dynamics import read_dynamics
from sftmix.training.signals import Stopped
from tests.recipe.run.small import run

Material = tuple[Path, Path]
FLAGS = ("--evaluate.batch_size=2", "--reference.dynamics=checkpoint")


class Killed(Exception):
    pass


@pytest.fixture(scope="module")
def scored(material: Material, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scored") / "r"
    run(material, folder, *FLAGS)
    return folder


@pytest.fixture
def unscored(scored: Path, tmp_path: Path) -> Path:
    """The same with its scores, and all that came of them, taken away."""
    folder = tmp_path / "r"
    shutil.copytree(scored, folder)
    RunFolder(folder).remove(("score", "split", "train-ntp", "train-sftmix", "evaluate", "plot"))
    return folder


def interrupt(monkeypatch: pytest.MonkeyPatch, at: int, what: Any) -> list[int]:
    """Slices of two examples; ``what`` happens in the ``at``-th of all. The sizes of those that were scored."""
    sizes: list[int] = []
    real = scoring.score_examples

    def score(model: Any, examples: Any, **options: Any) -> Any:
        sizes.append(len(examples))
        found = real(model, examples, **options)
        if len(sizes) == at:
            what()
        return found

    monkeypatch.setattr(scoring, "_ROUNDS", 1)
    monkeypatch.setattr(scoring, "score_examples", score)
    return sizes


def kill() -> None:
    raise Killed


@pytest.mark.parametrize("at", [1, 5, 13, 20])
def test_after_a_signal_and_after_a_kill(
    material: Material, scored: Path, unscored: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """24 examples at two points: a signal keeps all that was scored, a kill what the clock had kept."""
    with monkeypatch.context() as patch:
        interrupt(patch, at, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Stopped) as stopped:
            run(material, unscored, *FLAGS)
    assert stopped.value.code == 143
    with monkeypatch.context() as patch:
        sizes = interrupt(patch, 3, kill)
        with pytest.raises(Killed):
            run(material, unscored, *FLAGS, "--train.checkpoint_every=1 step")
    with monkeypatch.context() as patch:
        again = interrupt(patch, 10**9, kill)
        run(material, unscored, *FLAGS)
    assert len(sizes) == 3
    assert sum(again) == 48 - 2 * at - 2 * 2  # the killed slice was not kept
    assert (unscored / "dynamics.parquet").read_bytes() == (scored / "dynamics.parquet").read_bytes()
    assert not (unscored / "scoring").exists()


def test_scores_of_other_weights_and_damaged_ones_are_not_taken(
    material: Material, scored: Path, unscored: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    with monkeypatch.context() as patch:
        interrupt(patch, 20, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Stopped):
            run(material, unscored, *FLAGS)
    first, second = (unscored / "scoring" / f"point-00{n}.parquet" for n in (0, 1))
    shutil.copy(first, second)
    first.write_bytes(first.read_bytes()[:-20])
    capfd.readouterr()
    run(material, unscored, *FLAGS)
    told = " ".join(capfd.readouterr().out.split())
    assert "score: again from the start of point-000" in told
    assert "point-001.parquet is of other weights, its examples are scored again" in told
    one, other = (read_dynamics(folder / "dynamics.parquet") for folder in (scored, unscored))
    assert (one.nll_sum == other.nll_sum).all()

"""A file of a finished run is flipped, cut or gone: it is made again from what is whole, to the same bits, and said."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from sftmix.run import session
from sftmix.run.checksums import damage, described, files_of, sums
from sftmix.run.folder import RunFolder
from sftmix.scores.dynamics import read_dynamics
from tests.recipe.hurt import hurt
from tests.recipe.run.small import run, same, sftmix, trained

POINT = "shard-00001-model-00001-of-00001.safetensors"
# (file of the run, what is said)
FILES = [
    (f"reference/point-000/{POINT}", f"reference: again, reference/point-000/{POINT}"),
    ("reference/point-001.json", "reference: again, reference/point-001.json"),
    ("reference/online.parquet", "reference: again, reference/online.parquet"),
    ("dynamics.parquet", "score: again, dynamics.parquet"),
    ("split.parquet", "split: again, split.parquet"),
    ("train-ntp/model/config.json", "train-ntp: again, train-ntp/model/config.json"),
    ("train-sftmix/model/model.safetensors", "train-sftmix: again, train-sftmix/model/model.safetensors"),
    ("evaluation.json", "evaluate: anew, evaluation.json"),
    ("evaluation/heldout.parquet", "evaluate: anew, evaluation/heldout.parquet"),
]


def copied(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def assert_same_run(folder: Path, whole: Path) -> None:
    for method in ("ntp", "sftmix"):
        assert same(trained(folder, method), trained(whole, method))
    for source in ("checkpoint", "online"):
        one, other = (read_dynamics(each / "dynamics.parquet", source) for each in (folder, whole))
        assert one.examples == other.examples and (one.nll_sum == other.nll_sum).all()
    figures = [json.loads((each / "evaluation.json").read_text()) for each in (folder, whole)]
    assert figures[0] == figures[1]


@pytest.mark.parametrize("how", ["flip", "cut", "remove"])
@pytest.mark.parametrize("name,said", FILES, ids=[name for name, _ in FILES])
def test_a_damaged_file_is_made_again(
    finished: Path, material: tuple[Path, Path], tmp_path: Path, capfd: Any, name: str, said: str, how: str
) -> None:
    folder = copied(finished, tmp_path)
    hurt(folder / name, how)
    run(material, folder)
    if (name, how) != ("evaluation.json", "remove"):  # whose absence is that of figures never made
        assert f"{said} is {'gone' if how == 'remove' else 'damaged'}" in capfd.readouterr().out
    assert_same_run(folder, finished)
    for stage, entry in RunFolder(folder).record().items():
        assert entry["files"] and not damage(folder, entry["files"]), stage


ALONE: list[tuple[str, Sequence[str], str]] = [
    ("dynamics.parquet", ["split"], r"dynamics.parquet(: expected a whole|.* is damaged).*`sftmix score`"),
    ("split.parquet", ["train"], r"split.parquet(: expected a whole|.* is damaged).*`sftmix split`"),
    (
        "train-ntp/model/model.safetensors", ["evaluate"],
        "model.safetensors is damaged: .*; run `sftmix train --train.method ntp` to make it anew",
    ),
]  # fmt: skip


@pytest.mark.parametrize("name,command,message", ALONE, ids=[command[0] for _, command, _ in ALONE])
def test_a_stage_does_not_read_what_is_damaged(
    finished: Path, tmp_path: Path, name: str, command: Sequence[str], message: str
) -> None:
    """And the command that it names mends it."""
    folder = copied(finished, tmp_path)
    hurt(folder / name, "flip")
    with pytest.raises(ValueError, match=message):
        sftmix(command[0], folder, *command[1:])
    mending = message.rpartition("`sftmix ")[2].partition("`")[0].split()
    sftmix(mending[0], folder, *mending[1:])
    sftmix(command[0], folder, *command[1:])
    assert_same_run(folder, finished)


def test_what_may_change_after_a_stage_is_not_held(finished: Path) -> None:
    names = {
        stage: {path.name for path in files_of(finished, stage)} for stage in RunFolder(finished).record()
    }
    assert names["reference"] == {
        POINT,
        "meta.json",
        "online.parquet",
        "point-000.json",
        "point-001.json",
    }
    assert "model.safetensors" in names["train-sftmix"] and "README.md" not in names["train-sftmix"]
    assert names["score"] == {"dynamics.parquet"} and names["split"] == {"split.parquet"}
    assert sums(finished, "score").keys() == {"dynamics.parquet"}


def test_few_files_are_named_and_the_others_counted() -> None:
    assert (
        described({f"f{n}": "is gone" for n in range(5)}) == "f0 is gone; f1 is gone; f2 is gone; and 2 more"
    )


def test_a_start_reads_a_stage_once(
    finished: Path, material: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Train and evaluate both ask for the exported model, which may have many bytes."""
    read: list[str] = []

    def counted(folder: Path, recorded: Any) -> dict[str, str]:
        read.extend(recorded)
        return damage(folder, recorded)

    monkeypatch.setattr(session, "damage", counted)
    run(material, finished)
    assert "train-sftmix/model/model.safetensors" in read and len(read) == len(set(read))

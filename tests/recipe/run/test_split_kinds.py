"""Splits that are not at the median, by the command line: quantile, random, given, one half, and ready scores."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from sftmix.report.lambdas import lambdas
from sftmix.scores.confidence import read_split
from sftmix.scores.dynamics import read_dynamics
from sftmix.training.metrics import read_metrics
from tests.recipe.run.small import run, sftmix


def again(
    material: tuple[Path, Path], finished: Path, folder: Path, *flags: str, scores: Path | None = None
) -> None:
    """A run of SFTMix alone on the scores of the finished run."""
    run(
        material, folder, "--reference.scores", str(scores or finished / "dynamics.parquet"), "--no-baseline",
        "--train.epochs=1", *flags,
    )  # fmt: skip


def num_tokens(folder: Path) -> int:
    return sum(record["num_tokens"] for record in read_metrics(folder / "train-sftmix" / "metrics.jsonl"))


def test_a_quantile_gives_halves_of_its_sizes(
    material: tuple[Path, Path], finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again(material, finished, tmp_path / "q", "--split.by", "quantile", "--split.confident_share", "0.25")
    split, median = (read_split(folder / "split.parquet") for folder in (tmp_path / "q", finished))
    total = len(median.confident) + len(median.unconfident)
    assert len(split.confident) == -(-total // 4) and len(split.unconfident) == total - len(split.confident)
    ranked = sorted(median.confidence, key=lambda name: (-median.confidence[name], name))
    assert split.confident == ranked[: len(split.confident)]
    assert "cut at confidence" in capsys.readouterr().out
    whole = sum(r["num_tokens"] for r in read_metrics(finished / "train-sftmix" / "metrics.jsonl")) / 2
    assert num_tokens(tmp_path / "q") == whole  # those without a partner are trained on too


def test_random_and_given_halves_need_no_reference(
    material: tuple[Path, Path], finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(material, tmp_path / "r", "--split.by", "random", "--no-baseline")
    assert not (tmp_path / "r" / "reference").exists() and not (tmp_path / "r" / "dynamics.parquet").exists()
    told = capsys.readouterr().out
    assert "reference: not needed, the split is at random" in told
    assert "plot: no data map and no confidence, the split is at random" in told
    split = read_split(tmp_path / "r" / "split.parquet")
    rows = [{"id": name, "half": "confident"} for name in split.unconfident]  # the other way round
    rows += [{"id": name, "half": "unconfident"} for name in split.confident]
    file = tmp_path / "halves.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(material, tmp_path / "g", "--split.by", "given", "--split.file", str(file), "--no-baseline")
    given = read_split(tmp_path / "g" / "split.parquet")
    assert (sorted(given.confident), sorted(given.unconfident)) == (
        sorted(split.unconfident), sorted(split.confident),
    )  # fmt: skip
    assert "Held-out answers" in capsys.readouterr().out
    capsys.readouterr()
    run(material, tmp_path / "g", "--split.by", "given", "--split.file", str(file), "--no-baseline")
    assert "train sftmix: done before" in capsys.readouterr().out


def test_halves_of_other_examples_are_refused_before_anything_is_done(
    material: tuple[Path, Path], tmp_path: Path
) -> None:
    file = tmp_path / "halves.jsonl"
    file.write_text('{"id": "a", "half": "confident"}\n{"id": "b", "half": "unconfident"}\n')
    with pytest.raises(ValueError, match=r"expected exactly the examples of data\.train"):
        run(material, tmp_path / "g", "--split.by", "given", "--split.file", str(file))
    assert not (tmp_path / "g").exists()
    with pytest.raises(ValueError, match=r"split\.file: expected a file with split\.by=given, got none"):
        run(material, tmp_path / "g", "--split.by", "given")
    with pytest.raises(ValueError, match=r"split\.file: expected none with split\.by=median"):
        run(material, tmp_path / "g", "--split.file", str(file))


@pytest.mark.parametrize(
    "flags,message",
    [
        (
            ["--split.confident_share", "0.3"],
            r"split\.confident_share: expected 0\.5 with split\.by=median, got 0\.3",
        ),
        (
            ["--split.by", "random", "--reference.scores", "x"],
            r"reference\.scores: expected none with split\.by=random",
        ),
        (["--mixup.weight", "0", "--mixup.ntp_weight", "0"], r"mixup\.ntp_weight: expected more than 0"),
    ],
)
def test_a_knob_that_nothing_would_read_is_refused(
    material: tuple[Path, Path], tmp_path: Path, flags: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run(material, tmp_path / "r", *flags)
    assert not (tmp_path / "r").exists()


def test_another_split_in_the_same_folder_is_refused(
    material: tuple[Path, Path], finished: Path, tmp_path: Path
) -> None:
    again(material, finished, tmp_path / "q")
    with pytest.raises(ValueError, match=r"expected the split that split\.by=quantile gives, got another"):
        sftmix("split", tmp_path / "q", "--split.by", "quantile", "--split.confident_share", "0.3")
    quantile = ("--split.by", "quantile", "--split.confident_share", "0.3")
    with pytest.raises(ValueError, match="got another"):
        again(material, finished, tmp_path / "q", *quantile)
    sftmix("split", tmp_path / "q")  # a refused flag leaves the folder as it was
    with pytest.raises(ValueError, match=r"split\.use"):
        sftmix("train", tmp_path / "q", "--split.use", "confident")
    with pytest.raises(ValueError, match=r"mixup\.pairing"):
        sftmix("train", tmp_path / "q", "--mixup.pairing", "length")


def test_a_folder_of_an_earlier_version_goes_on(
    material: tuple[Path, Path], finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its record names none of the newer knobs, and none that has its usual value is named today."""
    again(material, finished, tmp_path / "q")
    record = json.loads((tmp_path / "q" / "stages.json").read_text())["train-sftmix"]["settings"]
    assert not [key for key in record if key.startswith("split.")]
    assert {key for key in record if key.startswith("mixup.")} == {"mixup.alpha", "mixup.weight", "mixup.lam"}


def test_scores_of_more_examples_are_taken_with_a_word(
    material: tuple[Path, Path], finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = pq.read_table(finished / "dynamics.parquet")
    more = table.slice(0, 1).to_pylist()[0]
    rows = table.to_pylist() + [
        {**more, "example": "other", "checkpoint": c, "source": s}
        for s in ("checkpoint", "online")
        for c in range(2)
    ]
    path = tmp_path / "more.parquet"
    pq.write_table(type(table).from_pylist(rows, schema=table.schema), path)
    again(material, finished, tmp_path / "m", scores=path)
    assert f"1 examples of {path} are not trained on: left out" in capsys.readouterr().out
    assert (
        read_dynamics(tmp_path / "m" / "dynamics.parquet").examples
        == read_dynamics(finished / "dynamics.parquet").examples
    )
    pq.write_table(
        table.filter(table.column("example").to_numpy() != table.column("example")[0].as_py()), path
    )
    with pytest.raises(ValueError, match="got 1 of them missing and 0 unknown"):
        again(material, finished, tmp_path / "n", scores=path)


def test_one_half_alone_and_pairs_by_length(
    material: tuple[Path, Path], finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--split.use", "confident", "--mixup.pairing", "length", "--mixup.lam", "token")
    again(material, finished, tmp_path / "c", *flags)
    told = capsys.readouterr().out
    assert "on the confident half alone" in told and "pairing length" in told
    assert read_split(tmp_path / "c" / "split.parquet") == read_split(finished / "split.parquet")
    assert 0 < num_tokens(tmp_path / "c") < num_tokens(finished) / 2
    # what the report draws again is what the run mixed
    metrics = read_metrics(tmp_path / "c" / "train-sftmix" / "metrics.jsonl")
    settings = json.loads((tmp_path / "c" / "stages.json").read_text())["train-sftmix"]["settings"]
    dynamics = read_dynamics(finished / "dynamics.parquet")
    sizes = dict(zip(dynamics.examples, dynamics.num_tokens[0].tolist(), strict=True))
    split = read_split(tmp_path / "c" / "split.parquet")
    drawn = lambdas(split, settings, steps=len(metrics), num_supervised=sizes)
    assert sum(len(part) for part in drawn) == sum(record["num_mixed"] for record in metrics)

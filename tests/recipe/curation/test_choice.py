"""``sftmix select``, ``suspects`` and ``cartography``, on scores made up here."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from sftmix.config import load_config, save_config
from sftmix.curation.selection import at_random, how_many
from sftmix.data.prepare import Source
from sftmix.scores.cartography import read_rows
from sftmix.scores.dynamics import read_dynamics, to_table
from sftmix.scores.table import SCORES, auroc, read_scores, score_row
from tests.recipe.run.small import run, sftmix

COUNT = 12


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder as ``sftmix score --data`` leaves it: example n has n + 1 tokens, of NLL n / 4 and n / 4 + 1."""
    data = tmp_path / "data.jsonl"
    rows = [{"prompt": f"question {n}", "completion": f"answer {n}", "n": n} for n in range(COUNT)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    ids = [example.id for example in Source(str(data)).examples()]
    scores = tmp_path / "scores"
    scores.mkdir()
    save_config(
        load_config(None, [f"run_dir={scores}", f"data.train={data}", "model.name=m"]), scores / "config.yaml"
    )
    made = [
        score_row(
            name,
            checkpoint=c,
            step=c,
            model="m",
            nll_sum=(n / 4 + c) * (n + 1),
            num_tokens=n + 1,
            num_top1=n % 2 * (n + 1),
            entropy_sum=0.5,
            ifd=None if n == 3 else 2.0 - n / 10,
        )
        for n, name in enumerate(ids)
        for c in range(2)
    ]
    pq.write_table(to_table(made, SCORES, "scores"), scores / "scores.parquet")
    return scores


def selected(folder: Path, *flags: str) -> list[int]:
    sftmix("select", folder, *flags)
    out = folder / "selected"
    found = [json.loads(line)["n"] for line in (out / "selected.jsonl").read_text().splitlines()]
    kept, dropped = ((out / name).read_text().split() for name in ("kept_ids.txt", "dropped_ids.txt"))
    assert len(kept) == len(found) and len(kept) + len(dropped) == COUNT == len({*kept, *dropped})
    return found


@pytest.mark.parametrize(
    "flags,expected",
    [
        (["--keep", "3"], [0, 1, 2]),  # the most confident
        (["--keep", "3", "--take", "lowest"], [9, 10, 11]),
        (["--keep", "3", "--by", "longest"], [9, 10, 11]),
        (["--keep", "5", "--take", "ends"], [0, 1, 2, 10, 11]),
        (["--keep", "4", "--take", "middle"], [4, 5, 6, 7]),
        (["--keep", "25%", "--by", "ifd"], [0, 1, 2]),
        (["--keep", "4", "--by", "ifd"], [0, 1, 2, 4]),  # example 3 has none
        (["--keep", "2", "--by", "last_nll"], [10, 11]),
        (["--keep", "2", "--by", "ifd", "--below", "1.85"], [2, 4]),  # the highest below a bound
        (["--by", "nll", "--above", "1", "--below", "1.6"], [3, 4]),  # 0.5, 0.75 … and 1.0 is not above 1
        (["--keep", "10%", "--by", "top1_share"], None),
    ],
)
def test_examples_are_chosen_by_score(folder: Path, flags: list[str], expected: list[int] | None) -> None:
    found = selected(folder, *flags)
    if expected is None:  # equal scores go by their ids
        ids = {
            example.id: n for n, example in enumerate(Source(str(folder.parent / "data.jsonl")).examples())
        }
        assert found == sorted(ids[name] for name in sorted(n for n in ids if ids[n] % 2)[:2])
    else:
        assert found == expected


def test_lists_of_ids_and_random_choices(folder: Path) -> None:
    ids = [example.id for example in Source(str(folder.parent / "data.jsonl")).examples()]
    (folder / "some.txt").write_text("".join(f"{ids[n]}\n" for n in (8, 2, 5)))
    assert selected(folder, "--ids", str(folder / "some.txt")) == [2, 5, 8]
    assert selected(folder, "--without", str(folder / "some.txt")) == [
        n for n in range(COUNT) if n not in (2, 5, 8)
    ]
    assert selected(folder, "--ids", str(folder / "some.txt"), "--keep", "1") == [2]
    first = selected(folder, "--keep", "6", "--by", "random")
    assert (
        first
        == selected(folder, "--keep", "6", "--by", "random")
        != selected(folder, "--keep", "6", "--by", "random", "--seed", "1")
    )
    assert set(selected(folder, "--keep", "3", "--by", "random")) < set(first)
    assert set(at_random(ids, 4, seed=0)) == set(at_random(reversed(ids), 4, seed=0))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "keep,count", [("3", 3), ("50%", 6), ("1%", 1), ("100%", 12), ("12", 12), ("33.4%", 5)]
)
def test_how_many_are_kept(keep: str, count: int) -> None:
    assert how_many(keep, COUNT) == count


@pytest.mark.parametrize(
    "flags,message",
    [
        ([], "keep: expected a number or a share, or --ids, --without, --above or --below"),
        (["--keep", "0"], "keep: expected a number from 1 to 12"),
        (["--keep", "13"], "keep: expected a number from 1 to 12"),
        (["--keep", "0.3"], "keep: expected a number from 1 to 12, or a share such as 30%, got '0.3'"),
        (["--keep", "-1"], "keep: expected"),
        (["--take", "ends", "--above", "0"], "take: expected it beside --keep and a score, got ends"),
        (
            ["--keep", "2", "--by", "random", "--take", "ends"],
            "take: expected it beside --keep and a score, got ends",
        ),
        (["--keep", "2", "--seed", "3"], "seed: expected it beside --by random, got 3"),
        (["--by", "ifd", "--above", "9"], "keep: expected some example to be left, got none"),
        (["--keep", "12", "--by", "ifd"], "keep: expected at most the 11 examples that have ifd, got 12"),
        (["--keep", "2", "--by", "loss"], "by: expected one of confidence, .*, or random, got 'loss'"),
        (
            ["--keep", "2", "--take", "best"],
            "take: expected one of highest, lowest, ends, middle, got 'best'",
        ),
    ],
)
def test_a_choice_that_cannot_be_made_is_refused(folder: Path, flags: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sftmix("select", folder, *flags)
    assert not (folder / "selected").exists()


def test_unknown_ids_are_refused(folder: Path) -> None:
    (folder / "other.txt").write_text("nobody\n")
    with pytest.raises(
        ValueError, match=r"without: expected ids of examples, got 1 unknown of 1 \(first: nobody\)"
    ):
        sftmix("select", folder, "--without", folder / "other.txt")


def test_a_file_that_changed_since_is_refused(folder: Path) -> None:
    data = folder.parent / "data.jsonl"
    data.write_text(data.read_text().replace("answer 4", "another answer"))
    for command in (["select", folder, "--keep", "3"], ["suspects", folder, "--by", "nll"]):
        with pytest.raises(
            ValueError, match="expected the records that were scored, got 1 that are not there"
        ):
            sftmix(*command)
    assert not (folder / "selected" / "selected.jsonl").exists()


def test_the_most_suspicious_come_first_with_their_texts(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sftmix("suspects", folder, "--limit", "2")
    told = capsys.readouterr().out
    assert "question 0" in told and "answer 0" in told and "1 examples have no first_ifd" in told
    lines = [json.loads(line) for line in (folder / "suspects.jsonl").read_text().splitlines()]
    assert [line["record"]["n"] for line in lines] == [0, 1] and [line["score"] for line in lines] == [
        2.0,
        1.9,
    ]
    for flags, expected in (
        (["--by", "nll"], [11, 10]), (["--by", "confidence"], [11, 10]), (["--kind", "saturated"], [0, 1]),
        (["--kind", "saturated", "--by", "ifd"], [11, 10]),
    ):  # fmt: skip
        sftmix("suspects", folder, "--limit", "2", *flags)
        lines = [json.loads(line) for line in (folder / "suspects.jsonl").read_text().splitlines()]
        assert [line["record"]["n"] for line in lines] == expected, flags
    with pytest.raises(ValueError, match=r"by: expected one of first_ifd, .*, got 'loss'"):
        sftmix("suspects", folder, "--by", "loss")
    with pytest.raises(ValueError, match="kind: expected one of wrong, saturated, got 'odd'"):
        sftmix("suspects", folder, "--kind", "odd")


def test_a_run_folder_serves_too(
    material: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(material, tmp_path / "r", "--no-baseline", "--train.epochs=1")
    sftmix("select", tmp_path / "r", "--keep", "50%", "--out", tmp_path / "half")
    rows = (tmp_path / "half" / "selected.jsonl").read_text().splitlines()
    dynamics = read_dynamics(tmp_path / "r" / "dynamics.parquet")
    assert len(rows) == math.ceil(len(dynamics.examples) / 2)
    assert "are no scored examples" in capsys.readouterr().out  # the held-out ones
    sftmix("suspects", tmp_path / "r", "--limit", "3")
    found = [json.loads(line) for line in (tmp_path / "r" / "suspects.jsonl").read_text().splitlines()]
    nll = (dynamics.nll_sum / dynamics.num_tokens)[0]
    order = np.argsort(-nll)[:3]
    assert [line["id"] for line in found] == [dynamics.examples[i] for i in order]


def test_a_file_without_scores_is_chosen_from_by_length(material: tuple[Path, Path], tmp_path: Path) -> None:
    model, data = material
    sftmix(
        "select",
        "--data",
        data,
        "--model",
        model,
        "--by",
        "longest",
        "--keep",
        "4",
        "--out",
        tmp_path / "long",
    )
    found = [json.loads(line) for line in (tmp_path / "long" / "selected.jsonl").read_text().splitlines()]
    lengths = sorted(
        (len(json.loads(line)["completion"].split()) for line in data.read_text().splitlines()), reverse=True
    )
    assert sorted((len(row["completion"].split()) for row in found), reverse=True) == lengths[:4]
    with pytest.raises(ValueError, match="by: expected one of num_tokens, or random, got 'confidence'"):
        sftmix("select", "--data", data, "--model", model, "--keep", "4", "--out", tmp_path / "x")


def softmax(values: list[float]) -> Any:
    found = np.exp(np.asarray(values) - max(values))
    return found / found.sum()


def test_cartographys_files_are_written_and_read_back(folder: Path, tmp_path: Path) -> None:
    sftmix("cartography", folder)
    scores = read_scores(folder / "scores.parquet")
    place = folder / "cartography"
    metrics = [json.loads(line) for line in (place / "td_metrics.jsonl").read_text().splitlines()]
    probability = np.exp(-scores.points["nll"])
    for epoch in range(2):
        text = (place / "training_dynamics" / f"dynamics_epoch_{epoch}.jsonl").read_text()
        for at, row in enumerate(json.loads(line) for line in text.splitlines()):
            assert row["guid"] == scores.examples[at]
            assert softmax(row[f"logits_epoch_{epoch}"])[row["gold"]] == pytest.approx(probability[epoch, at])
    for at, row in enumerate(metrics):
        mean, top1 = probability[:, at].mean(), scores.points["top1_share"][:, at]
        assert row["guid"] == scores.examples[at]
        assert row["confidence"] == pytest.approx(mean)
        assert row["variability"] == pytest.approx(probability[:, at].std())
        assert row["threshold_closeness"] == pytest.approx(mean * (1 - mean))
        assert row["correctness"] == int((top1 > 0.5).sum())
        assert row["forgetfulness"] == (0 if top1[0] > 0.5 else 1000)
    rows = read_rows(place)
    back = {(row["example"], row["checkpoint"]): row["nll_sum"] for row in rows}
    for at, name in enumerate(scores.examples):
        for epoch in range(2):
            assert back[name, epoch] == pytest.approx(scores.points["nll"][epoch, at], abs=1e-9)


def test_cartographys_folder_is_a_score_file(
    material: tuple[Path, Path], finished: Path, tmp_path: Path
) -> None:
    sftmix("cartography", finished, "--out", tmp_path / "td")
    run(
        material, tmp_path / "r", "--reference.scores", str(tmp_path / "td"), "--no-baseline", "--train.epochs=1"
    )  # fmt: skip
    found, own = (read_dynamics(place / "dynamics.parquet") for place in (tmp_path / "r", finished))
    assert found.examples == own.examples
    np.testing.assert_allclose(found.perplexity, own.perplexity, rtol=1e-9)  # by the token, as perplexity is


@pytest.mark.parametrize(
    "files,message",
    [
        (
            {0: '{"guid": 1, "logits_epoch_0": [1, 2], "gold": 2}'},
            "line 1: expected guid, gold .*, got gold 2 among 2",
        ),
        (
            {0: '{"guid": 1, "logits_epoch_1": [1, 2], "gold": 0}'},
            "line 1: expected guid, gold and logits_epoch_0",
        ),
        (
            {1: '{"guid": 1, "logits_epoch_1": [1, 2], "gold": 0}'},
            r"dynamics_epoch_0.jsonl and on, got epochs \[1\]",
        ),
        ({0: "nonsense"}, "line 1: expected guid"),
        ({0: '{"guid": 1, "logits_epoch_0": [1, NaN], "gold": 0}'}, "line 1: expected guid"),
    ],
)
def test_bad_cartography_files_are_refused(tmp_path: Path, files: dict[int, str], message: str) -> None:
    for epoch, text in files.items():
        (tmp_path / f"dynamics_epoch_{epoch}.jsonl").write_text(text + "\n")
    with pytest.raises(ValueError, match=message):
        read_rows(tmp_path)


def test_three_classes_are_read_by_hand(tmp_path: Path) -> None:
    (tmp_path / "dynamics_epoch_0.jsonl").write_text(
        '{"guid": 5, "logits_epoch_0": [1.0, 3.0, 2.0], "gold": 2}\n'
    )
    (row,) = read_rows(tmp_path)
    assert row["nll_sum"] == pytest.approx(-math.log(softmax([1.0, 3.0, 2.0])[2]))
    assert (row["example"], row["top1_share"]) == ("5", 0.0)


def test_auroc_by_counting() -> None:
    draw = np.random.default_rng(0)
    values, marks = draw.integers(0, 9, 60).tolist(), (draw.random(60) < 0.3).tolist()
    wins = [
        (a > b) + 0.5 * (a == b)
        for a, good in zip(values, marks, strict=True) if good
        for b, other in zip(values, marks, strict=True) if not other
    ]  # fmt: skip
    assert auroc(values, marks) == pytest.approx(np.mean(wins))
    with pytest.raises(ValueError, match="positive: expected some of both"):
        auroc([1.0, 2.0], [True, True])

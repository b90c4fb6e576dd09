"""``sftmix score --data``: every record of a file with its scores, from one model or several checkpoints."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from sftmix.curation.pass_alone import checkpoints
from sftmix.run.scoring import Rows
from sftmix.scores.dynamics import read_dynamics
from sftmix.scores.table import read_scores
from tests.recipe import tiny
from tests.recipe.run.small import Stop, run, sftmix


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("trainer-output")
    for number in (2, 10):
        place = folder / f"checkpoint-{number}"
        tiny.causal_lm(seed=number).save_pretrained(place)
        tiny.tokenizer().save_pretrained(place)
    return [folder / "checkpoint-2", folder / "checkpoint-10"]


def words(start: int, count: int) -> str:
    return " ".join(f"w{(start + i) % 50}" for i in range(count))


ROWS: list[Any] = [
    *({"id": f"mine-{n}", "prompt": words(n, 3), "completion": words(3 * n, 1 + n % 5)} for n in range(9)),
    {"prompt": "w1", "completion": "w2 w3", "note": None},
    {"prompt": "w1", "completion": "w2 w3", "note": 7.5},  # the same text again
]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def score(data: Path, models: list[Path], out: Path, *extra: str) -> list[dict[str, Any]]:
    named = [word for model in models for word in ("--model", str(model))]
    sftmix("score", "--data", data, *named, "--out", out, "--model.dtype", "float32", *extra)
    return [json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()]


def by_hand(folder: Path, prompt: str, completion: str) -> dict[str, float]:
    """NLL, entropy, top-1 share and IFD of an answer from the model's own logits; its end token is part of it."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), tiny.tokenizer()
    first = f"<|im_start|> user {prompt} <|im_end|> <|im_start|> assistant"
    before, answer = (
        tokenizer(text, add_special_tokens=False)["input_ids"] for text in (first, f"{completion} <|im_end|>")
    )

    def nll(ids: list[int], start: int) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0].double()[start - 1 : -1]
        return F.cross_entropy(logits, torch.tensor(ids[start:]), reduction="none"), logits

    own, logits = nll(before + answer, len(before))
    probability = logits.softmax(-1)
    found = {
        "nll": float(own.mean()), "entropy": float(-(probability * probability.log()).sum(-1).mean()),
        "top1_share": float((logits.argmax(-1) == torch.tensor(answer)).double().mean()),
    }  # fmt: skip
    if len(answer) > 1:
        alone, _ = nll(answer, 1)
        found["ifd"] = math.exp(float(own[1:].mean() - alone.mean()))
    return found


def test_every_record_has_its_scores_beside_it(data: Path, models: list[Path], tmp_path: Path) -> None:
    lines = score(data, models, tmp_path / "out")
    assert [line["record"] for line in lines] == ROWS
    assert [line["place"].rpartition(" ")[2] for line in lines] == [str(n + 1) for n in range(len(ROWS))]
    assert lines[10]["id"] == f"{lines[9]['id']}-2" and lines[10]["scores"] == lines[9]["scores"]
    for line in lines[:9]:
        scores = line["scores"]
        expected = [
            by_hand(model, line["record"]["prompt"], line["record"]["completion"]) for model in models
        ]
        for name in ("nll", "entropy", "top1_share", "ifd"):
            if name not in expected[0]:
                assert scores[name]["by_point"] == [None, None]
                continue
            values = [each[name] for each in expected]
            assert scores[name]["by_point"] == pytest.approx(values, rel=1e-4), name
            assert scores[name]["mean"] == pytest.approx(np.mean(values), rel=1e-4)
            assert scores[name]["variability"] == pytest.approx(np.std(values), rel=1e-3, abs=1e-6)
        perplexity = [math.exp(each["nll"]) for each in expected]
        assert scores["confidence"] == pytest.approx(-np.mean(perplexity), rel=1e-4)
        assert scores["variability"] == pytest.approx(np.std(perplexity), rel=1e-3)
    assert (tmp_path / "out" / "kept_ids.txt").read_text().split() == [line["id"] for line in lines]


def test_the_table_is_dynamics_too(data: Path, models: list[Path], tmp_path: Path) -> None:
    score(data, models, tmp_path / "out")
    path = tmp_path / "out" / "scores.parquet"
    dynamics, scores = read_dynamics(path), read_scores(path)
    assert dynamics.num_checkpoints == scores.num_points == 2 and dynamics.examples == scores.examples
    assert set(dynamics.step[:, 0].tolist()) == {2, 10}
    table = pq.read_table(path).to_pylist()
    assert {row["model"] for row in table} == {str(model) for model in models}
    for row in table:
        assert row["nll"] == pytest.approx(row["nll_sum"] / row["num_tokens"])
        assert row["perplexity"] == pytest.approx(math.exp(row["nll"]))
    run((models[0], data), tmp_path / "run", "--reference.scores", str(path), "--no-baseline")
    assert (tmp_path / "run" / "train-sftmix" / "model").is_dir()


def test_a_folder_of_checkpoints_stands_for_all_of_them(models: list[Path], tmp_path: Path) -> None:
    assert checkpoints(str(models[0].parent)) == [str(model) for model in models]  # 2 before 10
    assert checkpoints(str(models[0])) == [str(models[0])]
    assert checkpoints("someone/model") == ["someone/model"]
    assert checkpoints(str(tmp_path)) == [str(tmp_path)]


def test_without_the_second_pass_there_is_no_difficulty(
    data: Path, models: list[Path], tmp_path: Path
) -> None:
    lines = score(data, models[:1], tmp_path / "out", "--no-ifd")
    assert all("ifd" not in line["scores"] and "variability" not in line["scores"] for line in lines)
    assert lines[0]["scores"]["nll"]["mean"] == lines[0]["scores"]["nll"]["by_point"][0]


def test_scores_are_taken_up_and_others_are_refused(
    data: Path, models: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = score(data, models, tmp_path / "out")
    (tmp_path / "out" / "scores.jsonl").unlink()
    capsys.readouterr()
    assert score(data, models, tmp_path / "out") == first  # written again from the table
    assert "done before" in capsys.readouterr().out
    with pytest.raises(ValueError, match="expected scores of the same models, got others"):
        score(data, models[:1], tmp_path / "out")
    with pytest.raises(ValueError, match="expected scores of the same ifd, got others"):
        score(data, models, tmp_path / "out", "--no-ifd")
    data.write_text(data.read_text() + json.dumps({"prompt": "w4", "completion": "w5"}) + "\n")
    with pytest.raises(ValueError, match="expected scores of the same examples"):
        score(data, models, tmp_path / "out")
    (tmp_path / "out" / "scores.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="expected a whole Parquet file"):
        score(data, models, tmp_path / "out")


def test_a_pass_that_was_killed_goes_on(
    data: Path, models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sftmix.curation import pass_alone

    whole = score(data, models, tmp_path / "whole")
    rows, calls = pass_alone._rows, []

    def killed(*args: Any, **options: Any) -> Rows:
        calls.append(options["facts"]["checkpoint"])
        if len(calls) == 2:
            raise Stop
        return rows(*args, **options)

    monkeypatch.setattr(pass_alone, "_rows", killed)
    with pytest.raises(Stop):
        score(data, models, tmp_path / "cut")
    assert not (tmp_path / "cut" / "scores.parquet").exists()
    assert score(data, models, tmp_path / "cut") == whole
    assert calls == [0, 1, 1]  # the first checkpoint was not scored again
    assert not (tmp_path / "cut" / "scoring").exists()


def test_records_that_cannot_be_scored_say_why(models: list[Path], tmp_path: Path) -> None:
    path = tmp_path / "mixed.jsonl"
    path.write_text(
        '{"prompt": "w1", "completion": "w2 w3"}\n{"prompt": "w1"}\nnot JSON\n{"prompt": "w1", "completion": ""}\n'
    )
    with pytest.raises(ValueError, match=r"3 .* that cannot"):
        score(path, models[:1], tmp_path / "refused")
    lines = score(path, models[:1], tmp_path / "out", "--data.bad_rows", "drop")
    assert len(lines) == 4 and [line["scores"] is None for line in lines] == [False, True, True, True]
    assert all(line["why"] for line in lines[1:]) and lines[1]["record"] == {"prompt": "w1"}
    assert lines[2]["record"] is None and "JSON" in lines[2]["why"]
    assert len((tmp_path / "out" / "kept_ids.txt").read_text().split()) == 1


def test_checkpoints_of_another_tokenizer_are_refused(data: Path, models: list[Path], tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(models[0], other)
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(text.replace('"w40"', '"v40"'))
    with pytest.raises(
        ValueError, match=r"expected checkpoints with one tokenizer, got another one in .*other"
    ):
        score(data, [models[0], other], tmp_path / "out")


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["score"], "run_dir: expected a run folder or --data, got neither"),
        (["score", "run", "--data", "x"], "run_dir: expected a run folder or --data, got both"),
        (["score", "run", "--model", "x"], "model: expected none beside a run folder"),
        (["score", "--data", "x"], "model: expected one or more with --data, got none"),
        (["score", "--data", "x", "--model", "m", "--model", "m"], "model: expected every checkpoint once"),
    ],
)
def test_bad_calls_are_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sftmix(*arguments)


def test_a_runs_folder_is_not_written_into(data: Path, models: list[Path], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "stages.json").write_text("{}")
    with pytest.raises(ValueError, match="out: expected another folder than a run's"):
        score(data, models, tmp_path / "run")

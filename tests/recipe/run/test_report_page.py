"""report.html of a whole run: written by the plot stage, without a model, from the tokens and draws of training."""

from __future__ import annotations

import base64
import gzip
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sftmix import cli
from sftmix.config import read_config
from sftmix.report.gather import gather
from sftmix.run import models, stages
from sftmix.run.folder import RunFolder
from sftmix.run.session import Session
from sftmix.run.texts import _decoded, _sources, example_texts, texts_from
from sftmix.scores.confidence import read_split
from sftmix.scores.dynamics import read_dynamics
from sftmix.training import trainer
from sftmix.training.batch import Batch
from tests.recipe.run.small import run, sftmix


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def told(path: Path) -> dict[str, Any]:
    """The content of a report, read without a browser."""
    (blob,) = re.findall(r'id="data-content">([^<]*)<', path.read_text(encoding="utf-8"))
    return dict(json.loads(gzip.decompress(base64.b64decode(blob))))


def test_a_run_leaves_its_report_and_names_it(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert told(finished / "report.html")["title"] == "whole"
    cli.show_files(str(finished))
    assert f"report: {finished / 'report.html'}" in capsys.readouterr().out


def test_plot_writes_the_same_report_without_loading_a_model(
    copy: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **more: object) -> None:
        raise AssertionError("a model is loaded, or an example tokenised")

    before = told(copy / "report.html")
    monkeypatch.setattr(models, "load_model", refuse)
    monkeypatch.setattr("sftmix.data.prepare._write", refuse)
    sftmix("plot", copy)
    assert capsys.readouterr().out.strip().splitlines()[-1] == str(copy / "report.html")
    after = told(copy / "report.html")
    for page in (before, after):  # the folder has another name
        del page["title"], page["facts"]
    assert after.pop("settings")[1:] == before.pop("settings")[1:]
    assert after == before and before["extremes"]["most"][0]["answer"] and before["notes"] == []


def test_texts_are_what_training_saw(copy: Path, material: tuple[Path, Path]) -> None:
    """Against the source itself: the tiny template puts the words of a row between marks of its own."""
    rows = [json.loads(line) for line in material[1].read_text().splitlines()]
    session, found = Session(read_config(copy)), gather(copy)
    assert found.scores is not None
    texts = example_texts(session, found.scores)
    assert texts.missing == "" and set(texts.short) == set(found.scores.ids)
    seen = {(text.prompt, text.answer) for text in texts.short.values()}
    expected = {(row["prompt"], row["completion"]) for row in rows}
    assert len(seen) == len(found.scores.ids)
    for prompt, answer in seen:
        match = [row for row in expected if row[0].endswith(prompt) and answer.startswith(row[1])]
        assert len(match) == 1 and len(prompt.split()) == 3, (prompt, answer)
    for name, size in zip(found.scores.ids, found.scores.num_tokens.tolist(), strict=True):
        assert texts.num_supervised[name] == size == session.train[name].num_supervised
        assert texts.num_tokens[name] == len(session.train[name].input_ids)
    assert set(texts.source.values()) == {"pairs.jsonl"}


def test_sources_are_files_without_the_folders_that_they_share() -> None:
    places = {"a": "d/e/x.jsonl, line 3", "b": "d/f/x.json, item 2, line 9", "c": "d/e/y, z.csv, row 1"}
    assert _sources(places) == {"a": "e/x.jsonl", "b": "f/x.json", "c": "e/y, z.csv"}
    assert _sources({"a": "org/name train, row 7"}) == {"a": "name train"}


class Bytes:
    """A tokenizer whose tokens are bytes, so that a character may be several."""

    def batch_decode(self, parts: list[list[int]], **options: bool) -> list[str]:
        assert options == {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        return [bytes(part).decode("utf-8", "replace") for part in parts]


def test_what_was_cut_ends_in_dots_whatever_a_token_is(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = {"a": "short", "b": "x" * 100, "c": "é" * 100, "d": "日" * 20, "e": "y" * 40, "f": "…" * 40}
    monkeypatch.setattr("sftmix.run.texts._parts", lambda store, name: ([], list(texts[name].encode())))
    found = _decoded(None, Bytes(), list(texts), 0, 0, 40)  # type: ignore[arg-type]
    shown = {name: text.answer for name, text in found.items()}
    assert shown["a"] == "short" and shown["e"] == "y" * 40
    assert shown["b"] == "x" * 38 + "…" and shown["c"] == "é" * 20 + "…" and shown["d"] == "日" * 13 + "…"
    assert all(
        len(text) <= 40 and (text == texts[name] or text.endswith("…")) for name, text in shown.items()
    )


def test_prompts_lose_only_what_all_of_them_share(copy: Path) -> None:
    session, found = Session(read_config(copy)), gather(copy)
    assert found.scores is not None
    kept = session.kept_tokens()
    assert kept is not None
    store, tokenizer = kept
    one = found.scores.ids[:1]
    alone = texts_from(store, tokenizer, one, shown=one, extremes=one)
    assert (
        "without their first" not in alone.note and len(alone.short[one[0]].prompt.split()) > 3
    )  # nothing to compare: all of it
    names = found.scores.ids
    first, last = map(
        int, re.findall(r"first (\d+) and last (\d+)", example_texts(session, found.scores).note)[0]
    )
    prompts = [store[name].input_ids[: store[name].supervised.index(True)] for name in names]
    assert (
        len({prompt[:first] for prompt in prompts})
        == 1
        == len({prompt[len(prompt) - last :] for prompt in prompts})
    )
    assert len({prompt[: first + 1] for prompt in prompts}) > 1


@pytest.mark.parametrize("change", ["data.max_length=12", "data"])
def test_tokens_that_are_gone_are_not_made_for_a_report(
    change: str, copy: Path, tmp_path: Path, material: tuple[Path, Path]
) -> None:
    flags = [f"--{change}"] if "=" in change else ["--data.train", str(tmp_path / "nowhere.jsonl")]
    before = sorted((copy / "tokens").iterdir())
    sftmix("plot", copy, *flags)
    assert sorted((copy / "tokens").iterdir()) == before
    (note,) = told(copy / "report.html")["notes"]
    assert note.startswith("texts of the examples: not in this page") and (
        "sftmix run" in note or "nowhere" in note
    )


def test_a_run_stopped_before_its_scores_has_a_report_and_no_pictures(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = RunFolder(copy)
    folder.remove(("score", "split", "train-ntp", "train-sftmix", "evaluate", "plot"))
    assert not folder.report.exists()
    sftmix("plot", copy)
    assert "plot: no pictures, dynamics.parquet and split.parquet not there yet" in capsys.readouterr().out
    assert not list(folder.plots.glob("*.png")) and told(folder.report)["curves"]


def test_restart_of_any_stage_takes_the_report_away(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = RunFolder(copy)
    assert "report.html" in folder.remove(("train-sftmix", "evaluate", "plot"))
    assert not folder.report.exists() and folder.remove(("plot",)) == []


def test_figures_of_the_report_are_those_of_the_files(finished: Path) -> None:
    page = told(finished / "report.html")
    evaluation = json.loads((finished / "evaluation.json").read_text())
    for row, figures in zip(page["results"]["rows"], evaluation.values(), strict=True):
        assert row[5:] == [
            f"{figures['nll']:.4f}",
            f"{figures['perplexity']:.3f}",
            f"{figures['token_accuracy']:.2%}",
        ]
    split, dynamics = read_split(finished / "split.parquet"), read_dynamics(finished / "dynamics.parquet")
    assert [one["id"] for one in page["extremes"]["most"]] == split.confident[:10]
    assert [one["id"] for one in page["extremes"]["least"]] == split.unconfident[::-1][:10]
    for one in page["extremes"]["most"]:
        assert one["confidence"] == float(f"{split.confidence[one['id']]:.6g}")
        assert one["variability"] == float(f"{split.variability[one['id']]:.6g}")
        at = dynamics.examples.index(one["id"])
        assert one["loss"] == float(f"{dynamics.nll_sum[-1, at] / dynamics.num_tokens[-1, at]:.6g}")
    border = (split.confidence[split.confident[-1]] + split.confidence[split.unconfident[0]]) / 2
    assert page["map"]["median"] == pytest.approx(-border)


@pytest.mark.parametrize("lam", ["pair", "token", "batch"])
def test_the_lambdas_are_those_that_training_used(
    lam: str, material: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the trainer put into its batches, over two epochs and a half, against the report's histogram."""
    used: list[float] = []
    collate = trainer.collate_chunk

    def watched(chunk: Any, step: Any, *args: Any, **more: Any) -> Batch:
        batch = collate(chunk, step, *args, **more)
        if more["mixup"].lam == "token":
            used.extend(batch.lam.tolist())
        elif lam == "pair":
            sizes = [pair for pair in chunk if pair.unconfident is not None]
            used.extend(dict.fromkeys(batch.lam.tolist()))
            assert len(dict.fromkeys(batch.lam.tolist())) == len(sizes)
        elif batch.num_mixed:
            used.append(batch.lam[0].item())
        return batch

    monkeypatch.setattr(trainer, "collate_chunk", watched)
    folder = tmp_path / "r"
    run(
        material,
        folder,
        f"--mixup.lam={lam}",
        "--train.epochs=3",
        "--train.max_steps=7",
        "--no-baseline",
        "--seed=5",
    )
    found = told(folder / "report.html")["lambdas"]
    drawn = list(dict.fromkeys(used)) if lam == "batch" else used  # a step has more than one chunk
    assert found["total"] == len(drawn) > 6 and found["lam"] == lam and found["steps"] == 7
    assert found["counts"] == np.histogram(np.float32(drawn), bins=40, range=(0, 1))[0].tolist()
    assert found["mean"] == pytest.approx(np.mean(drawn))


def test_only_the_main_process_writes(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "is_main", lambda: False)
    before = (copy / "report.html").stat().st_mtime_ns
    stages.plot(Session(read_config(copy)))
    assert (copy / "report.html").stat().st_mtime_ns == before

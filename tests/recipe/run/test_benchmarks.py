"""Benchmarks, answers and standard errors as a user gets them: flags in; evaluation.json, files, tables, card out."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from sftmix.config import read_config
from sftmix.evaluation.paired import read_rows
from sftmix.run import benchmarks
from sftmix.run.folder import RunFolder
from sftmix.run.report import closing_tables
from tests.recipe.run.small import run, sftmix

pytest.importorskip("lm_eval")
ROOT = Path(__file__).resolve().parents[3]
LABELS = ["base", "ntp", "sftmix"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("questions")
    rows: dict[str, list[Any]] = {
        "gsm8k": [{"question": f"w{i} w{i + 1}", "answer": f"w{i} #### {i}"} for i in range(6)],
        "pubmedqa": [
            {"question": f"w{i}", "context": f"w{i + 3}", "final_decision": ["yes", "no", "maybe"][i % 3]}
            for i in range(7)
        ],
        "mt": [{"question_id": 81 + i, "category": "math", "turns": [f"w{i} w2", f"w{i}"]} for i in range(3)],
        "alpaca": [
            {"dataset": "koala", "instruction": f"w{i} w4", "output": "x", "generator": "y"} for i in range(3)
        ],
    }
    for name, listed in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in listed))
    (folder / "broken.yaml").write_text("task: broken\ndataset_path: none/such\ntest_split: test\n")
    return folder


def flags(files: Path) -> list[str]:
    tasks = f"gsm8k={files}/gsm8k.jsonl,pubmedqa={files}/pubmedqa.jsonl"
    answers = f"mt-bench={files}/mt.jsonl,alpaca-eval={files}/alpaca.jsonl"
    return ["--evaluate.tasks", tasks, "--evaluate.answers", answers, "--evaluate.answer_tokens", "8"]


@pytest.fixture(scope="module")
def asked(finished: Path, files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished run, evaluated once more with benchmarks and questions."""
    folder = Path(shutil.copytree(finished, tmp_path_factory.mktemp("asked") / "mine"))
    sftmix("evaluate", folder, *flags(files))
    return folder


def results(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "evaluation.json").read_text())
    return found


def test_every_model_has_its_benchmarks_beside_the_figures_that_stood(asked: Path, finished: Path) -> None:
    found, before = results(asked), results(finished)
    assert list(found) == LABELS
    for label, figures in found.items():
        assert {k: v for k, v in figures.items() if k not in ("tasks", "answers")} == before[label]
        assert list(figures["tasks"]) == ["gsm8k", "pubmedqa"]
        gsm8k, pubmedqa = figures["tasks"].values()
        assert [m["filter"] for m in gsm8k["metrics"]] == ["strict", "flexible"]
        assert (gsm8k["num_examples"], pubmedqa["num_examples"]) == (6, 7)
        for task in (gsm8k, pubmedqa):
            about = task["about"]
            assert about["model"] == figures["about"]["model"] and about["chat_template"] and about["lm_eval"]
        for form, name, count in (("mt-bench", "mt_bench.jsonl", 6), ("alpaca-eval", "alpaca_eval.json", 3)):
            assert figures["answers"][form]["num_answers"] == count
            assert (asked / "evaluation" / "answers" / label / name).is_file()
        lines = (asked / "evaluation" / "answers" / label / "mt_bench.jsonl").read_text().splitlines()
        assert {json.loads(line)["model_id"] for line in lines} == {f"mine-{label}"}
        samples = (asked / "evaluation" / "tasks" / label / "gsm8k.jsonl").read_text().splitlines()
        assert len(samples) == 12  # a line a row and filter
    kept = {path.name.split("-")[0] for path in (asked / "evaluation" / "tasks").glob("*.*")}
    assert kept == {"gsm8k.yaml", "gsm8k", "pubmedqa.yaml", "pubmedqa"}


def test_the_errors_and_differences_are_those_of_the_examples_on_disk(finished: Path) -> None:
    found, rows = results(finished), read_rows(finished / "evaluation" / "heldout.parquet")
    assert list(rows) == LABELS
    nll = {label: np.array([row["nll_sum"] for row in rows[label]]) for label in LABELS}
    tokens = np.array([row["num_tokens"] for row in rows["base"]])
    n = len(tokens)
    assert n == found["base"]["num_examples"] > 2

    def error(sums: Any) -> float:
        """Of the linearised examples, each (s - R n) over the mean number of tokens: a mean's standard error."""
        linear = (sums - sums.sum() / tokens.sum() * tokens) / tokens.mean()
        return float(linear.std(ddof=1) / np.sqrt(n))

    for label in LABELS:
        assert [row["example"] for row in rows[label]] == [row["example"] for row in rows["base"]]
        assert found[label]["nll"] == pytest.approx(nll[label].sum() / tokens.sum(), rel=1e-12)
        assert found[label]["nll_stderr"] == pytest.approx(error(nll[label]), rel=1e-9)
        assert found[label]["calibration"]["num_tokens"] == tokens.sum()
    assert {label: list(found[label]["against"]) for label in LABELS} == {
        "base": [], "ntp": ["base"], "sftmix": ["base", "ntp"]
    }  # fmt: skip
    for label, other in (("ntp", "base"), ("sftmix", "base"), ("sftmix", "ntp")):
        gap = found[label]["against"][other]
        assert gap["nll"] == pytest.approx(found[label]["nll"] - found[other]["nll"], abs=1e-9)
        assert gap["nll_stderr"] == pytest.approx(error(nll[label] - nll[other]), rel=1e-9)


def test_what_stands_is_not_asked_again_and_what_changed_is_with_a_word(
    asked: Path, files: Path, tmp_path: Path, capfd: Any
) -> None:
    folder = Path(shutil.copytree(asked, tmp_path / "mine"))

    def again(*extra: str) -> tuple[dict[str, Any], str]:
        capfd.readouterr()
        sftmix("evaluate", folder, *extra)
        return results(folder), capfd.readouterr().out

    first = results(folder)
    second, told = again()
    assert (
        second == first and told.count("gsm8k done before") == 3 and told.count("mt-bench done before") == 3
    )
    assert all(f"evaluate {label}: done before" in told for label in LABELS) and "loading" not in told
    third, told = again("--evaluate.num_fewshot=2")
    assert (
        told.count("gsm8k anew, the figures that stand there are about another rows or examples, number of")
        == 3
    )
    assert {figures["tasks"]["gsm8k"]["num_fewshot"] for figures in third.values()} == {2}
    assert third["ntp"]["nll"] == first["ntp"]["nll"] and third["ntp"]["answers"] == first["ntp"]["answers"]
    fourth, told = again("--evaluate.task_limit=2")
    assert told.count("gsm8k: the first 2 of 6 rows (evaluate.task_limit)") == 3
    assert told.count("mt-bench: the first 2 of 3 questions (evaluate.task_limit)") == 3
    assert (
        fourth["base"]["tasks"]["gsm8k"]["num_rows"] == 6
        and fourth["base"]["answers"]["mt-bench"]["num_rows"] == 3
    )
    fifth, _ = again("--evaluate.tasks=null", "--evaluate.answers=null", "--evaluate.task_limit=null")
    assert fifth == fourth  # of the same models: they stay
    about = {name: figures["tasks"]["gsm8k"]["about"] for name, figures in fifth.items()}
    told_of_others = copy.deepcopy(fifth)
    for figures in told_of_others.values():
        figures["tasks"]["gsm8k"]["about"]["model"] = "another"
    found = benchmarks._standing(told_of_others["ntp"], read_config(folder).evaluate, about["ntp"]["model"])
    assert list(found["tasks"]) == ["pubmedqa"] and list(found["answers"]) == ["mt-bench", "alpaca-eval"]
    (folder / "evaluation" / "answers" / "ntp" / "mt_bench.jsonl").write_text("")
    sixth, told = again()
    assert "evaluate: anew, evaluation/answers/ntp/mt_bench.jsonl is damaged" in told
    assert "tasks" not in sixth["base"] and sixth["base"]["nll"] == first["base"]["nll"]


def test_the_tables_fit_eighty_columns_and_the_card_tells_the_same(asked: Path) -> None:
    console = Console(width=80, force_terminal=False)
    with console.capture() as captured:
        for table in closing_tables(RunFolder(asked)):
            console.print(table)
    text = captured.get()
    lines = text.splitlines()
    assert all(len(line) <= 80 and "…" not in line for line in lines)
    found = results(asked)["sftmix"]
    row = next(line for line in lines if line.startswith("SFTMix") and "±" in line)
    assert f"{found['nll']:.4f} ± {found['nll_stderr']:.4f}" in row
    gap = found["against"]["ntp"]
    assert (
        f"{gap['nll']:+.4f} ± {gap['nll_stderr']:.4f}" in row and f"{found['calibration']['ece']:.2%}" in row
    )
    assert sum(line.startswith("gsm8k exact_match") for line in lines) == 2  # on one line each
    assert any(line.startswith("pubmedqa acc") for line in lines)
    card = (asked / "train-sftmix" / "model" / "README.md").read_text()
    assert f"{found['nll']:.4f} ± {found['nll_stderr']:.4f}" in card
    assert "## Benchmarks" in card and "| sftmix | pubmedqa | acc (none) | " in card
    assert "| base | gsm8k | exact_match (strict) | 0% (≤ " in card and "6 of 6" in card


@pytest.mark.parametrize(
    "flag, message",
    [
        (
            "evaluate.tasks=gsm8k=none.jsonl",
            "evaluate.tasks: expected a file, got none.jsonl, which is not there",
        ),
        (
            "evaluate.tasks=pubmedqa={files}/gsm8k.jsonl",
            r"evaluate.tasks: .*gsm8k.jsonl, line 1: context: expected",
        ),
        (
            "evaluate.answers=mt-bench={files}/alpaca.jsonl",
            r"evaluate.answers: .*line 1: question_id: expected a",
        ),
        ("evaluate.tasks={files}/broken.yaml", r"broken.yaml: expected a task that runs on local files, got"),
        (
            "evaluate.num_fewshot=6",
            "evaluate.num_fewshot: expected at most 5, the examples there are for gsm8k, got 6",
        ),
        (
            "evaluate.fewshot=medqa={files}/gsm8k.jsonl",
            "evaluate.fewshot: expected names of built-in tasks that are",
        ),
        ("evaluate.answer_tokens=5000", r"evaluate.answer_tokens: expected fewer than the 2048 positions"),
        (
            "data.heldout_fraction=0",
            r"evaluate.tasks, evaluate.answers: expected held-out examples beside them",
        ),
    ],
)
def test_what_cannot_be_asked_is_refused_before_anything_is_trained(
    material: tuple[Path, Path], files: Path, tmp_path: Path, flag: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run(material, tmp_path / "r", *flags(files), flag.format(files=files))
    assert not list(tmp_path.glob("r/*/*.safetensors")) and not (tmp_path / "r" / "evaluation.json").exists()


def test_knobs_that_nothing_uses_are_named(finished: Path, tmp_path: Path, capfd: Any) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "copy"))
    sftmix("evaluate", folder, "--evaluate.num_fewshot=2", "--evaluate.task_limit=3")
    told = capfd.readouterr().out
    assert "warning: evaluate.num_fewshot is not used" in told and "evaluate.task_limit is not used" in told


def test_restart_takes_the_files_of_evaluation_away(asked: Path, tmp_path: Path, capfd: Any) -> None:
    folder = Path(shutil.copytree(asked, tmp_path / "mine"))
    sftmix("evaluate", folder, "--restart", "evaluate", "--evaluate.tasks=null", "--evaluate.answers=null")
    assert "restart evaluate: removed evaluation.json, evaluation/, plots/" in capfd.readouterr().out
    assert "tasks" not in results(folder)["base"]
    assert [path.name for path in (folder / "evaluation").iterdir()] == ["heldout.parquet"]


def torchrun(*arguments: Any) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "sftmix",
    ]
    return subprocess.run(
        [*command, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.mark.slow
def test_two_processes_give_what_one_gives_and_end_together(
    asked: Path, finished: Path, files: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "mine"))
    done = torchrun("evaluate", folder, *flags(files), "--restart", "evaluate")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("benchmarks and answers by the first process alone, the others wait") == 3
    one, two = results(asked), results(folder)
    for label in LABELS:
        assert two[label]["nll"] == pytest.approx(one[label]["nll"], rel=1e-5)
        assert two[label]["nll_stderr"] == pytest.approx(one[label]["nll_stderr"], rel=1e-4)
        assert two[label]["calibration"]["ece"] == pytest.approx(one[label]["calibration"]["ece"], abs=1e-4)
        assert two[label]["tasks"] == one[label]["tasks"]
        for name in ("mt_bench.jsonl", "alpaca_eval.json"):
            texts = [(f / "evaluation" / "answers" / label / name).read_text() for f in (asked, folder)]
            said = [re.findall(r'"(?:turns|output)": .*?[\]}]', text, re.DOTALL) for text in texts]
            assert said[0] == said[1] and len(said[0]) == 3
    done = torchrun("evaluate", folder, f"--evaluate.tasks={files}/broken.yaml")
    assert (
        done.returncode != 0
        and "sftmix: evaluate.tasks: " in done.stderr
        and "broken.yaml: expected a task that" in done.stderr
    )


def test_a_whole_run_asks_every_model(material: tuple[Path, Path], files: Path, tmp_path: Path) -> None:
    tasks = f"evaluate.tasks=pubmedqa={files}/pubmedqa.jsonl"
    run(material, tmp_path / "r", "--train.tuning=lora", "--export=adapter", "--train.epochs=1", "--reference.epochs=1", tasks)  # fmt: skip  # noqa: E501
    found = results(tmp_path / "r")
    assert [list(found[label]["tasks"]) for label in LABELS] == [["pubmedqa"]] * 3
    models = {found[label]["tasks"]["pubmedqa"]["about"]["model"] for label in LABELS}
    assert len(models) == 3

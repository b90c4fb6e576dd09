"""What is asked for, and rows of the public files: the forms that are read, and every row that is none by its place."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from sftmix.evaluation.requests import TaskRequest, parse_files, parse_tasks
from sftmix.evaluation.task_rows import read_task_rows
from sftmix.evaluation.task_sources import check_rows, write_tasks


def written(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_gsm8k_gives_the_number_behind_the_marks(tmp_path: Path) -> None:
    answers = ["a <<1+1=2>>2\n#### 1,234", "#### -5", "b #### $7.50", "c\n####  8."]
    rows = [{"question": f"q{i}", "answer": answer, "id": i or None} for i, answer in enumerate(answers)]
    with gzip.open(tmp_path / "g.jsonl.gz", "wt") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
    found = read_task_rows("gsm8k", str(tmp_path / "g.jsonl.gz"), "evaluate.tasks")
    assert [row["number"] for row in found.rows] == ["1,234", "-5", "7.50", "8"]
    assert found.rows[0] == {"question": "q0", "answer": answers[0], "number": "1,234"}
    assert dict(found.ignored) == {"id": 3} and found.repeated == 0


def test_pubmedqa_is_read_in_each_of_its_public_forms(tmp_path: Path) -> None:
    expected = {"question": "q?", "context": "one\ntwo", "answer": "yes"}
    hub = {
        "question": "q?",
        "context": {"contexts": ["one", "two"], "labels": ["A"]},
        "final_decision": "yes",
    }
    plain = {"question": "q?", "context": "one\ntwo", "final_decision": "Yes", "long_answer": "because"}
    found = read_task_rows("pubmedqa", str(written(tmp_path / "p.jsonl", [hub, plain])), "evaluate.tasks")
    assert found.rows == [expected, expected] and found.repeated == 1
    assert dict(found.ignored) == {"context.labels": 1, "long_answer": 1}
    original = {
        "21645374": {"QUESTION": "q?", "CONTEXTS": ["one", "two"], "final_decision": "yes", "YEAR": "2011"}
    }
    (tmp_path / "ori_pqal.json").write_text(json.dumps(original))
    found = read_task_rows("pubmedqa", str(tmp_path / "ori_pqal.json"), "evaluate.tasks")
    assert found.rows == [expected] and dict(found.ignored) == {"YEAR": 1}


def test_medqa_is_read_in_each_of_its_public_forms(tmp_path: Path) -> None:
    texts = ["one", "two", "three", "four"]
    by_letter = dict(zip("ABCD", texts, strict=True))
    rows: list[dict[str, Any]] = [
        {"question": "q?", "options": by_letter, "answer_idx": "C", "answer": "three"},
        {
            "question": "q?",
            "options": [{"key": k, "value": v} for k, v in by_letter.items()],
            "answer": "three",
        },
        {"question": "q?", "options": texts, "answer": "C"},
    ]
    expected = {
        "question": "q?", "options": "A. one\nB. two\nC. three\nD. four", "letters": list("ABCD"), "answer": "C",
    }  # fmt: skip
    found = read_task_rows("medqa", str(written(tmp_path / "m.jsonl", rows)), "evaluate.tasks")
    assert found.rows == [expected] * 3


@pytest.mark.parametrize(
    "form, row, message",
    [
        ("gsm8k", {"question": "q", "answer": "no number"}, "answer: expected a text that ends with #### and a number"),
        ("gsm8k", {"question": " ", "answer": "#### 1"}, "question: expected a text, got ' '"),
        ("gsm8k", ["q", "a"], "expected an object of gsm8k's fields"),
        ("pubmedqa", {"question": "q", "context": "c", "final_decision": "perhaps"}, "expected yes, no or maybe"),
        ("pubmedqa", {"question": "q", "final_decision": "no"}, "context: expected a text, or a list of texts"),
        ("medqa", {"question": "q", "options": {"A": "x"}, "answer": "A"}, "options: expected two to 26 differing"),
        ("medqa", {"question": "q", "options": {"A": "x", "C": "y"}, "answer": "A"}, "options: expected two to 26"),
        ("medqa", {"question": "q", "options": ["x", "x"], "answer": "A"}, "options: expected two to 26 differing"),
        ("medqa", {"question": "q", "options": ["x", "y"], "answer": "E"}, "answer: expected one of A, B, or an opt"),
        ("medqa", {"question": "q", "options": ["x", "y"], "answer_idx": "A", "answer": "y"}, "expected 'x', option A"),
    ],
)  # fmt: skip
def test_a_row_that_is_none_is_refused_by_its_place(
    tmp_path: Path, form: str, row: Any, message: str
) -> None:
    good = {
        "gsm8k": {"question": "q", "answer": "#### 1"},
        "pubmedqa": {"question": "q", "context": "c", "final_decision": "no"},
        "medqa": {"question": "q", "options": ["x", "y"], "answer": "A"},
    }
    path = written(tmp_path / "rows.jsonl", [good[form], row])
    with pytest.raises(ValueError, match=message) as caught:
        read_task_rows(form, str(path), "evaluate.tasks")
    told = str(caught.value)
    assert told.startswith("evaluate.tasks: ") and "rows.jsonl, line 2: " in told


def test_requests_are_names_with_files_yaml_files_and_folders(tmp_path: Path) -> None:
    file, yaml = written(tmp_path / "g.jsonl", [{}]), tmp_path / "mine.yaml"
    yaml.write_text("task: mine\n")
    assert parse_tasks(None) == [] and parse_files("evaluate.answers", None, ["mt-bench"]) == {}
    assert parse_tasks(f"gsm8k={file}, {yaml},{tmp_path}") == [
        TaskRequest("gsm8k", file), TaskRequest(None, yaml), TaskRequest(None, tmp_path)
    ]  # fmt: skip
    for text, message in [
        ("gsm8k", "expected gsm8k=FILE with a file of its rows, got gsm8k"),
        (f"gsm9k={file}", "expected name=file with a name of gsm8k, medqa, pubmedqa, got 'gsm9k="),
        ("gsm8k=none.jsonl", "expected a file, got none.jsonl, which is not there"),
        ("hellaswag", "a task's YAML file or a folder of them, got hellaswag, which is not there"),
        (str(file), "a task's YAML file or a folder of them, got "),
        (f"gsm8k={file},gsm8k={file}", "expected each task once"),
        (f"{yaml},,{yaml}", "expected entries separated by commas"),
    ]:
        with pytest.raises(ValueError, match=message) as caught:
            parse_tasks(text)
        assert str(caught.value).startswith("evaluate.tasks: ")
    with pytest.raises(
        ValueError, match=r"evaluate.answers: expected name=file with a name of mt-bench, got 'x="
    ):
        parse_files("evaluate.answers", f"x={file}", ["mt-bench"])


def test_examples_without_their_task_and_files_that_are_not_read_are_refused(tmp_path: Path) -> None:
    file = written(tmp_path / "g.jsonl", [{"question": "q", "answer": "#### 1"}])
    with pytest.raises(
        ValueError, match=r"evaluate.fewshot: expected names of built-in tasks that are asked, got medqa"
    ):
        check_rows(parse_tasks(f"gsm8k={file}"), {"medqa": file})
    folder = tmp_path / "tasks"
    folder.mkdir()
    with pytest.raises(ValueError, match=r"expected a folder with .yaml files, got"):
        check_rows([TaskRequest(None, folder)], {})
    (folder / "a.yaml").write_text("task: [unclosed\n")
    with pytest.raises(ValueError, match=r"a.yaml: expected YAML, got "):
        check_rows([TaskRequest(None, folder)], {})
    (folder / "a.yaml").rename(folder / "a.yml")
    with pytest.raises(ValueError, match=r"expected files named .yaml in a folder, got .*a.yml"):
        check_rows([TaskRequest(None, folder)], {})


def test_a_users_task_is_known_by_all_that_decides_what_it_asks(tmp_path: Path, capfd: Any) -> None:
    (tmp_path / "common.yaml").write_text("output_type: generate_until\n")
    (tmp_path / "functions.py").write_text("def text(doc):\n    return doc['q']\n")
    task = tmp_path / "mine.yaml"
    task.write_text("include: common.yaml\ntask: mine\ndoc_to_text: !function functions.text\n")

    def digest() -> str:
        (source,) = write_tasks([TaskRequest(None, task)], {}, tmp_path / "out", max_tokens=4)
        return source.digest

    first = digest()
    assert f"{task} runs Python of {tmp_path / 'functions.py'}" in capfd.readouterr().out
    assert digest() == first
    for name in ("common.yaml", "functions.py", "mine.yaml"):
        (tmp_path / name).write_text((tmp_path / name).read_text() + "\n# another\n")
        second = digest()
        assert second != first, name
        first = second

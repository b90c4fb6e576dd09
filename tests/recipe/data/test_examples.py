"""Examples from files: every format and column form, stable ids, the held-out part, and broken input."""

from __future__ import annotations

import gzip
import json
import lzma
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sftmix.data.examples import Example, load_examples, split_heldout

ROWS = [{"prompt": f"What is {i}?", "completion": f"It is {i}."} for i in range(5)]


def jsonl(rows: list[Any]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def exchange(question: str, answer: str) -> tuple[dict[str, str], ...]:
    return ({"role": "user", "content": question}, {"role": "assistant", "content": answer})


def write_one(path: Path, row: Any) -> str:
    path.write_text(jsonl([row]), encoding="utf-8")
    return str(path)


def write_all_formats(folder: Path, rows: list[dict[str, Any]]) -> list[Path]:
    text = jsonl(rows)
    array = json.dumps(rows, indent=2)
    (folder / "a.jsonl").write_text(text, encoding="utf-8")
    (folder / "a.ndjson").write_text("\n" + text.replace("\n", "\r\n\n"), encoding="utf-8-sig")
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    (folder / "a.jsonl.xz").write_bytes(lzma.compress(text.encode()))
    (folder / "lines.json").write_text(text, encoding="utf-8")
    (folder / "array.json").write_text(array, encoding="utf-8")
    (folder / "array.json.gz").write_bytes(gzip.compress(array.encode()))
    (folder / "ARRAY.JSON.XZ").write_bytes(lzma.compress(array.encode()))
    pq.write_table(pa.Table.from_pylist(rows), folder / "a.parquet")
    return sorted(folder.iterdir())


def test_every_format_gives_the_same_examples(tmp_path: Path) -> None:
    files = write_all_formats(tmp_path, ROWS)
    assert len(files) == 9
    expected = load_examples(str(files[0]))
    assert [e.messages for e in expected] == [exchange(f"What is {i}?", f"It is {i}.") for i in range(5)]
    for file in files:
        assert load_examples(str(file)) == expected, file.name
        assert load_examples(str(file), limit=2) == expected[:2], file.name


@pytest.mark.parametrize(
    "row, messages",
    [
        ({"instruction": "Add.", "input": "1, 2", "output": "3"}, exchange("Add.\n\n1, 2", "3")),
        ({"instruction": "Add.", "input": "", "output": "3"}, exchange("Add.", "3")),
        ({"instruction": "Add.", "input": None, "output": "3"}, exchange("Add.", "3")),
        ({"instruction": "Add.", "output": "3"}, exchange("Add.", "3")),
        ({"question": "Q", "answer": "A", "difficulty": 3}, exchange("Q", "A")),
        ({"prompt": "Q", "response": "A"}, exchange("Q", "A")),
        ({"instruction": "Q", "response": "A"}, exchange("Q", "A")),
        (
            {
                "prompt": [{"role": "user", "content": "Q"}],
                "completion": [{"role": "assistant", "content": "A"}],
            },
            exchange("Q", "A"),
        ),
        ({"prompt": "x", "messages": list(exchange("Q", "A")), "prompt_id": "7"}, exchange("Q", "A")),
        ({"messages": None, "prompt": "Q", "completion": "A"}, exchange("Q", "A")),
        (
            {
                "messages": [
                    {"role": m["role"], "content": m["content"], "tool_calls": None}
                    for m in exchange("Q", "A")
                ]
            },
            exchange("Q", "A"),
        ),
    ],
)
def test_recognised_columns(
    tmp_path: Path, row: dict[str, Any], messages: tuple[dict[str, str], ...]
) -> None:
    assert load_examples(write_one(tmp_path / "a.jsonl", row))[0].messages == messages


def test_ids_come_from_the_conversation_alone(tmp_path: Path) -> None:
    one = load_examples(write_one(tmp_path / "a.jsonl", {"prompt": "Q", "completion": "A"}))[0].id
    other = {"id": 9, "messages": list(exchange("Q", "A"))}
    assert load_examples(write_one(tmp_path / "b.jsonl", other))[0].id == one
    assert one == "0a266bac4424c674"  # for good: scores on disk are found by it
    for row in ({"prompt": "Q", "completion": "A "}, {"prompt": "Q2", "completion": "A"}):
        assert load_examples(write_one(tmp_path / "c.jsonl", row))[0].id != one
    two_turns = {"messages": [*exchange("Q", "A"), *exchange("Q", "A")]}
    assert load_examples(write_one(tmp_path / "d.jsonl", two_turns))[0].id != one


def test_copies_get_numbered_ids(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(jsonl([ROWS[0], ROWS[1], ROWS[0], ROWS[0]]))
    first, second, *copies = [e.id for e in load_examples(str(tmp_path / "a.jsonl"))]
    assert copies == [f"{first}-2", f"{first}-3"]
    assert second != first


def make_examples(count: int) -> list[Example]:
    return [Example(f"{i:016x}", exchange(str(i), "a")) for i in range(count)]


def test_heldout_part_follows_the_ids_and_not_the_order() -> None:
    examples = make_examples(200)
    training, heldout = split_heldout(examples, 0.1)
    assert len(heldout) == 20
    assert sorted(e.id for e in training + heldout) == sorted(e.id for e in examples)
    assert [e.id for e in training] == sorted(e.id for e in training)  # the order they came in
    shuffled = random.Random(0).sample(examples, 200)
    assert {e.id for e in split_heldout(shuffled, 0.1)[1]} == {e.id for e in heldout}
    assert heldout != examples[:20]


def test_copies_stay_on_one_side() -> None:
    examples = [
        Example(f"{e.id}{suffix}", e.messages) for e in make_examples(30) for suffix in ("", "-2", "-3")
    ]
    training, heldout = split_heldout(examples, 0.3)
    assert len(heldout) >= 27
    assert not {e.id.split("-")[0] for e in training} & {e.id.split("-")[0] for e in heldout}


def test_heldout_limits() -> None:
    assert split_heldout(make_examples(5), 0) == (make_examples(5), [])
    assert len(split_heldout(make_examples(5), 0.01)[1]) == 1
    with pytest.raises(ValueError, match="expected at least 3 to hold 1 out, got 2"):
        split_heldout(make_examples(2), 0.1)
    with pytest.raises(ValueError, match="fraction: expected at least 0 and less than 1, got 1"):
        split_heldout(make_examples(5), 1.0)


@pytest.mark.parametrize(
    "row, message",
    [
        ({"text": "x"}, "a.jsonl, line 1: expected columns messages; or instruction and output"),
        ({"prompt": "Q"}, "got prompt"),
        ({}, "got none"),
        ({"prompt": "Q", "completion": None}, "expected columns"),
        ([1, 2], "expected an object with columns"),
        ("text", "expected an object with columns"),
        ({"prompt": "Q", "completion": ""}, "message 2: expected an answer, got empty text"),
        ({"prompt": "Q", "completion": "  \n"}, "message 2: expected an answer, got empty text"),
        ({"prompt": "Q", "completion": 7}, "message 2, content: expected text, got 7"),
        ({"instruction": "Q", "input": 3, "output": "A"}, "column input: expected text, got 3"),
        ({"messages": []}, "expected at least one assistant message, got []"),
        ({"messages": [{"role": "user", "content": "Q"}]}, "assistant message, got ['user']"),
        ({"messages": "Q"}, "expected messages to be a list of objects, got 'Q'"),
        ({"messages": [{"content": "Q"}]}, "message 1, role: expected text, got None"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "message 1, content: expected text",
        ),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [1]}]}, "got tool_calls"),
    ],
)
def test_bad_rows_are_refused_with_their_line(tmp_path: Path, row: Any, message: str) -> None:
    with pytest.raises(ValueError) as error:
        load_examples(write_one(tmp_path / "a.jsonl", row))
    assert message in str(error.value)
    assert "a.jsonl, line 1" in str(error.value)


def cut(name: str, packed: bytes) -> tuple[str, Callable[[Path], None], str]:
    return (
        name,
        lambda path: path.write_bytes(packed[: len(packed) // 2]) and None,
        rf"{name}, line \d+: expected a whole",
    )


MANY = jsonl([{"prompt": f"{random.Random(i).random()}", "completion": "A"} for i in range(3000)]).encode()


@pytest.mark.parametrize(
    "name, write, message",
    [
        (
            "a.jsonl",
            lambda p: p.write_text(jsonl(ROWS) + '{"prompt": "Q", "compl'),
            "a.jsonl, line 6: expected JSON",
        ),
        ("a.jsonl", lambda p: p.write_bytes(jsonl(ROWS).encode() + b"\xff\xfe\n"), "line 6: expected UTF-8"),
        ("a.json", lambda p: p.write_text(json.dumps(ROWS)[:-20]), "a.json: expected JSON"),
        ("a.json", lambda p: p.write_text("[1, 2]"), "a.json, item 1: expected an object"),
        ("a.jsonl", lambda p: p.write_text(json.dumps(ROWS)), "line 1: expected an object"),
        ("a.jsonl", lambda p: p.write_text(""), "expected at least one example, got none"),
        ("a.json", lambda p: p.write_text("[]"), "expected at least one example, got none"),
        ("a.jsonl", lambda p: p.write_text("\n \n"), "expected at least one example, got none"),
        ("a.jsonl.gz", lambda p: p.write_text(jsonl(ROWS)), r"a.jsonl.gz, line 1: expected a whole .gz file"),
        ("a.jsonl.xz", lambda p: p.write_text(jsonl(ROWS)), r"a.jsonl.xz, line 1: expected a whole .xz file"),
        cut("a.jsonl.gz", gzip.compress(MANY)),
        cut("a.jsonl.xz", lzma.compress(MANY)),
        cut(
            "a.json.xz", lzma.compress(json.dumps([json.loads(line) for line in MANY.splitlines()]).encode())
        ),
        (
            "a.parquet",
            lambda p: p.write_bytes(b"PAR1 but no more"),
            "a.parquet: expected a whole Parquet file",
        ),
        ("a.csv", lambda p: p.write_text("a,b"), r"expected a \.json.* file.*, got 'a.csv'"),
        ("a.jsonl.zip", lambda p: p.write_text("x"), "got 'a.jsonl.zip'"),
        ("a.jsonl", lambda p: p.mkdir(), "got a folder"),
    ],
)
def test_broken_files_are_refused(
    tmp_path: Path, name: str, write: Callable[[Path], None], message: str
) -> None:
    write(tmp_path / name)
    with pytest.raises(ValueError, match=message):
        load_examples(str(tmp_path / name))


def test_a_truncated_parquet_file_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    whole = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"a\.parquet: expected a whole Parquet file"):
        load_examples(str(tmp_path / "a.parquet"))


def test_a_datasets_id_is_loaded_when_there_is_no_such_file(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(source: str, *, split: str) -> datasets.Dataset:
        asked.append((source, split))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(load_examples("someone/some-data", split="test", limit=3)) == 3
    assert asked == [("someone/some-data", "test")]


def test_a_source_that_is_nothing_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(source: str, *, split: str) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(
        ValueError, match=r"no such file, and loading it .* failed \(ConnectionError: no network\)"
    ):
        load_examples("someone/some-data")
    for name in ("missing.jsonl", "/no/such/place", "./x", "data/train.jsonl.xz", "a/b/c"):
        with pytest.raises(ValueError, match="no such file, and its name is not one of a datasets id"):
            load_examples(name)


@pytest.mark.parametrize(
    "name, count, first",
    [
        ("medquad_heldout.jsonl.xz", 1037, None),
        ("gsm8k_train.jsonl.xz", 7473, "Natalia sold clips"),
        ("alpaca_en_demo.json.xz", 999, "Describe a process of making crepes."),
    ],
)
def test_real_files(shared_data: Path, name: str, count: int, first: str | None) -> None:
    examples = load_examples(str(shared_data / name))
    assert len({e.id for e in examples}) == len(examples) == count
    assert all([m["role"] for m in e.messages] == ["user", "assistant"] for e in examples)
    if first:
        assert examples[0].messages[0]["content"].startswith(first)

"""Examples in memory: every format gives the same ones, with stable ids."""

from __future__ import annotations

import gzip
import json
import lzma
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sftmix.data.examples import Example, load_examples

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


def unplaced(examples: list[Example]) -> list[Example]:
    """Without the files and lines they come from."""
    assert all(example.place for example in examples)
    return [replace(example, place="") for example in examples]


def test_every_format_gives_the_same_examples(tmp_path: Path) -> None:
    files = write_all_formats(tmp_path, ROWS)
    assert len(files) == 9
    expected = unplaced(load_examples(str(files[0])))
    assert [e.messages for e in expected] == [exchange(f"What is {i}?", f"It is {i}.") for i in range(5)]
    for file in files:
        assert unplaced(load_examples(str(file))) == expected, file.name
        assert unplaced(load_examples(str(file), limit=2)) == expected[:2], file.name


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


def test_the_first_bad_row_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(jsonl([ROWS[0], {"prompt": "Q", "completion": " "}]) + "{")
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: completion: expected an answer"):
        load_examples(str(tmp_path / "a.jsonl"))
    (tmp_path / "a.jsonl").write_text(jsonl([ROWS[0]]) + "{")
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: expected JSON"):
        load_examples(str(tmp_path / "a.jsonl"))


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

"""From a source to tokens on disk: every row used or told, the same by any number of processes, kept by content."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from sftmix.data.prepare import SHOWN, Source, prepare
from sftmix.data.store import TokenStore
from sftmix.data.tokens import TokenOptions
from tests.recipe import tiny

GOOD = [
    {"messages": [{"role": "user", "content": f"w{i}"}, {"role": "assistant", "content": "w1 w2"}]}
    for i in range(6)
]
TOKENIZER = tiny.tokenizer()


def write(path: Path, rows: list[Any]) -> Source:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return Source(str(path))


def prepared(source: Source, folder: Path, **options: Any) -> TokenStore:
    settings = {name: options.pop(name) for name in ("bad_rows", "num_workers") if name in options}
    made: TokenStore = prepare(source, TOKENIZER, TokenOptions(**options), folder=folder, **settings)
    return made


def test_every_row_is_used_or_told(tmp_path: Path) -> None:
    rows = [
        *GOOD[:2], "{", {"prompt": "w1", "completion": " "}, GOOD[0], {"foo": 1},
        {**GOOD[2], "source": "s", "tags": []}, {"prompt": "w5", "completion": "w6", "id": 7},
    ]  # fmt: skip
    store = prepared(write(tmp_path / "a.jsonl", rows), tmp_path / "t", bad_rows="drop")
    account = store.account
    assert (account.rows_read, account.rows_used, account.duplicates, len(store)) == (8, 5, 1, 5)
    assert dict(account.dropped) == {"not JSON": 1, "empty answer": 1, "unknown columns": 1}
    assert dict(account.ignored) == {"source": 1, "id": 1}
    assert dict(account.forms) == {"messages": 4, "prompt_completion": 1}
    assert [fault.place.rpartition("/")[2] for fault in account.faults] == [
        "a.jsonl, line 3",
        "a.jsonl, line 4",
        "a.jsonl, line 6",
    ]
    assert account.tokens == sum(len(example.input_ids) for example in store.values())
    assert account.supervised_tokens == sum(example.num_supervised for example in store.values())
    first, _, copy, *_ = store
    assert copy == f"{first}-2" and store[copy].input_ids == store[first].input_ids
    assert store.source_of(copy).endswith("a.jsonl, line 5")
    assert store.stops == {TOKENIZER.eos_token_id: 5}
    assert [example.id for example in Source(str(tmp_path / "a.jsonl")).examples()] == list(store)


def test_bad_rows_are_refused_together_with_file_line_and_reason(tmp_path: Path) -> None:
    """Case 16: the first twenty are named and every kind is counted; nothing is left on disk."""
    rows = [*GOOD, *({"prompt": "w1", "completion": ""} for _ in range(30)), "nonsense"]
    source = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(ValueError) as caught:
        prepared(source, tmp_path / "run" / "tokens")
    told = str(caught.value).splitlines()
    assert "got 31 (30 empty answer, 1 not JSON) of 37 that cannot" in told[0]
    assert "data.bad_rows=drop leaves them out" in told[0]
    assert len(told) == 1 + SHOWN + 1 and told[-1] == "  … and 11 more"
    assert told[1].startswith(f"  {tmp_path}/a.jsonl, line 7: ") and "expected an answer" in told[1]
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match=r"expected at least one example, got none of 1 rows:\n .*line 1: "):
        prepared(write(tmp_path / "b.jsonl", [{"x": 1}]), tmp_path / "t", bad_rows="drop")


def test_too_long_rows_that_may_be_dropped_are_counted_and_refuse_nothing(tmp_path: Path) -> None:
    long = {"prompt": "w1 " * 30, "completion": "w2"}
    source = write(tmp_path / "a.jsonl", [*GOOD, long])
    store = prepared(source, tmp_path / "t", max_length=16, too_long="drop")
    assert (len(store), dict(store.account.dropped)) == (6, {"too long": 1})
    with pytest.raises(
        ValueError, match=r"1 too long.*\n.*line 7: expected at most data.max_length = 16 tok"
    ):
        prepared(source, tmp_path / "t", max_length=16, too_long="refuse")
    with pytest.raises(
        ValueError, match=r"1 too long.*\n.*line 7: expected an answer within data.max_length = 16"
    ):
        prepared(source, tmp_path / "t", max_length=16)
    store = prepared(source, tmp_path / "t", max_length=36)
    assert store.account.cut == 1 and [example.cut for example in store.values()] == [False] * 6 + [True]


def test_what_is_made_is_found_by_content(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", GOOD)
    first = prepared(source, tmp_path / "t")
    stamp = first.path.stat().st_mtime_ns
    shutil.move(tmp_path / "a.jsonl", tmp_path / "moved.jsonl")
    again = prepared(Source(str(tmp_path / "moved.jsonl")), tmp_path / "t")
    assert again.path == first.path and again.path.stat().st_mtime_ns == stamp
    others = {
        prepared(write(tmp_path / "b.jsonl", GOOD[:5]), tmp_path / "t").path,
        prepared(Source(str(tmp_path / "moved.jsonl"), limit=5), tmp_path / "t").path,
        prepared(Source(str(tmp_path / "moved.jsonl")), tmp_path / "t", max_length=9).path,
        prepared(Source(str(tmp_path / "moved.jsonl")), tmp_path / "t", date="2026-01-01").path,
        prepared(Source(str(tmp_path / "moved.jsonl")), tmp_path / "t", stop_ids=(5,)).path,
        prepared(Source(str(tmp_path / "moved.jsonl")), tmp_path / "t", supervise="last").path,
    }
    assert len(others) == 6 and first.path not in others


def test_another_template_or_vocabulary_is_another_file(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", GOOD)
    paths = {prepared(source, tmp_path / "t").path}
    other = tiny.tokenizer()
    other.chat_template = tiny.CHATML.replace("assistant ", "assistant  ")
    paths.add(prepare(source, other, TokenOptions(), folder=tmp_path / "t").path)
    more = tiny.tokenizer()
    more.add_tokens(["w1 w2"])
    paths.add(prepare(source, more, TokenOptions(), folder=tmp_path / "t").path)
    assert len(paths) == 3


@pytest.mark.slow
def test_several_processes_make_the_same_file(tmp_path: Path) -> None:
    rows: list[Any] = []
    for i in range(2500):
        rows += [GOOD[i % 6], {"prompt": f"w{i % 9}", "completion": f"w{i % 7} w3", "note": i}]
        rows += ["{"] if i % 500 == 0 else []
    source = write(tmp_path / "a.jsonl", rows)
    alone = prepared(source, tmp_path / "one", bad_rows="drop", num_workers=1)
    together = prepared(source, tmp_path / "two", bad_rows="drop", num_workers=2)
    assert alone.path.read_bytes() == together.path.read_bytes()
    assert alone.account == together.account and alone.account.rows_read == 5005


def test_files_that_are_passed_over_are_noted(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    write(tmp_path / "d" / "a.jsonl", GOOD)
    (tmp_path / "d" / "README.md").write_text("about")
    store = prepared(Source(str(tmp_path / "d")), tmp_path / "t")
    assert len(store) == 6 and any("README.md is not read" in note for note in store.account.notes)


def test_a_datasets_id_is_read_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its content is not known before; what the hub holds may have changed since the last start."""
    import datasets

    held = [{"prompt": "w1", "completion": "w2"}]
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: datasets.Dataset.from_list(held))
    source = Source("someone/something", split="train")
    first = prepared(source, tmp_path)
    held.append({"prompt": "w3", "completion": "w4"})
    assert len(prepare(source, TOKENIZER, TokenOptions(), folder=tmp_path, anew=False)) == len(first) == 1
    assert len(prepared(source, tmp_path)) == 2

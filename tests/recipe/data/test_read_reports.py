"""What users of other tools reported of reading data, one named test each, with the report it comes from."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from sftmix.data.read import read_rows
from sftmix.data.rows import Fault, Row

REPORTS = {
    "line separators": "https://github.com/huggingface/datasets/issues/3729",
    "carriage returns": "https://github.com/huggingface/datasets/issues/622",
    "null": "https://github.com/huggingface/datasets/issues/4467",
    "quoted newlines": "https://github.com/apple/turicreate/issues/907",
    "open quote": "https://github.com/apple/turicreate/issues/1692",
    "saved folder": "https://github.com/axolotl-ai-cloud/axolotl/issues/1430",
    "small saved folder": "https://github.com/huggingface/datasets/issues/7018",
    "mixed types": "https://github.com/huggingface/datasets/issues/5827",
    "object or array": "https://github.com/xiaoachen98/Open-LLaVA-NeXT/issues/31",
    "key twice": "https://github.com/zhangnn520/chinese_llama_alpaca_lora/issues/4",
    "one bad line": "https://github.com/huggingface/datasets/issues/7233",
    "which file": "https://github.com/ml-explore/mlx-examples/pull/458",
    "byte order mark": "https://github.com/WangRongsheng/MedQA-ChatGLM/issues/2",
    "separators in JSON": "https://github.com/wbolster/jsonlines/issues/53",
    "one object": "https://github.com/huggingface/datasets/pull/8086",
    "surrogates": "https://github.com/huggingface/transformers/issues/8886",
    "packed lines": "https://github.com/huggingface/datasets/issues/328",
}


def read(path: Path, data: str | bytes) -> list[Row | Fault]:
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return list(read_rows(str(path)))


def fields(records: list[Row | Fault]) -> list[Any]:
    return [record.fields if isinstance(record, Row) else record.kind for record in records]


def test_line_separators_in_text_make_no_more_rows(tmp_path: Path) -> None:
    """datasets 3729: 1,199,649 rows of 1,199,637 lines, U+2029 being taken for a line's end."""
    records = read(tmp_path / "train.txt", "one\u2029still one\u2028\x85\ntwo\n")
    assert fields(records) == [{"text": "one\u2029still one\u2028\x85"}, {"text": "two"}]


def test_carriage_returns_in_text(tmp_path: Path) -> None:
    """datasets 622: a text file with carriage returns, read as CSV, stops the run."""
    assert fields(read(tmp_path / "a.txt", 'one\r\ntwo, "2\rthree\n')) == [
        {"text": "one"},
        {"text": 'two, "2'},
        {"text": "three"},
    ]


def test_the_word_null_in_a_table_stays_a_word(tmp_path: Path) -> None:
    """datasets 4467: the transcript "null" (zero, in Luxembourgish) becomes None."""
    words = ["null", "NA", "None", "nan", "007", "1.0", "TRUE", ""]
    records = read(tmp_path / "a.csv", "word,n\n" + "".join(f"{word},{i}\n" for i, word in enumerate(words)))
    assert [row["word"] for row in fields(records)] == words


def test_newlines_and_quotes_in_a_table(tmp_path: Path) -> None:
    """turicreate 907: a quoted newline ends the row. 1692: an open quote drops all later rows without a word."""
    text = 'id,title\n11,"this is fine"\n12,this too\n13,"this is \nfine!"\n'
    assert [row["title"] for row in fields(read(tmp_path / "a.csv", text))] == [
        "this is fine",
        "this too",
        "this is \nfine!",
    ]
    with pytest.raises(
        ValueError, match=r"a\.csv, line 3: expected each quote to close, got the end of the file"
    ):
        read(tmp_path / "a.csv", 'a, b\n"a", "b"\n"c", "d\n')
    assert fields(read(tmp_path / "a.csv", 'a, b\n"a", "b"\n')) == [{"a": "a", "b": "b"}]


def test_a_saved_folder_gives_its_rows_and_not_its_state(tmp_path: Path) -> None:
    """axolotl 1430 and datasets 7018: state.json is read as the data of a folder written by save_to_disk."""
    folder = tmp_path / "saved"
    rows = {"train": [{"text": "a"}, {"text": "b"}], "test": [{"text": "c"}]}
    splits = {name: datasets.Dataset.from_list(split) for name, split in rows.items()}
    datasets.DatasetDict(splits).save_to_disk(str(folder))
    assert fields(list(read_rows(str(folder)))) == rows["train"]
    assert fields(list(read_rows(str(folder / "test")))) == rows["test"]


def test_values_of_any_type_under_one_key(tmp_path: Path) -> None:
    """datasets 5827 and Open-LLaVA-NeXT 31: a column whose type changes on the way stops the reading of all."""
    rows = [{"id": 1, "x": {"a": 1}}, {"id": "Nan", "x": [{"a": 1}]}, {"id": 3.5, "x": "image"}, {"id": None}]
    assert fields(read(tmp_path / "a.json", json.dumps(rows))) == rows
    assert fields(read(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)))) == rows


def test_a_key_that_is_there_twice(tmp_path: Path) -> None:
    """chinese_llama_alpaca_lora 4: "Column(/input) was specified twice in row 397", of no file."""
    lines = ['{"input": "a", "output": "b"}'] * 400
    lines[396] = '{"input": "a", "input": "c", "output": "b"}'
    records = read(tmp_path / "a.jsonl", "\n".join(lines))
    assert [record for record in records if isinstance(record, Fault)] == [
        Fault(
            f"{tmp_path / 'a.jsonl'}, line 397",
            "repeated key",
            "expected each key of an object once, got 'input' again",
        )
    ]
    assert len(records) == 400


def test_one_bad_line_of_many_is_named_and_loses_no_other(tmp_path: Path) -> None:
    """datasets 7233: 718 rows are read, with the 719th none. mlx-examples 458: of several files, which is bad?"""
    good = json.dumps({"messages": [{"role": "user", "content": "a"}]})
    (tmp_path / "other.jsonl").write_text(good + "\n")
    (tmp_path / "train.jsonl").write_text((good + "\n") * 718 + '{"messages": [{"role": "user", }]}\n' + good)
    records = list(read_rows(str(tmp_path)))
    assert len(records) == 721
    (fault,) = [record for record in records if isinstance(record, Fault)]
    assert fault.place == f"{tmp_path / 'train.jsonl'}, line 719"
    assert fault.kind == "not JSON" and "property name" in fault.reason


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv", "a.txt"])
def test_a_byte_order_mark_is_no_part_of_the_data(tmp_path: Path, name: str) -> None:
    """MedQA-ChatGLM 2: "Unexpected UTF-8 BOM" for a file saved on Windows; in a table it sticks to the first name."""
    text = {"a.csv": "text\r\n解\r\n", "a.txt": "解\r\n"}.get(name, '{"text": "解"}\r\n')
    assert fields(read(tmp_path / name, text.encode("utf-8-sig"))) == [{"text": "解"}]


def test_separators_within_json_strings_end_no_line(tmp_path: Path) -> None:
    """jsonlines 53: str.splitlines cuts records at U+0085, U+2028 and others, which JSON allows in its strings."""
    rows = [{"text": f"a{sign}b"} for sign in "\x85\u2028\u2029\x7f"]
    assert (
        fields(read(tmp_path / "a.jsonl", "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)))
        == rows
    )


def test_a_file_of_one_object_over_several_lines(tmp_path: Path) -> None:
    """datasets 8086: one object a file, printed over several lines, was read as broken lines."""
    row = {"prompt": "a", "completion": "b", "steps": [{"name": "x"}], "tags": ["y", "z"]}
    assert fields(read(tmp_path / "a.json", json.dumps(row, indent=2))) == [row]


def test_half_of_a_surrogate_pair_does_not_reach_the_tokenizer(tmp_path: Path) -> None:
    """transformers 8886: "surrogates not allowed" in the midst of tokenising, of no row."""
    lines = ['{"text": "ok \\ud83d\\ude00"}', '{"text": "cut \\ud83d"}', '{"text": "\\ude00\\ud83d"}']
    assert fields(read(tmp_path / "a.jsonl", "\n".join(lines))) == [
        {"text": "ok \U0001f600"},
        "lone surrogate",
        "lone surrogate",
    ]


def test_packed_lines(tmp_path: Path) -> None:
    """datasets 328: lines packed with gzip are read as one JSON value."""
    rows = [{"a": i} for i in range(3)]
    packed = gzip.compress("\n".join(map(json.dumps, rows)).encode())
    assert fields(read(tmp_path / "a.json.gz", packed)) == rows


def test_every_report_has_its_test() -> None:
    text = "\n".join(test.__doc__ or "" for name, test in globals().items() if name.startswith("test_"))
    for link in REPORTS.values():
        repository, number = link.split("/")[4], link.split("/")[-1]
        assert repository in text and number in text, link

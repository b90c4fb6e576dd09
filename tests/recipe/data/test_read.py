"""Reading: every form, packing and shape gives the same rows at the right places; broken records are faults.

``test_read_sources.py`` holds what a source names, and ``test_fuzz.py`` damaged files at random.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import struct
import zipfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sftmix.data.json_window import TextWindow
from sftmix.data.read import read_rows
from sftmix.data.rows import Fault, Row

ROWS = [
    {"prompt": "What is 1?", "completion": "It is\none."},
    {"prompt": "Wie heißt „2“?\u2028", "completion": 'It is "2", \U0001f600.'},
    {"prompt": "", "completion": "NA"},
    {"prompt": "null", "completion": "007"},
    {"prompt": "a\\b", "completion": "{["},
]


def jsonl(rows: list[Any]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def delimited(rows: list[dict[str, str]], delimiter: str) -> str:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def ipc(rows: list[Any], *, stream: bool) -> bytes:
    table = pa.Table.from_pylist(rows)
    sink = pa.BufferOutputStream()
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return sink.getvalue().to_pybytes()


def parquet(rows: list[Any]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink, row_group_size=2)
    return sink.getvalue().to_pybytes()


def zipped(files: dict[str, bytes]) -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return sink.getvalue()


def zstd(data: bytes) -> bytes:
    return pa.compress(data, codec="zstd", asbytes=True)


LINES = [f"line {i}" for i in range(1, 6)]
NUMBERED = [f"row {i}" for i in range(1, 6)]
INDENTED = [f"item {i}, line {2 + 4 * (i - 1)}" for i in range(1, 6)]
ITEMS = [f"item {i}" for i in range(1, 6)]
CSV_LINES = [f"line {i}" for i in (2, 4, 5, 6, 7)]  # the first record has a newline in its quotes
FORMS: dict[str, tuple[bytes, list[str]]] = {
    "lines.jsonl": (jsonl(ROWS).encode(), LINES),
    "ascii.jsonl": ("".join(json.dumps(row) + "\n" for row in ROWS).encode(), LINES),
    "no_last_newline.ndjson": (jsonl(ROWS).rstrip("\n").encode(), LINES),
    "mark_and_blank.JSONL": (
        jsonl(ROWS).replace("}\n", " }\r\n \n").encode("utf-8-sig"),
        [f"line {i}" for i in (1, 3, 5, 7, 9)],
    ),
    "utf16.jsonl": (jsonl(ROWS).encode("utf-16"), LINES),
    "utf16be.jsonl": (b"\xfe\xff" + jsonl(ROWS).encode("utf-16-be"), LINES),
    "utf16.json": (json.dumps(ROWS, indent=1).encode("utf-16"), INDENTED),
    "lines.json": (jsonl(ROWS).encode(), LINES),
    "array.json": (json.dumps(ROWS).encode(), [f"item {i}, line 1" for i in range(1, 6)]),
    "array.jsonl": (
        ("\n[" + ",\n".join(json.dumps(row) for row in ROWS) + "]\n").encode(),
        [f"item {i}, line {i + 1}" for i in range(1, 6)],
    ),
    "indented.json": (json.dumps(ROWS, indent=2).encode("utf-8-sig"), INDENTED),
    "printed.json": (
        "\n".join(json.dumps(row, indent=4) for row in ROWS).encode(),
        [f"object {i + 1}, line {1 + 4 * i}" for i in range(5)],
    ),
    "printed.jsonl": (
        "".join(json.dumps(row, indent=1) for row in ROWS).encode(),
        [f"object {i + 1}, line {1 + 3 * i}" for i in range(5)],
    ),
    "data.json": (json.dumps({"data": ROWS}).encode(), ITEMS),
    "rows.json": (json.dumps({"rows": ROWS}, indent=1).encode(), ITEMS),
    "line_each.json": (
        ('{"examples": [\n' + ",\n".join(json.dumps(row) for row in ROWS) + "\n]}").encode(),
        ITEMS,
    ),
    "train.json": (json.dumps({"test": [{"x": 1}], "train": ROWS}).encode(), ITEMS),
    "only_key.json": (json.dumps({"whatever": ROWS}).encode(), ITEMS),
    "columns.json": (json.dumps({key: [row[key] for row in ROWS] for key in ROWS[0]}).encode(), ITEMS),
    "pandas.json": (
        json.dumps({key: {str(i): row[key] for i, row in enumerate(ROWS)} for key in ROWS[0]}).encode(),
        ITEMS,
    ),
    "index.json": (json.dumps({str(i): row for i, row in enumerate(ROWS)}).encode(), ITEMS),
    "table.csv": (delimited(ROWS, ",").encode(), CSV_LINES),
    "mark.csv": (delimited(ROWS, ",").encode("utf-8-sig"), CSV_LINES),
    "semicolons.csv": (delimited(ROWS, ";").encode(), CSV_LINES),
    "utf16.csv": (delimited(ROWS, "\t").encode("utf-16"), CSV_LINES),
    "table.tsv": (delimited(ROWS, "\t").encode(), CSV_LINES),
    "rows.parquet": (parquet(ROWS), NUMBERED),
    "file.arrow": (ipc(ROWS, stream=False), NUMBERED),
    "file.feather": (ipc(ROWS, stream=False), NUMBERED),
    "stream.arrow": (ipc(ROWS, stream=True), NUMBERED),
}
PACKERS = {".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress, ".zst": zstd}


def records(path: Path, **options: Any) -> list[Row | Fault]:
    return list(read_rows(str(path), **options))


def write(path: Path, data: str | bytes) -> Path:
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def fields(path: Path, **options: Any) -> list[Any]:
    """Fields of a file without any fault."""
    found = []
    for record in records(path, **options):
        assert isinstance(record, Row), record
        found.append(record.fields)
    return found


@pytest.mark.filterwarnings("ignore:.*test is not read")
@pytest.mark.parametrize("name", FORMS)
def test_every_form_gives_the_same_rows_at_their_places(tmp_path: Path, name: str) -> None:
    data, places = FORMS[name]
    path = write(tmp_path / name, data)
    expected = [Row(f"{path}, {place}", row) for place, row in zip(places, ROWS, strict=True)]
    assert records(path) == expected
    assert records(path, limit=2) == expected[:2]


@pytest.mark.filterwarnings("ignore:.*test is not read")
@pytest.mark.parametrize("packing", PACKERS)
@pytest.mark.parametrize("name", FORMS)
def test_every_form_packed(tmp_path: Path, name: str, packing: str) -> None:
    data, places = FORMS[name]
    path = write(tmp_path / f"{name}{packing}", PACKERS[packing](data))
    assert records(path) == [Row(f"{path}, {place}", row) for place, row in zip(places, ROWS, strict=True)]
    half = len(data) // 2
    write(path, PACKERS[packing](data[:half]) + PACKERS[packing](data[half:]))  # streams one after another
    assert fields(path) == ROWS


@pytest.mark.filterwarnings("ignore:.*test is not read")
def test_members_of_an_archive(tmp_path: Path) -> None:
    skipped: list[tuple[str, str]] = []
    files = {name.replace("train", "x"): data for name, (data, _) in FORMS.items()}
    path = write(
        tmp_path / "all.zip",
        zipped({**files, "in/a.jsonl.gz": gzip.compress(FORMS["lines.jsonl"][0]), "README.md": b"# data"}),
    )
    found = records(path, on_skip=lambda what, why: skipped.append((what, why)))
    assert [record.fields for record in found if isinstance(record, Row)] == ROWS * (len(FORMS) + 1)
    assert found[0].place == f"{path}, lines.jsonl, line 1"
    assert found[-1].place == f"{path}, in/a.jsonl.gz, line 5"
    assert skipped[0] == (f"{path}/README.md", "a file that goes with data and is none")


@pytest.mark.parametrize(
    "files, message",
    [
        ({}, "got none"),
        ({"a.png": b"x"}, "another kind of file"),
        ({"README": b"x"}, "got none"),
        ({"b.zip": zipped({"a.txt": b"x"})}, "got b.zip"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*README")
def test_archives_without_data_are_refused(tmp_path: Path, files: dict[str, bytes], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        records(write(tmp_path / "a.zip", zipped(files)))


def test_lines_of_text(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "one\n\n  \ntwo\x85\u2029 of \x0b them\r\nthree\rfour \n")
    assert records(path) == [
        Row(f"{path}, line 1", {"text": "one"}),
        Row(f"{path}, line 4", {"text": "two\x85\u2029 of \x0b them"}),
        Row(f"{path}, line 5", {"text": "three"}),
        Row(f"{path}, line 6", {"text": "four "}),
    ]
    found = records(write(tmp_path / "b.TEXT", b"one\ntw\xe4\n\0\nfour"))
    assert [getattr(record, "kind", "") for record in found] == ["", "not UTF-8", "NUL character", ""]


@pytest.mark.parametrize(
    "document",
    [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"conversations": [{"from": "human", "value": "a"}], "tools": [{"name": "f"}]},
        {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]},
        {"input_ids": [1, 2, 3], "labels": [-100, 2, 3]},
        {"prompt": "a", "completion": "b"},
        {"a": [1, 2], "b": [1]},
        {"a": [1, 2], "b": "c"},
        {},
    ],
)
def test_one_object_that_is_a_row_stays_one(tmp_path: Path, document: Any) -> None:
    for indent in (None, 2):
        assert fields(write(tmp_path / "a.json", json.dumps(document, indent=indent))) == [document]
    assert fields(write(tmp_path / "a.jsonl", jsonl([document]))) == [document]


def test_what_is_beside_the_rows_is_told(tmp_path: Path) -> None:
    told: list[tuple[str, str]] = []
    path = write(tmp_path / "a.json", json.dumps({"version": 2, "data": [{"a": 1}], "by": "us"}))
    assert len(records(path, on_skip=lambda what, why: told.append((what, why)))) == 1
    assert [what for what, _ in told] == [
        f"{path}, object 1, line 1, version",
        f"{path}, object 1, line 1, by",
    ]
    with pytest.warns(UserWarning, match="is not read: beside") as warned:
        records(path)
    assert [str(one.message) for one in warned] == [
        f"{path}, object 1, line 1, {key} is not read: beside data, which holds the rows"
        for key in ("version", "by")
    ]


def test_an_object_of_several_splits(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", json.dumps({"train": [{"a": 1}], "test": [{"a": 2}]}))
    quiet: Any = {"on_skip": lambda what, why: None}
    assert fields(path, **quiet) == [{"a": 1}]
    assert fields(path, split="test", **quiet) == [{"a": 2}]
    with pytest.raises(ValueError, match="expected the split validation, got train, test"):
        records(path, split="validation", **quiet)
    two = write(tmp_path / "b.json", json.dumps({"data": [{"a": 1}], "rows": [{"a": 2}]}))
    with pytest.raises(ValueError, match="expected one list of rows, got data, rows"):
        records(two)


BAD_LINES: list[tuple[bytes, str, str]] = [
    (b'{"a": 1', "not JSON", "its end"),
    (b"", "", ""),
    (b'{"a": 1} {"a": 2}', "not JSON", "Extra data, column 10"),
    (b'{"a": 1},', "not JSON", "Extra data"),
    (b"{'a': 1}", "not JSON", "column 2"),
    (b'{"a": "b\0"}', "not JSON", "control character"),
    (b'\0\0\0{"a": 1}', "not JSON", "Expecting value, column 1"),
    (b'{"a": "\xff"}', "not UTF-8", "byte 0xff at 8"),
    (b'{"a": "\xed\xa0\x80"}', "not UTF-8", "byte 0xed"),
    (b'{"m": [{"c": "x"}, {"c": "\\uD83D oh"}]}', "lone surrogate", "in m[1].c, got \\ud83d"),
    (b'{"a": {"\\udc00": 1}}', "lone surrogate", "in a.\\udc00"),
    (b'["\\ud800"]', "lone surrogate", "in [0]"),
    (b'"\\ud800"', "lone surrogate", "expected whole characters, got"),
    (b'{"a": 1, "b": {"c": 1, "c": 2}}', "repeated key", "got 'c' again"),
    (b'{"a": ' + b"1" * 5000 + b"}", "number too long", "at most 4,300 digits"),
    (b'{"a": ' + b"[" * 100 + b"]" * 100 + b"}", "nested too deeply", "at most 100"),
    (b"[" * 100_000, "nested too deeply", "at most 100"),
    (b'{"a":' * 100_000, "nested too deeply", "at most 100"),
    (b"[" * 3000 + b"]" * 3000, "nested too deeply", "at most 100"),
    (b"nul", "not JSON", "Expecting value"),
]


@pytest.mark.parametrize("line, kind, reason", BAD_LINES)
def test_a_bad_line_is_a_fault_and_reading_goes_on(
    tmp_path: Path, line: bytes, kind: str, reason: str
) -> None:
    good = b'{"a": 0}\n'
    path = write(tmp_path / "a.jsonl", good + line + b"\n" + good + good)
    found = records(path)
    if kind:
        fault = found.pop(1)
        assert isinstance(fault, Fault)
        assert (fault.place, fault.kind) == (f"{path}, line 2", kind)
        assert reason in fault.reason
    assert found == [Row(f"{path}, line {i}", {"a": 0}) for i in (1, 3, 4)]
    assert found[1:] == records(write(tmp_path / "a.jsonl", good * 4))[2:]


@pytest.mark.parametrize("line, kind, reason", [bad for bad in BAD_LINES if bad[1] and bad[0][:1] != b"["])
def test_a_bad_first_line_is_no_document(tmp_path: Path, line: bytes, kind: str, reason: str) -> None:
    path = write(tmp_path / "a.json", line + b'\n{"a": 0}\n{"a": 0}\n')
    first, *others = records(path)
    assert isinstance(first, Fault)
    assert first.kind == kind
    assert others == [Row(f"{path}, line {i}", {"a": 0}) for i in (2, 3)]


def test_a_last_line_that_is_cut_is_a_fault(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", jsonl(ROWS)[:-10])
    assert [type(record) for record in records(path)] == [Row, Row, Row, Row, Fault]
    assert [type(record) for record in records(write(path, jsonl(ROWS[:1])[:-5]))] == [Fault]


def test_surrogates_in_pairs_numbers_and_depth_that_are_right(tmp_path: Path) -> None:
    rows = [
        {"a": "\U0001f600\ud55c"},
        {"a": [1] * 500},
        {"a": [[]] * 500},
        {"a": json.loads("[" * 99 + "]" * 99)},
    ]
    assert fields(write(tmp_path / "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))) == rows
    assert fields(write(tmp_path / "a.jsonl", '{"a": NaN, "b": [NaN]}\n')) == [{"a": None, "b": [None]}]
    assert fields(write(tmp_path / "a.jsonl", '1\n"a"\nnull\n')) == [1, "a", None]


def test_bad_items_of_an_array_that_spans_lines(tmp_path: Path) -> None:
    bad = [(line, kind) for line, kind, _ in BAD_LINES if line[:1] == b"{" and line[-1:] == b"}"]
    items = [b'{"a": 0}'] + [item for line, _ in bad for item in (line, b'{"a": 0}')]
    for indent in (b"", b"  "):
        text = b"[\n" + b",\n".join(indent + item for item in items) + b"\n]\n"
        path = write(tmp_path / "a.json", text)
        found = records(path)
        assert [record.place for record in found] == [
            f"{path}, item {i}, line {i + 1}" for i in range(1, len(items) + 1)
        ]
        assert [record.kind for record in found[1::2] if isinstance(record, Fault)] == [k for _, k in bad]
        assert [record.fields for record in found[::2] if isinstance(record, Row)] == [{"a": 0}] * (
            len(bad) + 1
        )
    assert len(bad) >= 10
    last = records(write(path, b'[\n{"a": 0},\n{"a": "x}\n]'))
    assert [type(record) for record in last] == [Row, Fault]


def test_bad_items_of_an_array_on_one_line(tmp_path: Path) -> None:
    text = '[{"a": 0}, {"a" 1}, {"a": 0}, {"a": 1, "a": 2}, {"a": "\\ud800"}, {"a": 0}, {"a": %s}, {"a": 0}]'
    found = records(write(tmp_path / "a.json", text % ("1" * 5000)))
    assert [getattr(record, "kind", "") for record in found] == [
        "", "not JSON", "", "repeated key", "lone surrogate", "", "number too long", "",
    ]  # fmt: skip
    found = records(write(tmp_path / "a.json", '[{"a": 0},, {"a": 0},]'))
    assert [getattr(record, "kind", "") for record in found] == ["", "not JSON", "", "not JSON"]


@pytest.mark.parametrize(
    "text, rows, message",
    [
        ('[{"a": 0}, {"a": 0}', 2, r"after item 2, line 1: expected a whole array, got one without its end"),
        ('[\n{"a": 0},\n{"a": 0},\n', 2, r"item 3, line 4: expected a whole array"),
        ('[\n{"a": 0},\n{"a": "0', 1, r"item 2, line 3: expected a whole array"),
        ('[{"a": 0}, {"a": 0', 1, r"item 2, line 1: expected a whole array"),
        ("[", 0, "expected a whole array"),
        ('[{"a": 0}]\n]', 1, r"line 2: expected nothing after the array, got '\]'"),
        ('[{"a": 0}]\n{"a": 0}', 1, r"line 2: expected nothing after the array, got '\{'"),
        ('[{"a": 0}, {"a: 0}, {"a": 0}]', 1, r"item 2, line 1: .* where the next item begins cannot be told"),
        ('[{"a": 0} {"a": 0}]', 0, r"after item 1, line 1: expected a comma"),
        ('{"data": [{"a": 0}, {"a"', 0, r"line 1: expected JSON"),
        ('{"data": [\n{"a": 0},\n{"a"', 0, r"line 1: expected JSON"),
        ('{\n"a": 0,\n"b"', 0, r"line 1: expected JSON"),
        ('{"a": 0} {"b": [{"a": 1}], "c": }{"a": 2}}', 1, r"object 2, line 1: expected JSON"),
        ('{"a": 0}{"a": 0}"a"', 2, r"object 3, line 1: expected nothing but objects one after another"),
        ('{"data": [{"a": 0}], "data": []}', 0, r"line 1: expected each key of the object once"),
        (
            '{"data": [{"a": 0}, {"a": %s}]}' % ("1" * 5000),
            0,
            "object 1, line 1: expected a number of at most 4,300",
        ),
        ("[]", 0, "expected at least one row, got none"),
        ('{"data": []}', 0, "expected at least one row, got none"),
        ("", 0, "expected data, got an empty file"),
        ("\n \r\n", 0, "expected rows, got blank lines only"),
    ],
)
def test_json_that_is_cut_short_is_refused_after_its_rows(
    tmp_path: Path, text: str, rows: int, message: str
) -> None:
    path = write(tmp_path / "a.json", text)
    found: list[Row | Fault] = []
    with pytest.raises(ValueError, match=message) as error:
        found.extend(read_rows(str(path)))
    assert [record.fields for record in found if isinstance(record, Row)] == [{"a": 0}] * rows
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    "name", [name for name, (_, places) in FORMS.items() if places[0].startswith("item")]
)
def test_arrays_and_documents_cut_anywhere_are_refused(tmp_path: Path, name: str) -> None:
    data = FORMS[name][0].rstrip()
    for cut in range(4, len(data), 5):
        found: list[Row | Fault] = []
        with pytest.raises(ValueError, match="expected"):
            found.extend(read_rows(str(write(tmp_path / name, data[:cut])), on_skip=lambda what, why: None))
        rows = [record.fields for record in found if isinstance(record, Row)]
        assert rows == ROWS[: len(rows)]


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "name, text",
    [
        ("a.json", "\n" * 300_000 + '{"a": "0"}'),
        ("a.json", " \n" * 300_000 + '[{"a": "0"}' + "\n" * 300_000 + "]"),
        ("a.json", '{\n"a": "0"}' + "\n" * 300_000 + '{"a": "0"}'),
        ("a.csv", "\n" * 300_000 + "a\n" + "\n" * 300_000 + "0\n"),
        ("a.jsonl", '{"a": "0"}\n' + '{"a": "\n' * 100_000),
        ("a.json", '[\n{"a": "0"},\n' + '{"a": ",\n' * 10_000 + "]"),
        (
            "a.json",
            '[\n{"a": "0"},\n{"b": ' + "[" * 90 + "]" * 90 + "},\n" + '{"b": [[[[[[[[],\n' * 10_000 + "]",
        ),
    ],
)
def test_long_runs_of_nothing_and_of_faults_take_no_square_of_time(
    tmp_path: Path, name: str, text: str
) -> None:
    found = records(write(tmp_path / name, text))
    assert next(record.fields for record in found if isinstance(record, Row)) == {"a": "0"}


def test_printed_objects_of_which_one_is_broken(tmp_path: Path) -> None:
    texts = [json.dumps({"a": {"b": i}}, indent=2) for i in range(4)]
    texts[1] = texts[1].replace(":", "", 1)
    path = write(tmp_path / "a.json", "\n".join(texts))
    found = records(path)
    assert [type(record) for record in found] == [Row, Fault, Row, Row]
    assert [record.place for record in found] == [
        f"{path}, object {i + 1}, line {1 + 5 * i}" for i in range(4)
    ]
    cut = read_rows(str(write(path, "\n".join(texts)[:-2])))
    assert [type(next(cut)) for _ in range(3)] == [Row, Fault, Row]
    with pytest.raises(ValueError, match="line 16: expected JSON"):
        next(cut)


def test_bad_rows_in_an_object_that_holds_them(tmp_path: Path) -> None:
    rows = [b'{"a": 0}', b'{"a": 1, "a": 2}', b'{"a": "\\ud800"}', b'{"a": 0}']
    path = write(tmp_path / "a.json", b'{"data": [\n' + b",\n".join(rows) + b"\n]}")
    kinds = [getattr(record, "kind", "") for record in records(path)]
    assert kinds == ["", "repeated key", "lone surrogate", ""]
    rows[3:3] = [b'{"a": "\xff"}']
    path = write(tmp_path / "a.json", b'{"data": [\n' + b",\n".join(rows) + b"\n]}")
    kinds = [getattr(record, "kind", "") for record in records(path)]
    assert kinds == ["", "repeated key", "lone surrogate", "not UTF-8", ""]


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_an_array_in_chunks_of_any_size(size: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sftmix.data.text_lines._CHUNK", size)
    monkeypatch.setattr("sftmix.data.json_window._LEAST", size)
    rows = [*ROWS, 12, 3.5, True, None, "x", [], {}, [1, 22]] * 3
    for indent in (None, 3):
        text = json.dumps(rows, indent=indent).replace("true", "true  ")
        assert fields(write(tmp_path / "a.json", text)) == rows
    places = [record.place.rpartition(" ")[2] for record in records(tmp_path / "a.json")]
    starts = [i for i, line in enumerate(text.split("\n"), 1) if line[:3] == "   " and line[3] not in " ]}"]
    assert [int(place) for place in places] == starts
    items = [json.dumps({"a": "x" * 50})] * 60
    bad = {10: '{"a" 1}', 20: '{"a": 2, "a": 3}', 30: '{"a": "\\ud800"}', 40: '{"a": "}', 50: '{"a": [1}'}
    items = [bad.get(i, item) for i, item in enumerate(items, 1)]
    found = records(write(tmp_path / "a.json", "[\n    " + ",\n    ".join(items) + "\n]"))
    assert [record.place.rpartition(" ")[2] for record in found] == [str(i + 1) for i in range(1, 61)]
    assert [i for i, record in enumerate(found, 1) if isinstance(record, Fault)] == list(bad)


def test_an_array_is_read_without_holding_its_items(tmp_path: Path) -> None:
    """The window never holds much more than a chunk, whatever the length of the file."""
    widest = 0
    more = TextWindow.more

    def watched(self: TextWindow) -> bool:
        nonlocal widest
        result = more(self)
        widest = max(widest, len(self.text))
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TextWindow, "more", watched)
        patch.setattr("sftmix.data.text_lines._CHUNK", 1 << 12)
        patch.setattr("sftmix.data.json_window._LEAST", 1 << 12)
        rows = [{"prompt": f"{i} ?", "completion": "x" * 50} for i in range(5000)]
        assert fields(write(tmp_path / "a.json", json.dumps(rows))) == rows
    assert widest < 3 << 12 < (tmp_path / "a.json").stat().st_size / 20


@pytest.mark.parametrize(
    "name, text, expected",
    [
        ("a.csv", "a,b\n1\n2,2\n3,3,3\n", ["1 line 2 number of cells", "2", "1 line 4 number of cells"]),
        ("a.csv", 'a,b\n1,"x"y\n2,2\n', ["1 line 2 broken record", "2"]),
        ("a.csv", 'a,b\n1,"x\n2,y\n3,"z"\n4,4\n', ["1 line 2 broken record", "1 line 3 broken record",
                                                    "1 line 4 broken record", "4"]),
        ("a.csv", b"a,b\n1,\xe4\n2,2\n", ["1 line 2 not UTF-8", "2"]),
        ("a.csv", b"a,b\n1,\0\n2,2\n", ["1 line 2 NUL character", "2"]),
        ("a.csv", 'a,b\n1,"\n\n"\n\n2,2\n', ["1", "2"]),
        ("a.csv", "a,b\r1,1\r2,2", ["1", "2"]),
        ("a.tsv", "a\tb\n1\t1,2\n2\n", ["1", "1 line 3 number of cells"]),
    ],
)  # fmt: skip
def test_bad_records_of_a_table(tmp_path: Path, name: str, text: str | bytes, expected: list[str]) -> None:
    path = write(tmp_path / name, text)
    found = [
        record.fields["a"]
        if isinstance(record, Row)
        else "1 " + record.place.removeprefix(f"{path}, ") + " " + record.kind
        for record in records(path)
    ]
    assert found == expected


@pytest.mark.parametrize(
    "text, message",
    [
        ("a,b,a\n1,2,3\n", "line 1: expected columns of different names, got 'a' twice"),
        ("\n\n", "expected a header, got blank lines only"),
        ("a,b\n", "expected at least one row, got none"),
        ('a,b\n1,1\n2,"2\n3,3\n', "line 3: expected each quote to close, got the end of the file"),
        ('a,"b\n1,1\n', "line 1: expected each quote to close, got the end of the file"),
        ('a,"b"c\n1,1\n', "line 1: expected a header, got"),
        (b"\xff\xfea\0,\0b\0\n\0\x00\xd8\n\0", "expected UTF-16, got"),
        (b"a\0,\0b\0", "without its byte order mark"),
        (b"\xff\xfe\0\0a\0\0\0", "got UTF-32"),
        (b"\xff\xfea\0b", "expected UTF-16, got"),
        (gzip.compress(b"a,b\n1,1\n", mtime=0), r"got gzip data \(name it .gz\)"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "got a Git LFS pointer to it"),
    ],
)
def test_tables_that_cannot_be_read_are_refused(tmp_path: Path, text: str | bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        records(write(tmp_path / "a.csv", text))
    assert str(tmp_path / "a.csv") in str(error.value)


def test_columns_without_a_name_and_cells_beyond_the_modules_limit(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", ",a, b ,\n0,1,2,\n")
    assert fields(path) == [{"Unnamed: 0": "0", "a": "1", "b": "2", "Unnamed: 3": ""}]
    long = "x" * 300_000
    assert fields(write(path, f"a,b\n{long},1\n")) == [{"a": long, "b": "1"}]


@pytest.mark.parametrize("packing", [*PACKERS, ".zip"])
def test_packed_files_cut_or_lengthened_anywhere_are_never_short(tmp_path: Path, packing: str) -> None:
    rows = [{"a": str(i)} for i in range(40)]
    half = jsonl(rows[:20]).encode()
    text = jsonl(rows).encode()
    pack = PACKERS.get(packing, lambda data: zipped({"a.jsonl": data}))
    for data in [pack(text)] if packing == ".zip" else [pack(text), pack(half) + pack(text[len(half) :])]:
        whole = len(pack(half))
        path = tmp_path / f"a.jsonl{packing}"
        for cut in range(len(data)):
            write(path, data[:cut])
            if cut == whole and len(data) != len(pack(text)):
                assert fields(path) == rows[:20]  # a whole first stream: no trace of another
            else:
                with pytest.raises(ValueError, match="expected"):
                    records(path)
        if packing != ".zip":  # an archive may stand in a longer file
            for more in (b"x", b"more", b"\xff" * 9, pack(text)[: len(pack(text)) - 1]):
                write(path, data + more)
                with pytest.raises(ValueError, match="expected"):
                    records(path)


@pytest.mark.parametrize("name", ["rows.parquet", "file.arrow", "stream.arrow"])
def test_columnar_files_cut_or_lengthened_anywhere_are_refused(tmp_path: Path, name: str) -> None:
    data = FORMS[name][0]
    for cut in range(0, len(data), 3):
        with pytest.raises(ValueError, match=name):
            records(write(tmp_path / name, data[:cut]))
    with pytest.raises(ValueError, match=name):
        records(write(tmp_path / name, data + (data if name == "stream.arrow" else b"x")))


def test_columnar_files_with_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    flat = pa.table([pa.array(["x"]), pa.array(["y"])], names=["a", "a"])
    inner = pa.StructArray.from_arrays([pa.array([1]), pa.array([2])], names=["b", "b"])
    nested = pa.table({"m": pa.ListArray.from_arrays([0, 1], inner)})
    for table, column in ((flat, "a"), (nested, "b")):
        with pa.ipc.new_file(tmp_path / "a.arrow", table.schema) as writer:
            writer.write_table(table)
        pq.write_table(table, tmp_path / "a.parquet")
        for name in ("a.arrow", "a.parquet"):
            with pytest.raises(ValueError, match=f"columns of different names, got '{column}' twice"):
                records(tmp_path / name)


@pytest.mark.parametrize(
    "ends, data", [([0, 1_000_000, 2], b"ab"), ([0, 2, 1], b"ab"), ([0, 1, 2], b"\xff\xff")]
)
def test_an_arrow_file_whose_offsets_or_text_are_wrong_is_refused(
    tmp_path: Path, ends: list[int], data: bytes
) -> None:
    """Reading it would show memory that is not the file's, or end the process."""
    offsets = pa.py_buffer(struct.pack("<3i", *ends))
    column = pa.Array.from_buffers(pa.string(), 2, [None, offsets, pa.py_buffer(data)])
    batch = pa.RecordBatch.from_arrays([column], ["a"])
    with pa.ipc.new_file(tmp_path / "a.arrow", batch.schema) as writer:
        writer.write_batch(batch)
    with pytest.raises(ValueError, match=r"a\.arrow: expected a whole Arrow file, got"):
        records(tmp_path / "a.arrow")


def test_a_value_that_python_cannot_hold_is_a_fault(tmp_path: Path) -> None:
    days = pa.array([0, 2**40, 1], pa.int64()).cast(pa.timestamp("s"))
    pq.write_table(pa.table({"when": days, "a": ["x", "y", "z"]}), tmp_path / "a.parquet")
    found = records(tmp_path / "a.parquet")
    assert [record.place for record in found] == [f"{tmp_path / 'a.parquet'}, row {i}" for i in (1, 2, 3)]
    assert [getattr(record, "kind", "") for record in found] == ["", "unreadable value", ""]
    assert isinstance(found[2], Row) and found[2].fields["a"] == "z"

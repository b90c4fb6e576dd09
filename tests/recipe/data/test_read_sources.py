"""What a source names: files, folders, globs, several with commas, saved folders, ids; splits; nothing left out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import datasets
import pytest

from sftmix.data.read import read_rows, source_files
from sftmix.data.rows import Row


def write(path: Path, *values: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"a": value}) + "\n" for value in values))
    return path


def values(source: object, **options: Any) -> list[int]:
    found = []
    for record in read_rows(str(source), **options):
        assert isinstance(record, Row), record
        found.append(record.fields["a"])
    return found


class Told(list[tuple[str, str]]):
    """What ``on_skip`` was told."""

    def __call__(self, what: str, why: str) -> None:
        self.append((what, why))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Data and its company: in order 1, 2, 3, 4, 5."""
    data = tmp_path / "data"
    write(data / "a.jsonl", 1)
    write(data / "b" / "c" / "x.JSONL", 2)
    write(data / "b" / "d.jsonl", 3)
    write(data / "e,f.jsonl", 4, 5)
    for name in (
        "README.md",
        "LICENSE",
        ".gitattributes",
        "b/.cache/x.jsonl",
        "load.py",
        "dataset_infos.json",
    ):
        (data / name).parent.mkdir(exist_ok=True)
        (data / name).write_text("{}")
    return data


def test_a_folder_is_read_in_order_and_its_company_told(folder: Path) -> None:
    told = Told()
    assert values(folder, on_skip=told) == [1, 2, 3, 4, 5]
    company = ("b/.cache", ".gitattributes", "LICENSE", "README.md", "dataset_infos.json", "load.py")
    assert sorted(what for what, _ in told) == sorted(f"{folder}/{name}" for name in company)
    assert source_files(str(folder)) == [
        folder / name for name in ("a.jsonl", "b/c/x.JSONL", "b/d.jsonl", "e,f.jsonl")
    ]
    with pytest.warns(UserWarning, match="is not read: ") as warned:
        values(folder)
    assert len(warned) == len(company) == len(told)


def test_a_folder_with_another_kind_of_file_is_refused(folder: Path) -> None:
    (folder / "picture.png").write_bytes(b"x")
    with pytest.raises(
        ValueError, match=r"picture\.png: expected .*, got another kind of file among the data"
    ):
        values(folder, on_skip=Told())
    (folder / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty: expected .* in the folder, got none"):
        values(folder / "empty")


def test_globs(folder: Path) -> None:
    assert values(folder / "*.jsonl", on_skip=Told()) == [1, 4, 5]
    assert values(folder / "**" / "*.[jJ]*[lL]", on_skip=Told()) == [1, 2, 3, 4, 5]
    told = Told()
    assert values(folder / "**", on_skip=told) == [1, 2, 3, 4, 5]
    assert {Path(what).name for what, _ in told} == {"README.md", "LICENSE", "load.py", "dataset_infos.json"}
    told = Told()
    assert values(folder / "*", on_skip=told) == [1, 4, 5]
    assert (f"{folder}/b", "a folder, whose files the pattern does not match") in told
    with pytest.raises(ValueError, match="expected a pattern that matches files"):
        values(folder / "*.csv")
    with pytest.raises(ValueError, match="got a pattern that matches none"):
        values(folder / "README*", on_skip=Told())


def test_several_with_commas(folder: Path) -> None:
    comma = folder / "e,f.jsonl"
    assert values(comma) == [4, 5]
    assert values(f"{comma},{folder}/a.jsonl") == [4, 5, 1]
    assert values(f"{folder}/b/*.jsonl , {folder}/b/c,{comma}", on_skip=Told()) == [3, 2, 4, 5]
    for source, message in (
        (f"{folder}/a.jsonl,", "expected a name between the commas, got none"),
        (f"{folder}/a.jsonl,{folder}/a.jsonl", "expected every file once"),
        (f"{folder}/a.jsonl,{folder}/*.jsonl", "expected every file once"),
        (f"{folder}/b/../a.jsonl,{folder}", "expected every file once"),
        (" ", "got an empty name"),
    ):
        with pytest.raises(ValueError, match=message):
            values(source, on_skip=Told())


def test_links_and_the_home_folder(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert values("~/data/a.jsonl") == [1]
    assert values("~/data/b/*.jsonl") == [3]
    (tmp_path / "link").symlink_to(folder / "b")
    (tmp_path / "link.jsonl").symlink_to(folder / "a.jsonl")
    assert values(tmp_path / "link", on_skip=Told()) == [2, 3]
    assert values(tmp_path / "link.jsonl") == [1]
    with pytest.raises(ValueError, match="expected every file once"):
        values(f"{tmp_path}/link.jsonl,{folder}/a.jsonl")
    (folder / "b" / "up").symlink_to(folder)
    with pytest.raises(ValueError, match="got a link to one that it is in"):
        values(folder, on_skip=Told())
    (tmp_path / "gone.jsonl").symlink_to(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"gone\.jsonl: expected .*, got no such file"):
        values(tmp_path / "gone.jsonl")


def test_a_folder_whose_names_tell_splits(tmp_path: Path) -> None:
    write(tmp_path / "train-00000-of-00002.jsonl", 1)
    write(tmp_path / "train-00001-of-00002.jsonl", 2)
    assert values(tmp_path) == values(tmp_path, split="test") == [1, 2]  # only one split: nothing to choose
    write(tmp_path / "more" / "test.jsonl", 3)
    write(tmp_path / "validation" / "0.jsonl", 4)
    told = Told()
    assert values(tmp_path, on_skip=told) == [1, 2]
    assert {why for _, why in told} == {"of another split than train"} and len(told) == 2
    assert values(tmp_path, split="test", on_skip=told) == [3]
    assert values(tmp_path, split="dev", on_skip=told) == [4]
    assert source_files(str(tmp_path), split="test") == [tmp_path / "more" / "test.jsonl"]
    assert values(f"{tmp_path}/**/*.jsonl") == [3, 1, 2, 4]  # a glob has chosen already
    with pytest.raises(ValueError, match="expected files of the split other, got test, train, validation"):
        values(tmp_path, split="other")
    write(tmp_path / "latest.jsonl", 5)
    with pytest.raises(ValueError, match=r"every file's name to tell its split .* got 'latest.jsonl'"):
        values(tmp_path)


def test_files_that_tell_no_split_beside_some_that_do(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", 1)
    write(tmp_path / "train.jsonl", 2)
    assert values(tmp_path) == [1, 2]
    with pytest.raises(ValueError, match=r"to tell its split beside files of train, got 'a\.jsonl'"):
        values(tmp_path, split="test")
    (tmp_path / "train.jsonl").rename(tmp_path / "test.jsonl")
    with pytest.raises(ValueError, match=r"to tell its split beside files of test, got 'a\.jsonl'"):
        values(tmp_path)  # the test examples would be trained on


def test_an_archive_whose_names_tell_splits(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a/train.jsonl", '{"a": 1}')
        archive.writestr("a/test.jsonl", '{"a": 2}')
    assert values(tmp_path / "a.zip", on_skip=Told()) == [1]
    assert values(tmp_path / "a.zip", split="test", on_skip=Told()) == [2]


def saved(path: Path, *numbers: int) -> Path:
    datasets.Dataset.from_list([{"a": number, "b": "x"} for number in numbers]).save_to_disk(str(path))
    return path


def test_folders_of_save_to_disk(tmp_path: Path) -> None:
    path = saved(tmp_path / "one", 1, 2)
    assert list(read_rows(str(path))) == [Row(f"{path}, row {i}", {"a": i, "b": "x"}) for i in (1, 2)]
    assert {file.suffix for file in source_files(str(path))} == {".arrow", ".json"}
    many = datasets.DatasetDict(
        {name: datasets.Dataset.from_list([{"a": i}]) for i, name in enumerate(("train", "test"))}
    )
    many.save_to_disk(str(tmp_path / "many"))
    assert values(tmp_path / "many") == [0]
    assert next(read_rows(str(tmp_path / "many"), split="test")).place == f"{tmp_path}/many (test), row 1"
    with pytest.raises(ValueError, match="expected the split dev, got train, test"):
        values(tmp_path / "many", split="dev")
    write(tmp_path / "more.jsonl", 9)
    assert values(f"{tmp_path}/one,{tmp_path}/more.jsonl") == [1, 2, 9]
    assert values(f"{tmp_path}/[mo][on][re]*") == [9, 1, 2]
    assert values(path / "*.arrow") == [1, 2]
    told = Told()
    assert values(path / "*", on_skip=told) == [1, 2] and len(told) == 2


def test_a_saved_folder_within_a_folder(tmp_path: Path) -> None:
    saved(tmp_path / "z", 1, 2)
    write(tmp_path / "a.jsonl", 9)
    assert values(tmp_path) == [9, 1, 2]
    saved(tmp_path / "split" / "test", 3)
    saved(tmp_path / "split" / "train", 4)
    assert values(tmp_path / "split", on_skip=Told()) == [4]


def test_a_saved_format_leaves_no_column_out(tmp_path: Path) -> None:
    data = datasets.Dataset.from_list([{"a": 1, "b": "x"}])
    data.set_format("numpy", columns=["a"])
    data.save_to_disk(str(tmp_path / "d"))
    assert [record.fields for record in read_rows(str(tmp_path / "d")) if isinstance(record, Row)] == [
        {"a": 1, "b": "x"}
    ]


def test_a_saved_folder_that_was_cut_short_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "d", *range(3000))
    (file,) = path.glob("*.arrow")
    whole = file.read_bytes()
    for cut in [*range(len(whole) - 40, len(whole)), *range(0, len(whole), 1999)]:
        file.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=str(path)):
            values(path)
    file.write_bytes(whole)
    assert values(path) == list(range(3000))
    (path / "state.json").write_text("{")
    with pytest.raises(ValueError, match="expected a folder written by save_to_disk, got"):
        values(path)


def test_an_id_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, dict[str, Any]]] = []
    pulled: list[int] = []

    def rows() -> Any:
        for i in range(1000):
            pulled.append(i)
            yield {"a": i}

    def load_dataset(source: str, **options: Any) -> Any:
        asked.append((source, options))
        return rows() if options.get("streaming") else datasets.Dataset.from_list([{"a": 5}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert list(read_rows("someone/data")) == [Row("someone/data (train), row 1", {"a": 5})]
    found = list(read_rows("data", split="test[:5%]", configuration="small", limit=2, streaming=True))
    assert found == [Row(f"data (small, test[:5%]), row {i}", {"a": i - 1}) for i in (1, 2)]
    assert len(pulled) == 2
    assert asked == [
        ("someone/data", {"split": "train"}),
        ("data", {"split": "test[:5%]", "name": "small", "streaming": True}),
    ]
    assert source_files("someone/data") == []


def test_an_id_that_fails_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(source: str, **options: Any) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", no_network)
    with pytest.raises(
        ValueError, match=r"no such file, and loading it .* failed \(ConnectionError: no network\)"
    ):
        values("someone/data")

    def breaks_off(source: str, **options: Any) -> Any:
        yield {"a": 1}
        raise OSError("gone")

    monkeypatch.setattr(datasets, "load_dataset", breaks_off)
    with pytest.raises(ValueError, match=r"someone/data \(train\): .* got OSError after row 1: gone"):
        values("someone/data", streaming=True)


@pytest.mark.parametrize(
    "source",
    [
        "missing.jsonl",
        "/no/such/place",
        "./x",
        "data/train.jsonl.xz",
        "a/b/c",
        "x" * 5000,
        "a\0b",
        "a b",
        "x.zip",
    ],
)
def test_a_source_that_is_nothing_is_one_clear_error(source: str) -> None:
    with pytest.raises(ValueError, match="no such file, and its name is not one of a datasets id"):
        values(source)


def test_options_that_files_cannot_have(folder: Path) -> None:
    for options, message in (
        ({"configuration": "small"}, "configuration: expected none with files, got 'small'"),
        ({"split": "train[:5%]"}, r"split: expected a split's name with files, got 'train\[:5%\]'"),
        ({"limit": 0}, "limit: expected at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            read_rows(str(folder / "a.jsonl"), **options)  # type: ignore[arg-type]
    assert values(folder / "a.jsonl", split="train", streaming=True, limit=9) == [1]


def test_files_that_cannot_be_opened(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"a\.png: expected a \.json, .* file .*, got 'a\.png'"):
        values(tmp_path / "a.png")
    os.mkfifo(tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match=r"a\.jsonl: expected .*, got 'a\.jsonl'"):
        values(tmp_path / "a.jsonl")

    def denied(*args: Any, **options: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    path = write(tmp_path / "b.jsonl", 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.open", denied)
        with pytest.raises(ValueError, match=r"b\.jsonl: expected a whole .*Permission denied"):
            values(path)


def test_reading_imports_nothing_heavy() -> None:
    code = "import sys, sftmix.data.read; print(sorted({'torch', 'datasets', 'pyarrow', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

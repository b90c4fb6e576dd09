"""Damaged data files at random: nothing but rows, faults and a ``ValueError`` that names the file comes of them.

Small valid files of every form are cut, lengthened, flipped, and pieces of them doubled, deleted, moved and replaced
by what trips readers. What a file without any check of its own then says may be wrong; what a packed file says may
not: it is refused, or its rows are those that it had.
"""

from __future__ import annotations

import json
import random
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

import pytest

from sftmix.data.forms import parse_row
from sftmix.data.read import read_rows
from sftmix.data.rows import Fault, Row, RowError
from sftmix.data.tokenized import TokenizedExample
from sftmix.data.tokens import Encoder, TokenOptions
from tests.recipe import tiny
from tests.recipe.data.test_read import FORMS, PACKERS, ROWS, zipped
from tests.recipe.data.test_read_sources import saved

ENCODER = Encoder(tiny.tokenizer(), TokenOptions(max_length=64))
SECONDS = 5  # a file of a few hundred bytes takes milliseconds
FRAGMENTS = [
    b"\0", b"\n", b"\r", b"\r\n\r\n", b'"', b'""', b"\\", b"\\u", b"\\ud800", b"\\udc00", b"\xff", b"\xed\xa0\x80",
    b"\xef\xbb\xbf", b"\xff\xfe", b"\xc3", "\u2028".encode(), "\U0001f600".encode(), b"[", b"]", b"{", b"}", b",",
    b":", b"[" * 3000, b'{"a":' * 3000, b"9" * 5000, b"-", b"1e999", b"NaN", b"Infinity", b"null", b"\x1a", b"\t",
    b'{"data": [', b'"data": [], ', b"PAR1", b"ARROW1", b"\x1f\x8b", b"\xff\xff\xff\xff", b"\x80\0\0\0", b"\x7f",
]  # fmt: skip
TEXT = "".join(f"{row['prompt']}\n{row['completion']}\n" for row in ROWS).encode()
SEEDS: dict[str, bytes] = {
    **{name: data for name, (data, _) in FORMS.items()},
    "lines.txt": TEXT,
    "messages.jsonl": b'{"messages": [{"role": "user", "content": "a"}, {"role": "x", "content": "b"}]}\n'
    * 3,
    **{f"lines.jsonl{suffix}": pack(FORMS["lines.jsonl"][0] * 3) for suffix, pack in PACKERS.items()},
    **{f"indented.json{suffix}": pack(FORMS["indented.json"][0]) for suffix, pack in PACKERS.items()},
    "rows.parquet.gz": PACKERS[".gz"](FORMS["rows.parquet"][0]),
    "all.zip": zipped({"a.jsonl": FORMS["lines.jsonl"][0], "b.csv": FORMS["table.csv"][0], "c.txt": TEXT}),
}


def mutated(data: bytes, draw: random.Random) -> bytes:
    """One to three damages to a copy of ``data``."""
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        start, end = sorted((draw.randint(0, len(data)), draw.randint(0, len(data))))
        part = data[start:end][: draw.choice((1, 4, 40, 10_000))]
        kind = draw.randrange(8)
        if kind == 0:
            data = data[:start]
        elif kind == 1 and data:
            place = draw.randrange(len(data))
            data = data[:place] + bytes([data[place] ^ 1 << draw.randrange(8)]) + data[place + 1 :]
        elif kind == 2:
            data = data[:start] + draw.randbytes(draw.choice((1, 2, 8))) + data[start:]
        elif kind == 3:
            data = data[:end] + part + data[end:]
        elif kind == 4:
            data = data[:start] + data[start + len(part) :]
        elif kind == 5:
            rest = data[:start] + data[start + len(part) :]
            place = draw.randint(0, len(rest))
            data = rest[:place] + part + rest[place:]
        elif kind == 6:
            data = data[:start] + draw.choice(FRAGMENTS) + data[start:]
        else:
            data = data[:start] + draw.choice(FRAGMENTS) + data[start + len(part) :]
    return data


@contextmanager
def time_limit(what: str) -> Iterator[None]:
    def late(number: int, frame: FrameType | None) -> None:
        pytest.fail(f"{what} takes more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def outcome(path: Path) -> tuple[list[Row | Fault], str]:
    """Records of a damaged file and the text of its error; anything else that it does fails the test."""
    found: list[Row | Fault] = []
    refusal: ValueError | None = None
    try:
        with time_limit(str(path)):
            for record in read_rows(str(path), on_skip=lambda what, why: None):
                found.append(record)
    except ValueError as error:
        refusal = error
    if refusal is None:
        assert found
        return found, ""
    assert type(refusal) is ValueError, repr(refusal)
    assert str(path) in str(refusal)
    assert ": expected " in str(refusal)
    return found, str(refusal)


def check(found: list[Row | Fault], path: Path) -> None:
    places = [record.place for record in found]
    assert len(set(places)) == len(places)
    assert all(place.startswith(str(path)) for place in places)
    for record in found:
        if isinstance(record, Row):
            json.dumps(
                record.fields, default=str, ensure_ascii=False
            ).encode()  # no half of a character, not too deep
        else:
            assert record.kind and record.reason


def to_tokens(found: list[Row | Fault]) -> None:
    """What was read goes all the way: an example's tokens, a fault, or a ``RowError`` that says why not."""
    for record in found:
        if isinstance(record, Row):
            with suppress(RowError):
                ((made, _),) = ENCODER.outcomes([parse_row(record).example])
                assert isinstance(made, (TokenizedExample, Fault))


def check_same(found: list[Row | Fault], whole: list[Row | Fault]) -> None:
    """The packings that check their content let through the rows that were packed, or all of them several times."""
    fields = [record.fields for record in whole if isinstance(record, Row)]
    again = [record.fields for record in found if isinstance(record, Row)]
    assert len(again) == len(found)
    assert again == fields * (len(again) // len(fields))


def fuzz(folder: Path, seed: int, count: int) -> None:
    folder.mkdir(exist_ok=True)
    whole = {}
    for name, data in SEEDS.items():
        (folder / name).write_bytes(data)
        whole[name], error = outcome(folder / name)
        assert not error
        assert all(isinstance(record, Row) for record in whole[name])
    draw = random.Random(seed)
    names = list(SEEDS)
    refused = faults = 0
    for number in range(count):
        name = names[number % len(names)]
        path = folder / name
        data = mutated(SEEDS[name], draw)
        path.write_bytes(data)
        try:
            found, error = outcome(path)
            check(found, path)
            to_tokens(found)
            if name.endswith((".gz", ".xz", ".bz2")) and not error:
                check_same(found, whole[name])
        except BaseException:
            path.with_name(f"failed-{seed}-{number}-{name}").write_bytes(data)
            raise
        refused += bool(error)
        faults += any(isinstance(record, Fault) for record in found)
    assert refused > count / 20  # the damage is real: files are refused, and records are faults
    assert faults > count / 20


@pytest.mark.parametrize("seed", range(2))
def test_damaged_files_are_rows_faults_or_one_error(tmp_path: Path, seed: int) -> None:
    fuzz(tmp_path, seed, 300)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 110))
def test_ten_thousand_damaged_files(tmp_path: Path, seed: int) -> None:
    fuzz(tmp_path, seed, 1000)


@pytest.mark.parametrize("seed", range(2))
def test_a_damaged_folder_of_save_to_disk(tmp_path: Path, seed: int) -> None:
    path = saved(tmp_path / "d", *range(20))
    draw = random.Random(seed)
    files = sorted(path.iterdir())
    refused = 0
    for number in range(60):
        file = files[number % len(files)]
        data = file.read_bytes()
        file.write_bytes(mutated(data, draw))
        found, error = outcome(path)
        check(found, path)
        refused += bool(error)
        file.write_bytes(data)
    assert len(files) == 3 and refused > 20

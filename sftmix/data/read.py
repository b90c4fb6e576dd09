"""From files, folders, archives and ``datasets`` ids to rows, one ``Row`` or one ``Fault`` for each record.

The form is told by a file's suffix, and within ``.json``, ``.jsonl`` and ``.ndjson`` by what is in it. A record that
cannot be read is a ``Fault``, and reading goes on; a file that is damaged, cut short or unknown raises.

Kinds of fault: not JSON, not UTF-8, lone surrogate, repeated key, nested too deeply, number too long (JSON); number
of cells, broken record, NUL character (tables, text); unreadable value (Parquet, Arrow).
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from sftmix.data.columnar_rows import arrow_rows, parquet_rows
from sftmix.data.documents import Said
from sftmix.data.hub import hub_rows, saved_rows
from sftmix.data.json_rows import json_rows
from sftmix.data.packed import READABLE, Piece, file_piece, form_of, zip_members
from sftmix.data.rows import Fault, Row
from sftmix.data.sources import Part, choose, parts_of
from sftmix.data.table_rows import delimited_rows, text_rows


def read_rows(
    source: str,
    *,
    split: str | None = None,
    configuration: str | None = None,
    streaming: bool = False,
    limit: int | None = None,
    on_skip: Said | None = None,
) -> Iterator[Row | Fault]:
    """Every record of ``source``, in order: a ``Row`` with its place, or a ``Fault`` that says why it is none.

    ``source`` is a file, a folder (all data in it), a glob, several of these with commas, a ``save_to_disk``
    folder, or a ``datasets`` id. ``split`` chooses in a DatasetDict and a datasets id, in a folder or archive whose
    file names tell several splits, and in a JSON object that holds several; None is train where there are several.
    ``configuration`` and ``streaming`` are a datasets id's. ``limit`` ends after so many records, faults included.
    ``on_skip(what, why)`` is told of each file or key that is passed over; without it, each is a warning.

    Raises ``ValueError``, at once for a source that is not there or not known, and while it is read for a file
    that is empty, damaged or cut short, and for a source without any record.
    """
    said = _warn if on_skip is None else on_skip
    parts = parts_of(source, split, said)
    on_disk = [part.name for part in parts if part.kind != "hub"]
    if on_disk and configuration is not None:
        raise ValueError(f"configuration: expected none with files, got {configuration!r} with {on_disk[0]}")
    if on_disk and split is not None and not re.fullmatch(r"[\w.-]+", split):
        raise ValueError(f"split: expected a split's name with files, got {split!r} with {on_disk[0]}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit: expected at least 1, got {limit}")
    records = _records(parts, source, said, split=split, configuration=configuration, streaming=streaming)
    return islice(records, limit)


def source_files(source: str, *, split: str | None = None) -> list[Path]:
    """The files that ``source`` names, in the order they are read; none for a ``datasets`` id.

    Of a ``save_to_disk`` folder it is all of its files. Raises ``ValueError`` as ``read_rows`` does.
    """
    files: list[Path] = []
    for part in parts_of(source, split, lambda what, why: None):
        if part.kind == "file":
            files.append(part.path)
        elif part.kind == "saved":
            files += sorted(path for path in part.path.rglob("*") if path.is_file())
    return files


def _records(
    parts: list[Part],
    source: str,
    said: Said,
    *,
    split: str | None,
    configuration: str | None,
    streaming: bool,
) -> Iterator[Row | Fault]:
    empty = True
    for part in parts:
        if part.kind == "hub":
            records = hub_rows(part.name, split, configuration, streaming=streaming)
        elif part.kind == "saved":
            records = saved_rows(part.path, split)
        elif form_of(part.name)[1] == ".zip":
            records = _zip_records(part.path, split, said)
        else:
            records = _piece_records(file_piece(part.path), split, said)
        for record in records:
            empty = False
            yield record
    if empty:
        raise ValueError(f"{source}: expected at least one row, got none")


def _zip_records(path: Path, split: str | None, said: Said) -> Iterator[Row | Fault]:
    with zip_members(path) as (names, piece):
        chosen = choose([name for name in names if not name.endswith(".zip")], split, str(path), said)
        inner = [name for name in names if name.endswith(".zip")]
        if inner or not chosen:
            raise ValueError(
                f"{path}: expected {READABLE} in the archive, got {inner[0] if inner else 'none'}"
            )
        for name in chosen:
            yield from _piece_records(piece(name), split, said)


def _piece_records(piece: Piece, split: str | None, said: Said) -> Iterator[Row | Fault]:
    columnar = piece.form in (".parquet", ".arrow", ".feather")
    with piece.open(text=not columnar) as stream:
        if piece.form == ".parquet":
            yield from parquet_rows(stream, piece)
        elif columnar:
            yield from arrow_rows(stream, piece)
        elif piece.form in (".csv", ".tsv"):
            yield from delimited_rows(stream, piece)
        elif piece.form in (".txt", ".text"):
            yield from text_rows(stream, piece)
        else:
            yield from json_rows(stream, piece, split, said)


def _warn(what: str, why: str) -> None:
    warnings.warn(f"{what} is not read: {why}", stacklevel=2)

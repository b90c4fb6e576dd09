"""Rows of Parquet and Arrow files, numbered from 1; Arrow files may be IPC files (Feather) or streams."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sftmix.data.packed import READ_ERRORS, Piece
from sftmix.data.rows import Fault, Row

_BATCH = 512  # rows turned into Python objects at a time
_STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"
_OLD_STREAM_END = b"\0\0\0\0"  # before Arrow 0.15, when a message did not begin with ff ff ff ff either


def parquet_rows(stream: io.BufferedReader, piece: Piece) -> Iterator[Row | Fault]:
    """Rows of a Parquet file, batch by batch. Raises ``ValueError`` for a damaged one or two columns of one name."""
    import pyarrow.parquet as pq

    with _errors(piece), pq.ParquetFile(_seekable(stream, piece)) as file:
        _check_names(file.schema_arrow, piece.name)
        yield from _rows(file.iter_batches(batch_size=_BATCH), piece.name)


def arrow_rows(stream: io.BufferedReader, piece: Piece) -> Iterator[Row | Fault]:
    """Rows of an Arrow IPC file or stream, batch by batch.

    Raises ``ValueError`` for a damaged file, two columns of one name, and for a stream without its end mark or
    with anything after it: such a file was cut short, or is several.
    """
    import pyarrow as pa

    with _errors(piece):
        source = _seekable(stream, piece)
        if source.read(6) == b"ARROW1":
            with pa.ipc.open_file(source) as reader:
                _check_names(reader.schema, piece.name)
                batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
                yield from _rows(_checked(batches), piece.name)
            return
        source.seek(0)
        with pa.ipc.open_stream(source) as reader:
            _check_names(reader.schema, piece.name)
            yield from _rows(_checked(reader), piece.name)
            _check_end(source, piece.name)


def check_stream(path: str) -> None:
    """Raise ``ValueError`` unless this file is a whole Arrow stream; its columns are looked at, not converted."""
    import pyarrow as pa

    piece = Piece(path, ".arrow", None, lambda: open(path, "rb"))
    with _errors(piece), pa.memory_map(path) as source, pa.ipc.open_stream(source) as reader:
        for _ in _checked(reader):
            pass
        _check_end(source, path)


def _seekable(stream: io.BufferedReader, piece: Piece) -> Any:
    """The file mapped, or, unpacked into memory, all of it: these formats are read from their end."""
    import pyarrow as pa

    if piece.packing is None:
        return pa.memory_map(stream.name)  # a damaged size asks for bytes that are not there, not for memory
    try:
        return pa.BufferReader(stream.read())
    except READ_ERRORS as error:
        raise piece.damage(error) from error


@contextmanager
def _errors(piece: Piece) -> Iterator[None]:
    """Whatever a damaged file makes the library raise, as one ``ValueError`` that names it."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, *READ_ERRORS) as error:
        if type(error) is ValueError:
            raise
        form = "Parquet" if piece.form == ".parquet" else "Arrow"
        reason = str(error) or type(error).__name__
        raise ValueError(f"{piece.name}: expected a whole {form} file, got {reason}") from error


def _check_names(schema: Any, name: str) -> None:
    """A dict would keep only the last of two columns of one name."""
    todo = [(schema.names, [schema.field(i).type for i in range(len(schema.names))])]
    while todo:
        names, kinds = todo.pop()
        for column in names:
            if names.count(column) > 1:
                raise ValueError(f"{name}: expected columns of different names, got {column!r} twice")
        for kind in kinds:
            inner = [kind.field(i) for i in range(kind.num_fields)]
            todo.append(
                ([field.name for field in inner] if _is_struct(kind) else [], [f.type for f in inner])
            )


def _is_struct(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_struct(kind))


def _checked(batches: Any) -> Iterator[Any]:
    """Batches whose offsets and text have been looked at, since a damaged one would read memory that is not its."""
    for batch in batches:
        batch.validate(full=True)
        yield batch


def _rows(batches: Any, name: str) -> Iterator[Row | Fault]:
    number = 0
    for batch in batches:
        for start in range(0, batch.num_rows, _BATCH):
            part = batch.slice(start, _BATCH)
            try:
                rows = part.to_pylist()
            except Exception:  # one value that Python has no object for: found below
                rows = None
            for i in range(part.num_rows):
                number += 1
                place = f"{name}, row {number}"
                if rows is not None:
                    yield Row(place, rows[i])
                    continue
                try:
                    yield Row(place, part.slice(i, 1).to_pylist()[0])
                except (
                    Exception
                ) as error:  # dates out of range, bytes that are not UTF-8, unknown time zones …
                    reason = f"expected values that Python can hold, got {type(error).__name__}: {error}"
                    yield Fault(place, "unreadable value", reason)


def _check_end(source: Any, name: str) -> None:
    end = source.tell()
    source.seek(0, 2)
    size = source.tell()
    source.seek(0)
    is_old = source.read(4) != _STREAM_END[:4]
    source.seek(max(0, end - 8))
    last = source.read(min(8, end))
    if size != end:
        raise ValueError(f"{name}: expected nothing after the Arrow stream's end, got {size - end} bytes")
    if last != _STREAM_END and not (is_old and last.endswith(_OLD_STREAM_END)):
        raise ValueError(f"{name}: expected a whole Arrow stream, got one without its end mark")

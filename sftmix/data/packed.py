"""Opening a data file: its form by its suffix, unpacking that never ends early unnoticed, members of a zip archive.

A ``Piece`` is one stream of records: a file, packed or not, or one member of a zip archive.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

FORMS = (
    ".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow", ".feather", ".txt", ".text",
)  # fmt: skip
PACKINGS = (".gz", ".xz", ".bz2", ".zst")
READABLE = f"a {', '.join(FORMS)} file (also {', '.join(PACKINGS)}, .zip)"
# Whatever a damaged file, packed or not, makes the libraries raise while its bytes are read: many more than they say.
READ_ERRORS = (
    EOFError, OSError, lzma.LZMAError, zlib.error, zipfile.BadZipFile, zipfile.LargeZipFile, RuntimeError,
    ValueError, OverflowError, IndexError, KeyError, MemoryError,
)  # fmt: skip
_CHUNK = 1 << 20
# What a file holds that is no text, whatever its suffix says.
_MAGIC = {
    b"\x1f\x8b": "gzip data (name it .gz)",
    b"BZh": "bzip2 data (name it .bz2)",
    b"\xfd7zXZ\x00": "xz data (name it .xz)",
    b"\x28\xb5\x2f\xfd": "Zstandard data (name it .zst)",
    b"PK\x03\x04": "a zip archive (name it .zip)",
    b"PAR1": "a Parquet file (name it .parquet)",
    b"ARROW1": "an Arrow file (name it .arrow)",
}
_POINTER = b"version https://git-lfs.github.com/spec/"


@dataclass(frozen=True)
class Piece:
    """One stream of records; ``name`` begins the place of each, ``form`` is one of ``FORMS``."""

    name: str
    form: str
    packing: str | None
    opener: Callable[[], Any]

    def damage(self, error: BaseException, where: str = "") -> ValueError:
        """The one error for bytes that are missing, damaged or forbidden; ``where`` is ``", line 3"`` or empty."""
        whole = f"whole {self.packing or self.form} file"
        reason = str(error) or type(error).__name__
        return ValueError(f"{self.name}{where}: expected a {whole}, got damaged or missing data ({reason})")

    @contextmanager
    def open(self, *, text: bool = True) -> Iterator[io.BufferedReader]:
        """The unpacked bytes; raises ``ValueError`` for an empty file, a Git LFS pointer, and for no text."""
        try:
            raw = self.opener()
        except (*READ_ERRORS, NotImplementedError) as error:
            raise self.damage(error) from error
        with raw, io.BufferedReader(raw, _CHUNK) as stream:
            try:
                head = stream.peek(64)[:64]
            except READ_ERRORS as error:
                raise self.damage(error, ", line 1" if text else "") from error
            if not head:
                raise ValueError(f"{self.name}: expected data, got an empty file")
            if head.startswith(_POINTER):
                raise ValueError(
                    f"{self.name}: expected data, got a Git LFS pointer to it; `git lfs pull` fetches the file"
                )
            if text:
                for magic, what in _MAGIC.items():
                    if head.startswith(magic):
                        raise ValueError(f"{self.name}: expected text, got {what}")
            yield stream


def form_of(name: str) -> tuple[str | None, str | None]:
    """(form, packing) that a file's name tells; a form of None: unknown. A zip archive's packing is ``.zip``."""
    suffixes = [suffix.lower() for suffix in PurePosixPath(name).suffixes]
    packing = suffixes.pop() if suffixes and suffixes[-1] in (*PACKINGS, ".zip") else None
    form = suffixes[-1] if suffixes and suffixes[-1] in FORMS else None
    return form, packing


def is_data(name: str) -> bool:
    """Whether a file of this name is read: a known form, or a zip archive of whatever is inside."""
    form, packing = form_of(name)
    return form is not None or packing == ".zip"


def file_piece(path: Path) -> Piece:
    """The piece of a file that is no zip archive; raises ``ValueError`` for an unknown suffix or no file."""
    form, packing = form_of(path.name)
    if form is None or packing == ".zip" or not path.is_file():
        kind = "a folder" if path.is_dir() else repr(path.name) if path.exists() else "no such file"
        raise ValueError(f"{path}: expected {READABLE}, got {kind}")
    return Piece(str(path), form, packing, lambda: _unpacked(open(path, "rb"), packing))


@contextmanager
def zip_members(path: Path) -> Iterator[tuple[list[str], Callable[[str], Piece]]]:
    """Names of an archive's files, in its order, and what makes a piece of one.

    Raises ``ValueError`` for an archive that is damaged, or that holds two files of one name.
    """
    try:
        archive = zipfile.ZipFile(path)
        names = [member.filename for member in archive.infolist() if not member.filename.endswith("/")]
    except READ_ERRORS as error:
        raise ValueError(
            f"{path}: expected a whole .zip file, got damaged or missing data ({error})"
        ) from error
    with archive:
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"{path}: expected files of different names, got {twice!r} twice")

        def piece(name: str) -> Piece:
            form, packing = form_of(name)
            assert form is not None, name
            return Piece(
                f"{path}, {name}", form, packing or ".zip", lambda: _unpacked(archive.open(name), packing)
            )

        yield names, piece


def _unpacked(file: Any, packing: str | None) -> Any:
    if packing == ".gz":
        return _Closing(gzip.GzipFile(fileobj=file), file)
    if packing == ".zst":
        import pyarrow as pa

        return _Closing(pa.CompressedInputStream(pa.PythonFile(file, mode="r"), "zstd"), file)
    if packing is not None:
        return _Unpacker(file, bz2.BZ2Decompressor if packing == ".bz2" else lzma.LZMADecompressor)
    return file


class _Closing(io.RawIOBase):
    """A reader that closes the file below it too."""

    def __init__(self, reader: Any, file: BinaryIO) -> None:
        self._reader, self._file = reader, file

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._reader.read1(len(buffer))  # what is there, up to the very byte where a damaged file ends
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._reader.close()
            self._file.close()
        super().close()


class _Unpacker(io.RawIOBase):
    """bzip2 and xz streams, one after another, to the file's very end.

    Python's own ``BZ2File`` and ``LZMAFile`` take bytes after the first stream that they cannot read for padding,
    and end there: a damaged second stream would be rows lost without a word.
    """

    def __init__(self, file: BinaryIO, make: Callable[[], Any]) -> None:
        self._file, self._make = file, make
        self._decompressor: Any = make()
        self._rest = b""  # read from the file and not yet given to the decompressor
        self._begun = False  # whether the present stream has taken any byte

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            if self._decompressor.eof:
                self._rest = self._decompressor.unused_data
                self._decompressor, self._begun = self._make(), False
            if not self._rest and self._decompressor.needs_input:
                self._rest = self._file.read(_CHUNK)
                if not self._rest:
                    if self._begun:
                        raise EOFError("the file ends before its end mark")
                    return 0
            if not self._begun and self._make is lzma.LZMADecompressor:
                self._rest = self._rest.lstrip(b"\0")  # the padding that the xz format allows between streams
                if not self._rest:
                    continue
            self._begun = True
            data, self._rest = self._decompressor.decompress(self._rest, len(buffer)), b""
            if data:
                buffer[: len(data)] = data
                return len(data)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()

"""Rows of delimited tables (CSV, TSV) and of plain text, each with the line where it starts.

Cells are text, as they stand: ``NA``, ``null`` and ``007`` mean nothing else. A text file gives one row per line,
``{"text": line}``; lines without any text are passed over, as the ``datasets`` library does.
"""

from __future__ import annotations

import csv
import io
from collections import Counter, deque
from collections.abc import Iterator

from sftmix.data.packed import Piece
from sftmix.data.rows import Fault, Row, RowError
from sftmix.data.text_lines import decoded_lines

_LARGEST_CELL = 2**31 - 1  # characters; the module's own limit is 131,072


def text_rows(stream: io.BufferedReader, piece: Piece) -> Iterator[Row | Fault]:
    """One row per line that is not blank, without its line end."""
    for number, text, bad in decoded_lines(stream, piece, universal=True):
        place = f"{piece.name}, line {number}"
        if bad:
            yield Fault(place, "not UTF-8", bad)
        elif "\0" in text:
            yield Fault(place, "NUL character", "expected text, got a NUL character")
        elif text.strip():
            yield Row(place, {"text": text.rstrip("\r\n")})


def delimited_rows(stream: io.BufferedReader, piece: Piece) -> Iterator[Row | Fault]:
    """One row per record after the header, a dict of texts; a broken record is a ``Fault`` for each of its lines.

    The delimiter is a tab in a ``.tsv`` file; in a ``.csv`` file a comma, or else whichever of ``;`` and tab a
    header without any comma has. Spaces after a delimiter belong to no cell where each one in the header has one
    (``a, b``), else a quote after them would be part of the text. Empty names in the header become
    ``Unnamed: 0``, … by their column.
    Raises ``ValueError`` for a file without header, for two columns of one name, and for a quote that opens and
    never closes, since any number of records may be in it.
    """
    csv.field_size_limit(max(csv.field_size_limit(), _LARGEST_CELL))
    feed = _Feed(decoded_lines(stream, piece, universal=True))
    header = feed.first_line()
    sign = _delimiter(header, piece)
    spaced = 0 < header.count(sign) == header.count(f"{sign} ")
    records = csv.reader(feed, delimiter=sign, skipinitialspace=spaced, strict=True)
    names: list[str] = []
    while True:
        first, feed.problem = feed.number + 1, None
        place = f"{piece.name}, line {first}"
        try:
            cells = next(records)
            if feed.problem:
                raise RowError(*feed.problem)
            if names and cells:
                yield Row(place, _fields(names, cells, feed.number - first))
            elif any(cell.strip() for cell in cells):
                names = _names(cells, place)
        except StopIteration:
            break
        except RowError as error:
            if not names:
                raise ValueError(f"{place}: {error}") from None
            yield Fault(place, error.kind, str(error))
        except csv.Error as error:
            if feed.ended:
                reason = f"expected each quote to close, got the end of the file in the record ({error})"
                raise ValueError(f"{place}: {reason}") from None
            if not names:
                raise ValueError(f"{place}: expected a header, got {error}") from None
            kind, reason = feed.problem or ("broken record", f"expected delimited cells, got {error}")
            yield Fault(place, kind, reason)
            for number in range(first + 1, feed.number + 1):
                yield Fault(
                    f"{piece.name}, line {number}", kind, f"part of the record of line {first}: {reason}"
                )
    if not names:
        raise ValueError(f"{piece.name}: expected a header, got blank lines only")


class _Feed:
    """Lines for the ``csv`` module, counted; ``problem`` is what is wrong with one since it was last cleared."""

    def __init__(self, lines: Iterator[tuple[int, str, str | None]]) -> None:
        self._lines = lines
        self._held: deque[tuple[int, str, str | None]] = deque()
        self.number = 0
        self.ended = False
        self.problem: tuple[str, str] | None = None

    def first_line(self) -> str:
        """The first line that is not blank, which is still to come."""
        for line in self._lines:
            self._held.append(line)
            if line[1].strip():
                return line[1]
        return ""

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._held.popleft() if self._held else next(self._lines, None)
        if line is None:
            self.ended = True
            raise StopIteration
        self.number, text, bad = line
        if bad:
            self.problem = ("not UTF-8", bad)
        elif "\0" in text:
            self.problem = ("NUL character", "expected text, got a NUL character")
        return text


def _delimiter(header: str, piece: Piece) -> str:
    if piece.form == ".tsv":
        return "\t"
    return next((sign for sign in (",", ";", "\t") if sign in header), ",")


def _names(cells: list[str], place: str) -> list[str]:
    names = [cell.strip() or f"Unnamed: {i}" for i, cell in enumerate(cells)]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ValueError(f"{place}: expected columns of different names, got {twice[0]!r} twice")
    return names


def _fields(names: list[str], cells: list[str], more_lines: int) -> dict[str, str]:
    if len(cells) != len(names):
        lines = f" (in {more_lines + 1} lines)" if more_lines else ""
        raise RowError("number of cells", f"expected {len(names)} cells, got {len(cells)}{lines}")
    return dict(zip(names, cells, strict=True))

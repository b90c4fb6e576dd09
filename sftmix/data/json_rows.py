"""Rows of JSON: lines, an array, one object that holds the rows, columns, objects one after another.

Which of them a file is, its first characters tell: ``[`` begins an array; ``{`` begins lines where the first line is
a whole object and another line follows, else a document. Lines and arrays stream; a document of one object is held.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from itertools import chain

from sftmix.data.documents import Said, rows_of_document
from sftmix.data.json_values import (
    SPACE,
    JsonDecoder,
    JsonError,
    check_depth,
    check_keys,
    check_line_depth,
    check_surrogates,
)
from sftmix.data.json_window import NOT_SPACE, TextWindow
from sftmix.data.packed import Piece
from sftmix.data.rows import Fault, Row, RowError
from sftmix.data.text_lines import decoded_chunks, decoded_lines

_BEFORE = b"\xef\xbb\xbf\xff\xfe\0 \t\r\n"  # marks of byte order, and spaces of either encoding
_ENDS = ("\n", "\r\n", "")


def json_rows(
    stream: io.BufferedReader, piece: Piece, split: str | None, said: Said
) -> Iterator[Row | Fault]:
    """Rows of a JSON file of any shape, and a ``Fault`` for each record that cannot be one.

    Raises ``ValueError`` for a file without any value, an array or object that is cut short, and for a broken
    item after which the next one cannot be found.
    """
    if stream.peek(1).lstrip(_BEFORE)[:1] == b"[":  # perhaps all on one line, which is not held whole
        yield from _array(TextWindow(decoded_chunks(stream, piece)), piece)
        return
    lines = decoded_lines(stream, piece)
    head: list[tuple[int, str, str | None]] = []  # up to the second line that is not blank
    filled = 0
    for line in lines:
        head.append(line)
        text = line[1].lstrip(SPACE)
        filled += bool(text)
        if text[:1] == "[" or filled == 2:
            break
    shape = _shape([text for _, text, _ in head], lines_only=piece.form != ".json")
    if shape == "empty":
        raise ValueError(f"{piece.name}: expected rows, got blank lines only")
    if shape == "lines":
        yield from _lines(chain(head, lines), piece)
        return
    window = TextWindow(text for _, text, _ in chain(head, lines))
    if shape == "array":
        yield from _array(window, piece)
    else:
        yield from _document(window, piece, split, said)


def _shape(head: list[str], *, lines_only: bool) -> str:
    """``lines``, ``array``, ``document`` or ``empty``, of the lines up to the second one that is not blank."""
    first, second = ([text for text in head if text.strip(SPACE)] + ["", ""])[:2]
    if not first:
        return "empty"
    if first.lstrip(SPACE)[0] == "[":
        return "array"
    if first.lstrip(SPACE)[0] != "{":
        return "lines"
    first_is = _wholeness(first)
    if first_is == "whole":
        return "lines" if second or lines_only else "document"
    if not second:
        return "lines" if lines_only else "document"
    # A first line that is broken, or the beginning of an object that is printed over several lines.
    if first_is == "broken" and second.lstrip(SPACE)[0] == "{" and _wholeness(second) != "open":
        return "lines"
    return "document"


def _wholeness(line: str) -> str:
    """``whole`` for a line of one value, ``open`` for one that ends where a value has to follow, else ``broken``."""
    line = line.strip(SPACE)
    try:
        check_line_depth(line)
        return "whole" if JsonDecoder().decode(line)[1] == len(line) else "broken"
    except JsonError as error:
        return "open" if error.position >= len(line) and line[-1] in "{[,:" else "broken"
    except RowError:
        return "whole"


def _lines(lines: Iterator[tuple[int, str, str | None]], piece: Piece) -> Iterator[Row | Fault]:
    """One value a line; blank lines are passed over."""
    decoder = JsonDecoder()
    for number, text, bad in lines:
        place = f"{piece.name}, line {number}"
        try:
            if bad:
                raise RowError("not UTF-8", bad)
            start = 0
            if text[:1] in SPACE:  # the empty string too
                start = len(text) - len(text.lstrip(SPACE))
                if start == len(text):
                    continue
            check_line_depth(text)
            value, end = decoder.decode(text, start)
            if text[end:] not in _ENDS and (rest := NOT_SPACE.search(text, end)):
                raise JsonError("Extra data", text, 0, rest.start())
            decoder.check(value, text, 0, end)
        except RowError as error:
            yield Fault(place, error.kind, str(error))
        else:
            yield Row(place, value)


def _array(window: TextWindow, piece: Piece) -> Iterator[Row | Fault]:
    """The items of one array, one decoded at a time."""
    decoder = JsonDecoder()
    window.next()
    window.position += 1
    item = 0
    first = window.next()
    if first == "]":
        window.position += 1
    while first != "]":
        item += 1
        place = f"{piece.name}, item {item}, line {window.line()}"
        try:
            yield Row(place, window.value(decoder, ",]"))
        except RowError as error:
            yield Fault(place, error.kind, str(error))
            broken = _is_broken(error)
            if not window.pass_over(broken=broken, closer="]"):
                if broken and window.text.rstrip(SPACE).endswith("]"):
                    raise ValueError(f"{place}: {error}; where the next item begins cannot be told") from None
                raise ValueError(
                    f"{place}: expected a whole array, got one without its end ({error})"
                ) from None
        after = window.next()
        place = f"{piece.name}, after item {item}, line {window.line()}"
        if after in (",", "]"):
            window.position += 1
            if after == "]":
                break
            window.next()
        elif not after:
            raise ValueError(f"{place}: expected a whole array, got one without its end")
        elif not window.found_next:
            raise ValueError(f"{place}: expected a comma or the end of the array, got {after!r}")
    if after := window.next():
        raise ValueError(
            f"{piece.name}, line {window.line()}: expected nothing after the array, got {after!r}"
        )


def _document(window: TextWindow, piece: Piece, split: str | None, said: Said) -> Iterator[Row | Fault]:
    """Objects printed over several lines, one after another; or only one, which may hold the rows."""
    decoder = JsonDecoder()
    count = 0
    first: Row | None = None  # until it is known whether it is the only one
    first_is_suspect = False
    while begin := window.next():
        count += 1
        place = f"{piece.name}, object {count}, line {window.line()}"
        if begin != "{":
            raise ValueError(f"{place}: expected nothing but objects one after another, got {begin!r}")
        if first:
            yield _checked(first, first_is_suspect, window)
            first = None
        try:
            row = Row(place, window.value(decoder, "", checked=False))
        except RowError as error:
            found = window.pass_over(broken=_is_broken(error), closer="")
            if not found or (count == 1 and not window.next()):
                raise ValueError(f"{place}: {error}; where the next object begins cannot be told") from None
            yield Fault(place, error.kind, str(error))
        else:
            if count == 1:
                first, first_is_suspect = row, window.is_suspect
            else:
                yield _checked(row, window.is_suspect, window)
    if first:
        for row in rows_of_document(first, piece.name, split, said):
            yield _checked(row, first_is_suspect, window)


def _is_broken(error: RowError) -> bool:
    """Whether a value's brackets may not tell its end; too many that are open may be those of several values."""
    return isinstance(error, JsonError) or error.kind == "nested too deeply"


def _checked(row: Row, is_suspect: bool, window: TextWindow) -> Row | Fault:
    try:
        if is_suspect:
            check_keys(row.fields)
            check_depth(row.fields)
            check_surrogates(row.fields, bad_bytes=window.has_bad_bytes)
    except RowError as error:
        return Fault(row.place, error.kind, str(error))
    return row

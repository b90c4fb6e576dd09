"""Text of a data file: its encoding by the byte order mark, its lines and its chunks.

UTF-8, with a mark or without, and UTF-16 with one are read. A line ends at a newline, never at U+2028 or the like,
which may stand inside a JSON string.
"""

from __future__ import annotations

import io
from collections.abc import Iterator

from sftmix.data.packed import READ_ERRORS, Piece

_CHUNK = 1 << 20


def decoded_lines(
    stream: io.BufferedReader, piece: Piece, *, universal: bool = False
) -> Iterator[tuple[int, str, str | None]]:
    r"""(number, line with its end, what is wrong with its bytes or None) of each line, from 1.

    Bytes that are not UTF-8 come as lone surrogates, so that the line can still be divided. With ``universal`` a
    line also ends at ``\r``. Raises ``ValueError`` where the file itself breaks off or is not UTF-16 as it says.
    """
    number, wide = 0, _encoding(stream, piece) == "utf-16"
    try:
        if wide:
            text = io.TextIOWrapper(stream, encoding="utf-16", newline="" if universal else "\n")
            for number, line in enumerate(text, 1):
                yield number, line, None
            return
        for raw in stream:
            for part in raw.splitlines(keepends=True) if universal and b"\r" in raw else (raw,):
                number += 1
                try:
                    yield number, part.decode("utf-8-sig" if number == 1 else "utf-8"), None
                except UnicodeDecodeError as error:
                    yield number, part.decode("utf-8", "surrogateescape"), _bytes_reason(error)
    except UnicodeDecodeError as error:
        raise ValueError(f"{piece.name}, after line {number}: expected UTF-16, got {error.reason}") from error
    except READ_ERRORS as error:
        raise _breaks_off(error, piece, number + 1) from error


def decoded_chunks(stream: io.BufferedReader, piece: Piece) -> Iterator[str]:
    """The same text, about a million characters at a time; bytes that are not UTF-8 come as lone surrogates."""
    lines, wide = 1, _encoding(stream, piece) == "utf-16"
    try:
        encoding, errors = ("utf-16", "strict") if wide else ("utf-8-sig", "surrogateescape")
        text = io.TextIOWrapper(stream, encoding=encoding, errors=errors, newline="")
        while chunk := text.read(_CHUNK):
            yield chunk
            lines += chunk.count("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{piece.name}, after line {lines}: expected UTF-16, got {error.reason}") from error
    except READ_ERRORS as error:
        raise _breaks_off(error, piece, lines) from error


def bad_bytes(text: str) -> str | None:
    """What is wrong with text that came of bytes that are not UTF-8, or None; no JSON escape makes one of these."""
    if text.isascii():
        return None
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"expected UTF-8, got byte 0x{ord(text[error.start]) - 0xDC00:02x}"
    return None


def _bytes_reason(error: UnicodeDecodeError) -> str:
    return f"expected UTF-8, got {error.reason} (byte 0x{error.object[error.start]:02x} at {error.start + 1})"


def _breaks_off(error: BaseException, piece: Piece, line: int) -> ValueError:
    return piece.damage(error, f", line {line}")


def _encoding(stream: io.BufferedReader, piece: Piece) -> str:
    head = stream.peek(4)[:4]
    if head in (b"\xff\xfe\0\0", b"\0\0\xfe\xff"):
        raise ValueError(f"{piece.name}: expected UTF-8 or UTF-16 text, got UTF-32")
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return "utf-16"
    nul = [byte == 0 for byte in head]
    if nul in ([False, True] * 2, [True, False] * 2):
        raise ValueError(
            f"{piece.name}: expected UTF-8, got what looks like UTF-16 without its byte order mark"
        )
    return "utf-8"

"""JSON values checked as they are decoded: repeated keys, lone surrogates, depth, numbers that Python refuses.

``NaN``, which Python and pandas write for a missing value, is read as null; JSON itself has no such word.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from sftmix.data.rows import RowError

# Deeper values make the recursive code after this one (templates, copies, json itself) overflow.
MAX_DEPTH = 100
# So many brackets could, on a small stack, overflow the decoder itself, which counts on a large one: they are looked
# at before it is called.
_MANY_BRACKETS = 1000
_BLOCK = 4096
SPACE = " \t\r\n"
# A string, or a bracket: enough to find where a value ends, whatever its numbers and keys are.
_TOKEN = re.compile(r'"[^"\\\n]*(?:\\.[^"\\\n]*)*("?)|[\[\]{}]')


class JsonDecoder:
    """Decodes one value at a time and raises ``RowError`` for what is JSON and cannot be a row all the same."""

    def __init__(self) -> None:
        self._repeated = False
        decoder = json.JSONDecoder(object_pairs_hook=self._object, parse_constant=_constant)
        self._scan: Any = decoder.scan_once  # type: ignore[attr-defined]  # C code; raw_decode adds a Python call

    def decode(self, text: str, start: int = 0) -> tuple[Any, int]:
        """(value, where it ends) of the value that begins at ``text[start]``.

        Raises ``JsonError``, and ``RowError`` for depth and numbers that Python does not decode.
        """
        self._repeated = False
        try:
            value, end = self._scan(text, start)
        except StopIteration as stop:
            raise JsonError("Expecting value", text, start, stop.value) from None
        except json.JSONDecodeError as error:
            raise JsonError(error.msg, text, start, error.pos) from None
        except RecursionError:
            raise _too_deep() from None
        except ValueError:  # int() refuses more, since its time is quadratic
            reason = "expected a number of at most 4,300 digits, got more"
            raise RowError("number too long", reason) from None
        return value, end

    def is_suspect(self, text: str, start: int, end: int) -> bool:
        """Whether the value last decoded, of this text, has to be looked through."""
        return (
            bool(self._repeated) or _may_have_surrogates(text, start, end) or _may_be_deep(text, start, end)
        )

    def check(self, value: Any, text: str, start: int, end: int) -> None:
        """Raise ``RowError`` for what no row may have in the value last decoded; looked for where it can be."""
        if self._repeated:
            check_keys(value)
        if _may_have_surrogates(text, start, end):
            check_surrogates(value)
        if _may_be_deep(text, start, end):
            check_depth(value)

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if len(fields) == len(pairs):
            return fields
        self._repeated = True
        return Repeated(pairs)


class Repeated(dict[str, Any]):
    """An object in which a key is repeated; ``key`` is the first."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        names = [name for name, _ in pairs]
        self.key = next(name for i, name in enumerate(names) if name in names[:i])


class JsonError(RowError):
    """Text that is not JSON; ``position`` is where in the text."""

    def __init__(self, message: str, text: str, start: int, position: int) -> None:
        got = repr(text[position : position + 20]) if position < len(text) else "its end"
        line = text.count("\n", start, position) + 1
        column = position - (text.rfind("\n", 0, position) if line > 1 else start - 1)
        where = f"column {column}" if line == 1 else f"column {column} of its line {line}"
        super().__init__(
            "not JSON", f"expected JSON, got text that does not parse ({message}, {where}: {got})"
        )
        self.message, self.position = message, position

    def is_final(self, length: int) -> bool:
        """Whether more text after the ``length`` characters that there are could not mend it."""
        return not self.message.startswith("Unterminated string") and self.position < length - 16


def value_end(text: str, start: int) -> int | None:
    """Where the object or list that begins at ``text[start]`` ends, by its brackets; None: not in this text."""
    if text[start : start + 1] not in ("{", "["):
        return None
    depth = 0
    for token in _TOKEN.finditer(text, start):
        first = token[0][0]
        if first == '"':
            if not token[1]:
                return None
        elif first in "[{":
            depth += 1
        else:
            depth -= 1
            if depth == 0:
                return token.end()
    return None


def check_line_depth(line: str) -> None:
    """Raise ``RowError`` for one line that is nested so deep that decoding it might be dangerous."""
    if line.count("[") + line.count("{") > _MANY_BRACKETS:
        check_text_depth(line, 0)


def check_text_depth(text: str, start: int) -> None:
    """Raise ``RowError`` when the value that begins at ``text[start]`` is nested too deeply, told by its brackets."""
    depth = 0
    for token in _TOKEN.finditer(text, start):
        first = token[0][0]
        if first == '"':
            if not token[1]:
                return
        elif first in "[{":
            depth += 1
            if depth > MAX_DEPTH:
                raise _too_deep()
        else:
            depth -= 1
            if depth <= 0:
                return


def has_many_brackets(text: str) -> bool:
    """Whether more brackets than are safe could be open at any place of a long text, whatever they belong to."""
    depth = 0
    for start in range(0, len(text), _BLOCK):
        end = start + _BLOCK
        opened = text.count("[", start, end) + text.count("{", start, end)
        if depth + opened > _MANY_BRACKETS:
            return True
        depth = max(0, depth + opened - text.count("]", start, end) - text.count("}", start, end))
    return False


def check_keys(value: Any) -> None:
    """Raise ``RowError`` for a key that an object in ``value`` has twice, the first one's value being lost."""
    level = [value]
    while level:
        for node in level:
            if isinstance(node, Repeated):
                raise RowError(
                    "repeated key", f"expected each key of an object once, got {node.key!r:.80} again"
                )
        level = _inner(level)


def check_surrogates(value: Any, *, bad_bytes: bool = False) -> None:
    """Raise ``RowError`` naming the first field whose text, or whose own name, has half of a surrogate pair.

    ``bad_bytes``: the text was decoded from bytes of which those that are not UTF-8 became such halves.
    """
    for path, text in _texts(value, ""):
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError as error:
                where = f" in {path.encode('ascii', 'backslashreplace').decode()}" if path else ""
                half = ord(text[error.start])
                if bad_bytes and 0xDC80 <= half <= 0xDCFF:
                    reason = f"expected UTF-8{where}, got byte 0x{half - 0xDC00:02x}"
                    raise RowError("not UTF-8", reason) from None
                raise RowError(
                    "lone surrogate",
                    f"expected whole characters{where}, got \\u{half:04x} without its other half",
                ) from None


def _texts(value: Any, path: str) -> Iterator[tuple[str, str]]:
    """(path, text) of every string, the keys included; a path is ``messages[1].content``."""
    todo = [(path, value)]
    while todo:
        path, value = todo.pop()
        if isinstance(value, str):
            yield path, value
        elif isinstance(value, dict):
            inner = [(f"{path}.{key}" if path else key, item) for key, item in value.items()]
            yield from zip((name for name, _ in inner), value, strict=True)
            todo += reversed(inner)
        elif isinstance(value, list):
            todo += reversed([(f"{path}[{i}]", item) for i, item in enumerate(value)])


def check_depth(value: Any) -> None:
    """Raise ``RowError`` for more than ``MAX_DEPTH`` objects and lists within each other."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = _inner(level)
    if level:
        raise _too_deep()


def _too_deep() -> RowError:
    return RowError("nested too deeply", f"expected at most {MAX_DEPTH} levels, got more")


def _inner(level: list[Any]) -> list[Any]:
    """The objects and lists right inside those of ``level``."""
    return [
        item
        for node in level
        if isinstance(node, (dict, list))
        for item in (node.values() if isinstance(node, dict) else node)
        if isinstance(item, (dict, list))
    ]


def _may_have_surrogates(text: str, start: int, end: int) -> bool:
    return text.find("\\ud", start, end) >= 0 or text.find("\\uD", start, end) >= 0


def _may_be_deep(text: str, start: int, end: int) -> bool:
    return text.count("[", start, end) + text.count("{", start, end) > MAX_DEPTH


def _constant(name: str) -> float | None:
    return None if name == "NaN" else float(name.replace("Infinity", "inf"))

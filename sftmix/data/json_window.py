"""A window that moves over JSON text of any length: values are decoded out of it, broken ones passed over."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from sftmix.data.json_values import (
    SPACE,
    JsonDecoder,
    JsonError,
    check_text_depth,
    has_many_brackets,
    value_end,
)
from sftmix.data.rows import RowError
from sftmix.data.text_lines import bad_bytes

NOT_SPACE = re.compile(r"[^ \t\r\n]")
_LEAST = 1 << 16
_INDENT = 200  # an indentation wider than this is not remembered


class TextWindow:
    """A text that comes in chunks: a window of it, a position in the window, and the line of that position."""

    def __init__(self, chunks: Iterator[str]) -> None:
        self._chunks = chunks
        self.text, self.position, self.ended = "", 0, False
        self.found_next = False  # whether a broken value was left for one that begins a later line
        self.has_bad_bytes = False  # whether the text so far came of bytes that are not UTF-8
        self.is_suspect = False  # whether the value last decoded unchecked has to be looked through
        self._has_many_brackets = False
        self._end: int | None = None  # where the value ends that could be decoded and is no row all the same
        self._line, self._counted = 1, 0

    def more(self) -> bool:
        """Lengthen the window to about twice what is left in it; False at the end of the text."""
        if self.ended:
            return False
        self._count()
        kept = max(self.text.rfind("\n", 0, self.position), self.position - _INDENT, 0)
        parts, wanted = [self.text[kept:]], max(_LEAST, len(self.text) - self.position)
        self.position = self._counted = self.position - kept
        for chunk in self._chunks:
            parts.append(chunk)
            self.has_bad_bytes = self.has_bad_bytes or bad_bytes(chunk) is not None
            wanted -= len(chunk)
            if wanted <= 0:
                break
        else:
            self.ended = True
        self.text = "".join(parts)
        self._has_many_brackets = has_many_brackets(self.text)
        return True

    def next(self) -> str:
        """Move to the next character that is no space and return it; empty at the end."""
        while not (found := NOT_SPACE.search(self.text, self.position)):
            self.position = len(self.text)
            if not self.more():
                return ""
        self.position = found.start()
        return found[0]

    def line(self) -> int:
        """The number of the line of the present position, from 1."""
        self._count()
        return self._line

    def _count(self) -> None:
        self._line += self.text.count("\n", self._counted, self.position)
        self._counted = self.position

    def value(self, decoder: JsonDecoder, ends: str, *, checked: bool = True) -> Any:
        """Decode the value here and move behind it; ``ends``: what may follow it, or empty for anything.

        ``checked``: raise for what no row may have, else only say so in ``is_suspect``. Raises ``RowError`` and
        moves nowhere when there is no value; the window then holds whatever could matter.
        """
        while True:
            length, self._end, self.found_next = len(self.text), None, False
            try:
                if self._has_many_brackets:
                    check_text_depth(self.text, self.position)
                value, end = decoder.decode(self.text, self.position)
                after = NOT_SPACE.search(self.text, end)
                if after is None and self.more():
                    continue  # the value may go on: 1 of 12, or what must follow it is not here yet
                if ends and after and after[0] not in ends:
                    raise JsonError("Expecting ',' delimiter", self.text, self.position, after.start())
                self._end = end
                if checked:
                    decoder.check(value, self.text, self.position, end)
                    if self.has_bad_bytes and (bad := bad_bytes(self.text[self.position : end])):
                        raise RowError("not UTF-8", bad)
                else:
                    self.is_suspect = decoder.is_suspect(self.text, self.position, end) or self.has_bad_bytes
            except JsonError as error:
                if error.is_final(length) or not self.more():
                    raise
            except RowError:
                known = self._end is not None or self.ended
                if known or value_end(self.text, self.position) is not None or not self.more():
                    raise
            else:
                self.position = end
                return value

    def pass_over(self, *, broken: bool, closer: str) -> bool:
        """Move from a value that was no row to behind it, or to the next one; False where that is not known.

        A broken value says itself where it ends only by its brackets, which may be what is broken. So where it
        begins a line, the next object is looked for at the beginning of a line, as deep in; when there is none,
        the value is the last, and the text's last character, if it is ``closer``, what follows it. Without a
        ``closer``, nothing is around the values: a line after an open bracket, a comma or a colon begins none, and
        nothing but a line tells where one does.
        """
        if closer and self.text.startswith((",", closer), self.position):
            return True  # nothing stands between two commas, or before the end
        indent = self._indent() if broken else None
        if indent is not None:
            before = "" if closer else r"[^\s\[{,:]\s*"
            following = re.compile(rf"{before}\n{indent}(?={{)")
            while not (found := following.search(self.text, self.position + 1)):
                if not self.more():
                    break
            if found:
                self.position, self.found_next = found.end(), True
                return True
        if broken and not closer:
            return False
        end = self._end
        while end is None and (end := value_end(self.text, self.position)) is None and self.more():
            pass
        if end is None and indent is not None and closer and self.text.rstrip(SPACE).endswith(closer):
            end = len(self.text.rstrip(SPACE)) - 1
        if end is not None:
            self.position = end
        return end is not None

    def _indent(self) -> str | None:
        """The spaces before the present position when nothing else is before it on its line, else None."""
        begin = self.text.rfind("\n", 0, self.position) + 1
        indent = self.text[begin : self.position]
        return indent if len(indent) < _INDENT and not indent.strip(" \t") else None

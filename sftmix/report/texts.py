"""The examples' texts and lengths, as whoever has the tokens gives them to a report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Text:
    """One example in words: what comes before the first answer, and that answer; "…" ends what was cut."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class Texts:
    """Texts by id, some of them longer; tokens and tokens that bear loss, and the source, of every example.

    ``missing`` says why there are none, ``note`` what was left out of all of them.
    """

    short: Mapping[str, Text] = field(default_factory=dict)
    long: Mapping[str, Text] = field(default_factory=dict)
    num_tokens: Mapping[str, int] = field(default_factory=dict)
    num_supervised: Mapping[str, int] = field(default_factory=dict)
    source: Mapping[str, str] = field(default_factory=dict)
    missing: str = ""
    note: str = ""


def cut(text: str, most: int) -> str:
    """``text`` in at most ``most`` characters, the last of them "…" where it is longer."""
    if len(text) <= most:
        return text
    return text[: most - 1] + "…" if most > 0 else ""

"""What the doctor says: a finding a line, marked where something is worth knowing or wrong, with what to do about it.

Imports nothing of torch, so that a torch that cannot be imported is a finding too.
"""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterable
from typing import NamedTuple

TITLE = "sftmix_kernels: this machine, and whether the loss is right on it (about 10 s)"
WELL, NOTE, WRONG = "well", "note", "wrong"
MARKS = {WELL: " ", NOTE: "~", WRONG: "!"}
WIDTH, INDENT = 80, 15  # of a line, and of a finding's name with its mark


class Finding(NamedTuple):
    """One thing that was looked at: its name, what was found, ``well``, ``note`` or ``wrong``, and what to do."""

    name: str
    text: str
    level: str = WELL
    advice: str = ""

    @staticmethod
    def of_version(name: str, version: str, least: str, *, text: str = "") -> Finding:
        """Whether ``version`` is at least ``least``, the requirement of pyproject.toml."""
        if release(version) >= release(least):
            return Finding(name, f"{text or version} (supported: >= {least})")
        return Finding(
            name, f"{text or version} is too old (supported: >= {least})", WRONG, upgrade(name, least)
        )

    @staticmethod
    def of_broken(name: str, problem: BaseException, advice: str) -> Finding:
        """A package that is installed and cannot be imported."""
        return Finding(name, f"installed, but its import fails: {first_line(problem)}", WRONG, advice)

    def __str__(self) -> str:
        """Lines of at most 80 columns: mark, name, text; below them the advice."""
        lines = _wrap(f"{MARKS[self.level]} {self.name:<{INDENT - 3}} {self.text}")
        if self.advice:
            lines += _wrap(f"{'':{INDENT}}-> {self.advice}")
        return "\n".join(lines)


def _wrap(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, subsequent_indent=" " * INDENT, break_on_hyphens=False)


def show(title: str, findings: Iterable[Finding], *, as_json: bool = False) -> int:
    """Print the findings as they come, then the verdict; 1 where something is wrong, else 0.

    ``as_json`` prints one object at the end instead: title, ok, findings.
    """
    seen: list[Finding] = []
    for finding in findings:
        seen.append(finding)
        if not as_json:
            print(finding, flush=True)
    wrong = [finding.name for finding in seen if finding.level == WRONG]
    if as_json:
        rows = [finding._asdict() for finding in seen]
        print(json.dumps({"title": title, "ok": not wrong, "findings": rows}, indent=2))
    elif wrong:
        print(f"Wrong: {', '.join(wrong)}. Lines marked ! say what to do.")
    else:
        noted = any(finding.level == NOTE for finding in seen)
        print("Nothing is wrong." + " Lines marked ~ are worth knowing." * noted)
    return int(bool(wrong))


def release(version: str) -> tuple[int, ...]:
    """The numbers a version begins with: 2.13.0+cpu and 2.13.0a0+git both give (2, 13, 0)."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in found[0].split(".")) if found else ()


def upgrade(name: str, least: str) -> str:
    return f'pip install --upgrade "{name.lower()}>={least}"'


def first_line(problem: BaseException) -> str:
    """An error's class and the first line of its text, cut to two lines of a screen."""
    line = next(iter(str(problem).strip().splitlines()), "")
    return textwrap.shorten(f"{type(problem).__name__}: {line}".rstrip(": "), 150, placeholder=" ...")

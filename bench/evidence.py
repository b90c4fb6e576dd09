"""Where an answer about a peer was read: places in its packages, and whether they still say so.

A place is ``path:line words``, where that line holds the words, or ``path: no words``, where no text file of that path
holds them, in large letters or small. Paths begin in a folder of unpacked wheels, or in a site-packages.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

TEXT = (".py", ".md", ".yaml", ".yml", ".toml", ".json", ".jinja")


@dataclass(frozen=True)
class Place:
    """Words and where they stand; without a line, words that stand nowhere in ``path``."""

    path: str
    line: int | None
    words: str


def read_place(text: str) -> Place:
    """``trl/trainer/sft_config.py:222 packing``, or ``axolotl: no sftmix``. ValueError for anything else."""
    match = re.fullmatch(r"([^\s:]+):(?:(\d+)| no) (\S.*)", text)
    if match is None:
        raise ValueError(f"place: expected 'path:line words' or 'path: no words', got {text!r}")
    path, line, words = match.groups()
    return Place(path, int(line) if line else None, words)


def distributions(versions: str) -> dict[str, str]:
    """``trl 1.16.0, accelerate 1.15.0`` by name."""
    pairs = (item.partition(" ") for item in versions.split(", "))
    return {name: version for name, _, version in pairs}


def digest(places: Mapping[str, Sequence[str]], versions: Mapping[str, str]) -> str:
    """The first 16 hex digits of the SHA-256 of all places by peer, and what they were read in."""
    lines = [f"{peer} {versions[peer]} {place}" for peer in versions for place in places[peer]]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def _owned(name: str, version: str, folder: Path) -> set[str]:
    """What a distribution put into a folder: the first parts of its files' paths; empty where it is not there."""
    record = folder / f"{name}-{version}.dist-info" / "RECORD"
    if not record.is_file():
        return set()
    return {line.split("/")[0] for line in record.read_text(encoding="utf-8").splitlines()}


@cache
def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8", errors="replace").split("\n")


def _holding(path: Path, words: str) -> Path | None:
    """The first text file at or under ``path`` that holds the words."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.suffix in TEXT)
    for file in files:
        if any(words.lower() in line.lower() for line in _lines(file)):
            return file
    return None


def fault(place: Place, folder: Path) -> str | None:
    """Why a place does not say what it is named for, or None."""
    path = folder / place.path
    if not path.exists():
        return f"{place.path}: not there"
    if place.line is None:
        found = _holding(path, place.words)
        return f"{place.path}: {place.words!r} stands in {found.relative_to(folder)}" if found else None
    lines = _lines(path)
    if place.line <= len(lines) and place.words in lines[place.line - 1]:
        return None
    elsewhere = [number for number, line in enumerate(lines, 1) if place.words in line]
    where = f"in line {elsewhere[0]}" if elsewhere else "nowhere"
    return f"{place.path}:{place.line}: {place.words!r} stands {where}"


def faults(peer: str, versions: str, places: Iterable[str], folders: Sequence[Path]) -> list[str]:
    """All that is wrong with the places of one peer, whose distributions lie unpacked in ``folders``."""
    home: dict[str, Path] = {}
    wrong = []
    for name, version in distributions(versions).items():
        holders = [folder for folder in folders if _owned(name, version, folder)]
        if not holders:
            wrong.append(f"{peer}: {name} {version}: in none of the folders")
        for folder in holders[:1]:
            home |= dict.fromkeys(_owned(name, version, folder), folder)
    if wrong:
        return wrong
    for text in places:
        place = read_place(text)
        where = home.get(place.path.split("/")[0])
        reason = f"{place.path}: not of {versions}" if where is None else fault(place, where)
        wrong += [f"{peer}: {reason}"] if reason else []
    return wrong

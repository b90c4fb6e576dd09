"""What a finished stage left, by SHA-256: a stage whose files are damaged or gone is not done."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path

from sftmix.data.fingerprint import content_hash
from sftmix.progress import activity
from sftmix.run.folder import EXTRA, FILES

# Left out: checkpoints have their own sums and are the way back, evaluate writes the card anew, metrics are pictures'.
_CHANGING = {"checkpoints", "metrics.jsonl", "tensorboard", "wandb", "README.md"}
_SHOWN = 3  # files named in a message
_LONG = 2**30  # bytes that take a second to read


def files_of(folder: Path, stage: str) -> list[Path]:
    """The files of ``stage`` that later ones read, sorted."""
    places = [folder / name for name in (FILES[stage], EXTRA.get(stage)) if name]
    found = [place for place in places if place.is_file()]
    for place in places:
        inner = [path for path in place.rglob("*") if path.is_file() and not path.name.startswith(".")]
        found += [path for path in inner if not _CHANGING & {*path.relative_to(place).parts}]
    return sorted(found)


def sums(folder: Path, stage: str) -> dict[str, str]:
    """By path within the run folder, the SHA-256 of each file that ``stage`` left."""
    return {path.relative_to(folder).as_posix(): content_hash(path) for path in files_of(folder, stage)}


def damage(folder: Path, recorded: Mapping[str, str]) -> dict[str, str]:
    """By path, what is wrong with each recorded file; empty where all are what they were."""
    paths = {name: folder / name for name in recorded}
    size = sum(path.stat().st_size for path in paths.values() if path.is_file())
    with activity("reading again what earlier stages left") if size > _LONG else nullcontext():
        found = {
            name: "is gone" if not path.is_file() else "is damaged: its SHA-256 is not the one recorded"
            for name, path in paths.items()
            if not path.is_file() or content_hash(path) != recorded[name]
        }
    return found


def described(found: Mapping[str, str]) -> str:
    """The first of what ``damage`` found, in words."""
    lines = [f"{name} {what}" for name, what in found.items()]
    more = len(lines) - _SHOWN
    return "; ".join(lines[:_SHOWN]) + (f"; and {more} more" if more > 0 else "")

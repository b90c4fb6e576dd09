"""What a source names: files, folders, globs, several of them, ``save_to_disk`` folders or a ``datasets`` id.

A path that is there wins over every other meaning. Nothing that a folder or a glob holds is left out in silence: a
file that is known to be no data (a README, a hidden file, another split's) is told to ``said``, any other unknown one
is refused.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

from sftmix.data.documents import Said
from sftmix.data.hub import check_id, is_saved
from sftmix.data.packed import READABLE, is_data
from sftmix.data.splits import of_one_split

_COMPANY_STEMS = (
    "readme", "license", "licence", "notice", "copying", "authors", "citation", "changelog", "contributing",
    "_success", "dataset_infos", "dataset_info", "requirements", "makefile", "desktop", "thumbs",
)  # fmt: skip
_COMPANY_SUFFIXES = (".md", ".rst", ".py", ".lock", ".md5", ".sha256", ".crc")
_COMPANY_FOLDERS = ("__pycache__", "__MACOSX")


@dataclass(frozen=True)
class Part:
    """One thing that a source names: ``kind`` is file, saved or hub; ``path`` is empty for a datasets id."""

    kind: str
    name: str

    @property
    def path(self) -> Path:
        return Path(self.name)


def parts_of(source: str, split: str | None, said: Said) -> list[Part]:
    """Everything that ``source`` names, in its order, folders and globs sorted.

    Raises ``ValueError`` for what is not there and can be no datasets id, a folder or glob without data, unknown
    files in one, and for anything named twice.
    """
    parts = [part for name in _names(source) for part in _parts_of_one(name, split, said)]
    seen: dict[str, str] = {}
    for part in parts:
        key = part.name if part.kind == "hub" else os.path.realpath(part.path)
        if key in seen:
            raise ValueError(f"{source}: expected every file once, got {part.name} twice (as {seen[key]})")
        seen[key] = part.name
    return parts


def no_data(name: str) -> str | None:
    """Why a file that a folder, glob or archive holds is known to be no data, or None."""
    path = PurePath(name)
    if any(part.startswith(".") for part in path.parts):
        return "a hidden file"
    if any(part in _COMPANY_FOLDERS for part in path.parts):
        return "in a folder that holds no data"
    if path.name.split(".")[0].lower() in _COMPANY_STEMS or path.suffix.lower() in _COMPANY_SUFFIXES:
        return "a file that goes with data and is none"
    return None


def choose(
    names: Sequence[str], split: str | None, where: str, said: Said, *, folders: Collection[str] = ()
) -> list[str]:
    """Those of the names in a folder or archive that are read: of data, and of one split where they tell several.

    ``folders`` are the names that are ``save_to_disk`` folders. Raises ``ValueError`` for a file of unknown kind.
    """
    kept = []
    for name in names:
        if name in folders:
            kept.append(name)
        elif why := no_data(name):
            said(f"{where}/{name}", why)
        elif not is_data(name):
            raise ValueError(
                f"{where}/{name}: expected {READABLE}, got another kind of file among the data; a glob picks files"
            )
        else:
            kept.append(name)
    chosen = of_one_split(kept, split, where)
    for name in kept:
        if name not in chosen:
            said(f"{where}/{name}", f"of another split than {split or 'train'}")
    return chosen


def _names(source: str) -> list[str]:
    """The source's parts between commas; a comma in the name of a file that is there divides nothing."""
    if not source.strip():
        raise ValueError(f"data: expected {READABLE}, a folder of them, or a datasets id, got an empty name")
    pieces = source.split(",")
    names = []
    while pieces:
        for count in range(len(pieces), 0, -1):
            name = ",".join(pieces[:count])
            if count == 1 or _expanded(name) is not None or _expanded(name.strip()) is not None:
                names.append(name if _expanded(name) is not None else name.strip())
                del pieces[:count]
                break
    if "" in names:
        raise ValueError(f"{source}: expected a name between the commas, got none")
    return names


def _expanded(name: str) -> Path | None:
    """The path of this name if it is there, ``~`` expanded."""
    try:
        path = Path(name).expanduser()
        return path if name and (path.exists() or path.is_symlink()) else None
    except (OSError, RuntimeError, ValueError):  # too long a name, no such user, a NUL character
        return None


def _parts_of_one(name: str, split: str | None, said: Said) -> Iterator[Part]:
    path = _expanded(name)
    if path is not None and path.is_dir():
        yield from _parts_of_folder(path, split, said)
    elif path is not None:
        if not is_data(path.name):
            raise ValueError(f"{path}: expected {READABLE}, got {path.name!r}")
        yield Part("file", str(path))
    elif re.search(r"[*?\[]", name):
        yield from _parts_of_glob(os.path.expanduser(name), said)
    else:
        check_id(name)
        yield Part("hub", name)


def _parts_of_folder(folder: Path, split: str | None, said: Said) -> Iterator[Part]:
    if is_saved(folder):
        yield Part("saved", str(folder))
        return
    found = dict(_walk(folder, folder, (), said))
    saved = [name for name, kind in found.items() if kind == "saved"]
    chosen = choose(list(found), split, str(folder), said, folders=saved)
    if not chosen:
        raise ValueError(f"{folder}: expected {READABLE} in the folder, got none")
    for name in chosen:
        yield Part(found[name], str(folder / name))


def _walk(top: Path, folder: Path, above: tuple[str, ...], said: Said) -> Iterator[tuple[str, str]]:
    """(name relative to ``top``, ``file`` or ``saved``) of all within, sorted; hidden folders are told at once."""
    real = os.path.realpath(folder)
    if real in above:
        raise ValueError(f"{folder}: expected a folder, got a link to one that it is in")
    try:
        paths = sorted(folder.iterdir())
    except OSError as error:
        raise ValueError(f"{folder}: expected a readable folder, got {error.strerror}") from error
    for path in paths:
        name = str(path.relative_to(top))
        if not path.is_dir():
            yield name, "file"
        elif why := no_data(name):
            said(str(path), why)
        elif is_saved(path):
            yield name, "saved"
        else:
            yield from _walk(top, path, (*above, real), said)


def _parts_of_glob(pattern: str, said: Said) -> Iterator[Part]:
    """What the pattern matches, sorted; a folder only where ``save_to_disk`` wrote it, else its files count.

    The files inside a ``save_to_disk`` folder that go with its Arrow files are told and passed over.
    """
    paths = sorted({Path(found) for found in glob.glob(pattern, recursive=True)})
    if not paths:
        raise ValueError(f"data: expected a pattern that matches files, got {pattern!r}, which matches none")
    saved = [path for path in paths if path.is_dir() and is_saved(path)]
    paths = [path for path in paths if not any(folder in path.parents for folder in saved)]
    count = 0
    for path in paths:
        if path in saved:
            count += 1
            yield Part("saved", str(path))
        elif path.is_dir():
            if not any(path in other.parents for other in paths):
                said(str(path), "a folder, whose files the pattern does not match")
        elif why := no_data(path.name):
            said(str(path), why)
        elif is_saved(path.parent) and path.suffix == ".json":
            said(str(path), "goes with the Arrow files of save_to_disk")
        elif not is_data(path.name):
            raise ValueError(f"{path}: expected {READABLE}, got {path.name!r}, which {pattern!r} matches")
        else:
            count += 1
            yield Part("file", str(path))
    if not count:
        raise ValueError(f"{pattern}: expected {READABLE}, got a pattern that matches none")

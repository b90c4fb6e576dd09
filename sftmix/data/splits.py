"""The split that a file's name tells, and the files of one split among several."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import PurePath

_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
SPLITS = tuple(name for names in _NAMES.values() for name in names)
_WORDS = re.compile(r"[^a-z0-9]+")


def split_of(name: str) -> str | None:
    """The split whose name is a word of ``name``: ``test`` of ``data/test-00000-of-00002.parquet``; None: no split.

    The file's own name counts before the folders', the inner folder before the outer.
    """
    for part in reversed(PurePath(name).parts):
        words = _WORDS.split(part.lower())
        for split, names in _NAMES.items():
            if any(word in names for word in words):
                return split
    return None


def of_one_split(names: Sequence[str], split: str | None, where: str) -> list[str]:
    """The names of ``split`` (None: train) where they tell several splits; all of them where they tell one or none.

    Raises ``ValueError`` when the split wanted is not there, and when a name tells another one and some tell none,
    which may be of either.
    """
    wanted = split_of(split or "train")
    told = {name: split_of(name) for name in names}
    splits = {found for found in told.values() if found}
    nameless = [name for name, found in told.items() if found is None]
    if splits <= {wanted} or (len(splits) == 1 and not nameless):
        return list(names)
    listed = ", ".join(sorted(splits))
    if nameless:
        raise ValueError(
            f"{where}: expected every file's name to tell its split beside files of {listed}, got {nameless[0]!r}; "
            "a glob picks files"
        )
    if wanted not in splits:
        raise ValueError(f"{where}: expected files of the split {split or 'train'}, got {listed}")
    return [name for name, found in told.items() if found == wanted]

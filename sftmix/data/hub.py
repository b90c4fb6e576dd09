"""Rows that the ``datasets`` library loads: folders written by ``save_to_disk``, and ids of its hub."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sftmix.data.columnar_rows import check_stream
from sftmix.data.packed import READABLE, is_data
from sftmix.data.rows import Fault, Row

_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
_LONGEST_ID = 200


def is_saved(folder: Path) -> bool:
    """Whether this folder was written by ``save_to_disk``, of a Dataset or of a DatasetDict."""
    return (folder / "dataset_dict.json").is_file() or (
        (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    )


def saved_rows(folder: Path, split: str | None) -> Iterator[Row | Fault]:
    """Rows of a ``save_to_disk`` folder; of a DatasetDict those of ``split`` (None: the only one, or train).

    Every Arrow file is first looked through to its end mark, since the library takes one that was cut short for
    a shorter one. Raises ``ValueError`` for a folder that is damaged or has no such split.
    """
    import datasets

    expected = f"{folder}: expected a folder written by save_to_disk"
    for file in sorted(folder.rglob("*.arrow")):
        check_stream(str(file))
    try:
        loaded = datasets.load_from_disk(str(folder))
    except Exception as error:  # the library raises whatever a damaged file makes Python raise
        raise ValueError(f"{expected}, got {type(error).__name__}: {error}") from error
    where = str(folder)
    if isinstance(loaded, datasets.DatasetDict):
        wanted = split or (next(iter(loaded)) if len(loaded) == 1 else "train")
        if wanted not in loaded:
            raise ValueError(f"{folder}: expected the split {wanted}, got {', '.join(loaded) or 'none'}")
        loaded, where = loaded[wanted], f"{folder} ({wanted})"
    loaded.reset_format()  # a format saved with the data may leave columns out
    yield from _rows(loaded, where, expected)


def hub_rows(
    source: str, split: str | None, configuration: str | None, *, streaming: bool
) -> Iterator[Row | Fault]:
    """Rows of a ``datasets`` id; anything that goes wrong is one ``ValueError``."""
    import datasets

    expected = f"data: expected {READABLE}, a folder of them, or a datasets id, got {source!r}: no such file"
    split = split or "train"
    options: dict[str, Any] = {"split": split}
    if configuration is not None:
        options["name"] = configuration
    if streaming:
        options["streaming"] = True
    try:
        loaded = datasets.load_dataset(source, **options)
    except Exception as error:  # the library raises a different class for each of its back ends
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{expected}, and loading it as a datasets id failed ({reason})") from error
    where = f"{source} ({', '.join(filter(None, (configuration, split)))})"
    yield from _rows(loaded, where, f"{where}: expected rows")


def check_id(source: str) -> None:
    """Raise ``ValueError`` for what is neither there nor a name that a ``datasets`` id can have."""
    if not _ID.fullmatch(source) or len(source) > _LONGEST_ID or is_data(source):
        raise ValueError(  # no use asking the hub
            f"data: expected {READABLE}, a folder of them, or a datasets id, got {source!r}: no such file, "
            "and its name is not one of a datasets id"
        )


def _rows(loaded: Any, where: str, expected: str) -> Iterator[Row | Fault]:
    rows = iter(loaded)
    number = 0
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except Exception as error:  # of a network, a cache or a decoder
            raise ValueError(f"{expected}, got {type(error).__name__} after row {number}: {error}") from error
        number += 1
        yield Row(f"{where}, row {number}", row)

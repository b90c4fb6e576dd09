"""Choosing examples: by a score, by a list of ids, at random; and what is written of a choice."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sftmix.curation.records import plain, records, tell_changed
from sftmix.data.prepare import Source
from sftmix.data.rows import Example, Row
from sftmix.files import replacing
from sftmix.progress import say
from sftmix.scores.table import ranked

TAKES = ("highest", "lowest", "ends", "middle")
SELECTED, KEPT, DROPPED = "selected.jsonl", "kept_ids.txt", "dropped_ids.txt"


@dataclass(frozen=True)
class Scored:
    """Examples that can be chosen among: their ids, scores by name [E], and where their records are read from."""

    examples: list[str]
    columns: dict[str, NDArray[np.float64]]
    source: Source

    def column(self, name: str) -> NDArray[np.float64]:
        """One score of every example. Raises ``ValueError`` naming the scores that there are."""
        if name not in self.columns:
            raise ValueError(f"by: expected one of {', '.join(self.columns)}, or random, got {name!r}")
        return self.columns[name]


def how_many(keep: str, total: int) -> int:
    """``1000``, or ``30%`` of ``total`` rounded up. Raises ``ValueError`` for less than 1 and more than there are."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(%?)", keep.strip())
    number = float(found[1]) if found else -1.0
    count = -int(-(number * total / 100) // 1) if found and found[2] else int(number)
    if not found or (not found[2] and not number.is_integer()) or not 1 <= count <= total:
        raise ValueError(f"keep: expected a number from 1 to {total}, or a share such as 30%, got {keep!r}")
    return count


def within(scored: Scored, name: str, above: float | None, below: float | None) -> set[str]:
    """The ids whose score lies between two bounds, neither included; those without such a score are not among them."""
    values = scored.column(name)
    inside = ~np.isnan(values)
    if above is not None:
        inside &= values > above
    if below is not None:
        inside &= values < below
    return {scored.examples[at] for at in np.flatnonzero(inside).tolist()}


def by_score(scored: Scored, name: str, take: str, count: int) -> tuple[list[str], int]:
    """``count`` ids by a score, and how many examples have no such score and could not be chosen.

    ``ends``: as many of the highest as of the lowest, the middle left out (of an odd number the highest have one more);
    ``middle``: the ends left out. Equal scores are in the order of the ids. Raises ``ValueError`` for another ``take``,
    an unknown score, and where fewer examples have it.
    """
    if take not in TAKES:
        raise ValueError(f"take: expected one of {', '.join(TAKES)}, got {take!r}")
    order = ranked(scored.examples, scored.column(name), highest=take != "lowest")
    without = len(scored.examples) - len(order)
    if count > len(order):
        raise ValueError(f"keep: expected at most the {len(order)} examples that have {name}, got {count}")
    if take == "ends":
        low = count // 2
        return order[: count - low] + order[len(order) - low :], without
    first = (len(order) - count) // 2 if take == "middle" else 0
    return order[first : first + count], without


def at_random(names: Sequence[str], count: int, *, seed: int) -> list[str]:
    """``count`` ids, a pure function of the ids and ``seed``; a smaller count gives a part of a larger one's."""
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence(seed, spawn_key=(101,))))
    ordered = sorted(names)
    return [ordered[i] for i in generator.permutation(len(ordered))[:count].tolist()]


def listed(names: Collection[str], ids: Sequence[str], what: str) -> set[str]:
    """The ids of a list. Raises ``ValueError`` naming the first that no example has."""
    unknown = [name for name in ids if name not in names]
    if unknown:
        raise ValueError(
            f"{what}: expected ids of examples, got {len(unknown)} unknown of {len(ids)} (first: {unknown[0]})"
        )
    return set(ids)


def write_choice(scored: Scored, kept: Collection[str], folder: Path) -> None:
    """The chosen records as they are, in their order (selected.jsonl), the ids kept and the ids dropped.

    Raises ``ValueError`` where an example that has scores is in the file no more. Records that are no scored example
    are not chosen, and counted.
    """
    chosen = set(kept)
    missing = set(scored.examples)
    changed: Counter[str] = Counter()
    others = 0
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / SELECTED) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for row, found in records(scored.source):
            name = found.id if isinstance(found, Example) else None
            if name not in missing:
                others += 1
                continue
            missing.discard(name)
            if name in chosen and isinstance(row, Row):
                file.write(json.dumps(plain(row.fields, changed), ensure_ascii=False, allow_nan=False) + "\n")
        if missing:
            raise ValueError(
                f"{scored.source.name}: expected the records that were scored, got {len(missing)} that are not there "
                f"(first: {min(missing)}); score the file as it is now"
            )
    dropped = [name for name in scored.examples if name not in chosen]
    for name, ids in ((KEPT, [n for n in scored.examples if n in chosen]), (DROPPED, dropped)):
        with replacing(folder / name) as temporary:
            temporary.write_text("".join(f"{each}\n" for each in ids), encoding="utf-8")
    tell_changed(changed, folder / SELECTED)
    say(f"select: {len(chosen)} of {len(scored.examples)} examples kept, {len(dropped)} dropped")
    if others:
        say(
            f"select: {others} records of {scored.source.name} are no scored examples and were not chosen from"
        )

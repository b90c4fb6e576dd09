"""What each loss, and each trainer, can do: ``python -m bench.features`` rewrites the pages from the lists.

Every "yes" of ours names the tests that show it (or a file) and the arguments or knobs it is asked for by; every answer
about a peer names the version and the place it was read in (``--sources`` prints them). "?" means not known, not no.
``--check`` only compares. ``--verify FOLDER`` looks up every place of trainers.json in a folder of unpacked wheels.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from bench.evidence import digest, faults, read_place
from bench.report import update

BEGIN = "<!-- features: written by `python -m bench.features`, do not edit -->"
END = "<!-- end of features -->"
ANSWERS = ("yes", "partly", "no", "?")


@dataclass(frozen=True)
class Listing:
    """A list of features, and the page that is written from it."""

    data: Path
    page: Path


HERE = Path(__file__).parent
LOSSES = Listing(HERE / "features.json", HERE / "FEATURES.md")
TRAINERS = Listing(HERE / "trainers.json", HERE / "TRAINERS.md")
LISTS = (LOSSES, TRAINERS)


@dataclass(frozen=True)
class Answer:
    """One cell: the answer, where it was seen or why it is not a plain yes, and places (`bench.evidence`)."""

    value: str
    note: str
    places: tuple[str, ...] = ()


@dataclass(frozen=True)
class Feature:
    """One row of the table."""

    name: str
    ours: Answer
    tests: tuple[str, ...]  # pytest node ids without parameters, file::function; or a file
    arguments: tuple[str, ...]  # function.parameter or result.field of sftmix_kernels; of trainers, knobs
    peers: dict[str, Answer]
    group: str = ""  # rows of one group stand under its name


@dataclass(frozen=True)
class Features:
    """The whole list; ``versions`` gives the peers, in the table's order, and what was read of each.

    ``verified`` is the date on which all places were looked up, and their digest; None where a list has none.
    """

    versions: dict[str, str]
    rows: tuple[Feature, ...]
    verified: dict[str, str] | None = None

    @property
    def places(self) -> dict[str, list[str]]:
        """Every place by peer."""
        return {
            peer: [place for row in self.rows for place in row.peers[peer].places] for peer in self.versions
        }


def _answer(value: str, note: str, *places: str) -> Answer:
    return Answer(value, note, places)


def read_features(path: Path = LOSSES.data) -> Features:
    """The list as it is on disk. ValueError, naming the row, where an answer, a peer, a test or a source is missing."""
    content = json.loads(path.read_text(encoding="utf-8"))
    versions, verified = content["versions"], content.get("verified")
    rows = tuple(
        Feature(
            row["name"], _answer(*row["ours"]), tuple(row["tests"]), tuple(row["arguments"]),
            {peer: _answer(*answer) for peer, answer in row["peers"].items()}, row.get("group", ""),
        )
        for row in content["features"]
    )  # fmt: skip
    for row in rows:
        if list(row.peers) != list(versions):
            raise ValueError(f"{row.name}: expected the peers {list(versions)}, got {list(row.peers)}")
        for answer in (row.ours, *row.peers.values()):
            if answer.value not in ANSWERS:
                raise ValueError(f"{row.name}: expected one of {', '.join(ANSWERS)}, got {answer.value!r}")
            for place in answer.places:
                read_place(place)
        if row.ours.value != "no" and not row.tests:
            raise ValueError(f"{row.name}: expected the tests that show it, got none")
        if verified is None and any(not answer.note for answer in row.peers.values()):
            raise ValueError(f"{row.name}: expected where each answer was read, got an empty note")
        if verified is not None and any(not answer.places for answer in row.peers.values()):
            raise ValueError(f"{row.name}: expected a place for each peer, got none")
        if any(answer.value == "partly" and not answer.note for answer in (row.ours, *row.peers.values())):
            raise ValueError(f"{row.name}: expected what is missing where partly, got an empty note")
    return Features(versions, rows, verified)


def _reason(answer: Answer) -> str:
    """The words of a note, without the file in brackets that ``--sources`` prints where there are no places."""
    return answer.note if answer.places else answer.note.split(" (")[0]


def _limits(row: Feature) -> Iterator[str]:
    """What "partly" means in this row: who, and why; and why ours is no."""
    for name, answer in (("ours", row.ours), *row.peers.items()):
        if answer.value == "partly" or (name == "ours" and answer.value == "no" and answer.note):
            yield f"{name}: {_reason(answer)}"


def table(features: Features) -> str:
    """The page's block, Markdown."""
    head = ["", "ours", *features.versions, "our tests"]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---|" * (len(head) - 1)]
    group = ""
    for row in features.rows:
        if row.group != group:
            lines.append(f"| **{row.group}** |" + " |" * (len(head) - 1))
            group = row.group
        tests = "<br>".join(f"`{test.removeprefix('tests/')}`" for test in row.tests)
        answers = [row.ours.value, *(answer.value for answer in row.peers.values())]
        lines.append("| " + " | ".join([row.name, *answers, tests]) + " |")
    named = features.verified is None  # distributions name themselves
    versions = "; ".join(
        f"{peer} {version}" if named else version for peer, version in features.versions.items()
    )
    limits = [f"- {row.name}: {'; '.join(found)}." for row in features.rows if (found := list(_limits(row)))]
    checked = f" All places looked up on {features.verified['date']}." if features.verified else ""
    return "\n".join([*lines, "", f"Read: {versions}.{checked} Where partly, what is missing:", "", *limits])


def sources(features: Features) -> str:
    """Where every answer about a peer was read."""
    lines = []
    for row in features.rows:
        lines.append(row.name)
        for peer, answer in row.peers.items():
            lines.append(f"    {peer}: {answer.value}: {answer.note}".rstrip(": "))
            lines += [f"        {place}" for place in answer.places]
    return "\n".join(lines)


def verify(listing: Listing, folders: Sequence[Path]) -> list[str]:
    """Look up every place of a list; what is wrong, or nothing and the list's file says when that was."""
    features = read_features(listing.data)
    places = features.places
    wrong = [
        line
        for peer, versions in features.versions.items()
        for line in faults(peer, versions, places[peer], folders)
    ]
    if not wrong:
        today = datetime.now(timezone.utc).date().isoformat()
        record = json.dumps({"date": today, "digest": digest(places, features.versions)})
        text = listing.data.read_text(encoding="utf-8")
        text, count = re.subn(r'"verified": \{[^}]*\}', f'"verified": {record}', text)
        if count != 1:
            raise ValueError(f"{listing.data.name}: expected one record of when it was verified, got {count}")
        listing.data.write_text(text, encoding="utf-8")
    return wrong


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.features", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a page differs")
    parser.add_argument(
        "--sources", action="store_true", help="print where each answer was read; write nothing"
    )
    parser.add_argument(
        "--verify", nargs="+", type=Path, metavar="FOLDER", help="look up the places in unpacked wheels first"
    )
    args = parser.parse_args(argv)
    if args.sources:
        print("\n".join(sources(read_features(listing.data)) for listing in LISTS))
        return 0
    if args.verify:
        wrong = verify(TRAINERS, args.verify)
        if wrong:
            print("\n".join(wrong), file=sys.stderr)
            return 1
    return max(
        update(
            listing.page, table(read_features(listing.data)), (BEGIN, END),
            check=args.check, command="python -m bench.features",
        )
        for listing in LISTS
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())

"""What each loss can do: ``python -m bench.features`` rewrites FEATURES.md from features.json.

Every "yes" of ours names the tests that show it and the public arguments or fields it is asked for by; every answer
about a peer names the version and the file it was read in (``--sources`` prints them). "?" means not known, not no.
``--check`` only compares.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.machine import ROOT
from bench.report import update

DATA = Path(__file__).with_name("features.json")
PAGE = ROOT / "bench" / "FEATURES.md"
BEGIN = "<!-- features: written by `python -m bench.features`, do not edit -->"
END = "<!-- end of features -->"
ANSWERS = ("yes", "partly", "no", "?")


@dataclass(frozen=True)
class Answer:
    """One cell: the answer, and where it was seen or why it is not a plain yes."""

    value: str
    note: str


@dataclass(frozen=True)
class Feature:
    """One row of the table."""

    name: str
    ours: Answer
    tests: tuple[str, ...]  # pytest node ids without parameters: file::function
    arguments: tuple[str, ...]  # function.parameter or result.field of sftmix_kernels
    peers: dict[str, Answer]


@dataclass(frozen=True)
class Features:
    """The whole list; ``versions`` gives the peers, in the table's order, and what was read of each."""

    versions: dict[str, str]
    rows: tuple[Feature, ...]


def read_features(path: Path = DATA) -> Features:
    """The list as it is on disk. Raises ValueError naming the row on an unknown answer, a peer left out or no test."""
    content = json.loads(path.read_text(encoding="utf-8"))
    versions = content["versions"]
    rows = tuple(
        Feature(
            row["name"], Answer(*row["ours"]), tuple(row["tests"]), tuple(row["arguments"]),
            {peer: Answer(*answer) for peer, answer in row["peers"].items()},
        )
        for row in content["features"]
    )  # fmt: skip
    for row in rows:
        if list(row.peers) != list(versions):
            raise ValueError(f"{row.name}: expected the peers {list(versions)}, got {list(row.peers)}")
        for answer in (row.ours, *row.peers.values()):
            if answer.value not in ANSWERS:
                raise ValueError(f"{row.name}: expected one of {', '.join(ANSWERS)}, got {answer.value!r}")
        if row.ours.value != "no" and not row.tests:
            raise ValueError(f"{row.name}: expected the tests that show it, got none")
        if any(not answer.note for answer in row.peers.values()):
            raise ValueError(f"{row.name}: expected where each answer was read, got an empty note")
    return Features(versions, rows)


def _reason(answer: Answer) -> str:
    """The words of a note, without the file in brackets that ``--sources`` prints."""
    return answer.note.split(" (")[0]


def _limits(row: Feature) -> Iterator[str]:
    """What "partly" means in this row: who, and why."""
    for name, answer in (("ours", row.ours), *row.peers.items()):
        if answer.value == "partly":
            yield f"{name}: {_reason(answer)}"


def table(features: Features) -> str:
    """The page's block, Markdown."""
    head = ["", "ours", *features.versions, "our tests"]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---|" * (len(head) - 1)]
    for row in features.rows:
        tests = "<br>".join(f"`{test.removeprefix('tests/')}`" for test in row.tests)
        answers = [row.ours.value, *(answer.value for answer in row.peers.values())]
        lines.append("| " + " | ".join([row.name, *answers, tests]) + " |")
    versions = "; ".join(f"{peer} {version}" for peer, version in features.versions.items())
    limits = [f"- {row.name}: {'; '.join(found)}." for row in features.rows if (found := list(_limits(row)))]
    return "\n".join([*lines, "", f"Read: {versions}. Where partly, what is missing:", "", *limits])


def sources(features: Features) -> str:
    """Where every answer about a peer was read."""
    lines = []
    for row in features.rows:
        lines.append(row.name)
        lines += [f"    {peer}: {answer.value}: {answer.note}" for peer, answer in row.peers.items()]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.features", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the page differs")
    parser.add_argument(
        "--sources", action="store_true", help="print where each answer was read; write nothing"
    )
    args = parser.parse_args(argv)
    features = read_features()
    if args.sources:
        print(sources(features))
        return 0
    text = table(features)
    return update(PAGE, text, (BEGIN, END), check=args.check, command="python -m bench.features")


if __name__ == "__main__":
    sys.exit(main())

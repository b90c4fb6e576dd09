"""Held-out examples: a part of the training examples, or a source of their own that must not be among them.

``split_heldout`` cuts; ``check_sources`` refuses one source given twice before anything is read; ``overlap`` counts
what the two sides share. Copies are found by id and by text: two conversations with the same words, whatever their
white space, case or Unicode form, are one.
"""

from __future__ import annotations

import glob
import hashlib
import json
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

if TYPE_CHECKING:
    from sftmix.config import DataConfig


class _Example(Protocol):
    @property
    def id(self) -> str: ...


AnExample = TypeVar("AnExample", bound=_Example)


def split_heldout(examples: Sequence[AnExample], fraction: float) -> tuple[list[AnExample], list[AnExample]]:
    """Split examples into (training, held-out) by a hash of their ids.

    The held-out part is the examples with the smallest hashes, ``fraction`` of all and at least one; both
    parts keep the order they came in. Copies of one conversation stay on one side. A fraction of 0 holds
    nothing out. Raises ``ValueError`` when fewer than two training examples would remain.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"fraction: expected at least 0 and less than 1, got {fraction}")
    if fraction == 0:
        return list(examples), []
    copies: dict[int, list[int]] = {}  # text → places
    by_name: dict[str, int] = {}
    for place, example in enumerate(examples):
        # Same id or same text: the same conversation.
        text = by_name.setdefault(_name(example), _keys(example, parts=False).whole)
        copies.setdefault(text, []).append(place)
    wanted = max(1, round(fraction * len(examples)))
    ordered = sorted(
        copies.values(),
        key=lambda places: min(hashlib.sha256(_name(examples[i]).encode()).digest() for i in places),
    )
    heldout: set[int] = set()
    for places in ordered:
        if len(heldout) >= wanted:
            break
        heldout.update(places)
    if len(examples) - len(heldout) < 2:
        raise ValueError(
            f"examples: expected at least {len(heldout) + 2} to hold {len(heldout)} out, got {len(examples)}"
        )
    training = [example for i, example in enumerate(examples) if i not in heldout]
    return training, [examples[i] for i in sorted(heldout)]


@dataclass(frozen=True)
class Overlap:
    """What training and held-out examples share; every count is of held-out examples but the duplicates of train.

    ``same`` are among the training examples, word for word; ``same_prompt`` share all but the answer, ``same_answer``
    the answer alone. Duplicates are equal to an earlier example of their own side. ``first`` names some of ``same``.
    """

    heldout: int
    same: int
    same_prompt: int
    same_answer: int
    duplicates_train: int
    duplicates_heldout: int
    first: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """What has to be said: nothing where the two sides share nothing and hold no duplicates."""
        told = []
        shared = {
            "are training examples too": self.same,
            "share their prompt with a training example, not the answer": self.same_prompt,
            "share their answer with a training example, not the prompt": self.same_answer,
        }
        for what, count in shared.items():
            if count:
                told.append(f"held-out: {count} of {self.heldout} examples {what}")
        for side, count in (("training", self.duplicates_train), ("held-out", self.duplicates_heldout)):
            if count:
                told.append(f"duplicates: {count} {side} examples are equal to an earlier one")
        return told

    def check(self, *, train: str, heldout: str, allowed: bool) -> None:
        """Raise ``ValueError`` where held-out examples are among the training examples, unless ``allowed``."""
        if self.same and not allowed:
            raise ValueError(
                f"data.heldout: expected examples that are not in data.train, got {self.same} of {self.heldout} that "
                f"are (first: {', '.join(self.first)}; {heldout} against {train}); take them out of one of the two, "
                "or set data.allow_overlap=true"
            )


def overlap(train: Iterable[_Example], heldout: Iterable[_Example]) -> Overlap:
    """Count what two sets of examples share: one pass over each; what is kept grows with ``heldout`` alone."""
    kept = [(example.id, getattr(example, "place", ""), _keys(example)) for example in heldout]
    names = {_hash(_strip(given)) for given, _, _ in kept}
    wholes, prompts, answers = ({getattr(k, part) for _, _, k in kept} for part in Keys.PARTS)
    found: set[tuple[str, int]] = set()
    duplicates = 0
    for example in train:
        duplicates += _name(example) != example.id
        keys, name = _keys(example), _hash(_name(example))
        for kind, key, wanted in (
            ("name", name, names), ("whole", keys.whole, wholes), ("prompt", keys.prompt, prompts),
            ("answer", keys.answer, answers),
        ):  # fmt: skip
            if key in wanted:
                found.add((kind, key))
    same: list[str] = []
    same_prompt = same_answer = 0
    for given, place, keys in kept:
        if ("name", _hash(_strip(given))) in found or ("whole", keys.whole) in found:
            same.append(place or given)
        elif keys.prompt and ("prompt", keys.prompt) in found:
            same_prompt += 1
        elif keys.answer and ("answer", keys.answer) in found:
            same_answer += 1
    return Overlap(
        heldout=len(kept), same=len(same), same_prompt=same_prompt, same_answer=same_answer,
        duplicates_train=duplicates, duplicates_heldout=len(kept) - len(names), first=tuple(same[:3]),
    )  # fmt: skip


def check_sources(data: DataConfig) -> None:
    """Raise ``ValueError`` where data.heldout is a source of data.train, or a datasets id without its split.

    Files are compared by what they are, not by how they are written. One folder or datasets id may serve both, with
    two splits or configurations; a single file may not. ``data.allow_overlap`` lets the same source pass.
    """
    if data.heldout is None:
        return
    files = {_resolved(path): path for path in _paths(data.train)}
    for path in _paths(data.heldout):
        twin = files.get(_resolved(path))
        has_splits = path.is_dir() and data.heldout_split not in (None, data.split)
        if twin is not None and not has_splits and not data.allow_overlap:
            raise ValueError(
                f"data.heldout: expected another source than data.train, got {path}, which is {twin} of data.train; "
                "leave data.heldout out to hold out a part of it (data.heldout_fraction), or set "
                "data.allow_overlap=true"
            )
    if _paths(data.heldout):
        return
    if data.heldout_split is None:
        raise ValueError(
            f"data.heldout_split: expected the split of {data.heldout} to hold out, such as test, got none"
        )
    ours = (data.train, data.configuration, data.split)
    theirs = (data.heldout, data.heldout_configuration or data.configuration, data.heldout_split)
    if ours == theirs and not data.allow_overlap:
        raise ValueError(
            f"data.heldout: expected another source than data.train, got {data.heldout} with split "
            f"{data.heldout_split} for both; set data.heldout_split to another split"
        )


def _paths(source: str) -> list[Path]:
    """The files and folders that a source names; none where it is a datasets id."""
    whole = Path(source).expanduser()
    if whole.exists():
        return [whole]
    found = []
    for part in source.split(","):
        name = str(Path(part.strip()).expanduser())
        found += [Path(match) for match in sorted(glob.glob(name, recursive=True))]
    return found


def _resolved(path: Path) -> tuple[int, int]:
    status = path.stat()  # symbolic and hard links, and other spellings, are the same file
    return status.st_dev, status.st_ino


@dataclass(frozen=True)
class Keys:
    """Hashes of a conversation's words: all, all before the last answer, the last answer; 0 where there is none."""

    PARTS = ("whole", "prompt", "answer")
    whole: int
    prompt: int
    answer: int


def _keys(example: Any, *, parts: bool = True) -> Keys:
    """An example's hashes: those it carries, or those of its words."""
    return example.keys if hasattr(example, "keys") else words_keys(example, parts=parts)


def words_keys(example: Any, *, parts: bool = True) -> Keys:
    """Hashes of an example's words; without ``parts`` the one of the whole alone, the others 0."""
    messages = [(str(message["role"]), _words(message)) for message in example.messages]
    if not messages:
        alone = [getattr(example, "text", None) or "", list(getattr(example, "input_ids", ()))]
        return Keys(_hash(_normal(json.dumps(alone))), 0, 0)
    last = max((i for i, (role, _) in enumerate(messages) if role == "assistant"), default=len(messages) - 1)
    # A system message belongs to the prompt; tools too: another set of them is another question.
    before = [*messages[:last], *(json.dumps(tool, sort_keys=True) for tool in getattr(example, "tools", ()))]
    prompt, rest = repr(before), repr(messages[last:])
    if not parts:
        return Keys(_hash(prompt + rest), 0, 0)
    return Keys(_hash(prompt + rest), _hash(prompt) if last else 0, _hash(messages[last][1]))


def _words(message: Mapping[str, Any]) -> str:
    """All that a message says, its reasoning and calls included."""
    if len(message) == 2:  # a role and a content
        return _normal(str(message.get("content") or ""))
    rest = {key: value for key, value in message.items() if key not in ("role", "content") and value}
    told = json.dumps(rest, sort_keys=True, default=str) if rest else ""
    return _normal(f"{message.get('content') or ''} {told}")


def _normal(text: str) -> str:
    text = text.lower() if text.isascii() else unicodedata.normalize("NFKC", text).casefold()
    return " ".join(text.split())


def _name(example: _Example) -> str:
    return _strip(example.id)


def _strip(name: str) -> str:
    """An id without the number that tells copies apart."""
    stem, _, number = name.rpartition("-")
    return stem if stem and number.isdigit() else name


def _hash(text: str) -> int:
    return int.from_bytes(
        hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big", signed=True
    )

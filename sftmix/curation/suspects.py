"""The examples most likely wrong, and those that the model knew before it was trained on them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from sftmix.curation.records import plain, records, tell_changed
from sftmix.data.prepare import Source
from sftmix.data.rows import Example, Row
from sftmix.files import replacing
from sftmix.scores.table import ExampleScores, ranked

# Whether a high value is the suspicious one.
HIGH_IS_WRONG = {
    "first_ifd": True, "ifd": True, "nll": True, "perplexity": True, "entropy": True, "first_nll": True,
    "last_nll": True, "variability": True, "confidence": False, "top1_share": False,
}  # fmt: skip
KINDS = ("wrong", "saturated")
_SHOWN = 160  # characters of a text in the table


@dataclass(frozen=True)
class Suspect:
    """One example with the score it is suspected by, and its record."""

    id: str
    place: str
    score: float
    scores: dict[str, Any]
    record: Any
    prompt: str
    answer: str


def default_score(scores: ExampleScores) -> str:
    """The score that finds swapped answers best of those that are there (bench/RESULTS.md): IFD at the first scoring
    point; else the first NLL."""
    return "first_ifd" if "first_ifd" in scores.columns else "first_nll"


def order(scores: ExampleScores, *, by: str | None, kind: str) -> tuple[str, list[str]]:
    """The score's name and all ids, the most suspicious first.

    ``wrong``: answers that do not go with their prompts, or that the model never learns. ``saturated``: the ones it
    predicts best at the first scoring point, such as leaked or repeated texts. Raises ``ValueError`` for another kind
    and for a score that there is not.
    """
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    name = by or (default_score(scores) if kind == "wrong" else "first_nll")
    known = [key for key in HIGH_IS_WRONG if key in scores.columns]
    if name not in known:
        raise ValueError(f"by: expected one of {', '.join(known)}, got {name!r}")
    highest = HIGH_IS_WRONG[name] == (kind == "wrong")
    return name, ranked(scores.examples, scores.columns[name], highest=highest)


def find(scores: ExampleScores, source: Source, names: Sequence[str], by: str) -> list[Suspect]:
    """The suspects of ``names``, in their order. Raises ``ValueError`` where one is in the file no more."""
    at = {name: index for index, name in enumerate(scores.examples)}
    found: dict[str, Suspect] = {}
    wanted = set(names)
    for row, example in records(source):
        if isinstance(example, Example) and example.id in wanted and isinstance(row, Row):
            prompt, answer = _texts(example)
            index = at[example.id]
            value = float(scores.columns[by][index])
            found[example.id] = Suspect(
                example.id, row.place, value, scores.of(index), row.fields, prompt, answer
            )
    missing = [name for name in names if name not in found]
    if missing:
        raise ValueError(
            f"{source.name}: expected the records that were scored, got {len(missing)} that are not there (first: "
            f"{missing[0]}); score the file as it is now"
        )
    return [found[name] for name in names]


def table(suspects: Sequence[Suspect], by: str, kind: str) -> Table:
    """The suspects with their texts, cut to what a terminal holds; the JSONL has them whole."""
    told = Table(title=f"Suspects ({kind}), by {by}", title_justify="left", show_lines=True)
    told.add_column(by, justify="right", no_wrap=True)
    told.add_column("where", overflow="fold")
    told.add_column("prompt and answer", overflow="fold")
    for each in suspects:
        text = Text(f"{_cut(each.prompt)}\n→ {_cut(each.answer)}")
        told.add_row(f"{each.score:.4g}", Text(f"{each.place}\n{each.id}"), text)
    return told


def write(suspects: Sequence[Suspect], by: str, path: Path) -> None:
    """``{"id", "place", "by", "score", "scores", "record"}`` for each, in order."""
    changed: Counter[str] = Counter()
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for each in suspects:
            told = {
                "id": each.id, "place": each.place, "by": by, "score": each.score, "scores": each.scores,
                "record": each.record,
            }  # fmt: skip
            file.write(json.dumps(plain(told, changed), ensure_ascii=False, allow_nan=False) + "\n")
    tell_changed(changed, path)


def _texts(example: Example) -> tuple[str, str]:
    """The last question and its answer; of a text, the text."""
    if not example.messages:
        return "", example.text or f"{len(example.input_ids)} tokens"
    answers = [at for at, message in enumerate(example.messages) if message["role"] == "assistant"]
    last = answers[-1] if answers else len(example.messages) - 1
    asked = example.messages[last - 1] if last else {}
    return str(asked.get("content") or ""), str(example.messages[last].get("content") or "")


def _cut(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"

"""The training examples in words for a report, from the tokenised examples in the run folder; no model is read.

What is shown is what training saw: the tokens, decoded. The beginning and the end that the prompts of all examples
share (a template's system prompt, the header of the answer) are left out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sftmix.data.store import TokenStore
from sftmix.report.examples import Scores
from sftmix.report.texts import Text, Texts, cut
from sftmix.run.session import Session

LONG = 1500  # characters of each text of the most and the least confident examples
_ALL = 4_000_000  # characters of the texts of all examples, from which a report cuts further
_SHORTEST, _LONGEST = 60, 2000
_WITHOUT = "texts of the examples: not in this page, "


def example_texts(session: Session, scores: Scores) -> Texts:
    """Texts of the examples that a report shows, longer ones of its extremes, and the lengths of all.

    Where the tokens are not in the folder, or not those of all examples, ``missing`` of the result says so.
    """
    try:
        found = session.kept_tokens()
    except (ValueError, OSError) as error:
        return Texts(missing=f"{_WITHOUT}{' '.join(str(error).split())}")
    if found is None:
        return Texts(
            missing=f"{_WITHOUT}the tokens of the present settings and data are not in {session.folder.tokens}; "
            "`sftmix run` makes them"
        )
    store, tokenizer = found
    lacking = [name for name in scores.ids if name not in store]
    if lacking:
        return Texts(
            missing=f"{_WITHOUT}{len(lacking)} of {len(scores.ids)} examples (first: {lacking[0]}) are not among the "
            f"tokens in {session.folder.tokens}"
        )
    extremes = [scores.ids[place] for part in scores.extremes for place in part]
    return texts_from(store, tokenizer, scores.ids, shown=scores.shown_ids, extremes=extremes)


def texts_from(
    store: TokenStore, tokenizer: Any, names: Sequence[str], *, shown: Sequence[str], extremes: Sequence[str]
) -> Texts:
    """The same from a store and its tokenizer: texts of ``shown`` and ``extremes``, lengths of all ``names``."""
    lengths = dict(zip(store, zip(*store.lengths(), strict=True), strict=True))
    first, last = _shared(store, shown)
    most = max(_SHORTEST, min(_LONGEST, _ALL // max(1, 2 * len(shown))))
    note = "Texts are the tokens that training saw, decoded: what stands before the first answer, and that answer."
    if first or last:
        note += (
            f" The prompts are shown without their first {first} and last {last} tokens, which are the same in all of "
            "them."
        )
    return Texts(
        short=_decoded(store, tokenizer, shown, first, last, most),
        long=_decoded(store, tokenizer, extremes, first, last, LONG),
        num_tokens={name: lengths[name][0] for name in names},
        num_supervised={name: lengths[name][1] for name in names},
        source=_sources({name: store.source_of(name) for name in shown}),
        note=note,
    )


def _sources(places: Mapping[str, str]) -> dict[str, str]:
    """The file, or data set, of places such as ``a/train.jsonl, line 3``, without the folders that all share."""
    files = {name: re.sub(r"(, (item|line|row) \d+)+$", "", place) for name, place in places.items()}
    parts = [Path(file).parts for file in {*files.values()}]
    depth = 0
    while parts and all(len(each) > depth + 1 and each[depth] == parts[0][depth] for each in parts):
        depth += 1
    return {name: "/".join(Path(file).parts[depth:]) for name, file in files.items()}


def _shared(store: TokenStore, names: Sequence[str]) -> tuple[int, int]:
    """How many tokens all prompts begin with, and how many they end with; none where there is only one prompt."""
    begin: list[int] | None = None
    end: list[int] = []
    shortest, different = 1 << 30, False
    for name in names:
        prompt = _parts(store, name)[0]
        shortest = min(shortest, len(prompt))
        if begin is None:
            begin, end = prompt, prompt[::-1]
            continue
        different = different or prompt != begin
        begin, end = _common(begin, prompt), _common(end, prompt[::-1])
    if begin is None or not different:
        return 0, 0
    return len(begin), min(len(end), shortest - len(begin))


def _common(a: Sequence[int], b: Sequence[int]) -> list[int]:
    size = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return list(a[:size])


def _parts(store: TokenStore, name: str) -> tuple[list[int], list[int]]:
    """The tokens before the first that bears loss, and those from there to the end of that answer."""
    ids, marks = store.tokens_of(name)
    start = marks.index(1) if 1 in marks else len(ids)
    stop = next((i for i in range(start, len(ids)) if not marks[i]), len(ids))
    return ids[:start], ids[start:stop]


def _decoded(
    store: TokenStore, tokenizer: Any, names: Sequence[str], first: int, last: int, most: int
) -> dict[str, Text]:
    """Texts of at most ``most`` characters, of no more tokens than that; "…" ends what has more of either."""
    parts: list[list[int]] = []
    for name in names:
        prompt, answer = _parts(store, name)
        parts += [prompt[first : len(prompt) - last], answer]
    begun = [part[:most] for part in parts]
    texts = tokenizer.batch_decode(begun, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    for i, part in enumerate(parts):
        text = texts[i].strip()
        # The last of the tokens may be a part of a character.
        texts[i] = (
            cut(text, most) if len(part) <= most else cut(text.rstrip("\ufffd"), most - 1).rstrip("…") + "…"
        )
    return {name: Text(*texts[2 * i : 2 * i + 2]) for i, name in enumerate(names)}

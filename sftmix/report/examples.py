"""The scored examples of a run as columns for its page, in as many bytes as the page has for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sftmix.report.packing import pack_counts, pack_decimals, pack_texts, size_in_base64
from sftmix.report.texts import Text, Texts, cut
from sftmix.scores.dynamics import Dynamics
from sftmix.scores.halves import Split, border

MOST = 50_000  # examples that a page draws; of more an even choice by rank
EXTREMES = 10  # examples at each end that are told with longer texts
_FEW, _MANY_DIGITS, _DIGITS = 20_000, 6, 4
_BINS = 48
_BOTH = 40  # characters from which prompt and answer are both shown
_LEAST = 8  # characters of a text below which none is worth its bytes
Values = NDArray[np.float64]


@dataclass(frozen=True)
class Scores:
    """E examples by falling confidence, of all that were scored, and which of them the page shows."""

    ids: list[str]  # [E]
    perplexity: Values  # [E], mean over the scoring points
    variability: Values | None  # [E]; None with one scoring point
    share: Values  # [E], top-1 share, mean over the points
    loss: Values  # [E], nats per token at the last point
    num_tokens: NDArray[np.int64]  # [E], tokens that bear loss
    half: NDArray[np.int64]  # [E], 0 confident, 1 unconfident, 2 not split
    shown: NDArray[np.int64]  # [S], places of those that are drawn
    median: float  # perplexity between the halves; of all examples where confidence does not part them
    border: str  # what that is: median or cut; "" where confidence does not part the halves
    points: int
    source: str  # checkpoint or online

    @property
    def shown_ids(self) -> list[str]:
        """Ids of the examples that are drawn, by falling confidence."""
        return [self.ids[i] for i in self.shown.tolist()]

    @property
    def extremes(self) -> tuple[list[int], list[int]]:
        """Places of the most and of the least confident examples, the furthest first; no example is in both."""
        size = min(EXTREMES, len(self.ids) // 2)
        last = len(self.ids)
        return list(range(size)), [last - 1 - i for i in range(size)]

    @property
    def digits(self) -> int:
        """Significant digits of the numbers of each example."""
        return _MANY_DIGITS if len(self.shown) <= _FEW else _DIGITS


def scores(dynamics: Dynamics, split: Split | None) -> Scores:
    """The examples of ``dynamics`` by falling confidence, with the halves of ``split``.

    Raises ``ValueError`` for a split of other examples.
    """
    half_of = _halves(dynamics, split)
    perplexity = dynamics.perplexity
    mean = perplexity.mean(axis=0)
    # An order of its own only where the split has none: the halves' border must lie between two neighbours.
    order = np.lexsort((np.array(dynamics.examples), mean))
    ids = [dynamics.examples[i] for i in order.tolist()]
    spread = np.std(perplexity, axis=0)[order] if dynamics.num_checkpoints > 1 else None
    total = len(ids)
    shown = (
        np.arange(total) if total <= MOST else np.unique(np.linspace(0, total - 1, MOST).round().astype(int))
    )
    mean = mean[order]
    median, word = _median(mean, split)
    return Scores(
        ids=ids, perplexity=mean, variability=spread,
        share=dynamics.top1_share.mean(axis=0)[order],
        loss=(dynamics.nll_sum[-1] / dynamics.num_tokens[-1])[order],
        num_tokens=dynamics.num_tokens[-1][order],
        half=np.array([half_of.get(name, 2) for name in ids], np.int64),
        shown=shown, median=median, border=word, points=dynamics.num_checkpoints, source=dynamics.source,
    )  # fmt: skip


def _halves(dynamics: Dynamics, split: Split | None) -> dict[str, int]:
    if split is None:
        return {}
    found = {**dict.fromkeys(split.confident, 0), **dict.fromkeys(split.unconfident, 1)}
    if found.keys() != set(dynamics.examples):
        common = len(found.keys() & set(dynamics.examples))
        raise ValueError(
            f"split: expected the {len(dynamics.examples)} examples of the dynamics, got {len(found)}, {common} of "
            "them in common"
        )
    return found


def _median(mean: Values, split: Split | None) -> tuple[float, str]:
    """The mean perplexity between the halves, as the pictures draw it, and what it is."""
    if split is None or not split.confidence:
        return float(np.median(mean)), "median" if split is None else ""
    found = border(split)
    return (float(np.median(mean)), "") if found is None else (-found[0], found[1])


def axis(values: Values) -> dict[str, Any]:
    """A logarithmic axis around what is finite and positive of ``values``, a histogram on it, and what is not on it.

    ``low`` and ``high`` count what is below (zero, or less) and infinite: it is drawn at the edges.
    """
    usable = values[np.isfinite(values) & (values > 0)]
    lowest, highest = (float(usable.min()), float(usable.max())) if len(usable) else (1.0, 1.0)
    margin = max((highest / lowest) ** 0.04, 1.05)
    ends = lowest / margin, highest * margin
    edges = np.geomspace(*ends, _BINS + 1)
    return {
        "from": ends[0], "to": ends[1], "counts": np.histogram(usable, edges)[0].tolist(),
        "low": int((values <= 0).sum()), "high": int(np.isposinf(values).sum()), "unknown": int(np.isnan(values).sum()),
    }  # fmt: skip


def halves_on(values: Values, half: NDArray[np.int64], ends: dict[str, Any]) -> list[list[int]]:
    """The histogram of ``axis`` by half: confident, unconfident, not split."""
    edges = np.geomspace(ends["from"], ends["to"], _BINS + 1)
    usable = np.isfinite(values) & (values > 0)
    return [np.histogram(values[usable & (half == k)], edges)[0].tolist() for k in range(3)]


def packed(found: Scores, texts: Texts, *, most_bytes: int) -> tuple[dict[str, bytes], dict[str, Any]]:
    """The columns of the shown examples by name, and what the page must know of them.

    In base64 they have at most ``most_bytes``, for texts are cut as much as it takes; ids and numbers never are.
    """
    at, names = found.shown, found.shown_ids
    sources = sorted({texts.source.get(name, "") for name in names})
    numbers = [found.perplexity, found.share, found.loss]
    numbers += [] if found.variability is None else [found.variability]
    tokens = [texts.num_tokens.get(name, 0) for name in names]
    places = {name: place for place, name in enumerate(sources)}
    columns = {
        "ids": pack_texts(names),
        "numbers": b"".join(pack_decimals(each[at], found.digits) for each in numbers)
        + pack_counts(found.num_tokens[at])
        + pack_counts(tokens)
        + pack_counts(found.half[at])
        + pack_counts([places[texts.source.get(name, "")] for name in names])
        + pack_counts(at),
    }
    left = most_bytes - sum(map(size_in_base64, columns.values()))
    said = [texts.short.get(name, Text("", "")) for name in names]
    size, columns["texts"] = _fitting(said, left)
    answers = size >= min(_BOTH, _longest(said))
    if not answers:  # two texts so short say less than one
        size, columns["texts"] = _fitting([Text(text.prompt or text.answer, "") for text in said], left)
    about = {
        "shown": len(names), "total": len(found.ids), "digits": found.digits, "sources": sources, "cut": size,
        "has_variability": found.variability is not None, "has_tokens": bool(texts.num_tokens), "answers": answers,
        "has_texts": bool(texts.short) and size > 0,
    }  # fmt: skip
    return columns, about


def _fitting(texts: list[Text], left: int) -> tuple[int, bytes]:
    """The most characters a text for which all fit into ``left`` bytes, and the texts so cut; 0 for none."""

    def trial(size: int) -> tuple[bool, bytes]:
        content = pack_texts([cut(part, size) for text in texts for part in (text.prompt, text.answer)])
        return size_in_base64(content) <= left, content

    longest = _longest(texts)
    fits, best, size = 0, pack_texts([""] * 2 * len(texts)), _LEAST
    while fits < longest:  # from short to long, so that what is tried is never much too long
        is_short, content = trial(size)
        if not is_short:
            break
        fits, best, size = size, content, 2 * size
    fails = size
    while fits and fits < longest and fails - fits > 1:
        middle = (fits + fails) // 2
        is_short, content = trial(middle)
        if is_short:
            fits, best = middle, content
        else:
            fails = middle
    return min(fits, longest), best


def _longest(texts: list[Text]) -> int:
    return max((max(len(text.prompt), len(text.answer)) for text in texts), default=0)

"""What became of a data set, to be read: a table, the first examples as marked tokens, or lines of JSON."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from sftmix.data.prepare import SHOWN
from sftmix.data.rows import Account, Fault
from sftmix.data.tokens import Shown

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

    from sftmix.data.store import TokenStore

_SHARES = (0.0, 0.5, 0.9, 0.99, 1.0)


def first_object(account: Account) -> dict[str, Any]:
    """The account as the first object of ``sftmix data --json``."""
    return {
        "rows_read": account.rows_read,
        "rows_used": account.rows_used,
        "dropped": dict(account.dropped),
        "ignored": dict(account.ignored),
        "cut": account.cut,
        "duplicates": account.duplicates,
        "supervised_tokens": account.supervised_tokens,
        "tokens": account.tokens,
        "forms": dict(account.forms),
        "notes": dict(account.notes),
        "faults": [vars(fault) for fault in account.faults],
    }


def example_object(shown: Shown, source: str) -> dict[str, Any]:
    """One example as a further object: every token with its weight in the loss."""
    return {
        "id": shown.example.id,
        "source": source,
        "text": shown.text,
        "tokens": [list(pair) for pair in zip(shown.tokens, weights(shown), strict=True)],
    }


def weights(shown: Shown) -> list[float]:
    """The weight of each token."""
    example = shown.example
    if example.weights is not None:
        return list(example.weights)
    return [float(mark) for mark in example.supervised]


def lines(account: Account, store: TokenStore | None = None) -> list[str]:
    """The same in words, one line a fact: what a run says at its start."""
    told = [f"rows: {account.rows_used} of {account.rows_read} used ({_counts(account.forms) or 'none'})"]
    if account.dropped:
        told.append(f"left out: {_counts(account.dropped)}")
        told += [f"  {fault.place}: {fault.reason}" for fault in account.faults[:SHOWN]]
        more = sum(account.dropped.values()) - len(account.faults[:SHOWN])
        told += [f"  … and {more} more"] if more else []
    if account.ignored:
        told.append(f"ignored fields: {_counts(account.ignored)}")
    told += [f"note: {text} ({count} rows)" for text, count in account.notes.most_common()]
    if account.duplicates:
        told.append(f"duplicates: {account.duplicates} rows equal to an earlier one, all used")
    if account.rows_used:
        share = account.supervised_tokens / account.tokens
        told.append(f"tokens: {account.tokens}, of which {account.supervised_tokens} ({share:.0%}) bear loss")
        told.append(
            f"cut to the longest length: {account.cut} examples"
            + ", whose answers have no end" * bool(account.cut)
        )
    if store is not None and len(store):
        told += _measures(store)
    return told


def _measures(store: TokenStore) -> list[str]:
    lengths, supervised = store.lengths()
    told = []
    for name, values in (("length", lengths), ("tokens that bear loss", supervised)):
        ranked = sorted(values)
        cells = [ranked[min(len(ranked) - 1, int(share * len(ranked)))] for share in _SHARES]
        labels = ("least", "median", "90 %", "99 %", "most")
        told.append(
            f"{name} of an example: " + ", ".join(f"{a} {b}" for a, b in zip(labels, cells, strict=True))
        )
    if len(store) > 1:
        told.append(
            f"pairs: {_lost_share(supervised):.0%} of the tokens that bear loss are beyond the shorter partner"
        )
    return told


def _lost_share(supervised: Sequence[int]) -> float:
    """The share that random pairs leave unmixed: what of the longer answer goes beyond the shorter."""
    import numpy as np

    order = np.random.default_rng(0).permutation(len(supervised))
    sizes = np.asarray(supervised)[order[: len(order) // 2 * 2]].reshape(-1, 2)
    return float(1 - 2 * sizes.min(axis=1).sum() / sizes.sum())


def _counts(kinds: Counter[str]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())


def table(account: Account, store: TokenStore | None, title: str) -> Table:
    """The lines as a table, for a terminal."""
    from rich.table import Table
    from rich.text import Text

    made = Table(title=title, title_justify="left", show_header=False, show_edge=False, pad_edge=False)
    made.add_column(style="bold", no_wrap=True)
    made.add_column(overflow="fold")
    for line in lines(account, store):
        name, colon, rest = line.partition(": ")
        is_detail = line.startswith("  ") or not colon
        made.add_row("" if is_detail else name, Text(line.strip() if is_detail else rest))
    return made


def marked(shown: Shown, source: str, *, colours: bool) -> Text:
    """An example's text: what bears loss in colour, or between ⟦ and ⟧ where there is none."""
    from rich.text import Text

    made = Text()
    made.append(f"{source} ({shown.example.id})\n", style="bold" if colours else "")
    before = 0.0
    for i, (token, weight) in enumerate(zip(shown.tokens, weights(shown), strict=True)):
        if not colours and weight != before:
            made.append(
                "⟧" * bool(before) + ("" if not weight else f"⟦{'' if weight == 1 else f'{weight:g}× '}")
            )
        # Two shades by turns, so that each token can be told from the next.
        shades = (
            ("black on green", "black on bright_green")
            if weight == 1
            else ("black on yellow", "black on bright_yellow")
        )
        made.append(token, style=shades[i % 2] if colours and weight > 0 else "")
        before = weight
    made.append("⟧" * (not colours and bool(before)) + (" … (cut)" if shown.example.cut else "") + "\n")
    return made


def json_lines(account: Account, shown: Iterator[tuple[Shown | Fault, str]]) -> Iterator[str]:
    """The objects of ``sftmix data --json``, a line each."""
    yield json.dumps(first_object(account), ensure_ascii=False)
    for found, source in shown:
        if isinstance(found, Shown):
            yield json.dumps(example_object(found, source), ensure_ascii=False)

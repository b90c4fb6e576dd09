"""``sftmix compare``: the figures, settings and scores of several runs, in the terminal and as one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sftmix.progress import activity, say, show

if TYPE_CHECKING:
    from rich.table import Table

    from sftmix.report.compare import Agreement


def compare(
    runs: Annotated[
        list[str], typer.Argument(help="run folders; differences are to the first", show_default=False)
    ],
    out: Annotated[str, typer.Option(help="HTML file to write")] = "compare.html",
) -> None:
    """Several runs side by side, with differences to the first.

    Held-out figures, settings that differ, agreement of scores and halves; in the terminal, and as one HTML page.
    """
    target = Path(out)
    if target.is_dir() or target.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"out: expected the name of an HTML file, got {out}")
    with activity("reading the runs"):
        from sftmix.report.compare import (
            agreements,
            common_examples,
            content,
            figures,
            gather_runs,
        )
        from sftmix.report.packing import as_json
        from sftmix.report.page import page, write

        found = gather_runs(runs)
        told = content(found)
        columns, told["examples"] = common_examples(found)
    labels = [label for label, _ in found]
    rows = figures(found)
    if rows:
        show(_figures_table(rows))
    else:
        say("compare: no run has held-out figures")
    _say_settings(told["settings"], labels)
    agreed = agreements(found)
    if agreed:
        show(_agreement_table(agreed, labels[0]))
    else:
        say(f"compare: no agreement of scores, {labels[0]} or all others have none")
    for note in told["notes"]:
        say(f"note: {note}")
    say(f"page: {write(target, page('compare', told['title'], {'content': as_json(told), **columns}))}")


def _table(title: str, columns: tuple[str, ...], words: int) -> Table:
    """A table whose first so many columns are words."""
    from rich.table import Table

    made = Table(title=title, title_justify="left", show_edge=False, pad_edge=False)
    for i, name in enumerate(columns):
        made.add_column(name, justify="left" if i < words else "right", overflow="fold")
    return made


def _figures_table(rows: list[dict[str, Any]]) -> Table:
    from rich.text import Text

    columns = ("model", "run", "NLL", "±", "perplexity", "±", "accuracy", "±")
    made = _table("Held-out figures, and differences to the first run", columns, 2)
    for row in rows:
        mark = "" if row["same_heldout"] else " *"
        made.add_row(
            row["model"], Text(row["run"] + mark), f"{row['nll']:.4f}", _signed(row["d_nll"], ".4f"),
            f"{row['perplexity']:.3f}", _signed(row["d_perplexity"], ".3f"), f"{row['token_accuracy']:.2%}",
            _signed(row["d_token_accuracy"], ".2%"),
        )  # fmt: skip
    if any(not row["same_heldout"] for row in rows):
        made.caption = "* about other held-out examples than the first run's, or the first has no such model"
        made.caption_justify = "left"
    return made


def _signed(value: float | None, form: str) -> str:
    return "–" if value is None else f"{value:+{form}}"


def _say_settings(rows: list[list[str]], labels: list[str]) -> None:
    from rich.text import Text

    if not rows:
        say("settings: the same in all runs")
        return
    made = _table("Settings that differ", ("knob", *labels), len(labels) + 1)
    for row in rows:
        made.add_row(*map(Text, row))
    show(made)


def _agreement_table(agreed: list[Agreement], first: str) -> Table:
    from rich.text import Text

    columns = ("run", "examples", "in common", "rank correlation", "same half", "confident in both")
    made = _table(f"Scores, compared with those of {first}", columns, 1)
    for each in agreed:
        made.add_row(
            Text(each.label), f"{each.examples:,}", f"{each.common:,}", f"{each.spearman:.3f}",
            _share(each.same_half), _share(each.shared_confident),
        )  # fmt: skip
    made.caption = (
        "rank correlation: Spearman's of confidence; confident in both: of those confident in either"
    )
    made.caption_justify = "left"
    return made


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"

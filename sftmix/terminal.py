"""The command line on a terminal: help that fits a screen, completion that knows the knobs, exit codes in a line."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from typer.core import TyperCommand, TyperGroup

from sftmix.config import Config, describe
from sftmix.knobs import Knob, collect_knobs
from sftmix.progress import show
from sftmix.recipes import recipes

# The help's last line; README.md has a section.
EXIT_CODES = "Exit codes: 0 done, 1 a fault, 2 refused, 130/143/138 stopped by a signal."


class Commands(TyperGroup):
    """The commands; ``--show-completion`` works but is not in the help, so that all of it fits a screen."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        for parameter in self.params:
            if parameter.name == "show_completion":
                setattr(parameter, "hidden", True)  # noqa: B010  (typer's options have it, their base class has not)
        super().format_options(ctx, formatter)


class KnobCommand(TyperCommand):
    """A command whose further flags are knobs: ``--train.ep`` and the TAB key give ``--train.epochs``."""

    def shell_complete(self, ctx: Any, incomplete: str) -> list[Any]:
        found = super().shell_complete(ctx, incomplete)
        # typer brings its own click, or uses an installed one: the class of an item is that of typer's own.
        item = type(super().shell_complete(ctx, "--help")[0])
        return [*found, *(item(value, help=text) for value, text in _completions(ctx.args, incomplete))]


def _completions(before: list[str], incomplete: str) -> Iterator[tuple[str, str | None]]:
    """What may stand for an unfinished word: names of knobs, or the values of the knob before it, with their help."""
    knobs = collect_knobs(Config)
    if incomplete.startswith("-"):
        for name, knob in knobs.items():
            if f"--{name}".startswith(incomplete):
                yield f"--{name}", knob.field.metadata["help"]
        return
    named = knobs.get(before[-1].removeprefix("--")) if before else None
    for value in _values(named) if named is not None else ():
        if value.startswith(incomplete):
            yield value, None


def _values(knob: Knob) -> tuple[str, ...]:
    if knob.base is bool:
        return "true", "false"
    return tuple(knob.field.metadata["choices"] or ())


def list_knobs() -> None:
    """List every knob with its default and meaning."""
    _table(
        ("knob", "default", "meaning"),
        ((name, str(default), meaning) for name, default, meaning in describe()),
    )


def list_recipes() -> None:
    """List the recipes: settings to begin with, for --config."""
    _table(("recipe", "what it is for"), recipes().items())


def list_forms() -> None:
    """The forms of rows that are recognised, their columns, and what becomes of them."""
    from sftmix.data.forms import forms_table

    rows = (
        (name, columns.replace("[", r"\[").replace("|", " | "), becomes)
        for name, columns, becomes in forms_table()
    )
    _table(("form", "columns, those that may be missing in brackets", "what becomes of them"), rows)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    from rich.table import Table

    table = Table(*head)
    for row in rows:
        table.add_row(*row)
    show(table)

"""``sftmix data``: what would become of a data set, before any training."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from sftmix.config import Config
from sftmix.data.prepare import Source, check, prepare
from sftmix.data.rows import Fault
from sftmix.data.summary import json_lines, lines, marked, table
from sftmix.data.tokens import Encoder, Shown
from sftmix.progress import activity, console, on_terminal, say, show
from sftmix.run.inputs import settle_date, token_options, tokenizer_for, train_source


def inspect_data(config: Config, *, limit: int, as_json: bool) -> None:
    """Read, tokenise and count ``data.train``; print the account and the first ``limit`` examples.

    Raises ``ValueError`` where a run would refuse the data, after it has printed what it found.
    """
    config = settle_date(config)
    source = train_source(config)
    model = config.model
    if as_json:  # nothing but JSON on the screen
        return _inspect(config, source, model, limit, as_json)
    with activity("reading and tokenising the examples"):
        return _inspect(config, source, model, limit, as_json)


def _inspect(config: Config, source: Source, model: Any, limit: int, as_json: bool) -> None:
    tokenizer, options = tokenizer_for(config, model), token_options(config, model)
    with tempfile.TemporaryDirectory() as folder:
        store = prepare(
            source,
            tokenizer,
            options,
            folder=Path(folder),
            num_workers=config.data.num_workers,
            bad_rows=None,
        )
        examples = _examples(source, Encoder(tokenizer, options), limit)
        if as_json:
            for line in json_lines(store.account, examples):
                print(line)
        else:
            title = f"{config.data.train} for {config.model.name}, at most {options.max_length} tokens"
            if on_terminal():
                show(table(store.account, store, title))
            else:
                for line in (title, *lines(store.account, store)):
                    say(line)
            for found, place in examples:
                if isinstance(found, Shown):
                    console.print(marked(found, place, colours=on_terminal()), soft_wrap=True)
        check(
            store.account,
            source.name,
            bad_rows=config.data.bad_rows,
            too_long=options.too_long,
            listed=as_json,
        )


def _examples(source: Source, encoder: Encoder, limit: int) -> Iterator[tuple[Shown | Fault, str]]:
    """The first examples that can be used, with their places."""

    def usable() -> Iterator[tuple[Shown | Fault, str]]:
        for example in source.examples():
            shown = encoder.show(example)
            if isinstance(shown, Shown):
                yield shown, example.place

    return islice(usable(), limit)

"""The data of a run: its sources, the options of its tokens, and the tokenised examples in the run folder."""

from __future__ import annotations

import dataclasses
import datetime
from pathlib import Path
from typing import Any

from sftmix.config import Config, ModelConfig
from sftmix.data.fingerprint import fingerprint
from sftmix.data.forms import parse_columns
from sftmix.data.prepare import Source, prepare
from sftmix.data.read import source_files
from sftmix.data.store import TokenStore
from sftmix.data.template import read_arguments, use_chat_template
from sftmix.data.tokens import TokenOptions
from sftmix.model.tokenizer import generation_stops, load_tokenizer, longest


def settle_date(config: Config, earlier: Config | None = None) -> Config:
    """The configuration with the date that chat templates print: as given, as recorded before, or today's.

    It is fixed once for a run, so that a run that goes on tomorrow has the same tokens.
    """
    if config.data.date is not None:
        return config
    date = earlier.data.date if earlier is not None else None
    date = date or datetime.date.today().isoformat()
    return dataclasses.replace(config, data=dataclasses.replace(config.data, date=date))


def train_source(config: Config) -> Source:
    """Where the training examples are read from. Raises ``ValueError`` for ``data.columns`` that do not parse."""
    data = config.data
    columns = parse_columns(data.columns) if data.columns else {}
    return Source(data.train, data.split, data.configuration, data.streaming, data.limit, data.form, columns)


def heldout_source(config: Config) -> Source | None:
    """Where the held-out examples are read from; None for a part of the training examples."""
    data = config.data
    if data.heldout is None:
        return None
    source = train_source(config)
    return dataclasses.replace(
        source,
        name=data.heldout,
        split=data.heldout_split,
        configuration=data.heldout_configuration,
        limit=None,
    )


def tokenizer_for(config: Config, model: ModelConfig) -> Any:
    """The model's tokenizer with the configured chat template."""
    tokenizer = load_tokenizer(model)
    if config.data.chat_template is not None:
        use_chat_template(tokenizer, config.data.chat_template)
    return tokenizer


def token_options(config: Config, model: ModelConfig) -> TokenOptions:
    """How examples become tokens for ``model``. Raises ``ValueError`` for knobs that the model does not allow."""
    data = config.data
    return TokenOptions(
        max_length=longest(model, data.max_length), supervise=data.supervise, too_long=data.too_long,
        special_tokens=data.special_tokens, template_drops=data.template_drops, end_token=data.end_token,
        date=data.date, template_arguments=read_arguments(data.template_arguments), stop_ids=generation_stops(model),
    )  # fmt: skip


def prepared(
    config: Config, source: Source, tokenizer: Any, options: TokenOptions, folder: Path, *, anew: bool = True
) -> Any:
    """The tokenised examples of one source as a store, made or found in ``folder``; ``anew``: as for ``prepare``."""
    return prepare(
        source,
        tokenizer,
        options,
        folder=folder,
        num_workers=config.data.num_workers,
        bad_rows=config.data.bad_rows,
        anew=anew,
    )


def kept(source: Source, tokenizer: Any, options: TokenOptions, folder: Path) -> TokenStore | None:
    """The tokenised examples of one source if ``prepared`` has left them in ``folder``; nothing is made.

    Raises ``ValueError`` for a source that is not there, and for a damaged file.
    """
    files = source_files(source.name, split=source.split)
    path = folder / f"{fingerprint(source, tokenizer, options, files)}.arrow"
    return TokenStore(path) if path.exists() else None

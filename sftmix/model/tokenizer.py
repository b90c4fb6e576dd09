"""What the data must know of a model before it is loaded: tokenizer, positions, and where its generation stops."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sftmix.config import ModelConfig
from sftmix.model.source import options, place, read_configuration, reading, underlying
from sftmix.model.vocabulary import extend_tokenizer, highest_id

_LONGEST = 2048  # data.max_length, where the model's positions allow it


def load_tokenizer(model: ModelConfig) -> Any:
    """The model's tokenizer with ``model.added_tokens``. Raises ``ValueError`` naming the model if there is none."""
    return extended_tokenizer(model)[0]


def extended_tokenizer(model: ModelConfig) -> tuple[Any, list[str]]:
    """The tokenizer, and those of ``model.added_tokens`` that it lacked."""
    from transformers import AutoTokenizer

    if not (Path(place(model)) / "tokenizer_config.json").is_file():
        model = underlying(model)  # an adapter's folder need not have one
    name = place(model)
    with reading(model, "a tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(name, **options(model))
    return tokenizer, extend_tokenizer(tokenizer, model)


def _configuration(model: ModelConfig) -> Any:
    """The model's configuration; None for a folder with a tokenizer only, which is enough to look at data."""
    try:
        return read_configuration(model)
    except ValueError:  # a run says so when it loads the model
        return None


def positions(model: ModelConfig) -> int | None:
    """The longest sequence the model has positions for; None where its configuration names no bound."""
    config = _configuration(model)
    found = None if config is None else getattr(config.get_text_config(), "max_position_embeddings", None)
    return int(found) if isinstance(found, int) and found > 0 else None


def rows(model: ModelConfig) -> int | None:
    """The rows of the embedding as the configuration names them, added tokens included; None where it names none."""
    config = _configuration(model)
    found = None if config is None else getattr(config.get_text_config(), "vocab_size", None)
    if not isinstance(found, int):
        return None
    return max(found, highest_id(load_tokenizer(model)) + 1) if model.added_tokens else found


def longest(model: ModelConfig, asked: int | None) -> int:
    """``data.max_length``: what was asked, or the model's positions, at most 2048.

    Raises ``ValueError`` where more is asked than the model has positions for.
    """
    found = positions(model)
    if asked is None:
        return min(_LONGEST, found or _LONGEST)
    if found is not None and asked > found:
        raise ValueError(
            f"data.max_length: expected at most the {found} positions of {model.name}, got {asked}"
        )
    return asked


def generation_stops(model: ModelConfig) -> tuple[int, ...]:
    """The ids at which the model's generation settings stop; its configuration's where it has no settings."""
    from transformers import GenerationConfig

    found: Any = None
    try:
        base = underlying(model)
        found = GenerationConfig.from_pretrained(place(base), revision=base.revision or "main").eos_token_id
    except (OSError, ValueError):  # a model need not have any
        pass
    config = _configuration(model) if found is None else None
    if config is not None:
        found = getattr(config, "eos_token_id", None)
        if found is None:
            found = getattr(config.get_text_config(), "eos_token_id", None)
    if found is None:
        return ()
    return tuple(int(token) for token in (found if isinstance(found, Iterable) else [found]))

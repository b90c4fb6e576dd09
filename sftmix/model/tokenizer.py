"""What the data must know of a model before it is loaded: tokenizer, positions, and where its generation stops."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sftmix.config import ModelConfig

_LONGEST = 2048  # data.max_length, where the model's positions allow it


def _source(model: ModelConfig) -> dict[str, Any]:
    source: dict[str, Any] = {"revision": model.revision or "main"}
    return {**source, "gguf_file": model.gguf_file} if model.gguf_file else source


def load_tokenizer(model: ModelConfig) -> Any:
    """The model's tokenizer. Raises ``ValueError`` naming the model if there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model.name, **_source(model))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"model.name: expected a model with a tokenizer, got {model.name} ({error})"
        ) from error


def _configuration(model: ModelConfig) -> Any:
    """The model's configuration; None for a folder with a tokenizer only, which is enough to look at data."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(model.name, **_source(model))
    except (OSError, ValueError, KeyError):  # a run says so when it loads the model
        return None


def positions(model: ModelConfig) -> int | None:
    """The longest sequence the model has positions for; None where its configuration names no bound."""
    config = _configuration(model)
    found = None if config is None else getattr(config.get_text_config(), "max_position_embeddings", None)
    return int(found) if isinstance(found, int) and found > 0 else None


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
        found = GenerationConfig.from_pretrained(model.name, revision=model.revision or "main").eos_token_id
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

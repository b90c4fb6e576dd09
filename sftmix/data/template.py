"""The chat template of a tokenizer: rendering, and what it shows of itself on a tiny conversation.

A template is Jinja code that anyone may have written. It is compiled once, in transformers' sandbox, and rendered with
the arguments of the run; the date it may print is the run's, so that the same row gives the same tokens tomorrow.
"""

from __future__ import annotations

import datetime
import json
import os
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from sftmix.data.rows import Message, RowError

_GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")
Span = tuple[int, int]  # characters [start, stop) of a rendered text


def use_chat_template(tokenizer: Any, path: str | os.PathLike[str]) -> None:
    """Give the tokenizer the Jinja template in ``path`` (``data.chat_template``)."""
    try:
        template = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"data.chat_template: expected a text file, got {path} ({error})") from error
    if not template.strip():
        raise ValueError(f"data.chat_template: expected a template, got an empty file {path}")
    tokenizer.chat_template = template


def read_arguments(text: str | None) -> dict[str, Any]:
    """``data.template_arguments`` as a dict. Raises ``ValueError`` for anything but a JSON object."""
    if text is None:
        return {}
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"data.template_arguments: expected a JSON object, got {text!r:.80} ({error})"
        ) from error
    if not isinstance(found, dict):
        raise ValueError(f"data.template_arguments: expected a JSON object, got {text!r:.80}")
    return found


def read_date(text: str | None) -> datetime.datetime:
    """``data.date`` as noon of that day; today's for None. Raises ``ValueError`` for another form."""
    try:
        day = datetime.date.today() if text is None else datetime.date.fromisoformat(text)
    except ValueError:
        raise ValueError(f"data.date: expected YYYY-MM-DD, got {text!r}") from None
    return datetime.datetime.combine(day, datetime.time(12))


class ChatTemplate:
    """One tokenizer's template with the arguments of the run; ``stop_ids`` are those generation stops at."""

    def __init__(
        self, tokenizer: Any, *, arguments: Mapping[str, Any] | None = None, date: str | None = None,
        stop_ids: Sequence[int] = (),
    ) -> None:  # fmt: skip
        if not getattr(tokenizer, "chat_template", None):
            name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
            raise ValueError(
                f"tokenizer: expected a chat template, got none in {name}; give data.chat_template"
            )
        self.tokenizer = tokenizer
        self.arguments = dict(arguments or {})
        self._day = read_date(date)
        self._stop_ids = tuple(stop_ids)
        self._sources: dict[bool, str] = {}
        self._compiled: dict[bool, Any] = {}

    def _source(self, tools: Sequence[Any]) -> str:
        """The template's text: a tokenizer may have another one for conversations with tools."""
        key = bool(tools)
        if key not in self._sources:
            self._sources[key] = str(self.tokenizer.get_chat_template(tools=list(tools) or None))
        return self._sources[key]

    def _compile(self, tools: Sequence[Any]) -> Any:
        key = bool(tools)
        if key not in self._compiled:
            from transformers.utils.chat_template_utils import _compile_jinja_template

            self._compiled[key] = _compile_jinja_template(self._source(tools))
        return self._compiled[key]

    @cached_property
    def _shared(self) -> dict[str, Any]:
        return {**self.tokenizer.special_tokens_map, "strftime_now": self._day.strftime, **self.arguments}

    def render(
        self, messages: Sequence[Message], *, tools: Sequence[Any] = (),
        arguments: Mapping[str, Any] | None = None, prompt: bool = False,
    ) -> str:  # fmt: skip
        """The text of a conversation; ``prompt`` adds the beginning of the next answer.

        Raises ``RowError`` for whatever the template raises.
        """
        variables = {**self._shared, **arguments} if arguments else self._shared
        try:
            compiled = self._compiled.get(bool(tools)) or self._compile(tools)
            return str(
                compiled.render(
                    messages=list(messages), tools=list(tools) or None, documents=None,
                    add_generation_prompt=prompt, **variables,
                )
            )  # fmt: skip
        except Exception as error:  # Jinja errors, and whatever a template's own code runs into
            raise _unrenderable(messages, error) from error

    def has_tags(self, tools: Sequence[Any] = ()) -> bool:
        """Whether the template marks the assistant's text with ``{% generation %}``."""
        return _GENERATION_TAG.search(self._source(tools)) is not None

    def tagged_spans(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Any] = (),
        arguments: Mapping[str, Any] | None = None,
    ) -> list[Span]:
        """The spans of the ``{% generation %}`` blocks in the text that ``render`` gives."""
        compiled = self._compile(tools)
        blocks: list[str] = []
        spans: list[Span] = []
        variables = {**self._shared, **(arguments or {})}
        try:
            with compiled.environment.activate_tracker(blocks, spans):
                for block in compiled.generate(
                    messages=list(messages), tools=list(tools) or None, documents=None,
                    add_generation_prompt=False, **variables,
                ):  # fmt: skip
                    blocks.append(block)
        except Exception as error:  # as above
            raise _unrenderable(messages, error) from error
        return [(int(start), int(stop)) for start, stop in spans]

    # --- what generation does ---

    @cached_property
    def added_tokens(self) -> re.Pattern[str] | None:
        """Matches any token that was added to the vocabulary, white space excepted."""
        added = {str(token) for token in getattr(self.tokenizer, "added_tokens_decoder", {}).values()}
        added |= set(self.tokenizer.all_special_tokens)
        names = sorted((token for token in added if token.strip()), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, names))) if names else None

    @cached_property
    def known_stops(self) -> frozenset[str]:
        """Tokens at which generation stops today: the tokenizer's eos and those of the generation settings."""
        stops = {self.tokenizer.eos_token} | set(self.tokenizer.convert_ids_to_tokens(list(self._stop_ids)))
        return frozenset(stop for stop in stops if stop)

    @cached_property
    def prompt_segments(self) -> list[str]:
        """What ``add_generation_prompt`` puts before an answer, cut at added tokens; [] if it changes nothing."""
        question = [{"role": "user", "content": "a"}]
        try:
            without, through = self.render(question), self.render(question, prompt=True)
        except RowError:
            return []
        ours, theirs = self.segments(through), self.segments(without)
        same = 0
        while same < min(len(ours), len(theirs)) and ours[same] == theirs[same]:
            same += 1
        return ours[same:]

    def segments(self, text: str) -> list[str]:
        """A text cut into its added tokens, each whole, and single characters."""
        parts: list[str] = []
        last = 0
        for match in self.added_tokens.finditer(text) if self.added_tokens else ():
            parts += [*text[last : match.start()], match[0]]
            last = match.end()
        return [*parts, *text[last:]]


def _unrenderable(messages: Sequence[Message], error: Exception) -> RowError:
    roles = ", ".join(str(message["role"]) for message in messages[:8])
    roles += ", …" if len(messages) > 8 else ""
    return RowError(
        "refused by the chat template",
        f"expected a conversation that the chat template can render, got roles {roles} "
        f"({type(error).__name__}: {error})",
    )

"""A rendered text to token ids, and which tokens stand for which of its characters.

The whole text is tokenised once, so the tokens are those that the model will see. A token belongs to a span when its
last character lies inside; one that begins before the span does so only if what it takes from there is white space (a
tokenizer may join "Assistant: " and "yes" as " yes").

A special token's string inside somebody's text (``fakes``) can be kept text: the text is then cut at its real special
tokens, as the tokenizer itself cuts it, and the parts are tokenised without special tokens.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from sftmix.data.rows import RowError
from sftmix.data.template import Span

Encoded = tuple[list[int], list[Span]]  # ids, and the tokens [first, last) of each span


def encode(
    tokenizer: Any, texts: Sequence[str], spans: Sequence[Sequence[Span]]
) -> Iterator[tuple[list[int], list[Span]]]:
    """Ids of each text, and the tokens of each of its spans, which are in order and do not overlap."""
    if not texts:
        return
    if not tokenizer.is_fast:
        for text, found in zip(texts, spans, strict=True):
            yield _by_prefix(text, found, tokenizer)
        return
    for encoding, text, found in zip(_encodings(tokenizer, list(texts)), texts, spans, strict=True):
        yield encoding.ids, _token_spans(encoding, text, found)


def _encodings(tokenizer: Any, texts: list[str]) -> Sequence[Any]:
    """The texts' encodings: the backend's own, without the copies that transformers makes of them."""
    from transformers import PreTrainedTokenizerFast

    if (
        type(tokenizer)._encode_plus is not PreTrainedTokenizerFast._encode_plus
    ):  # it does more than its backend
        found = tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, verbose=False
        ).encodings
        return list(found)
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = False
    return list(backend.encode_batch(texts, add_special_tokens=False))


def _token_spans(encoding: Any, text: str, spans: Sequence[Span]) -> list[Span]:
    """The tokens of each span: at once where both its ends are those of tokens, else from all tokens' characters."""
    tokens = []
    for start, stop in spans:
        if start >= stop:
            tokens.append((0, 0))
            continue
        first = None if text[start].isspace() else encoding.char_to_token(start)
        last = None if text[stop - 1].isspace() else encoding.char_to_token(stop - 1)
        if (
            first is None
            or last is None
            or encoding.token_to_chars(first)[0] != start
            or encoding.token_to_chars(last)[1] != stop
            or not text[
                stop - 1
            ].isascii()  # a character may be several tokens, and the first of them is found
        ):
            return by_offsets(encoding.offsets, text, spans)
        tokens.append((first, last + 1))
    return tokens


def by_offsets(offsets: Sequence[Span], text: str, spans: Sequence[Span]) -> list[Span]:
    """The tokens of each span from every token's characters.

    A token is taken to begin where the one before it ended: tokenizers leave white space, and all but the
    first byte of a character, out of the offsets they report.
    """
    owners: list[int | None] = []
    start = at = 0
    for _, stop in offsets:
        while at < len(spans) and start >= spans[at][1]:
            at += 1
        stop = max(start, stop)
        if stop == start and owners:
            owners.append(owners[-1])  # a further byte of the same character
        else:
            owners.append(at if at < len(spans) and _inside(text, start, stop, spans[at]) else None)
        start = stop
    tokens = [(0, 0)] * len(spans)
    for token, owner in enumerate(owners):
        if owner is not None:
            first, last = tokens[owner]
            tokens[owner] = (token if first == last else first, token + 1)
    return tokens


def characters(text: str, offsets: Sequence[Span]) -> list[str]:
    """The characters that each token stands for; together they are the text."""
    names, start = [], 0
    for i, (_, stop) in enumerate(offsets):
        stop = len(text) if i + 1 == len(offsets) else max(start, stop)
        names.append(text[start:stop])
        start = stop
    return names


def _inside(text: str, start: int, stop: int, span: Span) -> bool:
    """Whether a token of characters [start, stop) belongs to a span; white space may stick out."""
    if stop <= span[0] or start >= span[1]:
        return False
    return not text[start : span[0]].strip() and not text[span[1] : stop].strip()


def _by_prefix(text: str, spans: Sequence[Span], tokenizer: Any) -> Encoded:
    """The same for a tokenizer without offsets: compare the ids of the text up to each boundary."""

    def shared(stop: int) -> int:
        prefix = tokenizer(text[:stop], add_special_tokens=False)["input_ids"]
        pairs = enumerate(zip(prefix, ids, strict=False))
        return next((i for i, (one, other) in pairs if one != other), min(len(prefix), len(ids)))

    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids, [(shared(start), shared(stop)) for start, stop in spans]


class SpecialTokens:
    """The strings of a tokenizer's special tokens, and tokenising around those that are somebody's text."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        added = getattr(tokenizer, "added_tokens_decoder", {}).values()
        flags = {str(token): token for token in added if token.special}
        flags |= {token: flags.get(token) for token in tokenizer.all_special_tokens}
        names = sorted((name for name in flags if name.strip()), key=len, reverse=True)
        self._plain = re.compile("|".join(map(re.escape, names))) if names else None
        self._longest = max(map(len, names), default=1)
        edges = {name[0] for name in names} | {name[-1] for name in names}
        self._edges = re.compile("[" + "".join(map(re.escape, sorted(edges))) + "]" if edges else r"(?!)")
        parts = [
            rf"{_blank(flags[name], 'lstrip')}{re.escape(name)}{_blank(flags[name], 'rstrip')}"
            for name in names
        ]
        self._wide = re.compile("|".join(parts)) if names else None

    def fakes(self, text: str, pieces: Sequence[Span]) -> list[Span]:
        """Where a special token's string overlaps one of ``pieces``, the texts that the rows themselves hold."""
        if self._plain is None:
            return []
        found = []
        for start, stop in pieces:
            # A token that overlaps a piece has its first or its last character in it; most pieces hold none of them.
            if self._edges.search(text, start, stop) is None:
                continue
            first, last = max(0, start - self._longest + 1), min(len(text), stop + self._longest - 1)
            spans = (match.span() for match in self._plain.finditer(text, first, last))
            found += [span for span in spans if span[0] < stop and start < span[1]]
        return sorted(set(found))

    def occurs(self, text: str) -> bool:
        return self._plain is not None and self._plain.search(text) is not None

    def encode(self, text: str, spans: Sequence[Span], fakes: Sequence[Span]) -> Encoded:
        """As ``encode``, ``fakes`` kept as text. Raises ``RowError`` for a tokenizer that cannot be cut this way."""
        if not self.tokenizer.is_fast:
            raise RowError(
                "special token in text",
                f"expected a fast tokenizer to keep {text[slice(*fakes[0])]!r} text, got "
                f"{type(self.tokenizer).__name__}; data.special_tokens=token lets it become the token",
            )
        # The same text without fakes shows whether cutting gives what the tokenizer gives for the whole.
        probe = list(text)
        for start, stop in fakes:
            probe[start:stop] = "x" * (stop - start)
        whole = self.tokenizer("".join(probe), add_special_tokens=False, verbose=False)["input_ids"]
        if self.cut("".join(probe), ())[0] != whole:
            raise RowError(
                "special token in text",
                f"expected a tokenizer that can keep {text[slice(*fakes[0])]!r} text, got one whose tokens depend on "
                "what stands before; data.special_tokens=token lets it become the token",
            )
        ids, offsets = self.cut(text, fakes)
        return ids, by_offsets(offsets, text, spans)

    def cut(self, text: str, fakes: Sequence[Span]) -> tuple[list[int], list[Span]]:
        """Ids and characters of each token, ``fakes`` kept as text."""
        assert self._wide is not None
        ids: list[int] = []
        offsets: list[Span] = []
        at = 0
        real = [
            match.span()
            for match in self._wide.finditer(text)
            if not any(match.start() < stop and start < match.end() for start, stop in fakes)
        ]
        for start, stop in [*real, (len(text), len(text))]:
            for first, last, is_text in ((at, start, True), (start, stop, False)):
                if first == last:
                    continue
                part = self.tokenizer(
                    text[first:last], add_special_tokens=False, return_offsets_mapping=True, verbose=False,
                    split_special_tokens=is_text,
                )  # fmt: skip
                ids += part["input_ids"]
                offsets += [(first + start, first + stop) for start, stop in part["offset_mapping"]]
            at = stop
        return ids, offsets


def _blank(token: Any, side: str) -> str:
    return r"\s*" if getattr(token, side, False) else ""

"""Which characters of a rendered conversation are an answer, and the token that ends it.

An answer begins where a model begins when it is asked for one: after what ``add_generation_prompt`` puts there. It
ends with the token at which generation stops. Where a template has ``{% generation %}`` tags they say where an answer
is, and the same is demanded of them: its texts inside, nobody else's, and the end token.

The end token is one at which generation stops today (the tokenizer's, or the generation settings'), or the one that
the template puts after the last answer of a conversation, which the export then adds to the generation settings. Where
a template closes earlier answers with another token (gpt-oss), the last one's is what is trained there.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from sftmix.data.pieces import TOOLS, Piece, Placed, place, texts_of
from sftmix.data.rows import Message, RowError
from sftmix.data.tellings import shape_of, variant_of, variants
from sftmix.data.template import ChatTemplate, Span

_SHAPES = 512  # shapes of conversations that are remembered


@dataclass(frozen=True)
class Answer:
    """An assistant turn in the rendered text: characters [start, stop), its end token included.

    ``end`` is the end token, None for an answer that the template leaves open; ``target`` the token that is trained in
    its place, None where that is ``end`` itself. ``notes`` are for the account.
    """

    message: int
    start: int
    stop: int
    end: str | None
    target: str | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Rendered:
    """A conversation as text with its answers, and the kinds of text that the template leaves out."""

    text: str
    answers: tuple[Answer, ...]
    pieces: tuple[Span, ...]  # where the conversation's own texts stand
    lost: tuple[Piece, ...]


@dataclass(frozen=True)
class _Shape:
    variant: tuple[str, Any, bool]
    literals: tuple[str, ...]
    answers: tuple[tuple[Answer, int, int], ...]  # with the indices of an answer's first and last piece
    spans: tuple[Span, ...]  # of the pieces in the conversation that was met first


class Renderer:
    """Renders conversations with one template; remembers the shapes it has met."""

    def __init__(self, template: ChatTemplate) -> None:
        self.template = template
        self._shapes: OrderedDict[Any, _Shape] = OrderedDict()

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Any] = (),
        arguments: Mapping[str, Any] | None = None,
    ) -> Rendered:
        """A conversation's text and answers.

        Raises ``RowError`` where the template refuses it, alters a text, or marks as generated what is not.
        """
        arguments = arguments or {}
        key = shape_of(messages, tools, arguments)
        shape = self._shapes.get(key)
        if shape is not None:
            found = self._by_shape(shape, messages, tools, arguments)
            if found is not None:
                return found
        variant, placed = self._best(messages, tools, arguments)
        told = variant_of(messages, *variant)
        answers = list(self._answers(told, tools, arguments, placed))
        self._remember(key, variant, placed, answers)
        lost = tuple(piece for piece, span in zip(placed.pieces, placed.spans, strict=True) if span is None)
        spans = tuple(span for span in placed.spans if span is not None)
        return Rendered(placed.text, tuple(answer for answer, _, _ in answers), spans, lost)

    def prompt(self, messages: Sequence[Message], tools: Sequence[Any], arguments: Mapping[str, Any]) -> str:
        """The text of a conversation with the beginning of the next answer."""
        variant, _ = self._best(messages, tools, arguments)
        return self.template.render(
            variant_of(messages, *variant), tools=tools, arguments=arguments, prompt=True
        )

    # --- variants: how a template wants to be told the same thing ---

    def _best(
        self, messages: Sequence[Message], tools: Sequence[Any], arguments: Mapping[str, Any]
    ) -> tuple[tuple[str, Any, bool], Placed]:
        """The first way of telling the template that loses nothing; else the one that loses least."""
        best: tuple[int, tuple[str, Any, bool], Placed] | None = None
        refusal: RowError | None = None
        for variant in variants(messages):
            try:
                placed = place(self.template, variant_of(messages, *variant), tools, arguments)
            except RowError as error:
                refusal = refusal or error
                continue
            lost = sum(span is None for span in placed.spans)
            if best is None or lost < best[0]:
                best = (lost, variant, placed)
            if not lost:
                break
        if best is None:
            raise refusal or RowError("refused by the chat template", "expected a conversation, got none")
        return best[1], best[2]

    # --- shapes ---

    def _by_shape(
        self, shape: _Shape, messages: Sequence[Message], tools: Sequence[Any], arguments: Mapping[str, Any]
    ) -> Rendered | None:
        """The same by comparing literals; None where they differ."""
        told = variant_of(messages, *shape.variant)
        texts = texts_of(told, tools)
        if len(texts) != len(shape.literals) - 1:
            return None
        text = self.template.render(told, tools=tools, arguments=arguments)
        at, spans = len(shape.literals[0]), []
        if not text.startswith(shape.literals[0]):
            return None
        for piece, literal in zip(texts, shape.literals[1:], strict=True):
            stop = at + len(piece)
            if not (text.startswith(piece, at) and text.startswith(literal, stop)):
                return None
            spans.append((at, stop))
            at = stop + len(literal)
        if at != len(text):
            return None
        old = shape.spans
        answers = tuple(
            Answer(
                answer.message,
                spans[first][0] + answer.start - old[first][0],
                spans[last][1] + answer.stop - old[last][1],
                answer.end, answer.target, answer.notes,
            )
            for answer, first, last in shape.answers
        )  # fmt: skip
        return Rendered(text, answers, tuple(spans), ())

    def _remember(
        self, key: Any, variant: tuple[str, Any, bool], placed: Placed, answers: list[tuple[Answer, int, int]]
    ) -> None:
        literals, spans, at = [], [], 0
        for span in placed.spans:
            if span is None or span[0] < at:  # left out, or in another order
                return
            literals.append(placed.text[at : span[0]])
            spans.append(span)
            at = span[1]
        literals.append(placed.text[at:])
        self._shapes[key] = _Shape(variant, tuple(literals), tuple(answers), tuple(spans))
        if len(self._shapes) > _SHAPES:
            self._shapes.popitem(last=False)

    # --- answers ---

    def _answers(
        self, messages: Sequence[Message], tools: Sequence[Any], arguments: Mapping[str, Any], placed: Placed
    ) -> Iterator[tuple[Answer, int, int]]:
        """The answers whose texts are in the rendered text, in order, with their first and last piece."""
        tags = None
        if self.template.has_tags(tools):
            tags = self.template.tagged_spans(messages, tools=tools, arguments=arguments)
            _check_tags(tags, messages, placed)
        shown = {i: span for i, span in enumerate(placed.spans) if span is not None}
        by_message: dict[int, list[int]] = {}
        for i in shown:
            by_message.setdefault(placed.pieces[i].message, []).append(i)
        starts = sorted(span[0] for span in shown.values())
        stops = sorted(span[1] for span in shown.values())
        for message, found in by_message.items():
            if message == TOOLS or messages[message]["role"] != "assistant":
                continue
            first = min(found, key=lambda i: shown[i][0])
            last = max(found, key=lambda i: shown[i][1])
            begin, finish = shown[first][0], shown[last][1]
            if bisect_left(starts, finish) - bisect_left(starts, begin) > len(found):
                raise RowError(
                    "another's text inside an answer",
                    f"expected the chat template to show message {message + 1} in one place, got the text of another "
                    "message inside it",
                )
            before = stops[at - 1] if (at := bisect_right(stops, begin)) else 0
            after = starts[at] if (at := bisect_left(starts, finish)) < len(starts) else len(placed.text)
            calls = bool(messages[message].get("tool_calls"))
            answer = self._answer(placed.text, message, (before, begin), (finish, after), calls)
            if tags is not None:
                answer = _by_tags(answer, tags, (begin, finish), placed.text)
            yield answer, first, last

    def _answer(self, text: str, message: int, before: Span, after: Span, calls: bool) -> Answer:
        """One answer whose texts stand at [before[1], after[0]); nobody else's are in ``before`` and ``after``."""
        start, notes = self._begin(text, before)
        own = text[start : before[1]].strip()
        if own:
            notes.append(f"the chat template's own {own!r} at the start of an answer bears loss")
        stop, end, target = self._end(text, after, calls)
        if target is not None:
            notes.append(f"an earlier answer is closed by {end}; what is trained there is {target}")
        return Answer(message, start, stop, end, target, tuple(notes))

    def _begin(self, text: str, before: Span) -> tuple[int, list[str]]:
        """Where a model that is asked for this answer begins."""
        segments = self.template.prompt_segments
        gap = text[before[0] : before[1]]
        for size in range(len(segments), 0, -1):
            header = "".join(segments[:size])
            if not header.strip():
                break
            at = gap.rfind(header)
            if at < 0:
                continue
            rest = "".join(segments[size:])
            notes = []
            if rest.strip():
                notes.append(f"generation begins with {rest!r}, which the rendered answer does not have")
            return before[0] + at + len(header), notes
        return before[1], []

    def _end(self, text: str, after: Span, calls: bool) -> tuple[int, str | None, str | None]:
        """Where an answer stops, its end token, and the token trained in that one's place."""
        gap = text[after[0] : after[1]]
        closer = self.closer
        found = _closing(self.template, gap, calls, closer)
        if found is None:
            return after[0], None, None
        if found[0] in self.template.known_stops or found[0] == closer:
            return after[0] + found.end(), found[0], None
        if closer is not None:
            return after[0] + found.end(), found[0], closer
        return after[0], None, None

    @cached_property
    def closer(self) -> str | None:
        """The token that the template puts after the last answer of a conversation."""
        try:
            _, placed = self._best(
                [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], (), {}
            )
        except RowError:  # a template that refuses it shows none
            return None
        stops = [span[1] for span in placed.spans if span is not None]
        found = _closing(self.template, placed.text[max(stops, default=0) :], False, None)
        return None if found is None else found[0]


def _closing(template: ChatTemplate, gap: str, calls: bool, closer: str | None) -> re.Match[str] | None:
    """The token that closes an answer in the text ``gap`` behind it.

    That is the first added token, or one that stands right behind it and ends generation. Behind tool calls there is
    text that closes the call itself: there it is the first token that ends generation, or ends answers without calls.
    """
    found = list(template.added_tokens.finditer(gap)) if template.added_tokens is not None else []
    if calls:
        stops = template.known_stops | {closer}
        return next((match for match in found if match[0] in stops), None)
    if not found or gap[: found[0].start()].strip():
        return None
    for i, match in enumerate(found):
        if i and match.start() != found[i - 1].end():
            break
        if match[0] in template.known_stops:
            return match
    return found[0]


def _by_tags(answer: Answer, tags: Sequence[Span], texts: Span, text: str) -> Answer:
    """The answer as the template's tags have it: from the first to the last block that holds one of its texts."""
    mine = [tag for tag in tags if tag[0] < texts[1] and texts[0] < tag[1]]
    inside = mine and mine[0][0] <= texts[0] and texts[1] <= mine[-1][1]
    if not inside:
        return replace(answer, start=texts[0], stop=texts[0], end=None, notes=("outside",))
    start, stop = mine[0][0], mine[-1][1]
    notes = [note for note in answer.notes if "closed by" in note]
    own = text[start : texts[0]].strip()
    if own:
        notes.append(f"the chat template's own {own!r} at the start of an answer bears loss")
    if answer.end is not None and stop < answer.stop:
        notes.append(
            f"the end token {answer.end} stands outside the template's generation block; it bears loss too"
        )
    return replace(
        answer, start=start, stop=answer.stop if answer.end is not None else stop, notes=tuple(notes)
    )


def _check_tags(tags: Sequence[Span], messages: Sequence[Message], placed: Placed) -> None:
    """Nobody else's text may stand in a block that the template marks as generated."""
    for piece, span in zip(placed.pieces, placed.spans, strict=True):
        if span is None or (piece.message != TOOLS and messages[piece.message]["role"] == "assistant"):
            continue
        if any(tag[0] < span[1] and span[0] < tag[1] for tag in tags):
            who = "the list of tools" if piece.message == TOOLS else f"message {piece.message + 1}"
            raise RowError(
                "generation block around another's text",
                f"expected {{% generation %}} blocks around the assistant's text only, got one around {who}",
            )

"""Examples to tokens: which ids the model sees, and how much loss each of them bears.

Every example comes out as a ``TokenizedExample`` or as a ``Fault`` that says why it cannot be used: a text that the
chat template leaves out, an answer without a token that ends it, nothing to train on within the longest length.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import Any

from sftmix.data.encode import SpecialTokens, by_offsets, characters, encode
from sftmix.data.pieces import told_lost
from sftmix.data.rows import Example, Fault, RowError
from sftmix.data.spans import Answer, Rendered, Renderer
from sftmix.data.supervision import message_weights
from sftmix.data.template import ChatTemplate, Span
from sftmix.data.tokenized import TokenizedExample

_CHUNK = 1000  # conversations tokenised together: the tokenizer's threads stay busy, offsets stay small
LONGEST = 2048  # data.max_length, where the model's positions allow it
Outcome = tuple[TokenizedExample | Fault, tuple[str, ...]]  # with notes for the account


@dataclass(frozen=True)
class TokenOptions:
    """The knobs of ``data`` that decide the tokens, resolved; plain data, so that processes can share them.

    ``stop_ids`` are the ids at which the model's generation settings stop today.
    """

    max_length: int | None = None
    supervise: str = "all"
    too_long: str = "cut"
    special_tokens: str = "text"
    template_drops: str = "refuse"
    end_token: str | None = None
    date: str | None = None
    template_arguments: Mapping[str, Any] = field(default_factory=dict)
    stop_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class _Draft:
    """A text with the parts that bear loss: (span, weight), and the ends whose target is another token."""

    text: str
    spans: tuple[Span, ...]
    weights: tuple[float, ...]
    targets: tuple[str | None, ...]  # by span: what is trained in place of its last token
    notes: tuple[str, ...]
    fakes: tuple[Span, ...] = ()


@dataclass(frozen=True)
class Shown:
    """An example to look at: the rendered text, and the characters of it that each token stands for."""

    example: TokenizedExample
    text: str
    tokens: list[str]


class Encoder:
    """Turns examples into tokens with one tokenizer; ``stops`` counts the end tokens that bear loss."""

    def __init__(self, tokenizer: Any, options: TokenOptions) -> None:
        if options.max_length is not None and options.max_length < 2:
            raise ValueError(f"max_length: expected at least 2, got {options.max_length}")
        self.tokenizer, self.options = tokenizer, options
        self.special = SpecialTokens(tokenizer)
        self.stops: Counter[int] = Counter()
        if options.end_token is not None:
            self._single(options.end_token, "data.end_token")

    @cached_property
    def renderer(self) -> Renderer:
        """Made when the first conversation comes: texts and ready tokens need no chat template."""
        options = self.options
        stops = list(options.stop_ids)
        if options.end_token is not None:
            stops.append(self._single(options.end_token, "data.end_token"))
        template = ChatTemplate(
            self.tokenizer, arguments=options.template_arguments, date=options.date, stop_ids=stops
        )
        return Renderer(template)

    def outcomes(self, examples: Iterable[Example]) -> Iterator[Outcome]:
        """One outcome for each example, in order."""
        examples = iter(examples)
        while chunk := list(islice(examples, _CHUNK)):
            yield from self._chunk(chunk)

    def _chunk(self, examples: Sequence[Example]) -> Iterator[Outcome]:
        drafts: list[_Draft | TokenizedExample | Fault] = []
        for example in examples:
            try:
                drafts.append(self._draft(example))
            except RowError as error:
                drafts.append(Fault(example.place, error.kind, error.reason))
        plain = [draft for draft in drafts if isinstance(draft, _Draft) and not draft.fakes]
        encoded = encode(self.tokenizer, [d.text for d in plain], [d.spans for d in plain])
        for example, draft in zip(examples, drafts, strict=True):
            if isinstance(draft, Fault):
                yield draft, ()
                continue
            try:
                if isinstance(draft, TokenizedExample):
                    yield self._fit(example, draft), ()
                    continue
                if draft.fakes:
                    ids, spans = self.special.encode(draft.text, draft.spans, draft.fakes)
                else:
                    ids, spans = next(encoded)
                yield self._fit(example, self._marked(example, draft, ids, spans)), draft.notes
            except RowError as error:
                yield Fault(example.place, error.kind, error.reason), ()

    # --- one example ---

    def _draft(self, example: Example) -> _Draft | TokenizedExample:
        if example.input_ids:
            return self._ready(example)
        if example.text is not None:
            return self._text(example.text)
        return self._conversation(example)

    def _ready(self, example: Example) -> TokenizedExample:
        """Tokens that came as such."""
        size = len(self.tokenizer)
        worst = max(example.input_ids)
        if worst >= size:
            raise RowError("token outside the vocabulary", f"expected input_ids below {size}, got {worst}")
        marks = (False, *(label != -100 for label in example.labels[1:]))
        last = max((i for i, mark in enumerate(marks) if mark), default=None)
        if last is not None:
            self.stops[example.input_ids[last]] += 0  # whatever ends them is the row's own business
        return TokenizedExample(example.id, tuple(example.input_ids), marks)

    def _text(self, text: str) -> _Draft:
        """Plain text: all of it bears loss, and the end of the text is trained after it."""
        end = self.options.end_token or self.tokenizer.eos_token
        if not end:
            raise RowError(
                "answer without an end",
                "expected a tokenizer with an eos token to end a text, got none; give data.end_token",
            )
        fakes = self._fakes(text, [(0, len(text))])
        whole = text if text.endswith(end) and not fakes else text + end
        notes = ("a special token's string in the text",) if fakes or self.special.occurs(text) else ()
        return _Draft(whole, ((0, len(whole)),), (1.0,), (None,), notes, fakes)

    def _conversation(self, example: Example) -> _Draft:
        weights = message_weights(example, self.options.supervise)
        rendered = self.renderer.render(
            example.messages, tools=example.tools, arguments=example.template_arguments
        )
        notes = []
        if rendered.lost:
            reason = told_lost(rendered.lost, example.messages)
            if self.options.template_drops == "refuse":
                raise RowError("text that the chat template leaves out", reason)
            notes.append("text that the chat template leaves out")
        chosen = [answer for answer in rendered.answers if weights[answer.message]]
        left_out = {i for i, weight in enumerate(weights) if weight} - {answer.message for answer in chosen}
        if left_out:
            raise RowError(
                "text that the chat template leaves out",
                f"expected every answer in the rendered text, got none of message {min(left_out) + 1}",
            )
        if any(answer.end is None for answer in chosen):
            rendered, chosen = self._ended(rendered, chosen)
        for answer in chosen:
            notes += answer.notes
        fakes = self._fakes(rendered.text, rendered.pieces)
        if fakes or (
            self.options.special_tokens == "token" and self.special.fakes(rendered.text, rendered.pieces)
        ):
            notes.append("a special token's string in the text")
        return _Draft(
            rendered.text,
            tuple((answer.start, answer.stop) for answer in chosen),
            tuple(weights[answer.message] for answer in chosen),
            tuple(answer.target for answer in chosen),
            tuple(dict.fromkeys(notes)),
            fakes,
        )

    def _fakes(self, text: str, pieces: Sequence[Span]) -> tuple[Span, ...]:
        return tuple(self.special.fakes(text, pieces)) if self.options.special_tokens == "text" else ()

    def _ended(self, rendered: Rendered, chosen: Sequence[Answer]) -> tuple[Rendered, list[Answer]]:
        """Every answer with an end token: its own, or ``data.end_token`` put behind it."""
        text, pieces, shift = rendered.text, list(rendered.pieces), 0
        answers = []
        for answer in chosen:
            if "outside" in answer.notes:  # such an answer has no end
                raise RowError(
                    "answer outside the generation block",
                    f"expected the text of message {answer.message + 1} inside a {{% generation %}} block of the chat "
                    "template, got it outside",
                )
            start, stop = answer.start + shift, answer.stop + shift
            notes = answer.notes
            if answer.end is None:
                end = self.options.end_token
                if end is None:
                    follows = text[stop : stop + 24]
                    raise RowError(
                        "answer without an end",
                        f"expected a token that ends generation behind the answer in message {answer.message + 1}, got "
                        f"{follows!r}; use another chat template, or give data.end_token, which is then put there",
                    )
                text = text[:stop] + end + text[stop:]
                pieces = [(a + len(end), b + len(end)) if a >= stop else (a, b) for a, b in pieces]
                shift += len(end)
                stop += len(end)
                notes = (*notes, f"data.end_token {end} put behind an answer")
            answers.append(Answer(answer.message, start, stop, answer.end, answer.target, notes))
        return Rendered(text, tuple(answers), tuple(pieces), rendered.lost), answers

    def _single(self, token: str, name: str) -> int:
        """The id of a token's string."""
        ids = self.tokenizer(token, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            raise ValueError(
                f"{name}: expected one token of the tokenizer, got {token!r}, which is {len(ids)}"
            )
        return int(ids[0])

    def _marked(
        self, example: Example, draft: _Draft, ids: Sequence[int], spans: Sequence[Span]
    ) -> TokenizedExample:
        """The example with the weight of every token."""
        marks = [False] * len(ids)
        replaced = []
        for (first, last), target in zip(spans, draft.targets, strict=True):
            if first == last:
                continue
            marks[first:last] = [True] * (last - first)
            trained = ids[last - 1] if target is None else self._single(target, "chat template")
            self.stops[trained] += 1
            if target is not None:
                replaced.append((last - 1, trained))
        marks[:1] = [False]  # nothing predicts the first token
        weights = None
        if any(weight != 1 for weight in draft.weights):
            loss = [0.0] * len(ids)
            for (first, last), weight in zip(spans, draft.weights, strict=True):
                loss[first:last] = [weight] * (last - first)
            weights = (0.0, *loss[1:])
        return TokenizedExample(example.id, tuple(ids), tuple(marks), weights, replaced=tuple(replaced))

    def _fit(self, example: Example, found: TokenizedExample) -> TokenizedExample:
        """The example within the longest length. Raises ``RowError`` where nothing is left to train on."""
        for first, last in self._beyond(found):
            found = found.without(first, last, cut=found.cut or last == len(found.input_ids))
        return found

    def _beyond(self, found: TokenizedExample) -> list[Span]:
        """The tokens to leave out, one range after the other, each counted in what the one before it left."""
        longest, how = self.options.max_length, self.options.too_long
        length = len(found.input_ids)
        if not any(found.supervised):
            raise RowError("nothing to train on", "expected at least one token that bears loss, got none")
        if longest is None or length <= longest:
            return []
        if how in ("refuse", "drop"):
            raise RowError("too long", f"expected at most data.max_length = {longest} tokens, got {length}")
        first, ranges = found.supervised.index(True), []
        if how == "cut_prompt":
            keep = 1 if found.input_ids[0] == self.tokenizer.bos_token_id else 0
            gone = min(length - longest, first - keep - 1)
            if gone > 0:
                ranges.append((keep, keep + gone))
                first, length = first - gone, length - gone
        if first >= longest:
            raise RowError(
                "too long",
                f"expected an answer within data.max_length = {longest} tokens, got one that starts at token {first}",
            )
        return [*ranges, (longest, length)] if length > longest else ranges

    def show(self, example: Example) -> Shown | Fault:
        """An example with the characters of each of its tokens."""
        try:
            draft = self._draft(example)
            if isinstance(draft, TokenizedExample):
                found, names = draft, [self.tokenizer.decode([token]) for token in draft.input_ids]
                text = "".join(names)
            else:
                text = draft.text
                ids, offsets = self.special.cut(text, draft.fakes) if draft.fakes else self._offsets(text)
                spans = by_offsets(offsets, text, draft.spans)
                found, names = self._marked(example, draft, ids, spans), characters(text, offsets)
            for first, last in self._beyond(found):
                found = found.without(first, last, cut=found.cut or last == len(found.input_ids))
                names[first:last] = []
            return Shown(found, text, names)
        except RowError as error:
            return Fault(example.place, error.kind, error.reason)

    def _offsets(self, text: str) -> tuple[list[int], list[Span]]:
        if not self.tokenizer.is_fast:
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            stops = [len(self.tokenizer.decode(ids[: i + 1])) for i in range(len(ids))]
            return ids, [(stop, stop) for stop in stops]
        found = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return found["input_ids"], found["offset_mapping"]

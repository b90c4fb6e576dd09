"""The judge of rendering: what must come of a conversation under a chat template, and whether what came of it is right.

It knows nothing of ``sftmix/data``: ``template_renderings`` finds the texts in the rendered text, and tokens are right
by where those lie.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tests.recipe.data.template_conversations import Conversation
from tests.recipe.data.template_renderings import SUPERVISED, Rendering, answers, in_order, renderings
from tests.recipe.data.template_tokenizers import Family

# What the reason of a refusal must say, by the kind of what is missing.
NAMED = {
    "system": r"system",
    "user": r"user",
    "assistant": r"assistant|answer",
    "reasoning": r"reason|think",
    "tool call": r"tool",
    "tool result": r"tool",
    "tools": r"tool",
    "end": r"\b(ends?|ending|stops?|closes?)\b",
}
_GENERATION = re.compile(r"{%-?\s*generation\s*-?%}")


@dataclass
class Judge:
    """One conversation under one tokenizer's template; ``drops``: the product was told to let text be lost."""

    talk: Conversation
    tokenizer: Any
    family: Family
    drops: bool = False

    # --- what must come ---

    @cached_property
    def made(self) -> list[Rendering]:
        return renderings(self.talk, self.tokenizer, self.family)

    @cached_property
    def nearest(self) -> list[Rendering]:
        """The renderings that lose the least, and that of the messages as they are: a refusal may name theirs."""
        rendered = [one for one in self.made if not one.error]
        least = min((len(one.missing) for one in rendered), default=0)
        return [one for one in rendered if len(one.missing) == least or one is self.made[0]]

    @cached_property
    def verdict(self) -> str:
        """``pass``, ``either`` (the words are there but not as given, or in a way not demanded), ``refuse: why``."""
        if any(one.plain and one.demanded and not self._interleaved(one) for one in self.made):
            return "pass"
        if any(one.whole for one in self.made):
            return "either"
        lost = dict.fromkeys(kind for one in self.nearest for kind in one.missing)
        if self.drops and lost and "end" not in lost:
            return "either"
        return "refuse: " + (", ".join(lost) or self.made[0].error)

    def _interleaved(self, one: Rendering) -> bool:
        """Whether another message's text stands between two texts of one answer: such a turn may be refused."""
        found = list(zip(one.places, (text.message for text in self.talk.texts), strict=not one.error))
        order = [
            message for place, message in sorted((place, message or -1) for place, message in found if place)
        ]
        runs = [message for i, message in enumerate(order) if i == 0 or order[i - 1] != message]
        return len(runs) > len(set(runs))

    @cached_property
    def fitting(self) -> list[Rendering]:
        """The renderings that the tokens may come from."""
        whole = [one for one in self.made if one.whole]
        return whole or (self.nearest if self.drops else [])

    # --- what came ---

    def refusal(self, fault: Any, place: str = "") -> str:
        """What is wrong with a refusal (``place``, ``kind``, ``reason``); ``""``: nothing."""
        said = f"{getattr(fault, 'kind', '')} {fault.reason}".lower()
        if self.verdict == "pass":
            return f"refused, expected tokens: {fault.reason}"
        if place and fault.place != place:
            return f"refused at {fault.place!r}, expected {place!r}"
        kinds = {kind for one in self.nearest for kind in one.missing}
        kinds |= {"assistant", "user"} if self.verdict == "either" else set()
        if any(self._interleaved(one) for one in self.made) and "another message inside" in said:
            return ""
        named = any(re.search(NAMED[kind], said) for kind in kinds)
        raised = any(one.error and one.error[:24].lower() in said for one in self.made)
        return "" if named or raised else f"refused for {fault.reason!r}, expected {self.verdict}"

    def tokens(self, result: Any) -> str:
        """What is wrong with tokens (``input_ids``, ``supervised``, ``weights``); ``""``: nothing."""
        if self.verdict.startswith("refuse"):
            return f"accepted, expected {self.verdict}"
        ids, supervised, weights = list(result.input_ids), list(result.supervised), result.weights
        if len(supervised) != len(ids) or (weights is not None and len(weights) != len(ids)):
            return f"expected a mark for each of {len(ids)} tokens, got {len(supervised)}"
        if weights is not None and [weight > 0 for weight in weights] != [bool(mark) for mark in supervised]:
            return "weights differ from marks"
        if self.has_special:
            like, complaint = self.fitting[0], self._special(ids)
        else:
            exact = [one for one in self.fitting if one.ids == ids]
            if not exact:
                return "tokens differ from those of apply_chat_template"
            like, complaint = exact[0], self._places(exact[0], supervised)
        return (
            complaint
            or self._ends(ids, supervised, getattr(result, "replaced", ()))
            or self._words(_runs(ids, supervised), like)
        )

    @cached_property
    def has_special(self) -> bool:
        """Whether a text holds the string of a token that stands beside the vocabulary."""
        added = [str(token) for token in self.tokenizer.added_tokens_decoder.values()]
        return any(token in text.words for token in added for text in self.talk.texts)

    def _places(self, made: Rendering, supervised: list[bool]) -> str:
        """Every token of an answer's, a thought's and a call's text bears loss, and no token of another text."""
        for text, place in zip(self.talk.texts, made.places, strict=True):
            if place is None:
                continue
            start, stop = place
            marks = {
                bool(mark)
                for mark, (first, last) in zip(supervised, made.offsets, strict=True)
                if first < stop and last > start
            }
            if marks != {text.kind in SUPERVISED}:
                state = "is not wholly supervised" if text.kind in SUPERVISED else "is supervised"
                return f"{text.kind} text of message {text.message} {state}"
        return ""

    def _ends(self, ids: list[int], supervised: list[bool], replaced: Any) -> str:
        """Every run of supervised tokens ends where generation stops, and starts neither with an end nor a header.

        ``replaced`` are (position, target): what is trained there is the target, as for the last answer's end in
        place of an earlier one's.
        """
        ends, stops = self._ids(self.family.ends), self._ids(self.family.generation)
        targets = list(ids)
        for position, target in replaced:
            if ids[position] not in self._ids(self.family.closers):
                return f"token {position} is replaced, which closes nothing"
            targets[position] = target
        runs = _runs(ids, supervised)
        for run, trained in zip(runs, _runs(targets, supervised), strict=True):
            if trained[-1] not in stops:
                end = self.tokenizer.decode(trained[-1:])
                return f"supervised run ends in {end!r}, at which generation does not stop"
            if run[0] in ends or run[0] == self._header:
                return f"supervised run starts with {self.tokenizer.decode(run[:1])!r}, which is before the answer"
        return "" if runs else "no token is supervised"

    @cached_property
    def _header(self) -> int | None:
        """The first token that ``add_generation_prompt`` adds; None where the template's own tags say what it is."""
        if _GENERATION.search(self.tokenizer.chat_template):
            return None
        question = [{"role": "user", "content": "a"}]
        try:
            plain, asked = (
                self.tokenizer.apply_chat_template(
                    question, tokenize=True, return_dict=False, add_generation_prompt=prompt
                )
                for prompt in (False, True)
            )
        except Exception:  # a template that wants parts of text
            return None
        added = [token for i, token in enumerate(asked) if plain[i : i + 1] != [token]]
        special = self.tokenizer.added_tokens_decoder
        return added[0] if added and added[0] in special else None

    def _words(self, runs: list[list[int]], like: Rendering) -> str:
        """The runs spell the answers, thoughts and calls in order, and nobody else's words."""
        decoded = "".join(self.tokenizer.decode(run, clean_up_tokenization_spaces=False) for run in runs)
        lying = [(place, text) for text, place in zip(self.talk.texts, like.places, strict=True)]
        if None not in like.places or self.drops:
            lying = sorted(
                (pair for pair in lying if pair[0] is not None), key=lambda pair: pair[0] or (0, 0)
            )
        words = [word for _, text in lying if text.kind in SUPERVISED for word in text.words.split()]
        if not in_order(words, decoded):
            return "the answers' words are not in the supervised tokens in order"
        for text in self.talk.texts:
            strange = [word for word in text.words.split() if word not in words and len(word) == 9]
            if text.kind not in SUPERVISED and any(word in decoded for word in strange):
                return f"{text.kind} text of message {text.message} is supervised"
        first = [i for i in answers(self.talk) if self.talk.messages[i - 1]["role"] != "assistant"]
        if not like.merged and not like.missing and len(runs) < len(first):
            return f"expected a run for each of {len(first)} answers, got {len(runs)}"
        return ""

    def _special(self, ids: list[int]) -> str:
        """The tokens spell the rendered text, and none of them was made a special token by what the texts hold."""
        texts = [_squeezed(one.text) for one in self.fitting]
        if _squeezed(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)) not in texts:
            return "tokens do not spell the rendered text"
        special = {i for i, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        held = dict.fromkeys(special, 0)
        for text in self.talk.texts:
            for token in self.tokenizer(text.words, add_special_tokens=False)["input_ids"]:
                held[token] = held.get(token, 0) + 1
        if any(all(ids.count(i) == one.ids.count(i) - held[i] for i in special) for one in self.fitting):
            return ""
        return "a special token's string in a text became the token"

    def _ids(self, tokens: tuple[str, ...]) -> list[int]:
        return [int(i) for i in self.tokenizer.convert_tokens_to_ids(list(tokens))]


def _runs(ids: list[int], supervised: list[bool]) -> list[list[int]]:
    """The ids of each run of supervised tokens."""
    runs: list[list[int]] = []
    for i, mark in enumerate(supervised):
        if mark and (i == 0 or not supervised[i - 1]):
            runs.append([])
        if mark:
            runs[-1].append(ids[i])
    return runs


def _squeezed(text: str) -> str:
    return re.sub(r"\s+", "", text)

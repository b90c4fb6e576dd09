"""The judge of rendering: what must come of a conversation under a chat template, and whether what came of it is right.

It knows nothing of ``sftmix/data``: ``template_renderings`` finds the texts in the rendered text, and tokens are right
by where those lie. ``verdict`` says what must come of a conversation; ``judge`` compares what came of it.
"""

from __future__ import annotations

import re
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


def verdict(talk: Conversation, tokenizer: Any, family: Family) -> str:
    """``pass``, ``either`` (the words are there but not as given, or in a way not demanded) or ``refuse: why``."""
    return _wanted(renderings(talk, tokenizer, family))


def _wanted(made: list[Rendering]) -> str:
    if any(one.plain and one.demanded for one in made):
        return "pass"
    if any(one.whole for one in made):
        return "either"
    lost = dict.fromkeys(kind for one in _nearest(made) for kind in one.missing)
    return "refuse: " + (", ".join(lost) or made[0].error)


def _nearest(made: list[Rendering]) -> list[Rendering]:
    """The renderings that lose the least, and the one of the messages as they are: a refusal may name theirs."""
    rendered = [one for one in made if not one.error]
    least = min((len(one.missing) for one in rendered), default=0)
    return [one for one in rendered if len(one.missing) == least or one is made[0]]


def judge(
    result: Any,
    talk: Conversation,
    tokenizer: Any,
    family: Family,
    *,
    place: str = "",
    is_fault: bool = False,
) -> str:
    """What is wrong with ``result``, a fault (``place``, ``reason``) or tokens with their marks; ``""``: nothing."""
    made = renderings(talk, tokenizer, family)
    wanted = _wanted(made)
    if is_fault:
        return _judge_refusal(result, made, wanted, place)
    if wanted.startswith("refuse"):
        return f"accepted, expected {wanted}"
    ids, supervised, weights = list(result.input_ids), list(result.supervised), result.weights
    if len(supervised) != len(ids) or (weights is not None and len(weights) != len(ids)):
        return f"expected a mark for each of {len(ids)} tokens, got {len(supervised)}"
    if weights is not None and [weight > 0 for weight in weights] != [bool(mark) for mark in supervised]:
        return "weights differ from marks"
    fitting = [one for one in made if one.whole]
    if has_special(talk, tokenizer):
        complaint, like = _judge_special(ids, talk, tokenizer, fitting), fitting[0]
    else:
        exact = [one for one in fitting if one.ids == ids]
        if not exact:
            return "tokens differ from those of apply_chat_template"
        complaint, like = _judge_places(exact[0], talk, supervised), exact[0]
    targets = list(
        ids
    )  # what is trained: a product may put the last answer's end in place of an earlier one's
    for position, target in getattr(result, "replaced", ()):
        if ids[position] not in tokenizer.convert_tokens_to_ids(list(family.closers)):
            return f"token {position} is replaced, which closes nothing"
        targets[position] = target
    return complaint or _judge_runs(ids, targets, supervised, like, talk, tokenizer, family)


def _judge_refusal(fault: Any, made: list[Rendering], wanted: str, place: str) -> str:
    said = f"{getattr(fault, 'kind', '')} {fault.reason}".lower()
    if wanted == "pass":
        return f"refused, expected tokens: {fault.reason}"
    if place and fault.place != place:
        return f"refused at {fault.place!r}, expected {place!r}"
    kinds = {kind for one in _nearest(made) for kind in one.missing}
    kinds |= {"assistant", "user"} if wanted == "either" else set()
    named = any(re.search(NAMED[kind], said) for kind in kinds)
    raised = any(one.error and one.error[:24].lower() in said for one in made)
    return "" if named or raised else f"refused for {fault.reason!r}, expected {wanted}"


def has_special(talk: Conversation, tokenizer: Any) -> bool:
    """Whether a text holds the string of a token that stands beside the vocabulary."""
    added = [str(token) for token in tokenizer.added_tokens_decoder.values()]
    return any(token in text.words for token in added for text in talk.texts)


def _judge_places(made: Rendering, talk: Conversation, supervised: list[bool]) -> str:
    """Every token of an answer's, a thought's and a call's text bears loss, and no token of another text."""
    for text, place in zip(talk.texts, made.places, strict=True):
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


def _judge_runs(
    ids: list[int],
    targets: list[int],
    supervised: list[bool],
    like: Rendering,
    talk: Conversation,
    tokenizer: Any,
    family: Family,
) -> str:
    """Runs of supervised tokens: each ends in an end, none starts with one, their texts are the answers' in order."""
    ends = tokenizer.convert_tokens_to_ids(list(family.ends))
    stops = tokenizer.convert_tokens_to_ids(list(family.generation))
    runs = _runs(ids, supervised)
    if not runs:
        return "no token is supervised"
    for run, trained in zip(runs, _runs(targets, supervised), strict=True):
        if trained[-1] not in stops:
            return f"supervised run ends in {tokenizer.decode(trained[-1:])!r}, at which generation does not stop"
        if run[0] in ends:
            return f"supervised run starts with {tokenizer.decode(run[:1])!r}, the end before it"
    decoded = "".join(tokenizer.decode(run, clean_up_tokenization_spaces=False) for run in runs)
    lying = zip(talk.texts, like.places, strict=True)
    wanted = [(place or (0, 0), text) for text, place in lying if text.kind in SUPERVISED]
    if None not in like.places:
        wanted.sort(key=lambda pair: pair[0])
    words = [word for _, text in wanted for word in text.words.split()]
    if not in_order(words, decoded):
        return "the answers' words are not in the supervised tokens in order"
    for text in talk.texts:
        strange = [word for word in text.words.split() if word not in words and len(word) == 9]
        if text.kind not in SUPERVISED and any(word in decoded for word in strange):
            return f"{text.kind} text of message {text.message} is supervised"
    if not like.merged and len(runs) < sum(
        talk.messages[i - 1]["role"] != "assistant" for i in answers(talk)
    ):
        return f"expected a run for each of {len(answers(talk))} answers, got {len(runs)}"
    return ""


def _runs(ids: list[int], supervised: list[bool]) -> list[list[int]]:
    runs: list[list[int]] = []
    for i, mark in enumerate(supervised):
        if mark and (i == 0 or not supervised[i - 1]):
            runs.append([])
        if mark:
            runs[-1].append(ids[i])
    return runs


def _judge_special(ids: list[int], talk: Conversation, tokenizer: Any, fitting: list[Rendering]) -> str:
    """The tokens spell the rendered text, and none of them was made a special token by what the texts hold."""
    texts = [_squeezed(one.text) for one in fitting]
    if _squeezed(tokenizer.decode(ids, clean_up_tokenization_spaces=False)) not in texts:
        return "tokens do not spell the rendered text"
    special = set(tokenizer.all_special_ids) | {
        i for i, token in tokenizer.added_tokens_decoder.items() if token.special
    }
    held = dict.fromkeys(special, 0)
    for text in talk.texts:
        for token in tokenizer(text.words, add_special_tokens=False)["input_ids"]:
            held[token] = held.get(token, 0) + 1
    for one in fitting:
        if all(ids.count(i) == one.ids.count(i) - held[i] for i in special):
            return ""
    return "a special token's string in a text became the token"


def _squeezed(text: str) -> str:
    return re.sub(r"\s+", "", text)

"""Every chat template that TRL ships, with conversations of every kind: right tokens, or a refusal that says why.

The templates are read where trl is installed (``>= 1.16``; it is not imported), or from the folder that the
environment variable SFTMIX_TRL_TEMPLATES names; without either these tests are skipped. What is right is said by
``template_judge``, which knows nothing of ``sftmix``.
"""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.recipe.data.template_conversations import KINDS, Conversation, conversation
from tests.recipe.data.template_judge import Judge
from tests.recipe.data.template_renderings import DATE, renderings
from tests.recipe.data.template_tokenizers import Family, family_of, stand_in

PLACE = "talks.jsonl, line 3"


def templates() -> list[Path]:
    """The files of TRL's chat templates, by name; none where they are not there."""
    folder = os.environ.get("SFTMIX_TRL_TEMPLATES")
    if not folder:
        found = importlib.util.find_spec("trl")
        folder = str(Path(found.origin).with_name("chat_templates")) if found and found.origin else ""
    return sorted(Path(folder).glob("*.jinja")) if folder else []


def outcomes(talks: Sequence[Conversation], tokenizer: Any, family: Family, **options: Any) -> list[Any]:
    """What the product makes of conversations: tokens or a fault each. The one place that knows its interface."""
    from sftmix.data.forms import parse_row
    from sftmix.data.rows import Fault, Row, RowError
    from sftmix.data.tokens import Encoder, TokenOptions

    stops = tuple(tokenizer.convert_tokens_to_ids(list(family.generation)))
    encoder = Encoder(tokenizer, TokenOptions(**{"date": DATE, "stop_ids": stops, **options}))
    found = []
    for talk in talks:
        row = Row(PLACE, {"messages": talk.messages, "tools": talk.tools})
        try:
            ((outcome, _),) = encoder.outcomes([parse_row(row).example])
        except RowError as error:
            outcome = Fault(PLACE, error.kind, error.reason)
        found.append(outcome)
    return found


def is_fault(outcome: Any) -> bool:
    return hasattr(outcome, "reason")


FILES = templates()
needs_templates = pytest.mark.skipif(
    not FILES, reason="needs trl's chat templates: install trl, or set SFTMIX_TRL_TEMPLATES to their folder"
)


@needs_templates
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_kind_of_conversation_is_right_or_rightly_refused(path: Path) -> None:
    assert complaints(path) == {}


@needs_templates
@pytest.mark.slow
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_what_is_left_is_right_where_text_may_be_dropped(path: Path) -> None:
    kinds = [kind for kind in KINDS if kind.startswith(("tools", "reasoning"))]
    assert complaints(path, kinds, template_drops="allow") == {}


def complaints(path: Path, kinds: Sequence[str] = tuple(KINDS), **options: Any) -> dict[str, str]:
    """What is wrong, by the kind of conversation."""
    family = family_of(path.stem)
    tokenizer = stand_in(path.read_text(encoding="utf-8"), path.stem)
    talks = [conversation(kind, family.marker) for kind in kinds]
    found = {}
    for talk, outcome in zip(talks, outcomes(talks, tokenizer, family, **options), strict=True):
        judge = Judge(talk, tokenizer, family, drops=options.get("template_drops") == "allow")
        found[talk.kind] = judge.refusal(outcome, PLACE) if is_fault(outcome) else judge.tokens(outcome)
    return {kind: complaint for kind, complaint in found.items() if complaint}


@needs_templates
def test_an_end_token_closes_what_the_template_leaves_open() -> None:
    """GLM closes an answer with the next role's token, and the last one not at all."""
    path = next(path for path in FILES if path.stem == "glm4moe")
    family, talk = family_of(path.stem), conversation("multi")
    tokenizer = stand_in(path.read_text(encoding="utf-8"), path.stem)
    (made,) = outcomes([talk], tokenizer, family, end_token=family.eos)
    plain = renderings(talk, tokenizer, family)[0]
    assert list(made.input_ids) == [*plain.ids, tokenizer.eos_token_id]
    assert made.supervised[-1]


@needs_templates
@pytest.mark.parametrize("name", ["gptoss", "llama3", "phi3", "qwen3", "qwen3_training"])
def test_time_is_linear_in_turns(name: str) -> None:
    path = next(path for path in FILES if path.stem == name)
    family = family_of(name)
    tokenizer = stand_in(path.read_text(encoding="utf-8"), name)

    def seconds(turns: int) -> float:
        talk, best = Conversation("long").turns(turns), float("inf")
        for _ in range(3):
            started = time.thread_time()
            (made,) = outcomes([talk], tokenizer, family)
            best = min(best, time.thread_time() - started)
            assert not is_fault(made) and sum(made.supervised) > turns * 9
        return best

    seconds(40)  # the template is compiled
    assert seconds(400) < 1.5 * 10 * seconds(40)


@needs_templates
def test_the_page_of_templates_is_as_the_command_writes_it() -> None:
    from tests.recipe.data.template_page import PAGE, page

    assert PAGE.read_text(encoding="utf-8") == page()

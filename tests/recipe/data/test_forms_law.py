"""The law of fields: every text of a row is in its example, or its field is named as ignored, or the row is refused."""

import json
from contextlib import suppress
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from sftmix.data.forms import FORMS, parse_row
from sftmix.data.rows import Row, RowError
from sftmix.data.supervision import message_weights

_NAMES = sorted({n for f in FORMS for names in (*f.required.values(), *f.optional.values()) for n in names})
_KEYS = [
    "role",
    "from",
    "content",
    "value",
    "weight",
    "train",
    "masked",
    "thinking",
    "name",
    "tool_calls",
    "type",
    "text",
]
_WORDS = st.sampled_from(
    ["user", "assistant", "gpt", "User", "system", "tool", "", " ", "narrator", "\ud800", "[]", "{}"]
)
_LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | _WORDS | st.text(max_size=5)
_JSON = st.recursive(
    _LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(_NAMES + _KEYS) | st.text(max_size=3), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(_JSON | st.dictionaries(st.sampled_from(_NAMES), _JSON, max_size=4))
def test_any_value_parses_or_is_refused(fields: Any) -> None:
    """Nothing but RowError ever leaves parse_row and message_weights."""
    with suppress(RowError):
        message_weights(parse_row(Row("x", fields)).example, "all")


@st.composite
def _rows(draw: Any) -> tuple[dict[str, Any], dict[str, str]]:
    """(row, text → name of the field it stands in): every text is unique in its row."""
    texts: dict[str, str] = {}

    def text(name: str) -> str:
        word = f"w{len(texts)}é."
        texts[word] = name
        return word

    def message(place: str, role: str) -> dict[str, Any]:
        keys = draw(st.sampled_from([("role", "content"), ("from", "value")]))
        turn: dict[str, Any] = {keys[0]: role, keys[1]: text(f"{place}.content")}
        for key in draw(
            st.lists(st.sampled_from(["name", "stamp", "thinking", "refusal", "tool_call_id"]), unique=True)
        ):
            turn[key] = text(f"{place}.{key}")
        if draw(st.booleans()):
            turn["content" if keys[1] == "content" else "value"] = [{"type": "text", "text": turn[keys[1]]}]
        if draw(st.booleans()):
            turn[draw(st.sampled_from(["weight", "train", "loss"]))] = draw(
                st.sampled_from([0, 1, True, False, None])
            )
        return turn

    form = draw(st.sampled_from([f for f in FORMS if f.name != "tokens"]))
    row: dict[str, Any] = {}
    for slot, names in (*form.required.items(), *form.optional.items()):
        if slot in form.optional and draw(st.booleans()):
            continue
        name = draw(st.sampled_from(names))
        if slot == "messages" or (
            slot in ("question", "answer", "rejected") and draw(st.integers(0, 3)) == 0
        ):
            roles = (
                ["assistant"]
                if slot == "answer"
                else ["user", draw(st.sampled_from(["gpt", "bot", "tool", "x"]))]
            )
            row[name] = [message(name, role) for role in roles]
        elif slot == "tools":
            row[name] = [{"name": text(name), "description": text(name)}]
        elif slot == "arguments":
            row[name] = {"a": text(name)}
        elif slot == "history":
            row[name] = [[text(name), text(name)]]
        else:
            row[name] = text(name)
    for extra in draw(st.lists(st.sampled_from([*_NAMES, "id", "source", "score"]), max_size=2, unique=True)):
        if extra not in row:
            row[extra] = text(extra)
    return row, texts


@settings(max_examples=300, deadline=None)
@given(_rows())
def test_every_text_is_used_or_named(drawn: tuple[dict[str, Any], dict[str, str]]) -> None:
    """A text that is not in the example stands in a field that is ignored by name, whole or in part."""
    row, texts = drawn
    try:
        parsed = parse_row(Row("x", row))
    except RowError:
        return
    example = parsed.example
    kept = json.dumps(
        [example.messages, example.tools, example.template_arguments, example.text], ensure_ascii=False
    )
    for word, name in texts.items():
        assert word in kept or name in parsed.ignored or name.split(".")[0] in parsed.ignored

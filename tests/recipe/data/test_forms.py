"""Every form of row becomes the example it means, and what it leaves unused is named."""

import hashlib
import json
from typing import Any

import pytest

from sftmix.data.forms import FORMS, Parsed, forms_table, parse_columns, parse_row
from sftmix.data.rows import Row, RowError
from sftmix.data.supervision import message_weights


def _parse(fields: Any, **choice: Any) -> Parsed:
    return parse_row(Row("train.jsonl, line 3", fields), **choice)


def _turns(fields: Any, **choice: Any) -> list[tuple[str, str]]:
    return [(m["role"], m["content"]) for m in _parse(fields, **choice).example.messages]


def _kind(fields: Any, **choice: Any) -> str:
    with pytest.raises(RowError) as caught:
        _parse(fields, **choice)
    return caught.value.kind


def _chat(*turns: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "q"}, *turns]}


def _answer(**keys: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": "a", **keys}


QA = [("user", "q"), ("assistant", "a")]


def test_case_01_context_reaches_the_prompt() -> None:
    """Dolly's context follows the instruction, SQuAD's precedes the question; other columns are named."""
    dolly = {"instruction": "q", "context": "c", "response": "a", "category": "closed_qa"}
    assert _turns(dolly) == [("user", "q\n\nc"), ("assistant", "a")]
    assert _parse(dolly).ignored == ("category",)
    assert _turns({"id": "0", "context": "c", "question": "q", "answer": "a"})[0] == ("user", "c\n\nq")


def test_case_03_system_prompts_are_used_or_refused() -> None:
    """A prompt beside question and answer is refused with the candidates, and used where data.columns says how."""
    assert _turns({"id": 1, "system_prompt": "s", "question": "q", "response": "a"}) == [("system", "s"), *QA]
    row = {"prompt": "s", "question": "q", "answer": "a"}
    assert _kind(row) == "ambiguous columns"
    assert _turns(row, columns=parse_columns("system=prompt")) == [("system", "s"), *QA]
    assert _parse(row, form="question").ignored == ("prompt",)


@pytest.mark.parametrize(
    "mark", [{"weight": 0}, {"train": False}, {"loss": False}, {"training": False}, {"masked": True}]
)
def test_case_04_marked_answers_bear_no_loss(mark: dict[str, Any]) -> None:
    """Whatever the flag's name, the turn's weight is 0."""
    row = _chat(_answer(**mark), {"role": "user", "content": "no"}, _answer(weight=0.5))
    assert message_weights(_parse(row).example, "all") == (0, 0, 0, 0.5)
    assert message_weights(_parse(row).example, "marked") == (0, 0, 0, 0.5)


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning", "thought"])
def test_case_06_reasoning_has_one_name(key: str) -> None:
    """Reasoning under any of its names is the message's reasoning_content."""
    assert _parse(_chat(_answer(**{key: "because"}))).example.messages[1]["reasoning_content"] == "because"


def test_case_11_roles_are_mapped_or_refused() -> None:
    """Roles of other conventions and other case are mapped with a note, unknown ones refused."""
    row = {"messages": [{"role": "human", "content": "q"}, {"role": "gpt", "content": "a"}]}
    assert _turns(row) == QA and _parse(row).notes == ()
    mixed = _chat({"role": "Assistant", "content": "a"})
    assert _turns(mixed) == QA and _parse(mixed).notes == ("role Assistant read as assistant",)
    developer = _chat({"role": "developer", "content": "d"}, _answer())
    assert _turns(developer)[1] == ("system", "d") and _parse(developer).notes == (
        "role developer read as system",
    )
    assert _kind(_chat({"role": "narrator", "content": "n"}, _answer())) == "unknown role"


def test_case_13_function_calls_and_results_are_kept() -> None:
    """function_call becomes a tool call, the function's turn a tool's."""
    call = _answer(function_call={"name": "rain", "arguments": '{"at": "here"}'})
    messages = _parse(
        _chat(call, {"role": "function", "name": "rain", "content": "yes"}, _answer())
    ).example.messages
    assert messages[1]["tool_calls"] == [
        {"type": "function", "function": {"name": "rain", "arguments": {"at": "here"}}}
    ]
    assert messages[2] == {"role": "tool", "content": "yes", "name": "rain"}


@pytest.mark.parametrize(
    "row",
    [
        _chat(_answer()),
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"messages": {"role": ["user", "assistant"], "content": ["q", "a"]}},
        {"messages": '[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]'},
        _chat({"role": "assistant", "content": [{"type": "text", "text": "a"}]}),
        {"instruction": "q", "input": "", "output": "a"},
        {"instruction": "q", "context": None, "response": "a"},
        {"question": "q", "answers": {"text": ["a"]}},
        {"prompt": "q", "completion": "a"},
        {"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a"}]},
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"prompt": "q", "chosen": _chat(_answer())["messages"], "rejected": "b"},
        {"chosen": _chat(_answer())["messages"], "rejected": "b"},
    ],
)
def test_one_exchange_in_every_form(row: dict[str, Any]) -> None:
    """The same exchange, however it is written down, is the same example with the id it always had."""
    assert _turns(row) == QA
    plain = ({"role": "user", "content": "q"}, {"role": "assistant", "content": "a"})
    told = json.dumps([[message["role"], message["content"]] for message in plain])
    assert _parse(row).example.id == hashlib.sha256(told.encode()).hexdigest()[:16]


def test_history_comes_first() -> None:
    """Alpaca's history is a list of pairs."""
    row = {"instruction": "q", "output": "a", "history": [["q0", "a0"]], "system": "s"}
    assert _turns(row) == [("system", "s"), ("user", "q0"), ("assistant", "a0"), *QA]


def test_text_and_tokens_stand_alone() -> None:
    """Plain text and ready tokens need no messages; labels that are no copies are refused."""
    assert _parse({"text": "t"}).example.text == "t"
    row = {"input_ids": [1, 2], "labels": [-100, 2], "attention_mask": [1, 1]}
    assert _parse(row).example.labels == (-100, 2)
    assert _kind({**row, "labels": [2, 2]}) == "invalid tokens"
    assert _kind({**row, "attention_mask": [0, 1]}) == "invalid tokens"


def test_pairs_say_which_answer_is_used() -> None:
    """The rejected answer is named as ignored, and a note says so."""
    parsed = _parse({"prompt": "q", "chosen": "a", "rejected": "b"})
    assert parsed.ignored == ("rejected",)
    assert parsed.notes == ("chosen answer of a preference pair used, rejected one not",)


@pytest.mark.parametrize(
    "row, kind",
    [
        ({"instruction": "q", "input": "i", "output": "a", "response": "b"}, "ambiguous columns"),
        ({"prompt": "q", "completion": "a", "response": "b"}, "ambiguous columns"),
        ({"messages": _chat(_answer())["messages"], "chosen": "a", "rejected": "b"}, "ambiguous columns"),
        ({"prompt": "q"}, "unknown columns"),
        ({"prompt": "q", "completion": "a", "label": True}, "feedback row"),
        ({"prompt": "q", "completion": " "}, "empty answer"),
        ({"prompt": "q", "completion": None}, "empty answer"),
        ({"prompt": "q", "completion": True}, "not text"),
        ({"prompt": "q", "completion": "\ud800"}, "text not Unicode"),
        (_chat(_answer(content="", reasoning="r")), "empty answer"),
        (_chat(_answer(weight=1, train=False)), "contradictory marks"),
        (_chat(_answer(train="no")), "invalid mark"),
        (_chat({"role": "user", "content": "x", "train": True}, _answer()), "mark on another's turn"),
        (_chat(_answer(thinking="x", reasoning="y")), "contradictory reasoning"),
        (_chat(_answer(tool_calls=[{"x": 1}])), "invalid tool calls"),
        (
            _chat({"role": "user", "content": [{"type": "image", "image": "x"}]}, _answer()),
            "content not text",
        ),
        ({**_chat(_answer()), "tools": [{"type": "function"}]}, "invalid tools"),
        (_chat(), "no answer"),
        ({}, "not an object"),
        ([1], "not an object"),
    ],
)
def test_what_cannot_be_used_is_refused(row: Any, kind: str) -> None:
    """One kind of error for each fault."""
    assert _kind(row) == kind


def test_ignored_keys_and_numbers_are_said() -> None:
    """Unknown keys are named by their place; a number as an answer is its digits, with a note."""
    parsed = _parse({**_chat(_answer(timestamp=5)), "source": "x", "weight": 2})
    assert parsed.ignored == ("source", "weight", "messages.timestamp")
    number = _parse({"question": "q", "answer": 3})
    assert number.example.messages[1]["content"] == "3" and number.notes == ("number in answer used as text",)


def test_tools_and_template_arguments() -> None:
    """Bare functions are wrapped, JSON text is read."""
    parsed = _parse(
        {**_chat(_answer()), "functions": '[{"name": "f"}]', "chat_template_kwargs": {"think": False}}
    )
    assert parsed.example.tools == ({"type": "function", "function": {"name": "f"}},)
    assert parsed.example.template_arguments == {"think": False}


def test_rows_that_train_differently_have_different_ids() -> None:
    """Marks, reasoning and tools are part of the id."""
    rows = [
        _chat(_answer()),
        _chat(_answer(weight=0.5)),
        _chat(_answer(thought="t")),
        {**_chat(_answer()), "tools": '[{"name": "f"}]'},
    ]
    assert len({_parse(row).example.id for row in rows}) == len(rows)


def test_a_list_of_marks_beside_the_messages() -> None:
    """A row's loss_mask has one item per message, and agrees with the messages' own marks."""
    row = {**_chat(_answer(), {"role": "user", "content": "q"}, _answer()), "loss_mask": [1, 0, 1, 1]}
    assert message_weights(_parse(row).example, "all") == (0, 0, 0, 1)
    assert _kind({**row, "loss_mask": [1]}) == "invalid mark"
    assert _kind({**_chat(_answer(weight=1)), "loss_mask": [0, 0]}) == "contradictory marks"


def test_columns_have_other_names() -> None:
    """Names and dotted paths are mapped; what is left beside a path is named."""
    row = {"query": "q", "reply": {"text": "a", "score": 3}}
    parsed = _parse(row, columns=parse_columns("question=query, answer=reply.text"))
    assert [m["content"] for m in parsed.example.messages] == ["q", "a"] and parsed.ignored == (
        "reply.score",
    )
    with pytest.raises(ValueError, match=r"columns: expected names among .*, got nonsense"):
        parse_columns("nonsense=x")


def test_supervise() -> None:
    """all, last, completion and marked; of a prompt of several turns only the completion bears loss."""
    chat = _parse(_chat(_answer(), {"role": "user", "content": "q"}, _answer())).example
    assert message_weights(chat, "all") == (0, 1, 0, 1)
    assert message_weights(chat, "last") == (0, 0, 0, 1)
    pair = _parse(
        {"prompt": [*_chat(_answer())["messages"], {"role": "user", "content": "q"}], "completion": "b"}
    )
    assert message_weights(pair.example, "all") == message_weights(pair.example, "completion") == (0, 0, 0, 1)
    for supervise, kind in (("completion", "no completion"), ("marked", "no marked turn")):
        with pytest.raises(RowError) as caught:
            message_weights(chat, supervise)
        assert caught.value.kind == kind
    with pytest.raises(RowError) as caught:
        message_weights(_parse(_chat(_answer(weight=0))).example, "all")
    assert caught.value.kind == "nothing to train on"


def test_table_names_every_form() -> None:
    """The printed table has a line for each form."""
    assert [name for name, _, _ in forms_table()] == [form.name for form in FORMS]
    assert forms_table()[1][1].startswith("instruction output [context|input]")


def test_a_missing_value_of_a_table_is_no_text() -> None:
    """Tables write it as NaN: it is not the answer "nan", nor a field that somebody has to read."""
    nan = float("nan")
    with pytest.raises(RowError, match="expected an answer, got empty text"):
        _parse({"prompt": "q", "completion": nan})
    parsed = _parse({"instruction": "q", "input": nan, "output": "a", "source": nan})
    assert (
        [m["content"] for m in parsed.example.messages] == ["q", "a"]
        and not parsed.ignored
        and not parsed.notes
    )


def test_a_tool_call_by_parameters_keeps_them() -> None:
    call = {"function": {"name": "f", "parameters": {"town": "Ulm"}}}
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    parsed = _parse({"messages": turns})
    assert parsed.example.messages[1]["tool_calls"][0]["function"] == {
        "name": "f",
        "arguments": {"town": "Ulm"},
    }
    assert not parsed.ignored
    both = {"function": {"name": "f", "parameters": {"a": 1}, "arguments": {"b": 2}}}
    turns[1]["tool_calls"] = [both]
    parsed = _parse({"messages": turns})
    assert parsed.example.messages[1]["tool_calls"][0]["function"]["arguments"] == {"b": 2}
    assert parsed.ignored == ("messages.tool_calls.parameters",)

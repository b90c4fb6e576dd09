"""Rows of a question and its answer as a conversation: history, context, question, answer, texts or messages."""

from __future__ import annotations

from typing import Any

from sftmix.data.ledger import Ledger, as_text, empty, parsed
from sftmix.data.messages import read_messages
from sftmix.data.rows import Message, RowError


def read_exchange(
    form: str, slots: dict[str, str], value: dict[str, Any], ledger: Ledger
) -> tuple[list[Message], list[float | None], int | None]:
    """(messages, marks, index of the answer) of a question and its answer, texts or lists of messages."""
    messages: list[Message] = []
    marks: list[float | None] = []
    if "history" in slots:
        messages, marks = _history(value["history"], ledger)
    question, answer = value.get("question"), value["answer"]
    context = as_text(value.get("context"), slots.get("context", ""), ledger)
    if isinstance(question, list):
        if context.strip():
            raise RowError(
                "context beside messages", f"{slots['context']}: expected a text question, got messages"
            )
        asked, asked_marks = read_messages(question, slots["question"], ledger)
        messages, marks = messages + asked, marks + asked_marks
    elif "question" in slots:
        text = as_text(question, slots["question"], ledger)
        parts = (context, text) if form == "question" else (text, context)
        if context.strip():
            text = "\n\n".join(part for part in parts if part.strip())
        if not text.strip():
            ledger.note("empty user turn")
        messages, marks = [*messages, {"role": "user", "content": text}], [*marks, None]
    if isinstance(answer, (dict, list)) and slots["answer"] == "answers":
        texts = answer.get("text") if isinstance(answer, dict) else answer
        texts = texts if isinstance(texts, list) else [texts]
        if len(texts) > 1:
            ledger.note("first of several answers used")
            ledger.ignore("answers.text" if isinstance(answer, dict) else "answers")
        for key, item in answer.items() if isinstance(answer, dict) else ():
            if key != "text" and not empty(item):
                ledger.ignore(f"answers.{key}")
        answer = texts[0] if texts else None
    start = len(messages)
    if isinstance(answer, list):
        answers, answer_marks = read_messages(answer, slots["answer"], ledger)
        if form == "preference":
            answers, answer_marks, messages, marks, start = _unrepeated(
                answers, answer_marks, messages, marks, value
            )
        messages, marks = messages + answers, marks + answer_marks
    else:
        text = as_text(answer, slots["answer"], ledger)
        if not text.strip():
            raise RowError("empty answer", f"{slots['answer']}: expected an answer, got empty text")
        messages, marks = [*messages, {"role": "assistant", "content": text}], [*marks, None]
    if form == "preference":
        note_preference(ledger)
    return messages, marks, start


def _unrepeated(answers: Any, answer_marks: Any, messages: Any, marks: Any, value: dict[str, Any]) -> Any:
    """The chosen conversation without the prompt that it repeats; what both pairs begin with is the prompt."""
    size = len(messages)
    if size and answers[:size] == messages:
        return answers[size:], answer_marks[size:], messages, answer_marks[:size], size
    if size == 1 and not isinstance(value.get("question"), list):
        at = next((i for i, m in enumerate(answers) if m == messages[0]), None)
        if at is not None and not any(m["role"] == "assistant" for m in answers[:at]):
            return answers, answer_marks, [], [], at + 1
    if size:
        return answers, answer_marks, messages, marks, size
    last = max((i for i, m in enumerate(answers) if m["role"] == "assistant"), default=0)
    return answers, answer_marks, messages, marks, last


def note_preference(ledger: Ledger) -> None:
    ledger.note("chosen answer of a preference pair used, rejected one not")
    ledger.ignore("rejected")


def _history(value: Any, ledger: Ledger) -> tuple[list[Message], list[float | None]]:
    """Earlier turns: pairs of question and answer, or messages."""
    value = parsed(value, "history")
    if isinstance(value, list) and all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in value):
        value = [
            {"role": role, "content": as_text(text, "history", ledger)}
            for pair in value
            for role, text in zip(("user", "assistant"), pair, strict=True)
        ]
    return read_messages(value, "history", ledger)

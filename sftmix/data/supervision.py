"""Which messages of an example bear loss, with what weight: ``data.supervise`` and the row's marks."""

from __future__ import annotations

from sftmix.data.rows import Example, RowError

_OWN_PROMPT = ("prompt_completion", "preference")


def message_weights(example: Example, supervise: str) -> tuple[float, ...]:
    """One weight per message, 0 for every one that is not the assistant's.

    A row's own marks always multiply. Raises ``RowError`` when no message is left to train on, and for a row that
    has not what ``completion`` or ``marked`` asks for; ``ValueError`` for an unknown ``supervise``.
    """
    if supervise not in ("all", "last", "completion", "marked"):
        raise ValueError(f"supervise: expected all, last, completion or marked, got {supervise!r}")
    marks = example.marks or (None,) * len(example.messages)
    turns = [i for i, message in enumerate(example.messages) if message["role"] == "assistant"]
    if supervise == "completion" and example.completion is None:
        raise RowError("no completion", "supervise: expected a row with a completion, got one without")
    if supervise == "completion" or (supervise == "all" and example.form in _OWN_PROMPT):
        turns = [i for i in turns if i >= (example.completion or 0)]
    elif supervise == "last":
        turns = turns[-1:]
    elif supervise == "marked":
        turns = [i for i in turns if marks[i]]
        if not turns:
            raise RowError("no marked turn", "supervise: expected a turn marked above 0, got none")
    weights = [0.0] * len(example.messages)
    for i in turns:
        mark = marks[i]
        weights[i] = 1.0 if mark is None else mark
    if example.messages and not any(weights):
        raise RowError(
            "nothing to train on", "messages: expected an assistant's turn that bears loss, got none"
        )
    return tuple(weights)

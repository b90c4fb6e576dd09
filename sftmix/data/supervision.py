"""Which messages bear loss, and how much: ``data.supervise`` and the marks of a row."""

from __future__ import annotations

from sftmix.data.rows import Example, RowError


def message_weights(example: Example, supervise: str) -> tuple[float, ...]:
    """The weight of each message in the loss; 0 for all but the assistant's.

    ``all``: every assistant turn, of a prompt–completion row those of the completion; ``last``: the last one;
    ``completion``: those of the completion; ``marked``: those that the row marks with a weight above 0. A row's own
    weights hold in every case. Raises ``RowError`` where no turn is left, and for a row without a completion or marks
    where they are asked for.
    """
    roles = [message["role"] for message in example.messages]
    marks = example.marks or (None,) * len(roles)
    first = example.completion or 0
    if supervise == "completion" and example.completion is None:
        raise RowError(
            "no completion", "expected a row with a completion (data.supervise=completion), got none"
        )
    if supervise == "marked" and not any(marks):
        raise RowError(
            "no marked turn", "expected a turn that the row marks (data.supervise=marked), got none"
        )
    chosen = [i for i, role in enumerate(roles) if role == "assistant" and i >= first]
    if supervise == "last":
        chosen = chosen[-1:]
    if supervise == "marked":
        chosen = [i for i in chosen if marks[i]]
    weights = [0.0] * len(roles)
    for i in chosen:
        mark = marks[i]
        weights[i] = 1.0 if mark is None else mark
    if not any(weights):
        raise RowError("nothing to train on", "expected an answer that bears loss, got none")
    return tuple(weights)

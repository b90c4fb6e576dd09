"""Rows that are tokens already: checked against their labels and masks, never changed."""

from __future__ import annotations

from typing import Any

from sftmix.data.content_id import hashed
from sftmix.data.rows import Example, RowError


def read_tokens(value: dict[str, Any], place: str) -> Example:
    """Ready tokens: labels are -100 or the token itself; a loss mask is folded into them."""
    ids = value["input_ids"]
    for name, items in value.items():
        if (
            not isinstance(items, list)
            or not all(type(item) is int for item in items)
            or len(items) != len(ids)
        ):
            raise RowError("invalid tokens", f"{name}: expected a list of integers as long as input_ids")
    labels = value["labels"]
    if any(i < 0 for i in ids) or any(label not in (-100, i) for i, label in zip(ids, labels, strict=True)):
        raise RowError("invalid tokens", "labels: expected -100 or the token at the same place, got another")
    if any(item != 1 for item in value.get("masks", ())) or any(
        m not in (0, 1) for m in value.get("loss", ())
    ):
        raise RowError("invalid tokens", "masks: expected attention of 1 everywhere and loss of 0 or 1")
    if "loss" in value:
        labels = [label if keep else -100 for label, keep in zip(labels, value["loss"], strict=True)]
    if all(label == -100 for label in labels):
        raise RowError("nothing to train on", "labels: expected a token that bears loss, got none")
    return Example(
        hashed(["tokens", ids, labels]),
        place=place,
        form="tokens",
        input_ids=tuple(ids),
        labels=tuple(labels),
    )

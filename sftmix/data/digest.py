"""What tokenised examples are, as one short hash: ids, tokens, which of them bear loss, and with what weight."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Mapping
from typing import Any

from sftmix.data.tokenized import TokenizedExample


def example_digest(example: TokenizedExample) -> int:
    """64 bits of what is trained: tokens, marks, weights and replaced targets. Weights that are all 1 are as none."""
    digest = hashlib.blake2b(array("q", example.input_ids).tobytes(), digest_size=8)
    digest.update(bytes(example.supervised))
    weights = example.weights
    if weights is not None and any(weights[t] != 1 for t, mark in enumerate(example.supervised) if mark):
        digest.update(array("f", weights).tobytes())
    if example.replaced:
        digest.update(repr(example.replaced).encode())
    return int.from_bytes(digest.digest(), "big", signed=True)


def examples_digest(examples: Mapping[str, TokenizedExample]) -> str:
    """A hash of everything in the examples that a result depends on, whatever their order.

    The text, the file it came from, and settings that leave the tokens alone do not show.
    """
    ready: Any = getattr(examples, "digests", None)
    by_name = ready() if ready is not None else {name: example_digest(examples[name]) for name in examples}
    return hashlib.sha256(repr(sorted(by_name.items())).encode()).hexdigest()[:16]

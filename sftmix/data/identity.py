"""What tokenised examples are, as one short hash: ids, tokens, which of them bear loss, and with what weight."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sftmix.data.chat import TokenizedExample


def examples_digest(examples: Mapping[str, TokenizedExample]) -> str:
    """A hash of everything in the examples that a result depends on, whatever their order.

    Weights that are all 1 are the same as none. The text, the file it came from, and settings that leave the tokens
    alone do not show.
    """
    import numpy as np

    digest = hashlib.sha256()
    for name in sorted(examples):
        example = examples[name]
        marks = np.asarray(example.supervised, dtype=bool)
        given = getattr(example, "weights", None)
        weights = marks if given is None else np.where(marks, np.asarray(given, dtype=np.float32), 0)
        digest.update(f"{name} {len(marks)}\n".encode())
        digest.update(np.asarray(example.input_ids, dtype="<i8").tobytes())
        digest.update(marks.tobytes())
        digest.update(weights.astype("<f4").tobytes())
    return digest.hexdigest()[:16]

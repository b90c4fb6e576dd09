"""Ids of examples: a hash of everything that a row gives to training, and of nothing else."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from sftmix.data.rows import Message, RowError


def content_id(
    messages: list[Message], marks: Any, tools: Any, arguments: Any, completion: int | None
) -> str:
    """Of a plain conversation the hash of roles and contents; whatever else changes the training joins in."""
    plain: list[Any] = [[m["role"], m["content"]] for m in messages]
    if marks or tools or arguments or any(len(m) > 2 for m in messages):
        return hashed(["rich", messages, marks, tools, arguments, completion])
    answers = sum(m["role"] == "assistant" for m in messages)
    return hashed(["completion", plain, completion] if completion is not None and answers > 1 else plain)


def hashed(content: Any) -> str:
    try:
        plain = isinstance(content, list) and content[0] != "rich"
        text = json.dumps(content) if plain else json.dumps(content, sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()[:16]
    except UnicodeEncodeError as error:
        raise RowError("text not Unicode", "row: expected Unicode text, got a lone surrogate") from error
    except (TypeError, ValueError) as error:
        raise RowError("not JSON", f"row: expected values that JSON holds, got {error}") from error

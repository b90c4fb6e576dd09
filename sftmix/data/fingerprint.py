"""What the tokens of a source depend on, as one short hash: the content of its files, settings, tokenizer, template."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

VERSION = 1  # of what is written for a source


def fingerprint(source: Any, tokenizer: Any, options: Any, files: Sequence[Path]) -> str:
    """A hash of everything that the tokens depend on."""
    settings = {**asdict(source), "options": asdict(options), "version": VERSION}
    settings["files"] = [content_hash(path) for path in files]
    if files:
        del settings["name"]  # a file that was moved is the same file
    told = json.dumps([settings, tokenizer_facts(tokenizer)], sort_keys=True, default=str)
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def tokenizer_facts(tokenizer: Any) -> dict[str, Any]:
    """What of a tokenizer decides the ids: its model and rules, special tokens and chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    model = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return {
        "class": type(tokenizer).__name__,
        "model": hashlib.sha256(model.encode()).hexdigest(),
        "special": tokenizer.special_tokens_map,
        "template": tokenizer.chat_template,
    }


def content_hash(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()

"""Examples from files: JSON, JSON Lines, Parquet or a ``datasets`` id to conversations with stable ids.

Three kinds of row are recognised, in this order:

- ``messages``: a list of ``{"role", "content"}``;
- ``instruction``, ``output`` and optionally ``input`` (Alpaca);
- a question and its answer: ``prompt``, ``question`` or ``instruction`` with ``completion``, ``response`` or
  ``answer``; both texts, or both lists of messages.

An example's id is a hash of its conversation, so it survives reordering, other columns and other formats.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from sftmix.data.heldout import split_heldout

__all__ = ["Example", "load_examples", "split_heldout"]
_OPENERS = {".gz": gzip.open, ".xz": lzma.open}
_FORMS = (".json", ".jsonl", ".ndjson", ".parquet")
_SUFFIXES = (*_FORMS, *_OPENERS)
_FILE_FORMS = "a .json, .jsonl or .ndjson file (also .gz, .xz), or a .parquet file"
_PROMPTS = ("prompt", "question", "instruction")
_ANSWERS = ("completion", "response", "answer")
_COLUMNS = (
    "messages; or instruction and output (input optional); or one of "
    f"{', '.join(_PROMPTS)} with one of {', '.join(_ANSWERS)}"
)


@dataclass(frozen=True)
class Example:
    """One conversation; every message is ``{"role": ..., "content": ...}``."""

    id: str
    messages: tuple[dict[str, str], ...]


def load_examples(source: str, *, split: str = "train", limit: int | None = None) -> list[Example]:
    """Read examples from a file, or else from the ``datasets`` id ``source`` (its ``split``).

    ``limit`` keeps the first so many rows. Rows that are equal get ids that end in -2, -3, … so that every
    id is unique. Raises ``ValueError`` naming the file and the line for text that does not parse, a file
    that ends early, unknown columns and empty answers; and for a source without any example.
    """
    path = Path(source).expanduser()
    rows = _read_file(path) if path.exists() else _read_hub(source, split)
    if limit is not None:
        rows = islice(rows, limit)
    examples: list[Example] = []
    seen: Counter[str] = Counter()
    for where, row in rows:
        messages = _conversation(row, where)
        name = _content_hash(messages)
        seen[name] += 1
        examples.append(Example(name if seen[name] == 1 else f"{name}-{seen[name]}", messages))
    if not examples:
        raise ValueError(f"{source}: expected at least one example, got none")
    return examples


def _content_hash(messages: tuple[dict[str, str], ...]) -> str:
    text = json.dumps([[m["role"], m["content"]] for m in messages])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _read_file(path: Path) -> Iterator[tuple[str, Any]]:
    """Rows of a file, each with a description of its place."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packed = suffixes.pop() if suffixes and suffixes[-1] in _OPENERS else None
    form = suffixes[-1] if suffixes else None
    if not path.is_file() or form not in _FORMS:
        kind = "a folder" if path.is_dir() else repr(path.name)
        raise ValueError(f"{path}: expected {_FILE_FORMS}, got {kind}")
    if form == ".parquet":
        return _read_parquet(path)
    return _read_json(path, packed, lines_only=form != ".json")


def _read_json(path: Path, packed: str | None, *, lines_only: bool) -> Iterator[tuple[str, Any]]:
    """Rows of JSON Lines, or of one JSON array (told by its first character, in a ``.json`` file)."""
    lines = _text_lines(path, packed)
    for number, line in lines:
        if not line.strip():
            continue
        if not lines_only and line.lstrip().startswith("["):
            text = line + "".join(rest for _, rest in lines)
            rows = _parse(text, str(path))
            yield from ((f"{path}, item {i}", row) for i, row in enumerate(rows, 1))
            return
        yield f"{path}, line {number}", _parse(line, f"{path}, line {number}")


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: expected JSON, got text that does not parse ({error})") from error


def _text_lines(path: Path, packed: str | None) -> Iterator[tuple[int, str]]:
    """Numbered lines of a UTF-8 file, unpacked; a file cut short is an error that says where."""
    opener: Any = _OPENERS[packed] if packed else open
    number = 0
    try:
        with opener(path, "rb") as file:
            for number, raw in enumerate(file, 1):
                yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}, line {number}: expected UTF-8 text, got {error.reason}") from error
    except (EOFError, OSError, lzma.LZMAError, zlib.error) as error:
        form = f"whole {packed} file" if packed else "readable file"
        raise ValueError(
            f"{path}, line {number + 1}: expected a {form}, got damaged or missing data ({error})"
        ) from error


def _read_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", row
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: expected a whole Parquet file, got {error}") from error


def _read_hub(source: str, split: str) -> Iterator[tuple[str, Any]]:
    """Rows of a ``datasets`` id; anything that goes wrong is one ``ValueError``."""
    expected = f"data: expected {_FILE_FORMS}, or a datasets id, got {source!r}: no such file"
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", source) or Path(source).suffix in _SUFFIXES:
        raise ValueError(f"{expected}, and its name is not one of a datasets id")  # no use asking the hub
    import datasets

    try:
        rows = datasets.load_dataset(source, split=split)
    except Exception as error:  # the library raises a different class for each of its back ends
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{expected}, and loading it as a datasets id failed ({reason})") from error
    return ((f"{source} ({split}), row {i}", row) for i, row in enumerate(rows, 1))


def _conversation(row: Any, where: str) -> tuple[dict[str, str], ...]:
    """A row's messages, whichever columns it has."""
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected an object with columns {_COLUMNS}, got {type(row).__name__}")
    columns = {name for name, value in row.items() if value is not None}
    prompt = next((name for name in _PROMPTS if name in columns), None)
    answer = next((name for name in _ANSWERS if name in columns), None)
    if "messages" in columns:
        return _checked(row["messages"], where)
    if {"instruction", "output"} <= columns:
        extra = _text(row.get("input") or "", f"{where}, column input")
        question = _text(row["instruction"], f"{where}, column instruction")
        return _checked(
            _exchange(f"{question}\n\n{extra}" if extra.strip() else question, row["output"]), where
        )
    if prompt is not None and answer is not None:
        if isinstance(row[prompt], list) and isinstance(row[answer], list):
            return _checked(row[prompt] + row[answer], where)
        return _checked(_exchange(row[prompt], row[answer]), where)
    raise ValueError(f"{where}: expected columns {_COLUMNS}, got {', '.join(map(str, row)) or 'none'}")


def _exchange(question: Any, answer: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _checked(messages: Any, where: str) -> tuple[dict[str, str], ...]:
    """Messages reduced to role and content, with at least one answer and none that is empty."""
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise ValueError(f"{where}: expected messages to be a list of objects, got {messages!r:.80}")
    kept = []
    for i, message in enumerate(messages, 1):
        place = f"{where}, message {i}"
        if message.get("tool_calls"):
            raise ValueError(
                f"{place}: expected role and content only, got tool_calls, which are not supported"
            )
        role, content = (_text(message.get(key), f"{place}, {key}") for key in ("role", "content"))
        if role == "assistant" and not content.strip():
            raise ValueError(f"{place}: expected an answer, got empty text")
        kept.append({"role": role, "content": content})
    if not any(message["role"] == "assistant" for message in kept):
        raise ValueError(f"{where}: expected at least one assistant message, got {[m['role'] for m in kept]}")
    return tuple(kept)


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where}: expected text, got {value!r:.80}")
    return value

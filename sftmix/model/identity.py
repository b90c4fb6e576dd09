"""Which model a folder or hub id is, as one short hash: its configuration and a sample of its weights' bytes.

A folder that was moved or copied is the same model; another fine-tune in the same place is another one; an adapter
is one with its base. All of the bytes would take minutes for a large model: read are a file's size, its first 64 KiB
(the names and shapes) and 256 blocks of 4 KiB spread over it, for safetensors one in each tensor. Training moves nearly
every number of a tensor.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

from sftmix.config import ModelConfig
from sftmix.model.source import ADAPTER_CONFIG, underlying

_WEIGHTS = ("*.safetensors", "*.bin", "*.gguf")
_FIRST, _BLOCK, _BLOCKS = 1 << 16, 1 << 12, 256


def model_identity(name: str, *, gguf_file: str | None = None, revision: str | None = None) -> str:
    """A hash for the model at ``name``; for a hub id, whose files never change under a revision, of the names alone.

    Raises ``ValueError`` for a file of the folder that cannot be read.
    """
    folder = Path(name).expanduser()
    digest = hashlib.sha256()
    if not folder.is_dir():
        return f"{name}@{revision or 'main'}" + (f"/{gguf_file}" if gguf_file else "")
    if gguf_file is not None:
        files = [folder / gguf_file]
    else:
        files = [path for pattern in _WEIGHTS[:2] for path in sorted(folder.glob(pattern))]
    try:
        config = folder / "config.json"
        if gguf_file is None and config.is_file():
            digest.update(_configuration(config))
        adapter = folder / ADAPTER_CONFIG
        if gguf_file is None and adapter.is_file():
            base = underlying(ModelConfig(name=name, revision=revision))
            digest.update(adapter.read_bytes())
            digest.update(model_identity(base.name, revision=base.revision).encode())
        for path in files:
            digest.update(f"{path.name} {path.stat().st_size}\n".encode())
            for block in _sample(path):
                digest.update(block)
    except OSError as error:
        raise ValueError(
            f"model: expected files that can be read in {folder}, got {error.strerror}"
        ) from error
    return digest.hexdigest()[:16]


def _configuration(path: Path) -> bytes:
    """config.json without what a newer library or another place alone changes."""
    raw = path.read_bytes()
    try:
        values = json.loads(raw)
    except ValueError:
        return raw
    if isinstance(values, dict):
        values = {k: v for k, v in values.items() if k not in ("_name_or_path", "transformers_version")}
    return json.dumps(values, sort_keys=True).encode()


def _sample(path: Path) -> Iterator[bytes]:
    size = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(_FIRST)
        yield first
        starts = _tensor_starts(first, file.read) if path.suffix == ".safetensors" else []
        for start in starts or [size * i // _BLOCKS for i in range(_BLOCKS)]:
            file.seek(start)
            yield file.read(_BLOCK)
        file.seek(max(0, size - _BLOCK))
        yield file.read(_BLOCK)


def _tensor_starts(first: bytes, read: Callable[[int], bytes]) -> list[int]:
    """Where each tensor of a safetensors file begins; none where the header is not one."""
    length = int.from_bytes(first[:8], "little")
    if len(first) < 8 or length > 1 << 28:
        return []
    header = first[8 : 8 + length]
    if len(header) < length:
        header += read(length - len(header))
    try:
        entries = json.loads(header)
        return sorted(
            8 + length + entry["data_offsets"][0] for name, entry in entries.items() if name != "__metadata__"
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        return []

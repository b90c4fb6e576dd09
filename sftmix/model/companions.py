"""The files that belong to a model beside its weights, configuration and tokenizer: they go along with an export.

A multimodal model without its processor files cannot be served, one with code of its own cannot be loaded without it,
and a licence has to stay with the weights.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from sftmix.config import ModelConfig

PROCESSOR = (
    "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
    "image_processor_config.json", "audio_tokenizer_config.json", "chat_template.json",
)  # fmt: skip
VOCABULARY = ("tokenizer.model", "spiece.model", "tekken.json")  # what other runtimes read
_TEXTS = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")


def home(source: ModelConfig) -> Path | None:
    """The folder with the model's files: its own, or the snapshot of a loaded hub id; None where there is none."""
    folder = Path(source.name).expanduser()
    if folder.is_dir():
        return folder
    from transformers.utils import cached_file

    found: Any = None
    for name in ("config.json", *PROCESSOR, *VOCABULARY):
        try:
            path = cached_file(
                source.name, name, revision=source.revision or "main", _raise_exceptions_for_missing_entries=False,
                _raise_exceptions_for_gated_repo=False, _raise_exceptions_for_connection_errors=False,
            )  # fmt: skip
        except (OSError, ValueError):
            path = None
        found = found or path
    return Path(found).parent if found else None


def copy_companions(source: ModelConfig, folder: Path, *, code: bool) -> list[str]:
    """Copy processor files, vocabularies, licences and, with ``code``, Python files from ``source`` into ``folder``.

    Nothing that stands there is replaced: what the export itself wrote is about the trained model. Returns the names
    of the files copied.
    """
    place = home(source)
    if place is None or source.gguf_file is not None:
        return []
    wanted = [place / name for name in (*PROCESSOR, *VOCABULARY)]
    wanted += [path for pattern in _TEXTS for path in sorted(place.glob(pattern))]
    if code:
        wanted += sorted(place.rglob("*.py"))
    copied = []
    for path in wanted:
        target = folder / path.relative_to(place)
        if path.is_file() and not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
            copied.append(str(target.relative_to(folder)))
    return copied

"""The files that belong to a model beside its weights, configuration and tokenizer: they go along with an export.

A multimodal model without its processor files cannot be served, one with code of its own cannot be loaded without it,
and a licence has to stay with the weights.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from sftmix.config import ModelConfig
from sftmix.model.source import underlying

PROCESSOR = (
    "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
    "image_processor_config.json", "audio_tokenizer_config.json", "chat_template.json",
)  # fmt: skip
VOCABULARY = ("tokenizer.model", "spiece.model", "tekken.json")  # what other runtimes read
_ROTARY = re.compile(r"rope|rotary")
_TEXTS = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")


def home(source: ModelConfig) -> Path | None:
    """The folder with the model's files: its own, or the snapshot of a loaded hub id; None where there is none.

    Of an adapter it is its base's.
    """
    source = underlying(source)
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
        found = sorted(place.rglob("*.py"))
        wanted += [path for path in found if not any(p[0] == "." for p in path.relative_to(place).parts)]
    copied = []
    for path in wanted:
        target = folder / path.relative_to(place)
        if path.is_file() and not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
            copied.append(str(target.relative_to(folder)))
    return copied


def keep_names(source: ModelConfig, folder: Path) -> None:
    """Give settings in ``folder`` the names, too, that the files of ``source`` have for them.

    transformers 5 moved some. Programs with an older one read the base model, and then this one, as it was trained:
    they take rotary frequencies from ``rope_theta``, and know neither a class ``TokenizersBackend`` nor a list of
    ``extra_special_tokens``.
    """
    place = home(source)
    if place is None or source.gguf_file is not None:
        return
    for name, keep in (("config.json", _rotary), ("tokenizer_config.json", _tokenizer)):
        theirs, ours = _object(place / name), _object(folder / name)
        if ours and keep(theirs, ours):
            text = json.dumps(ours, indent=2, ensure_ascii=False)
            (folder / name).write_text(text + "\n", encoding="utf-8")


def _rotary(theirs: dict[str, Any], ours: dict[str, Any]) -> bool:
    """Add what the base's configuration says of rotary positions and this one does not; in its parts too."""
    found = {name: value for name, value in theirs.items() if _ROTARY.search(name) and name not in ours}
    ours.update(found)
    parts = [name for name in theirs if isinstance(theirs[name], dict) and isinstance(ours.get(name), dict)]
    return bool([name for name in parts if _rotary(theirs[name], ours[name])] or found)


def _tokenizer(theirs: dict[str, Any], ours: dict[str, Any]) -> bool:
    before = dict(ours)
    named = theirs.get("tokenizer_class")
    if ours.get("tokenizer_class") == "TokenizersBackend" and isinstance(named, str):
        ours["tokenizer_class"] = named
    if isinstance(ours.get("extra_special_tokens"), list) and "extra_special_tokens" not in theirs:
        ours["additional_special_tokens"] = ours.pop("extra_special_tokens")
    return ours != before


def _object(path: Path) -> dict[str, Any]:
    """A file's JSON object; empty where there is none, as in the folder of an adapter."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}

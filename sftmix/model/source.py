"""Where a model is read from: a folder or a hub id, what transformers is told of it, and what is said when it fails.

A folder is looked at before transformers reads it, so that what is missing is named; ``reading`` turns whatever
transformers and the packages under it raise into one ``ValueError`` that says what to do.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from sftmix.config import ModelConfig

_WEIGHTS = ("*.safetensors", "*.bin", "*.index.json")
_TOKENIZER_PACKAGES = (
    ("*.tiktoken", "tiktoken"),
    ("tokenizer.model*", "sentencepiece"),
    ("*.spm", "sentencepiece"),
)
ADAPTER_CONFIG = "adapter_config.json"
_LONGEST = 200  # characters of another library's message


def place(model: ModelConfig) -> str:
    """The model's folder with ``~`` replaced, or its hub id.

    Raises ``ValueError`` for a file, and for a path that is not there and cannot be a hub id.
    """
    path = Path(model.name).expanduser()
    if path.is_dir():
        return str(path)
    if path.exists():
        raise ValueError(
            f"model.name: expected a folder or a hub id, got the file {model.name} (of a GGUF file: the folder, and "
            "the file's name as model.gguf_file)"
        )
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", model.name):
        raise ValueError(
            f"model.name: expected a folder with a model, or a hub id, got no folder {model.name}"
        )
    return model.name


def options(model: ModelConfig) -> dict[str, Any]:
    """What every ``from_pretrained`` is told; code of the model's own runs only where the knob says so."""
    told: dict[str, Any] = {
        "revision": model.revision or "main",
        "trust_remote_code": model.trust_remote_code,
    }
    return {**told, "gguf_file": model.gguf_file} if model.gguf_file else told


def check_folder(model: ModelConfig) -> None:
    """Raise ``ValueError`` for a local folder that cannot hold a causal LM; a hub id is left to the hub."""
    folder = Path(place(model))
    if not folder.is_dir():
        return
    if not os.access(folder, os.R_OK | os.X_OK):
        raise ValueError(
            f"model.name: expected a folder that may be read, got {folder}: change its permissions"
        )
    names = sorted(path.name for path in folder.iterdir())
    if not names:
        raise ValueError(
            f"model.name: expected a folder with config.json and weights, got {folder}, an empty one"
        )
    if model.gguf_file:
        if not (folder / model.gguf_file).is_file():
            found = ", ".join(name for name in names if name.endswith(".gguf")) or "none"
            raise ValueError(
                f"model.gguf_file: expected one of the GGUF files of {folder} ({found}), got {model.gguf_file}"
            )
        return
    if "adapter_config.json" in names:  # its base is looked at
        return
    if "config.json" not in names:
        ggufs = [name for name in names if name.endswith(".gguf")]
        advice = f"; for its GGUF file: model.gguf_file={ggufs[0]}" if ggufs else ""
        raise ValueError(f"model.name: expected a folder with config.json, got {folder} without one{advice}")
    if not any(True for pattern in _WEIGHTS for _ in folder.glob(pattern)):
        raise ValueError(
            f"model.name: expected weights (*.safetensors or *.bin) in {folder}, got none: bring the files there"
        )


def underlying(model: ModelConfig) -> ModelConfig:
    """Where weights and configuration are: the base of an adapter's folder, else ``model`` itself.

    Raises ``ValueError`` for an adapter that names no base.
    """
    path = Path(place(model)) / ADAPTER_CONFIG
    if not path.is_file():
        return model
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model.name: expected JSON in {path}, got {error}: bring the file there anew"
        ) from error
    base = found.get("base_model_name_or_path") if isinstance(found, dict) else None
    if not isinstance(base, str) or not base:
        raise ValueError(f"model.name: expected {path} to name base_model_name_or_path, got {base!r}")
    if not Path(base).expanduser().is_dir() and (path.parent / base).is_dir():
        base = str(path.parent / base)
    revision = found.get("revision")
    return dataclasses.replace(
        model, name=base, revision=revision if isinstance(revision, str) and revision else None
    )


def read_configuration(model: ModelConfig) -> Any:
    """The model's configuration. Raises ``ValueError`` naming what is wrong with it."""
    base = underlying(model)
    if base is not model:
        try:
            return read_configuration(base)
        except ValueError as error:
            raise ValueError(
                f"{error} ({base.name} is the base that the adapter {model.name} names)"
            ) from error
    from transformers import AutoConfig

    name = place(model)
    path = Path(name) / "config.json"
    if model.gguf_file is None and path.is_file():
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ValueError(
                f"model.name: expected {path} to be readable, got {error.strerror}: change its permissions"
            ) from error
        except ValueError as error:
            raise ValueError(
                f"model.name: expected JSON in {path}, got {error}: bring the file there anew"
            ) from error
        if not isinstance(found, dict):
            raise ValueError(
                f"model.name: expected a JSON object in {path}, got a {type(found).__name__}: bring the file there anew"
            )
    with reading(model, "a configuration"):
        return AutoConfig.from_pretrained(name, **options(model))


@contextmanager
def reading(model: ModelConfig, what: str) -> Iterator[None]:
    """Every error of the block as a ``ValueError`` of one line: what was expected of ``model``, and what to do."""
    try:
        yield
    except Exception as error:  # packages under transformers have error classes of their own
        raise ValueError(explained(model, what, error)) from error


def explained(model: ModelConfig, what: str, error: BaseException) -> str:
    """One line for an error that was raised while ``what`` was read from ``model``."""
    name, told, text = model.name, str(error), _first_sentence(error)
    if "trust_remote_code" in told and not model.trust_remote_code:
        return (
            f"model.name: {name} brings Python code of its own, which was not run; --model.trust_remote_code true "
            f"runs the code in {name} on this machine: read it first"
        )
    unknown = re.search(r"model type [`'\"]?([\w.-]+)[`'\"]? but Transformers does not", told)
    if unknown:
        return (
            f"model.name: expected a model type that transformers {version('transformers')} knows, got {unknown[1]} "
            f"in {name}: a newer transformers may know it"
        )
    if model.attn_implementation and re.search(r"attn_implementation|[Ff]lash_?[Aa]tt", told):
        return (
            f"model.attn_implementation: expected one that {name} has and this machine can run, such as eager or "
            f"sdpa, got {model.attn_implementation} ({text})"
        )
    if "backend tokenizer" in told:
        return _without_tokenizer(model)
    if isinstance(error, ImportError) or re.search(r"pip install|requires the .* library", told):
        return f"model.name: {what} of {name} needs a package that is not installed ({text}): install it"
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in told:
        return (
            f"model.name: {name} does not fit into memory ({text}): take a smaller model, a 16-bit model.dtype, or "
            "a machine with more memory"
        )
    if "Unrecognized configuration class" in told:
        kind = re.search(r"class '?[\w.]*?\.?(\w+)'?>", told)
        return (
            f"model.name: expected a causal language model, got {name} ({kind[1] if kind else text}): take a model "
            "that writes text from left to right"
        )
    if isinstance(error, PermissionError):
        return f"model.name: expected files that may be read in {name}, got {text}: change their permissions"
    if not Path(name).expanduser().is_dir() and isinstance(error, OSError):
        offline = os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE")
        why = "HF_HUB_OFFLINE is set and it is not in the cache" if offline else text
        return (
            f"model.name: expected a folder here, or a hub id that can be read, got {name} ({why}): check the name, "
            "the connection and the access rights, or give a folder"
        )
    return (
        f"model.name: expected {what} that transformers can read, got {name} ({type(error).__name__}: {text}): "
        "bring its files there anew, or take another model"
    )


def _without_tokenizer(model: ModelConfig) -> str:
    """One line for a model whose tokenizer could not be made: its files are not there, or a package is not."""
    folder = Path(model.name).expanduser()
    for pattern, package in _TOKENIZER_PACKAGES:
        if any(folder.glob(pattern)) and find_spec(package) is None:
            return (
                f"model.name: the tokenizer of {model.name} needs {package}, which is not installed: install it, or "
                "bring a tokenizer.json there"
            )
    return (
        f"model.name: expected a model with a tokenizer, got {model.name} without one that transformers can read: "
        "bring its tokenizer.json and tokenizer_config.json there"
    )


def _first_sentence(error: BaseException) -> str:
    """The first line of a message that has words, shortened."""
    lines = (" ".join(line.split()) for line in str(error).splitlines())
    text = next((line for line in lines if re.search(r"\w", line)), type(error).__name__)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"

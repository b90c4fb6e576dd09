"""The files that hold a model's weights, looked at before and after they are loaded.

A safetensors file begins with its tensors' names, shapes and places: enough to see that it is cut short, that a shard
is missing, and which weights stand in the files that the model's class has no place for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sftmix.config import ModelConfig
from sftmix.model.quantised import is_bits
from sftmix.model.source import place
from sftmix.progress import say

INDEX = "model.safetensors.index.json"
SHOWN = 3  # names in a line
_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
_HEADER_LIMIT = 1 << 28


def safetensors_of(model: ModelConfig) -> list[Path]:
    """The model's safetensors files, in its folder or in the hub's cache; none where it has others.

    Raises ``ValueError`` where the index names a file that is not there.
    """
    folder = _local(model)
    if folder is None or model.gguf_file:
        return []
    index = folder / INDEX
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if not index.is_file():
        return []
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"model.name: expected a JSON object with weight_map in {index}, got {error}: bring the file there anew"
        ) from error
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:
        raise ValueError(
            f"model.name: expected all {len(names)} files that {index} names, got {len(absent)} missing: "
            f"{shortened(absent)}: bring them there"
        )
    return [folder / name for name in names]


def _local(model: ModelConfig) -> Path | None:
    """The folder with the model's files; None for a hub id that is not in the cache."""
    name = place(model)
    if Path(name).is_dir():
        return Path(name)
    from transformers.utils import cached_file

    try:
        found = cached_file(name, "config.json", revision=model.revision or "main", local_files_only=True)
    except OSError:
        return None
    return None if found is None else Path(found).parent


def header(path: Path) -> dict[str, Any]:
    """A safetensors file's entries by tensor name: dtype, shape, data_offsets.

    Raises ``ValueError`` for a file that is not one, or whose tensors do not all lie inside it.
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size, _HEADER_LIMIT):
                raise ValueError(f"{size} bytes")
            entries = json.loads(file.read(length))
        entries.pop("__metadata__", None)
        end = 8 + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    except OSError as error:
        raise ValueError(
            f"model.name: expected {path} to be readable, got {error.strerror}: change its permissions"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"model.name: expected a safetensors file in {path}, got another or one cut short ({error}): bring it "
            "there anew"
        ) from error
    if size != end:
        raise ValueError(
            f"model.name: expected {end} bytes in {path}, as it says itself, got {size}: it is cut short or damaged, "
            "bring it there anew"
        )
    return dict(entries)


def weights_in_files(model: ModelConfig) -> dict[str, Any]:
    """The entries of all safetensors files by tensor name; empty where the model has others."""
    return {name: entry for path in safetensors_of(model) for name, entry in header(path).items()}


def check_complete(model: ModelConfig, missing: Iterable[str], mismatched: Iterable[Any]) -> None:
    """Raise ``ValueError`` where weights would keep the values that they were drawn at random with.

    ``missing`` are names of the model, ``mismatched`` (name, shape in the files, shape in the model).
    """
    lacking, wrong = sorted(missing), sorted(mismatched)
    if wrong:
        name, theirs, ours = wrong[0]
        raise ValueError(
            f"model.name: expected weights of the shapes that the configuration of {model.name} gives, got "
            f"{len(wrong)} of other shapes: {name} is {list(theirs)}, not {list(ours)}: configuration and weights "
            "belong to different models"
        )
    if lacking:
        raise ValueError(
            f"model.name: expected weights for all of {model.name}, the files lack {len(lacking)}: "
            f"{shortened(lacking)}: they would be random; bring the missing files, or take another model"
        )


def say_left_out(causal_lm: Any, unexpected: Iterable[str], files: dict[str, Any]) -> None:
    """One line on weights in the files that the model's class has no place for, those it passes over included."""
    patterns = [re.compile(found) for found in causal_lm._keys_to_ignore_on_load_unexpected or ()]
    prefix = f"{causal_lm.base_model_prefix}."
    # Files of the model without its head leave the prefix out.
    own = {part for name in causal_lm.state_dict() for part in (name, name.removeprefix(prefix))}
    ignored = {
        name
        for name, entry in files.items()
        if name not in own and any(pattern.search(name) for pattern in patterns) and _is_weight(name, entry)
    }
    found = sorted({*unexpected, *ignored})
    if found:
        say(
            f"model.name: {len(found)} weights in the files are not part of {type(causal_lm).__name__}: not trained, "
            f"not exported: {shortened(found)}"
        )


def _is_weight(name: str, entry: Any) -> bool:
    """Whether an entry is a weight; old files also hold masks, rotary frequencies and constants."""
    elements = 1
    for size in entry["shape"]:
        elements *= size
    return entry["dtype"] in _FLOATS and elements > 1 and not name.endswith("inv_freq")


def shortened(names: Iterable[str]) -> str:
    """The first few names, and how many more there are."""
    every = list(names)
    more = f" and {len(every) - SHOWN} more" if len(every) > SHOWN else ""
    return ", ".join(every[:SHOWN]) + more


@torch.no_grad()
def check_finite(model: ModelConfig, module: nn.Module) -> None:
    """Raise ``ValueError`` naming the first parameter with NaN or infinite values; each is read once."""
    for name, parameter in module.named_parameters():
        if not parameter.is_floating_point() or parameter.dtype.itemsize < 2 or is_bits(parameter):
            continue
        # A sum needs no memory; finite weights may overflow it, so a second look decides.
        if not bool(torch.isfinite(parameter.sum())) and not bool(torch.isfinite(parameter).all()):
            raise ValueError(
                f"model.name: expected finite weights in {model.name}, got NaN or infinite ones in {name}: bring its "
                "files there anew, or take another model"
            )

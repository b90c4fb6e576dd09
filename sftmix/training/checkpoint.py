"""Checkpoints: whole or absent on disk, refused when they are damaged or belong to something else.

A checkpoint is a folder ``step-00000120`` with ``weights.safetensors`` (the trainable weights, float32),
``state.pt`` (optimizer, online scores) and, written last, ``meta.json`` (fingerprint and
SHA-256 of the two). It is made under a temporary name, flushed and renamed. Weights are stored whole, so a
run can be resumed on another number of processes. ``save_trainable`` writes the weights alone, for scoring.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sftmix.model.parallel import spread, whole
from sftmix.rank import is_main

if TYPE_CHECKING:
    from sftmix.model.causal_lm import SFTMixModel
    from sftmix.training.optim import TrainableWeights


class DamagedError(ValueError):
    """A checkpoint that is not what was written: an older one may be."""


WEIGHTS, STATE, META = "weights.safetensors", "state.pt", "meta.json"
KEPT = 2  # older checkpoints are removed
_VOLATILE = ("transformers_version", "_name_or_path", "dtype", "torch_dtype", "_attn_implementation")


def fingerprint(model: SFTMixModel) -> dict[str, str]:
    """What a checkpoint must agree on: the model's class, its configuration, its trainable parameters."""
    config = {k: v for k, v in model.base.config.to_dict().items() if k not in _VOLATILE}
    shapes = {name: list(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    return {
        "model class": type(model.base).__name__,
        "model configuration": _hash(config),
        "trainable parameters": f"{len(shapes)} of {_hash(shapes)}",
    }


def save_trainable(model: SFTMixModel, folder: str | Path) -> None:
    """Write the trainable weights (all, or the adapters), whole, into ``folder``; every process calls it."""
    values = {name: p for name, p in model.named_parameters() if p.requires_grad}
    _write(Path(folder), _gather(values), None, {"fingerprint": fingerprint(model)})


def load_trainable(model: SFTMixModel, folder: str | Path) -> None:
    """Read what ``save_trainable`` wrote, or a checkpoint's weights, into the model, rounding to its dtype.

    Raises ``ValueError`` for a folder that is incomplete or damaged or of another model.
    """
    folder = Path(folder)
    values, _ = _read(folder, {"fingerprint": fingerprint(model)})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(spread(values[name], like=parameter))


def save_checkpoint(
    folder: Path, weights: TrainableWeights, optimizer: torch.optim.Optimizer, *,
    meta: dict[str, Any], extra: Mapping[str, Any],
) -> Path:  # fmt: skip
    """Write the checkpoint of ``meta["step"]`` under ``folder`` and remove old ones; every process calls it.

    ``extra`` is plain data to give back on resume.
    """
    moments = {}
    for name, master in weights.masters.items():
        entry = optimizer.state.get(master, {})
        gathered = {key: whole(value).cpu() for key, value in entry.items()}
        if is_main():
            moments[name] = gathered
    state = {"optimizer": moments, "extra": dict(extra)}
    target = folder / f"step-{meta['step']:08d}"
    _write(target, _gather(weights.masters), state, meta)
    if is_main():
        for old in complete_checkpoints(folder)[:-KEPT]:
            shutil.rmtree(old)
    return target


def load_checkpoint(
    path: Path, weights: TrainableWeights, optimizer: torch.optim.Optimizer, expected: Mapping[str, Any]
) -> dict[str, Any]:
    """Restore weights and optimizer; the checkpoint's ``step`` and ``extra``.

    Raises ``DamagedError`` for a damaged checkpoint, ``ValueError`` for one whose meta data differ from ``expected``.
    """
    values, meta = _read(path, expected)
    try:
        state = torch.load(path / STATE, map_location="cpu", weights_only=True)
    except Exception as error:
        raise DamagedError(f"checkpoint: expected a readable {path / STATE}, got {error}") from error
    weights.load(values)
    for name, master in weights.masters.items():
        entry = state["optimizer"][name]
        if entry:
            optimizer.state[master] = {
                key: spread(value, like=master) if value.shape == master.shape and value.ndim else value
                for key, value in entry.items()
            }
    return {"step": meta["step"], "extra": state["extra"]}


def complete_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints under ``folder``, oldest first; half-written ones are passed over."""
    if not folder.is_dir():
        return []
    names = sorted(path for path in folder.iterdir() if re.fullmatch(r"step-\d{8}", path.name))
    return [path for path in names if (path / META).is_file()]


def remove(paths: Iterable[Path]) -> None:
    """Delete checkpoints, by the main process; every process calls it."""
    if dist.is_initialized():
        dist.barrier()  # all have read them
    if is_main():
        for path in paths:
            shutil.rmtree(path)
    if dist.is_initialized():
        dist.barrier()


def _gather(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole copies on the CPU, on the main process; one at a time, so no other holds the model twice."""
    gathered = {}
    for name, value in values.items():
        full = whole(value)
        if is_main():
            gathered[name] = full.cpu().contiguous().clone()
    return gathered


def _write(
    target: Path, values: dict[str, Tensor], state: dict[str, Any] | None, meta: dict[str, Any]
) -> None:
    if is_main():
        temporary = target.with_name(f".{target.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        save_file(values, temporary / WEIGHTS)
        if state is not None:
            torch.save(state, temporary / STATE)
        sums = {path.name: _file_hash(path) for path in sorted(temporary.iterdir())}
        (temporary / META).write_text(json.dumps({**meta, "sha256": sums}, indent=1), encoding="utf-8")
        for path in [*temporary.iterdir(), temporary]:
            _sync(path)
        if target.exists():
            shutil.rmtree(target)
        temporary.rename(target)
        _sync(target.parent)
    if dist.is_initialized():
        dist.barrier()


def _read(folder: Path, expected: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights and meta data of a complete folder, after every check."""
    try:
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
        sums, files = meta["sha256"], sorted(path for path in folder.iterdir() if path.name != META)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedError(f"checkpoint: expected a complete one at {folder}, got {error}") from error
    for section, values in expected.items():
        found = meta.get(section)
        if not isinstance(found, dict):
            raise DamagedError(f"checkpoint: expected a {section} in {folder / META}, got none")
        for key, value in values.items():
            if found.get(key) != value:
                raise ValueError(
                    f"checkpoint: {folder} belongs to another run: {key} is {found.get(key)!r} there, "
                    f"{value!r} here"
                )
    if sorted(sums) != [path.name for path in files]:
        names = [path.name for path in files]
        raise DamagedError(f"checkpoint: expected {sorted(sums)} in {folder}, got {names}")
    for path in files:
        if _file_hash(path) != sums[path.name]:
            raise DamagedError(f"checkpoint: {path} is damaged: its SHA-256 is not the one recorded")
    try:
        return load_file(folder / WEIGHTS), meta
    except SafetensorError as error:
        raise DamagedError(f"checkpoint: expected a readable {folder / WEIGHTS}, got {error}") from error


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _file_hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    """Flush a file or folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Checkpoints: whole or absent on disk, refused when they are damaged or belong to something else.

A checkpoint is a folder ``step-00000120`` with the trainable weights and the optimizer's moments (float32,
safetensors, each process's shards in files of its own: ``tensor_files``), the online scores so far
(``online.parquet``) and, written last, ``meta.json``: step, fingerprint, and the SHA-256 of the others. It is made
under a temporary name, flushed and renamed. Nothing is pickled, and a run can be resumed on another number of
processes. ``save_trainable`` writes the weights alone, for scoring.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from sftmix.data.fingerprint import content_hash
from sftmix.model.parallel import reshard
from sftmix.rank import is_main
from sftmix.scores.dynamics import SCHEMA, read_table, to_table, write_table
from sftmix.training.tensor_files import flush, read_tensors, tensor_files, write_tensors

if TYPE_CHECKING:
    from sftmix.model.causal_lm import SFTMixModel
    from sftmix.training.optim import TrainableWeights


class DamagedError(ValueError):
    """A checkpoint that is not what was written: an older one may be."""


META, ONLINE = "meta.json", "online.parquet"
FORMAT = 2  # of the files: 1 was whole weights and a pickled state
_VOLATILE = ("transformers_version", "_name_or_path", "dtype", "torch_dtype", "_attn_implementation")


@dataclass(frozen=True)
class Snapshot:
    """What a checkpoint holds: tensors by kind and name, each with the optimizer's numbers in ``meta``."""

    tensors: dict[str, Tensor]  # weights/…, exp_avg/…, exp_avg_sq/…
    meta: dict[str, Any]
    online: list[dict[str, Any]] = field(default_factory=list)  # rows of dynamics.parquet


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
    """Write the trainable weights (all, or the adapters) into ``folder``; every process calls it."""
    reshard(model)
    values: dict[str, Tensor] = {
        f"weights/{name}": p.detach() for name, p in model.named_parameters() if p.requires_grad
    }
    write(Path(folder), Snapshot(values, {"fingerprint": fingerprint(model)}))


def load_trainable(model: SFTMixModel, folder: str | Path) -> None:
    """Read what ``save_trainable`` wrote, or a checkpoint's weights, into the model, rounding to its dtype.

    Raises ``ValueError`` for a folder that is incomplete or damaged or of another model.
    """
    folder = Path(folder)
    reshard(model)
    meta = read_meta(folder, {"fingerprint": fingerprint(model)})
    values = {f"weights/{name}": p for name, p in model.named_parameters() if p.requires_grad}
    read_tensors(folder, meta["sha256"], values)


def snapshot(
    weights: TrainableWeights, optimizer: torch.optim.Optimizer, *, copy: bool = False,
    meta: Mapping[str, Any], online: list[dict[str, Any]],
) -> Snapshot:  # fmt: skip
    """The state of a run after an optimizer step; with ``copy`` in the host's memory, where no step reaches it."""
    tensors = {f"weights/{name}": master.detach() for name, master in weights.masters.items()}
    numbers: dict[str, dict[str, float]] = {}
    for name, master in weights.masters.items():
        for key, value in optimizer.state.get(master, {}).items():
            if value.ndim:
                tensors[f"{key}/{name}"] = value
            else:  # AdamW's count of steps
                numbers.setdefault(name, {})[key] = float(value)
    if copy:
        # A tensor that is on the CPU already would be given as it is, and change before it is written.
        tensors = {
            name: value.clone() if value.device.type == "cpu" else value.cpu()
            for name, value in tensors.items()
        }
    return Snapshot(tensors, {**meta, "optimizer": numbers}, list(online))


def write(target: Path, found: Snapshot, *, group: dist.ProcessGroup | None = None) -> None:
    """Write a folder, whole or not at all, into one that is there; every process calls it.

    ``group``: see ``write_tensors``.
    """
    temporary = target.with_name(f".{target.name}.tmp")
    if is_main():
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()  # not its parents: a run whose folder was deleted must not go on in half a new one
    _barrier(group)
    write_tensors(temporary, found.tensors, group=group)
    rank = dist.get_rank() if dist.is_initialized() else 0
    own = [path for path in tensor_files(temporary) if path.name.startswith(f"shard-{rank + 1:05d}-")]
    sums = {
        k: v
        for part in _gather({path.name: content_hash(path) for path in own}, group)
        for k, v in part.items()
    }
    if is_main():
        if found.online:
            write_table(temporary / ONLINE, to_table(found.online, SCHEMA, "online"))
            sums[ONLINE] = content_hash(temporary / ONLINE)
        meta = {"format": FORMAT, **found.meta, "sha256": sums}
        text = json.dumps({**meta, "checksum": _hash(meta)}, indent=1)
        (temporary / META).write_text(text, encoding="utf-8")
        for path in [temporary / META, temporary]:
            flush(path)
        if target.exists():
            shutil.rmtree(target)
        temporary.rename(target)
        flush(target.parent)
    _barrier(group)


def load_checkpoint(
    path: Path, weights: TrainableWeights, optimizer: torch.optim.Optimizer, expected: Mapping[str, Any]
) -> Snapshot:
    """Restore weights and optimizer; what the checkpoint says beside them (no tensors).

    Raises ``DamagedError`` for a damaged checkpoint, ``ValueError`` for one whose meta data differ from ``expected``.
    """
    meta = read_meta(path, expected)
    tensors: dict[str, Tensor] = {}
    states: dict[str, dict[str, Tensor]] = {}
    for name, master in weights.masters.items():
        tensors[f"weights/{name}"] = master
        numbers = meta["optimizer"].get(name)
        if numbers is not None:  # a weight that never had a gradient has no moments
            moments = {key: torch.zeros_like(master) for key in ("exp_avg", "exp_avg_sq")}
            tensors.update({f"{key}/{name}": value for key, value in moments.items()})
            states[name] = {**{key: torch.tensor(value) for key, value in numbers.items()}, **moments}
    try:
        read_tensors(path, meta["sha256"], tensors)
        rows = read_table(path / ONLINE, SCHEMA, "reference") if ONLINE in meta["sha256"] else None
    except ValueError as error:
        raise DamagedError(f"checkpoint: {error}") from error
    weights.copy_to_model()
    for name, state in states.items():
        optimizer.state[weights.masters[name]] = state
    return Snapshot({}, meta, [] if rows is None else rows.to_pylist())


def complete_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints under ``folder``, oldest first; half-written ones are passed over."""
    if not folder.is_dir():
        return []
    names = sorted(path for path in folder.iterdir() if re.fullmatch(r"step-\d{8}", path.name))
    return [path for path in names if (path / META).is_file()]


def finished_steps(path: Path) -> int | None:
    """The steps of the run that the checkpoint is the end of; None where it is not the end, or cannot be read."""
    try:
        meta = json.loads((path / META).read_text(encoding="utf-8"))
        return int(meta["step"]) if meta["step"] == meta["run"]["steps"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def remove(paths: Iterable[Path]) -> None:
    """Delete checkpoints, by the main process; every process calls it."""
    _barrier()  # all have read them
    if is_main():
        for path in paths:
            shutil.rmtree(path)
    _barrier()


def read_meta(folder: Path, expected: Mapping[str, Any]) -> dict[str, Any]:
    """The meta data of a complete folder, after every check; the processes share the reading of its files.

    Raises ``DamagedError`` for a damaged folder, ``ValueError`` for one that is of another run.
    """
    try:
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
        old = isinstance(meta["sha256"], dict) and meta.get("format", 1) != FORMAT
        whole = old or meta.pop("checksum") == _hash(meta)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(f"checkpoint: expected a complete one at {folder}, got {error}") from error
    if old and isinstance(meta.get("fingerprint"), dict):
        raise ValueError(
            f"checkpoint: {folder} was written by another version of sftmix (format {meta.get('format', 1)}, here "
            f"{FORMAT}); finish it with that version, or begin its stage anew with --restart"
        )
    if old or not whole:
        raise DamagedError(f"checkpoint: {folder / META} is damaged: its checksum is not its own")
    for section, values in expected.items():
        found = meta.get(section)
        if not isinstance(found, dict):
            raise DamagedError(f"checkpoint: expected a {section} in {folder / META}, got none")
        for key in [*values, *(key for key in found if key not in values)]:
            if found.get(key) != values.get(key):
                raise ValueError(
                    f"checkpoint: {folder} belongs to another run: {key} is {found.get(key)!r} there, "
                    f"{values.get(key)!r} here"
                )
    _check_sums(folder, meta["sha256"])
    return dict(meta)


def _check_sums(folder: Path, sums: Mapping[str, str]) -> None:
    names = sorted(path.name for path in folder.iterdir())
    if missing := sorted(sums.keys() - set(names)):
        raise DamagedError(
            f"checkpoint: expected {', '.join(missing)} in {folder}, got {', '.join(names) or 'no files'}"
        )
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    own = sorted(sums)[rank::size]
    bad = [name for name in own if content_hash(folder / name) != sums[name]]
    for name in [name for part in _gather(bad) for name in part]:
        raise DamagedError(f"checkpoint: {folder / name} is damaged: its SHA-256 is not the one recorded")


def _gather(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=group)
    return values


def _barrier(group: dist.ProcessGroup | None = None) -> None:
    if dist.is_initialized():
        dist.barrier(group=group)


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]

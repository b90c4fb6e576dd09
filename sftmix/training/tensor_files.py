"""Tensors by name in a folder of safetensors files, each process writing and reading its own shards.

torch's distributed checkpoint with its safetensors storage: nothing is pickled, and what some number of processes
wrote is read on any other. Only processes that hold shards write them; what all hold alike is written once.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem

SUFFIX = ".safetensors"


def write_tensors(
    folder: Path, values: Mapping[str, Tensor], *, group: dist.ProcessGroup | None = None
) -> None:
    """Write tensors (DTensors or whole) into ``folder``, which is there; every process calls it with the same names.

    A name's part before the first slash says in which file of a process it stands. ``group``: the processes, by
    default all; a thread beside the training needs one of its own.
    """
    kinds = sorted({name.partition("/")[0] for name in values})
    files = {name: 1 + kinds.index(name.partition("/")[0]) for name in values}
    if not dist.is_initialized():  # the same files, in half the time
        for index, kind in enumerate(kinds, start=1):
            part = {k: v.detach().contiguous() for k, v in values.items() if k.partition("/")[0] == kind}
            path = folder / f"shard-00001-model-{index:05d}-of-{len(kinds):05d}{SUFFIX}"
            save_file(part, path)
            flush(path)
        return
    writer = dcp.HuggingFaceStorageWriter(str(folder), fqn_to_index_mapping=files, save_distributed=True)
    try:
        dcp.save(dict(values), storage_writer=writer, process_group=group)
    except CheckpointException as error:  # which is no Exception; every process gets it
        raise _first(error) from error


class _These(FileSystem):
    """The files of a folder that were written there, and not what else lies in it."""

    def __init__(self, files: Iterable[Path]) -> None:
        self.files = [str(path) for path in files]

    def ls(self, path: str | os.PathLike[str]) -> list[str]:
        return self.files


@torch.no_grad()
def read_tensors(folder: Path, files: Iterable[str], into: Mapping[str, Tensor]) -> None:
    """Fill the tensors of ``into``, sharded or not, with those of the same names; every process calls it.

    ``files``: names of the folder's safetensors files.

    Raises ``ValueError`` for a file that cannot be read, a name that is not there and another shape.
    """
    state = {name: value.detach() for name, value in into.items()}
    reader = dcp.HuggingFaceStorageReader(str(folder))
    reader.fs = _These(folder / name for name in files if name.endswith(SUFFIX))
    try:
        with _quiet():
            dcp.load(state, storage_reader=reader, no_dist=not dist.is_initialized())
    except (Exception, CheckpointException) as error:  # the second is no Exception
        text = " ".join(str(_first(error)).split())
        raise ValueError(f"{folder}: expected the tensors that were written, got {text}") from error


def flush(path: Path) -> None:
    """Have a file or folder on the disk itself."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def tensor_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder, sorted."""
    return sorted(folder.glob(f"*{SUFFIX}"))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's word that a single process is one."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _first(error: BaseException) -> BaseException:
    """What failed on the first process that failed, such as the OSError of a full disk."""
    failures = list(getattr(error, "failures", {}).values())
    return failures[0][0] if failures else error

"""The way of a tensor through the package: which functions are handed it, in which files, in the order of a call."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor

import sftmix_kernels

PACKAGE = str(Path(sftmix_kernels.__file__).parent) + "/"
DEPTH = 4  # of containers that are looked into


class Station(NamedTuple):
    """A function of the package: its file within it, and its name."""

    file: str
    name: str


def holds(value: Any, address: int, depth: int = 0) -> bool:
    """Whether ``value`` is a tensor over the memory at ``address``, or something of the package that holds one."""
    if isinstance(value, Tensor):
        return value.layout == torch.strided and value.untyped_storage().data_ptr() == address
    if depth == DEPTH:
        return False
    if isinstance(value, dict):
        value = list(value.values())
    elif type(value).__module__.startswith("sftmix_kernels") and hasattr(value, "__dict__"):
        value = list(vars(value).values())
    return isinstance(value, (tuple, list)) and any(holds(each, address, depth + 1) for each in value)


def is_property(frame: FrameType) -> bool:
    owner = type(frame.f_locals.get("self"))
    return isinstance(vars(owner).get(frame.f_code.co_name), property)


class Walk:
    """Collects stations while it is entered: what is called in a loop, and a kernel's body, counts once."""

    def __init__(self, tensor: Tensor | None) -> None:
        """``tensor``: functions that are handed it, or what holds it; None: every function."""
        self.address = None if tensor is None else tensor.untyped_storage().data_ptr()
        self.stations: list[Station] = []
        self._stack: list[tuple[Station, bool]] = []
        self._seen: set[tuple[Station, ...]] = set()

    def __enter__(self) -> Walk:
        sys.setprofile(self._event)
        return self

    def __exit__(self, *error: object) -> None:
        sys.setprofile(None)

    def _event(self, frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        if not code.co_filename.startswith(PACKAGE) or code.co_name.startswith("<"):
            return
        if event == "return" and self._stack:
            self._stack.pop()
        elif event == "call":
            caller = frame.f_back
            is_kernel = caller is not None and "/triton/" in caller.f_code.co_filename
            in_kernel = any(kernel for _, kernel in self._stack)
            station = Station(code.co_filename.removeprefix(PACKAGE), code.co_name)
            self._stack.append((station, is_kernel))
            path = tuple(each for each, _ in self._stack)
            if (
                in_kernel
                or path in self._seen
                or is_property(frame)
                or not (is_kernel or self._is_handed(frame))
            ):
                return
            self._seen.add(path)
            self.stations.append(station)

    def _is_handed(self, frame: FrameType) -> bool:
        code = frame.f_code
        if self.address is None:
            return True
        count = code.co_argcount + code.co_kwonlyargcount
        names = code.co_varnames[: count + bool(code.co_flags & 4) + bool(code.co_flags & 8)]
        return any(holds(frame.f_locals.get(name), self.address) for name in names)

    @property
    def files(self) -> list[str]:
        """The files in the order of the walk; a file again wherever the walk comes back to it."""
        names = [station.file for station in self.stations]
        return [name for index, name in enumerate(names) if index == 0 or names[index - 1] != name]

    @property
    def returns(self) -> int:
        """How often the walk comes back to a file it has left."""
        return len(self.files) - len(set(self.files))

    @property
    def most_visits(self) -> int:
        return max(Counter(self.files).values())


def walk(call: Callable[[], object], tensor: Tensor | None = None) -> Walk:
    """The walk of ``tensor``, or of everything, through a ``call``; the first call, which also imports, is not it."""
    call()
    with Walk(tensor) as found:
        call()
    return found

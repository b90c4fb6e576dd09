"""Accesses past a tensor's end, found in Triton's interpreter: every address must be an element of its own tensor.

Addresses there are 64-bit numbers of which the machine uses 48. The rest carries which argument of the launch an
address was made from, through all arithmetic on it, so that a step from one tensor into its neighbour in memory, or
into the gap between two rows of a slice, shows as well.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_ADDRESS_BITS = 48
_tensors: list[Tensor] = []  # the arguments of the launch that runs; an address's upper bits count from 1


def outside(tensor: Tensor, addresses: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
    """Of ``addresses``, as elements counted from the tensor's first, those that are none of its own."""
    element = (addresses - np.uint64(tensor.data_ptr())).view(np.int64) // tensor.element_size()
    left = element.copy()
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True), reverse=True):
        left -= np.clip(left // max(stride, 1), 0, max(size - 1, 0)) * stride
    return element[(left != 0) | (tensor.numel() == 0)]


def _plain(pointers: Any, mask: Any) -> Any:
    """The pointers without what their upper bits carry. Raises IndexError where one that is used lies outside."""
    from triton.runtime.interpreter import TensorHandle

    used = pointers.data[np.asarray(getattr(mask, "data", mask))]
    owners = np.unique(used >> np.uint64(_ADDRESS_BITS)) if used.size else ()
    for owner in map(int, owners):
        first, last = (np.uint64(number << _ADDRESS_BITS) for number in (owner, owner + 1))
        tensor = _tensors[owner - 1] if 0 < owner <= len(_tensors) else torch.empty(0)
        wrong = outside(tensor, used[(used >= first) & (used < last)] - first)
        if wrong.size:
            what = f"{tensor.dtype} {list(tensor.shape)} with strides {list(tensor.stride())}"
            raise IndexError(
                f"{wrong.size} addresses outside {what}, elements {wrong.min()} to {wrong.max()}"
            )
    return TensorHandle(pointers.data & np.uint64(2**_ADDRESS_BITS - 1), pointers.dtype)


def check_every_address() -> None:
    """Idempotent; Triton must be importable, and interpreting."""
    from triton.runtime import interpreter

    convert: Any = interpreter._implicit_cvt
    if convert.__module__ == __name__:
        return
    builder: Any = interpreter.InterpreterBuilder
    load, store, launch = (
        builder.create_masked_load,
        builder.create_masked_store,
        interpreter.GridExecutor.__call__,
    )

    def named(argument: Any) -> Any:
        found = convert(argument)
        if isinstance(argument, Tensor):
            _tensors.append(argument)
            found.handle.data = found.handle.data | np.uint64(len(_tensors) << _ADDRESS_BITS)
        return found

    def checked_load(self: Any, pointers: Any, mask: Any, *rest: Any, **named_rest: Any) -> Any:
        return load(self, _plain(pointers, mask), mask, *rest, **named_rest)

    def checked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        return store(self, _plain(pointers, mask), value, mask, *rest)

    def launched(executor: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return launch(executor, *args, **kwargs)
        finally:
            _tensors.clear()

    interpreter._implicit_cvt = named
    builder.create_masked_load, builder.create_masked_store = checked_load, checked_store
    interpreter.GridExecutor.__call__ = launched

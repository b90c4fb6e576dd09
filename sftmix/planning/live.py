"""Bytes of tensors that are alive, op by op: what a step holds, on shapes without numbers or on real ones.

A storage counts from the op that makes it to its last reference, at the size it has now (FSDP empties storages that
it will fill again). Storages made before the tracker began, such as a model's parameters, count where they are added.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

OnOp = Callable[[int], None]  # (bytes alive)


class LiveBytes(TorchDispatchMode):
    """Counts bytes of live storages while it is entered; ``now``, and ``peak`` since it was last set to ``now``.

    ``on_op`` is called with the bytes alive after every operator, those inside the loss's operators too.
    """

    def __init__(self, on_op: OnOp | None = None) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.on_op = on_op
        self._sizes: dict[int, int] = {}
        self._references: dict[int, weakref.ref[Any]] = {}

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Count these tensors' storages, each once."""
        for tensor in tensors:
            tensor = getattr(tensor, "_local_tensor", tensor)  # of a DTensor its own shard
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in self._references:
                self._references[key] = weakref.ref(storage, partial(self._forget, key))
            self._resize(key, storage.nbytes())
        self.peak = max(self.peak, self.now)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        own = OPDEFS.get(func.name().split(".")[0])
        if own is not None and not _is_fake(args):
            with self:  # an operator written in Python: what it does inside is seen too
                return own._init_fn(*args, **kwargs)
        out = func(*args, **kwargs)
        # Arguments too: an op may have emptied or filled the storage of one.
        resized = args if "resize" in func.name() or "set_" in func.name() else ()
        self.add(leaf for leaf in tree_leaves((out, resized)) if isinstance(leaf, Tensor))
        if self.on_op is not None:
            self.on_op(self.now)
        return out

    def resized(self, storage: Any) -> None:
        """A storage that was emptied or filled outside an operator has another size now."""
        if storage._cdata in self._references:
            self._resize(storage._cdata, storage.nbytes())
            self.peak = max(self.peak, self.now)

    def _resize(self, key: int, size: int) -> None:
        self.now += size - self._sizes.get(key, 0)
        self._sizes[key] = size

    def _forget(self, key: int, reference: Any) -> None:
        self._references.pop(key, None)
        self.now -= self._sizes.pop(key, 0)


def _is_fake(args: Any) -> bool:
    from torch._subclasses.fake_tensor import FakeTensor

    return any(isinstance(leaf, FakeTensor) for leaf in tree_leaves(args))


def nbytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of these tensors' numbers."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

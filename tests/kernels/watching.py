"""Looking inside the custom operators: what their bodies call, the largest tensor they make, and their products."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Bodies(TorchDispatchMode):
    """Runs every sftmix_kernels operator by its body, under the same modes, and keeps the names of what it calls."""

    def __init__(self) -> None:
        super().__init__()
        self.called: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.called.append(func.name().removeprefix("aten::").split(".")[0])
        own = OPDEFS.get(func.name().split(".")[0])
        if own is None:
            return func(*args, **kwargs)
        with self:
            return own._init_fn(*args, **kwargs)


def storages(values: Any) -> dict[int, int]:
    """Address → bytes of the memory under every tensor among ``values``."""
    found = (t.untyped_storage() for t in tree_leaves(values) if isinstance(t, torch.Tensor))
    return {storage.data_ptr(): storage.nbytes() for storage in found}


class LargestTensor(Bodies):
    """Bytes of the largest memory that any operation, inside the operators too, returned and was not given."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = storages((args, kwargs))
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if "aten::set_" in func.name():  # the interpreter's: another tensor over memory that is there
            return out
        new = (size for address, size in storages(out).items() if address not in given)
        self.nbytes = max([self.nbytes, *new])
        return out


# A product's name, and where its two operands stand among the arguments.
OPERANDS = {"mm": 0, "addmm": 1, "addmm_": 1}
OTHER_PRODUCTS = set("bmm baddbmm addbmm mv addmv addmv_ dot vdot linear matmul einsum".split())


class Products(Bodies):
    """Multiply-adds of all matrix products, the library's and those of Triton's kernels in the interpreter.

    The kernels' are counted tile by tile where ``tl.dot`` is computed, so padding counts: take sizes that fill tiles.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.multiply_adds = 0
        interpreter = pytest.importorskip("triton.runtime.interpreter")
        dot = interpreter.InterpreterBuilder.create_dot

        def counted(builder: Any, a: Any, b: Any, *rest: Any) -> Any:
            self._count(a.data.shape, b.data.shape)
            return dot(builder, a, b, *rest)

        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", counted)

    def _count(self, left: Any, right: Any) -> None:
        self.multiply_adds += left[0] * left[1] * right[1]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::").split(".")[0]
        assert name not in OTHER_PRODUCTS, f"{name} is not counted"
        if name in OPERANDS:
            left, right = args[OPERANDS[name] : OPERANDS[name] + 2]
            self._count(left.shape, right.shape)
        return super().__torch_dispatch__(func, types, args, kwargs)

"""What a call does, read off the running code: products, kernel launches, passes over memory, peak of what is held.

Every tensor operation is seen by a dispatch mode, inside the package's operators too, and every launch of a Triton
kernel with its grid and arguments. On meta tensors nothing is computed: :func:`on_chip` makes the code choose what it
would choose on a GPU, so that bench/model.py can count any shape for any chip; tests trace a real call as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

PRODUCTS = ("mm", "addmm", "addmm_")


@dataclass(frozen=True)
class Event:
    """One step of a call: a library "product", a "kernel" of ours, or a "pass" over memory.

    ``sizes`` are (rows, columns, inner) of a product and the number of programs of a kernel; ``bytes`` what the step
    must read and write at least (of a kernel: what its arguments cannot tell is added by bench/model.py).
    """

    kind: str
    name: str
    sizes: tuple[int, ...]
    bytes: int = 0
    itemsize: int = 0
    arguments: dict[str, Any] = field(default_factory=dict, compare=False)

    @property
    def flops(self) -> int:
        return 2 * self.sizes[0] * self.sizes[1] * self.sizes[2] if self.kind == "product" else 0


def _moved(tensors: list[Tensor]) -> int:
    """Bytes of tensors, each element once, expanded or not."""
    sizes = (
        t.element_size() * torch.Size([n for n, s in zip(t.shape, t.stride(), strict=True) if s]).numel()
        for t in tensors
    )
    return sum(sizes)


class Trace(TorchDispatchMode):
    """Collects events, and what tensors made within are held at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[Event] = []
        self.peak_bytes = 0
        self._held: dict[int, tuple[StorageWeakRef, int]] = {}
        self._known: set[int] = set()

    def ignore(self, *tensors: Tensor) -> None:
        """Tensors that are inputs: their memory is not the call's."""
        self._known |= {t.untyped_storage()._cdata for t in tensors}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        own = OPDEFS.get(func.name().split(".")[0])
        if own is not None:
            with self:
                return own._init_fn(*args, **kwargs)
        if (
            func is torch.ops.aten.addmm.dtype_out and kwargs["out"].is_meta
        ):  # torch 2.11 has no meta kernel for it
            out = kwargs["out"]
        else:
            out = func(*args, **kwargs)
        self._hold(out)
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        outputs = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        made = {t.untyped_storage()._cdata for t in outputs} - {t.untyped_storage()._cdata for t in inputs}
        name = func.name().removeprefix("aten::").split(".")[0]
        if name in PRODUCTS:
            self.events.append(_product(name, args, outputs[0]))
        elif (made or func._schema.is_mutable) and not name.startswith(("empty", "new_empty", "_assert")):
            rewritten = made or (name.endswith("_") and name not in ("zero_", "fill_", "copy_"))
            moved = _moved(inputs) + (_moved(outputs) if rewritten else 0)
            self.events.append(Event("pass", name, (), moved))
        return out

    def _hold(self, out: Any) -> None:
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._known:
                    self._held[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self._held = {key: item for key, item in self._held.items() if not item[0].expired()}
        self.peak_bytes = max(self.peak_bytes, sum(nbytes for _, nbytes in self._held.values()))

    def launch(self, name: str, grid: Any, arguments: dict[str, Any]) -> None:
        programs = 1
        for size in grid if isinstance(grid, tuple) else (grid,):
            programs *= size
        plain = {key: _described(value) for key, value in arguments.items()}
        self.events.append(Event("kernel", name, (programs,), arguments=plain))


def _described(value: Any) -> Any:
    """An argument that equals itself: (shape, bytes of an element) of a tensor, which would be held; "nan" of NaN."""
    tensor = getattr(value, "base", value)
    if isinstance(value, float) and value != value:
        return "nan"
    return (tuple(tensor.shape), tensor.element_size()) if isinstance(tensor, Tensor) else value


def _product(name: str, args: Any, out: Tensor) -> Event:
    left, right = [argument for argument in args if isinstance(argument, Tensor)][-2:]
    rows, inner, columns = *left.shape, right.shape[1]
    # A sum in place is read as well as written; a bias is not counted.
    is_sum = name != "mm" and args[0].shape == out.shape
    moved = _moved([left, right]) + out.numel() * out.element_size() * (2 if is_sum else 1)
    return Event("product", name, (rows, columns, inner), moved, left.element_size())


@contextmanager
def recording(trace: Trace, *, launching: bool) -> Iterator[None]:
    """Kernel launches go to ``trace``, and to the kernels too if ``launching``; else any device's tensors will do."""
    from triton.runtime.interpreter import GridExecutor
    from triton.runtime.jit import JITFunction

    from sftmix_kernels import choice

    interpret, run = GridExecutor.__call__, JITFunction.run

    def interpreted(executor: Any, *args: Any, **arguments: Any) -> Any:
        trace.launch(executor.fn.__name__, executor.grid, arguments)
        return interpret(executor, *args, **arguments) if launching else None

    def compiled(kernel: Any, *args: Any, grid: Any, warmup: bool, **arguments: Any) -> Any:
        trace.launch(kernel.__name__, grid, arguments)
        return run(kernel, *args, grid=grid, warmup=warmup, **arguments) if launching else None

    with ExitStack() as stack:
        stack.enter_context(patch.object(GridExecutor, "__call__", interpreted))
        stack.enter_context(patch.object(JITFunction, "run", compiled))
        if not launching:
            stack.enter_context(patch.object(choice, "why_not_fused", lambda *_: None))
        yield


@contextmanager
def on_chip(arch: str, num_processors: int) -> Iterator[None]:
    """The kernels' own functions choose tiles, splits and products as on a chip of ``arch``."""
    from sftmix_kernels.fused import configs, forward, products, recompute, stored, tiles

    def slots(device: torch.device, tile: configs.Tile) -> int:
        return num_processors * configs.programs_per_processor(tile)

    with ExitStack() as stack:
        stack.enter_context(patch.object(tiles, "current_arch", lambda device: arch))
        stack.enter_context(patch.object(forward, "_num_program_slots", slots))
        assert products.add_product is recompute.add_product is stored.add_product
        stack.enter_context(patch.object(products, "multiplies_into_float32", lambda tensor: True))
        yield


def trace_call(call: Callable[[], Any], inputs: list[Tensor], *, launching: bool = True) -> Trace:
    """Events and peak of ``call``; what it returns is held to its end, as its caller would."""
    trace = Trace()
    trace.ignore(*inputs)
    with recording(trace, launching=launching), trace:
        result = call()
    del result
    return trace

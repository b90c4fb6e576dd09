"""A checked call of the loss from a case, as the operators take it, and names of the operators that a function runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sftmix_kernels.arguments import HeadOptions, Rows, Ways, make_call
from sftmix_kernels.call import NAMESPACE, Call
from tests.parity import Case

HEAD = HeadOptions._fields


def call_of(
    case: Case, *, needs: tuple[bool, ...] = (True, True, True), factors: tuple[Tensor, Tensor] | None = None,
    impl: str = "chunked", rows: bool = False, entropy: bool = False, predicted: bool = False,
    main_grad: Tensor | None = None, **options: Any,
) -> Call:  # fmt: skip
    """``needs`` of hidden, weight, bias, and with ``factors`` of low and up, which stand in for those of an adapter."""
    tensors = [case.hidden, case.weight, case.bias]
    leaves = [
        None if t is None else t.detach().requires_grad_(n) for t, n in zip(tensors, needs, strict=False)
    ]
    hidden, weight, bias = leaves
    options = {**case.options, **options}
    head = HeadOptions(**{name: options.pop(name) for name in HEAD if name in options})
    scratch = options.pop("scratch_bytes", 4096)
    beside = Rows(case.lam, mixup_weight=options.pop("mixup_weight", 0.2), **options)
    ways = Ways(None, None, main_grad, impl, None, scratch, rows=rows, entropy=entropy, predicted=predicted)
    assert hidden is not None and weight is not None
    call, _ = make_call(hidden, weight, case.target, bias, head, beside, ways)
    if factors is not None:
        low, up = (t.detach().requires_grad_(n) for t, n in zip(factors, needs[3:], strict=True))
        plan = list(call.plan)
        plan[3:5] = [int(needed) for needed in needs[3:]]
        call = call._replace(low=low, up=up, plan=plan)
    return call


class Called(TorchDispatchMode):
    """Names of the package's operators, in the order in which they ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == NAMESPACE:
            self.names.append(func.name().removeprefix(f"{NAMESPACE}::"))
        return func(*args, **(kwargs or {}))


def made_gradients(call: Call) -> tuple[Tensor, ...]:
    """scale and the five gradients that ``made_fwd`` leaves for its backward."""
    from sftmix_kernels.operators import NUM_TERMS, made_fwd

    with torch.no_grad():
        return tuple(made_fwd(*call)[NUM_TERMS:])

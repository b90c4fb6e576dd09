"""torch.autocast for the loss: what it promises to a linear layer, and nothing that it would round beside it.

Inside an autocast block hidden, weight, bias and low-rank factors are cast to the block's dtype (float64 stays, as
everywhere in autocast); their gradients come back in their own dtypes. ``lam``, weights and denominators are not cast:
registering the rule on the operators would round ``lam``, so the cast stands before them. The rest of the call runs
with autocast off, so that no product inside is rounded a second time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from .choice import constant

P = ParamSpec("P")
T = TypeVar("T")
CAST = ("hidden", "weight", "bias")


@constant
def has_autocast(device_type: str) -> bool:
    """``torch.amp.is_autocast_available``, a constant under compile: torch before 2.13 cannot trace it."""
    return torch.amp.is_autocast_available(device_type)


def cast_like_linear(value: Any, device_type: str, dtype: torch.dtype) -> Any:
    """``value`` in autocast's dtype where autocast would cast it: a floating tensor of that device, not float64."""
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype == torch.float64:
        return value
    return value.to(dtype) if value.device.type == device_type else value


def follows_autocast(function: Callable[P, T]) -> Callable[P, T]:
    """A loss function of (hidden, weight, ...) that obeys ``torch.autocast``; without autocast it is unchanged."""

    @functools.wraps(function)
    def wrapper(*args: P.args, **options: P.kwargs) -> T:
        hidden = args[0] if args else options.get("hidden")
        device_type = hidden.device.type if isinstance(hidden, Tensor) else "cpu"
        if not has_autocast(device_type) or not torch.is_autocast_enabled(device_type):
            return function(*args, **options)
        dtype = torch.get_autocast_dtype(device_type)
        arguments: list[Any] = [cast_like_linear(value, device_type, dtype) for value in args[:2]]
        named: dict[str, Any] = dict(options)
        for name in CAST:
            if name in named:
                named[name] = cast_like_linear(named[name], device_type, dtype)
        if isinstance(named.get("lora"), tuple):
            named["lora"] = tuple(cast_like_linear(value, device_type, dtype) for value in named["lora"])
        with torch.autocast(device_type, enabled=False):
            # The same arguments, cast: a ParamSpec cannot say so.
            return function(*arguments, *args[2:], **named)  # type: ignore[arg-type]

    return wrapper

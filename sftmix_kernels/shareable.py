"""Which linear layers a LossHead may share the parameters of: those that compute W h + b and nothing else.

A head takes over weight and bias. What else a layer carries, on its class or on itself, would be dropped without a
word, so a layer with more is refused by the name of what it has, and with what takes it off.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch.nn as nn
from torch import Tensor
from torch.nn.utils import parametrize

HOOKS = {
    "_forward_pre_hooks": "a forward pre-hook",
    "_forward_hooks": "a forward hook",
    "_backward_pre_hooks": "a backward pre-hook",
    "_backward_hooks": "a backward hook",
    "_state_dict_pre_hooks": "a state_dict pre-hook",
    "_state_dict_hooks": "a state_dict hook",
    "_load_state_dict_pre_hooks": "a load_state_dict pre-hook",
    "_load_state_dict_post_hooks": "a load_state_dict post-hook",
}
# What torch's older utilities leave beside a weight that is no parameter any more.
REMOVERS = {
    "weight_mask": "torch.nn.utils.prune.remove(linear, 'weight')",
    "weight_g": "torch.nn.utils.remove_weight_norm(linear)",
    "weight_u": "torch.nn.utils.remove_spectral_norm(linear)",
}
PARTS = {"weight", "bias"}


def _fail(expected: str, got: str) -> NoReturn:
    raise ValueError(f"linear: expected {expected}, got {got}")


def _is_quantised(module: nn.Module) -> bool:
    """By its class's name, or by a tensor in it that is an integer, a byte, or a subclass made of other tensors."""
    kind = f"{type(module).__module__}.{type(module).__qualname__}".lower()
    if "quantized." in kind or kind.startswith("bitsandbytes."):
        return True
    tensors = [*module._parameters.values(), *module._buffers.values()]
    return any(
        not tensor.is_floating_point()
        or tensor.itemsize == 1
        or (hasattr(tensor, "__tensor_flatten__") and type(tensor).__name__ != "DTensor")
        for tensor in tensors
        if tensor is not None
    )


def check_shareable(linear: Any, forwards: tuple[Any, ...]) -> None:
    """``linear`` is an nn.Linear whose class has one of ``forwards``, with a plain weight and bias and no more.

    Raises: ValueError naming what it has instead: quantisation, a forward of its own (on the class, or on the layer,
    as accelerate puts it), a parametrisation, pruning or weight norm, hooks, FSDP2, further parameters or buffers.
    """
    kind = type(linear).__name__
    if not isinstance(linear, nn.Module):
        _fail("an nn.Linear with its own forward", kind)
    if _is_quantised(linear):
        _fail(
            "an nn.Linear with a floating-point weight",
            f"a quantised {kind}; leave the output layer out of quantisation, or dequantise it first",
        )
    if not isinstance(linear, nn.Linear) or type(linear).forward not in forwards:
        _fail("an nn.Linear with its own forward", kind)
    if parametrize.is_parametrized(linear):
        names = ", ".join(linear.parametrizations)  # type: ignore[arg-type]  # a ModuleDict
        _fail(
            "a plain weight",
            f"a layer whose {names} is parametrised; parametrize.remove_parametrizations(linear, ...) makes it plain",
        )
    if "weight" not in linear._parameters:
        held = {**linear._parameters, **linear._buffers, **vars(linear)}
        remover = next((f"; {how} makes it one" for name, how in REMOVERS.items() if name in held), "")
        others = ", ".join(name for name in linear._parameters if name not in PARTS)
        _fail("the weight to be a parameter", f"a tensor computed from {others or 'something else'}{remover}")
    _check_instance(linear)


def _check_instance(linear: nn.Linear) -> None:
    """What hangs on the layer itself, whatever its class."""
    if getattr(linear, "_is_fsdp_managed_module", False):
        _fail(
            "a layer that FSDP2 does not manage yet",
            "one under fully_shard; make the head first, then call fully_shard",
        )
    if "forward" in vars(linear):
        by = "one put on this layer"
        if hasattr(linear, "_hf_hook"):
            by = (
                f"accelerate's ({type(linear._hf_hook).__name__}), which moves weights; make the head before the "
                "model is dispatched or offloaded, or call accelerate.hooks.remove_hook_from_module first"
            )
        _fail("the forward of nn.Linear", by)
    for attribute, what in HOOKS.items():
        for hook in getattr(linear, attribute, {}).values():
            name = getattr(hook, "__qualname__", type(hook).__name__)
            _fail("a layer without hooks", f"{what} ({name}); remove it, and register it on the head")
    children = dict(linear._modules)
    held: dict[str, Tensor | nn.Module | None] = {**linear._parameters, **linear._buffers, **children}
    others = sorted(name for name in held if name not in PARTS)
    if others:
        _fail("a layer of weight and bias", f"one that also holds {', '.join(others)}")

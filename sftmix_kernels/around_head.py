"""What happens around a LossHead: adapters of peft that take it in, and models that put another layer in its place.

peft's layers keep the layer they adapt as ``base_layer`` and compute logits. A LoRA layer becomes one that computes
the loss by :func:`adapt_head`. Any other, or one that was forgotten, refuses a target: some of peft's layers pass one
on and then fail on the loss that comes back, others never call the head and give logits as if none had been asked for.
The head cannot see either, so the layer is told when it takes a head in, by the one notice that torch gives: a hook on
the registration of modules, set when this module is imported; elsewhere it costs a comparison of names.
"""

from __future__ import annotations

import copyreg
import functools
from typing import Any

import torch.nn as nn
from torch import Tensor
from torch.nn.modules.module import register_module_module_registration_hook

from .head import LOSS_OPTIONS, LossHead
from .lora_head import LoRA
from .reference import SFTMixLoss, TokenStats

ASKS_FOR_A_LOSS = frozenset({"target", "lam", "stats"}) | LOSS_OPTIONS
# Under which names peft's layers keep what they adapt; modules_to_save keeps a copy of the head, which is a head.
INSIDE = ("base_layer", "token_adapter")


def name_of(layer: object) -> str:
    """As peft prints its layers: "ia3.Linear", not Linear."""
    package, _, module = type(layer).__module__.partition("peft.tuners.")
    return (
        f"{module.split('.')[0]}.{type(layer).__name__}" if module and not package else type(layer).__name__
    )


def is_lora_layer(module: Any) -> bool:
    """Whether ``module`` is a peft LoRA layer around another module; peft itself is not needed to tell.

    AdaLoRA's layers look alike and are not: its factors are three, and its model adds a penalty to the loss it gets.
    """
    named = all(hasattr(module, name) for name in ("lora_A", "lora_B", "scaling", "base_layer"))
    return named and not hasattr(module, "lora_E")


def lora_of(module: Any) -> LoRA | None:
    """(A, B, scaling) of the active adapter of a peft LoRA layer; None if it is none, switched off or merged.

    Raises ValueError for what these factors alone do not say: several active adapters, DoRA and other variants, a
    bias in the adapter, dropout while training.
    """
    if not is_lora_layer(module) or module.disable_adapters or module.merged:
        return None
    names = [name for name in module.active_adapters if name in module.lora_A]
    if not names:
        return None
    if len(names) > 1:
        raise ValueError(f"head: expected one active LoRA adapter, got {', '.join(names)}")
    name = names[0]
    down, up = module.lora_A[name], module.lora_B[name]
    if name in getattr(module, "lora_variant", {}) or getattr(module, "use_dora", {}).get(name, False):
        raise ValueError("head: expected plain LoRA, got DoRA or another variant of it")
    if down.bias is not None or up.bias is not None:
        raise ValueError("head: expected LoRA factors without a bias, got lora_bias=True")
    dropout = module.lora_dropout[name]
    if module.training and getattr(dropout, "p", 0.0) > 0:
        raise ValueError(f"head: expected LoRA without dropout (or eval mode), got lora_dropout={dropout.p}")
    return down.weight, up.weight, float(module.scaling[name])


class LoraLossHead:
    """What :func:`adapt_head` puts before the class of a peft LoRA layer around a LossHead."""

    base_layer: LossHead

    @property
    def softcap(self) -> float | None:
        return self.base_layer.softcap

    @property
    def logit_scale(self) -> float:
        return self.base_layer.logit_scale

    def forward(
        self, hidden: Tensor, target: Tensor | None = None, lam: Tensor | None = None, **options: Any
    ) -> Tensor | SFTMixLoss | TokenStats:
        """As :meth:`LossHead.forward`, with the active adapter; without a target the layer's own logits."""
        if target is None and lam is None:
            # peft's layer, which adapt_head puts behind this class; object, as a type checker sees it, has no forward.
            logits: Tensor = super().forward(hidden, **options)  # type: ignore[misc]
            return logits
        if "lora" in options:
            raise ValueError("lora: expected the layer's own adapter alone, got an option")
        layer: Any = self
        if layer.disable_adapters and layer.merged:
            layer.unmerge()  # as peft's forward does: switched off means the base's own weight
        return self.base_layer(hidden, target, lam, lora=lora_of(self), **options)

    def __reduce__(self) -> tuple[Any, ...]:
        """The adapted class is made from peft's, so a pickle names that one."""
        kind = type(self)
        if kind.__mro__[1] is not LoraLossHead:  # a subclass made since, as fully_shard makes one
            return copyreg.__newobj__, (kind,), vars(self)  # type: ignore[attr-defined]  # not in stubs
        return _empty_layer, (kind.__mro__[2],), vars(self)


@functools.cache
def adapted_class(kind: Any) -> type[nn.Module]:
    """The subclass of peft's layer class ``kind`` that computes the loss; the same one for every layer of it."""
    return type(f"LossHead{kind.__name__}", (LoraLossHead, kind), {"__module__": kind.__module__})


def _empty_layer(kind: Any) -> nn.Module:
    """A layer without state yet, as unpickling and copying make one."""
    adapted = adapted_class(kind)
    return adapted.__new__(adapted)


def adapt_head(layer: nn.Module) -> nn.Module:
    """Let a peft LoRA layer around a LossHead be called like the head, in place; gradients reach A and B.

    peft's own forward expects a tensor from the layer inside and fails on a loss. The layer's class is replaced by a
    subclass of it, so names, merging and saving stay peft's. A LossHead, or a layer that is adapted, is returned as is.
    Raises: ValueError for another module, other adapters of peft among them, and for a LoRA layer with a forward of
    its own (X-LoRA's gates; accelerate's, which comes after this call).
    """
    if isinstance(layer, LossHead | LoraLossHead):
        return layer
    if not is_lora_layer(layer) or not isinstance(layer.base_layer, LossHead):
        raise ValueError(f"layer: expected a peft LoRA layer around a LossHead, got {name_of(layer)}")
    if "forward" in vars(layer):
        owner = name_of(getattr(vars(layer)["forward"], "__self__", None))
        raise ValueError(f"layer: expected the forward of {name_of(layer)}, got one put on it ({owner})")
    if getattr(layer, "parameter_name", "weight") != "weight":
        raise ValueError(f"layer: expected an adapter of the weight, got one of {layer.parameter_name}")
    kind: Any = type(layer)
    layer.__class__ = adapted_class(kind)
    return layer


def _refuse_a_loss(layer: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
    """Before a peft layer's forward: only an adapted one may be asked for more than logits."""
    if isinstance(layer, LoraLossHead):
        return
    asked = [*args[1:], *(value for name, value in options.items() if name in ASKS_FOR_A_LOSS)]
    if all(value is None or value is False for value in asked):
        return
    if is_lora_layer(layer) and "forward" not in vars(layer):
        remedy = "call sftmix_kernels.adapt_head on it once"
    else:
        remedy = "give the head a LoRA layer and adapt_head, or merge this adapter first (merge_and_unload)"
    raise ValueError(
        f"target: expected None for peft's {name_of(layer)}, which gives logits only, got a call for the loss; {remedy}"
    )


def _has_head(module: Any) -> bool:
    """Whether ``module`` is a LossHead, or peft's layers with one at the bottom."""
    while module is not None and not isinstance(module, LossHead):
        parts = getattr(module, "_modules", {})
        module = next((parts[name] for name in INSIDE if name in parts), None)
    return module is not None


def _on_registration(parent: nn.Module, name: str, child: nn.Module | None) -> nn.Module | None:
    """Called by torch before ``parent.name = child``; what is returned takes the child's place."""
    if name in INSIDE:
        of_peft = any(kind.__module__.split(".")[0] == "peft" for kind in type(parent).__mro__)
        if of_peft and _has_head(child):
            parent.register_forward_pre_hook(_refuse_a_loss, with_kwargs=True)
        return None
    if type(child) is not nn.Linear:
        return None
    old = parent._modules.get(name)
    if not isinstance(old, LossHead) or old.in_features != child.in_features:
        return None
    if old.out_features == child.out_features:
        return None  # somebody's own layer
    return type(old).from_linear(child, softcap=old.softcap, logit_scale=old.logit_scale)


# What it returns takes the module's place, though torch's type for it says None.
register_module_module_registration_hook(_on_registration)  # type: ignore[arg-type]

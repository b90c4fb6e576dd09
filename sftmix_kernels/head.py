"""LossHead: an output layer whose forward is the loss, so that FSDP2 hands it the gathered weight.

A head inside a peft LoRA layer is still a head: :func:`adapt_head` makes the layer's forward take a target too.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from .functional import sftmix_loss, token_stats
from .lora_head import is_lora_layer, lora_of
from .reference import SFTMixLoss, TokenStats


class LossHead(nn.Linear):
    """A linear output layer [V, D] that computes logits, the SFTMix loss or token statistics in its forward.

    ``softcap`` and ``logit_scale`` act in the loss and the statistics only: a model applies its own to the logits.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        *,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self.softcap = softcap
        self.logit_scale = logit_scale

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, *, softcap: float | None = None, logit_scale: float = 1.0
    ) -> LossHead:
        """A head that shares ``linear``'s parameters (the same objects, so tied weights stay tied).

        Raises: ValueError if ``linear`` is not an ``nn.Linear`` or is a subclass with a forward of its own.
        """
        if not isinstance(linear, nn.Linear) or type(linear).forward not in (
            nn.Linear.forward,
            LossHead.forward,
        ):
            raise ValueError(
                f"linear: expected an nn.Linear with its own forward, got {type(linear).__name__}"
            )
        head = cls(
            linear.in_features, linear.out_features, linear.bias is not None, softcap=softcap,
            logit_scale=logit_scale, device="meta",
        )  # fmt: skip
        head.weight, head.bias = linear.weight, linear.bias
        return head.train(linear.training)

    def forward(  # type: ignore[override]
        self,
        hidden: Tensor,  # (..., D), (N, D) with a target
        target: Tensor | None = None,  # (N,) int64
        lam: Tensor | None = None,  # (M,) float32
        *,
        stats: bool = False,
        **options: Any,
    ) -> Tensor | SFTMixLoss | TokenStats:
        """Logits [..., V], in the weight's dtype, without ``target``; with it SFTMixLoss, or TokenStats if ``stats``.

        ``options`` are those of :func:`sftmix_kernels.sftmix_loss`; without ``lam`` there are no pairs (M = 0).
        Raises: ValueError from the loss, for ``lam`` or ``stats`` without a target, for ``main_grad`` under FSDP2.
        """
        if target is None:
            if lam is not None or stats or options:
                raise ValueError("target: expected int64 [N] beside lam, stats or loss options, got None")
            return super().forward(hidden)
        shared: dict[str, Any] = {"bias": self.bias, "softcap": self.softcap, "logit_scale": self.logit_scale}
        if stats:
            if lam is not None:
                raise ValueError("lam: expected None with stats=True, got a tensor")
            return token_stats(hidden, self.weight, target, **shared, **options)
        # fully_shard marks the modules whose parameters it manages; it would not see what goes to main_grad.
        if options.get("main_grad") is not None and getattr(self, "_is_fsdp_managed_module", False):
            raise ValueError("main_grad: expected None under FSDP2, which owns its gradients, got a tensor")
        if lam is None:
            lam = torch.empty(0, dtype=torch.float32, device=hidden.device)
        return sftmix_loss(hidden, self.weight, target, lam, **shared, **options)


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
        result: Tensor | SFTMixLoss | TokenStats = self.base_layer(
            hidden, target, lam, lora=lora_of(self), **options
        )
        return result


def adapt_head(layer: nn.Module) -> nn.Module:
    """Let a peft LoRA layer around a LossHead be called like the head, in place; gradients reach A and B.

    peft's own forward expects a tensor from the layer inside and fails on a loss. The layer's class is replaced by a
    subclass of it, so names, merging and saving stay peft's. A LossHead, or a layer that is adapted, is returned as is.
    Raises: ValueError for another module.
    """
    if isinstance(layer, LossHead | LoraLossHead):
        return layer
    if not is_lora_layer(layer) or not isinstance(layer.base_layer, LossHead):
        raise ValueError(f"layer: expected a peft LoRA layer around a LossHead, got {type(layer).__name__}")
    kind = type(layer)
    layer.__class__ = type(f"LossHead{kind.__name__}", (LoraLossHead, kind), {})
    return layer

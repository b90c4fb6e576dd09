"""LossHead: an output layer whose forward is the loss, so that FSDP2 hands it the gathered weight."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from .functional import sftmix_loss, token_stats
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
        """Logits [..., V] without ``target``; with it SFTMixLoss, or TokenStats if ``stats``.

        ``options`` are those of :func:`sftmix_kernels.sftmix_loss`; without ``lam`` there are no pairs (M = 0).
        Raises: ValueError from the loss, or for ``lam`` or ``stats`` without a target.
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
        if lam is None:
            lam = torch.empty(0, dtype=torch.float32, device=hidden.device)
        return sftmix_loss(hidden, self.weight, target, lam, **shared, **options)

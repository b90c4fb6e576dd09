"""LossHead: an output layer whose forward is the loss, so that FSDP2 hands it the gathered weight.

A head inside a peft LoRA layer is still a head: :func:`sftmix_kernels.adapt_head` lets the layer take a target too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypedDict, overload

import torch
import torch.nn as nn
from torch import Tensor

from .functional import sftmix_loss, token_stats
from .lora_head import LoRA
from .reference import SFTMixLoss, TokenStats
from .shareable import check_shareable

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh
    from typing_extensions import Unpack

OWN = ("weight", "bias", "softcap", "logit_scale")  # what the head itself gives to the loss


class SharedOptions(TypedDict, total=False):
    """Options of both."""

    ignore_index: int
    want_predicted: bool
    lora: LoRA | None
    vocab_parallel: (
        ProcessGroup | DeviceMesh | None
    )  # not Any, which would make the result of a call with it Any
    exchange: ProcessGroup | DeviceMesh | None
    impl: str | None
    scratch_bytes: int | None


class StatsOptions(SharedOptions, total=False):
    """Options of a head's call with ``stats=True``: those of :func:`sftmix_kernels.token_stats`."""

    tokens: Tensor | None
    differentiable: bool


class LossOptions(SharedOptions, total=False):
    """Options of a head's call with a target: those of :func:`sftmix_kernels.sftmix_loss`."""

    class_weight: Tensor | None
    token_scaling: bool
    mixup_weight: float | Tensor
    row_weight: Tensor | None
    pair_weight: Tensor | None
    ntp_denominator: float | Tensor | None
    mixup_denominator: float | Tensor | None
    label_smoothing: float
    z_loss: float
    main_grad: Tensor | None
    schedule: str | None


LOSS_OPTIONS, STATS_OPTIONS = LossOptions.__optional_keys__, StatsOptions.__optional_keys__


def check_options(options: dict[str, Any], known: frozenset[str], call: str) -> None:
    """Every keyword of ``options`` is one of ``known``. Raises: ValueError naming the first that is not."""
    for name in options:
        if name in OWN:
            raise ValueError(f"{name}: expected it on the head, where {call} takes it from, got an option")
        if name not in known:
            hint = "; targets are the second argument, target" if name == "labels" else ""
            raise ValueError(f"{name}: expected one of {call}'s options, {', '.join(sorted(known))}{hint}")


class LossHead(nn.Linear):
    """A linear output layer [V, D] that computes logits, the SFTMix loss or token statistics in its forward.

    ``softcap`` and ``logit_scale`` act in the loss and the statistics only: a model applies its own to the logits.

    Where a module's replacement under the same name is an nn.Linear of another height, as transformers'
    ``resize_token_embeddings`` puts one, it becomes a LossHead with the same cap and scale (around_head.py).

    Under FSDP with 16-bit ``param_dtype`` torch casts every floating tensor argument of a wrapped module by default:
    ``lam``, weights and denominators that are tensors are rounded before the loss sees them (a denominator of 1001
    becomes 1000). The loss refuses 16-bit ones; ``MixedPrecisionPolicy(cast_forward_inputs=False)`` on every unit, or
    denominators as Python numbers, keeps them whole. Under DDP ``main_grad`` is not reduced over ranks: DDP sees
    gradients of parameters only, so all-reduce the buffer after the backward.
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

        Raises: ValueError if ``linear`` is not an ``nn.Linear`` that holds a plain weight and bias and no more:
        shareable.py lists what would be dropped. Or if it is a LossHead whose cap or scale would be.
        """
        check_shareable(linear, (nn.Linear.forward, LossHead.forward))
        if isinstance(linear, LossHead):
            if softcap is None and linear.softcap is not None:
                raise ValueError(f"softcap: expected that of the LossHead given, {linear.softcap}, got None")
            if logit_scale == 1.0 and linear.logit_scale != 1.0:
                raise ValueError(
                    f"logit_scale: expected that of the LossHead given, {linear.logit_scale}, got {logit_scale}"
                )
        head = cls(
            linear.in_features, linear.out_features, linear.bias is not None, softcap=softcap,
            logit_scale=logit_scale, device="meta",
        )  # fmt: skip
        head.weight, head.bias = linear.weight, linear.bias
        return head.train(linear.training)

    def layer(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias as the loss is to take them; a subclass may keep them in another form."""
        return self.weight, self.bias

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, softcap={self.softcap}, logit_scale={self.logit_scale}"

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

        ``options`` are those of :func:`sftmix_kernels.sftmix_loss` (with ``stats``, of ``token_stats``) but for the
        head's own: weight, bias, softcap, logit_scale. Without ``lam`` there are no pairs (M = 0).
        Raises: ValueError from the loss, for an unknown option by its name, for ``lam`` or ``stats`` without a target,
        for ``main_grad`` under FSDP2, and for ``exchange`` of a weight that FSDP2 gathers.
        """
        if stats:
            check_options(options, STATS_OPTIONS, "token_stats")
        else:
            check_options(options, LOSS_OPTIONS, "sftmix_loss")
        if target is None:
            if lam is not None or stats or options:
                raise ValueError("target: expected int64 [N] beside lam, stats or loss options, got None")
            return super().forward(hidden)
        weight, bias = self.layer()
        # fully_shard marks the modules whose parameters it manages; those that it ignores stay DTensors in the forward.
        is_managed = getattr(self, "_is_fsdp_managed_module", False)
        if is_managed and options.get("exchange") is not None and type(weight).__name__ != "DTensor":
            raise ValueError(
                "exchange: expected a head that FSDP2 leaves alone (ignored_params of fully_shard), got one that it "
                "gathers"
            )
        shared: dict[str, Any] = {"bias": bias, "softcap": self.softcap, "logit_scale": self.logit_scale}
        if stats:
            if lam is not None:
                raise ValueError("lam: expected None with stats=True, got a tensor")
            return token_stats(hidden, weight, target, **shared, **options)
        # FSDP2 would not see what goes to main_grad.
        if options.get("main_grad") is not None and is_managed:
            raise ValueError("main_grad: expected None under FSDP2, which owns its gradients, got a tensor")
        if lam is None:
            lam = torch.empty(0, dtype=torch.float32, device=hidden.device)
        return sftmix_loss(hidden, weight, target, lam, **shared, **options)

    if TYPE_CHECKING:
        # nn.Module declares a call as Callable[..., Any], which would hide what each form of it gives.

        @overload
        def __call__(self, hidden: Tensor) -> Tensor: ...

        @overload
        def __call__(
            self, hidden: Tensor, target: Tensor, lam: Tensor | None = None, *, stats: Literal[False] = False,
            **options: Unpack[LossOptions],
        ) -> SFTMixLoss: ...  # fmt: skip

        @overload
        def __call__(
            self, hidden: Tensor, target: Tensor, *, stats: Literal[True], **options: Unpack[StatsOptions]
        ) -> TokenStats: ...

        @overload
        def __call__(
            self, hidden: Tensor, target: Tensor | None = None, lam: Tensor | None = None, *, stats: bool = False,
            **options: Unpack[LossOptions],
        ) -> Tensor | SFTMixLoss | TokenStats: ...  # fmt: skip

        def __call__(self, *args: Any, **options: Any) -> Any: ...

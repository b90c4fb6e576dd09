"""The tensors of one call, checked: rows, and the output layer, whole or a shard, with low-rank factors or without."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checks
from .arguments import HeadOptions
from .lora_head import LoRA, low_rank
from .main_grad import sending_gradient_to
from .vocab_shard import Shard, check_target, reference_shard, resolve_shard


class Inputs(NamedTuple):
    """What a call computes with; ``weight``, ``bias`` and ``up`` are local where ``shard`` is given."""

    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    low: Tensor | None  # (N, r)
    up: Tensor | None  # (V, r)
    shard: Shard | None

    @property
    def head(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """The operators' first three arguments."""
        return self.hidden, self.weight, self.bias

    @property
    def low_rank(self) -> tuple[Tensor | None, Tensor | None]:
        """Their last two."""
        return self.low, self.up

    def detach(self) -> Inputs:
        bias, low, up = (None if t is None else t.detach() for t in (self.bias, *self.low_rank))
        return Inputs(self.hidden.detach(), self.weight.detach(), bias, low, up, self.shard)

    def needs(self) -> list[bool]:
        """Which of hidden, weight, bias, low and up get a gradient from this call."""
        grad = torch.is_grad_enabled()
        hidden, weight, bias, low, up = (grad and t is not None and t.requires_grad for t in self[:5])
        return [hidden, weight, bias, low, up]

    def for_reference(self, main_grad: Tensor | None = None) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """hidden, weight, and the reference's keywords for what else is here; ``main_grad`` gets weight's gradient."""
        hidden, low = self.hidden, self.low
        weight = self.weight if main_grad is None else sending_gradient_to(self.weight, main_grad)
        join: Callable[[Tensor], Tensor] | None = None
        if self.shard is not None:
            hidden, low, join = reference_shard(hidden, low, self.shard.group_name)
        return hidden, weight, {"bias": self.bias, "low": low, "up": self.up, "join": join}


def check_inputs(
    hidden: Tensor, weight: Tensor, target: Tensor, *, bias: Tensor | None, ignore_index: int, options: HeadOptions,
    lora: LoRA | None, vocab_parallel: Any,
) -> Inputs:  # fmt: skip
    """Check rows, layer, options and factors. With ``vocab_parallel`` a collective call (vocab_shard.py).

    Raises ValueError naming the argument.
    """
    shard = None
    if vocab_parallel is None:
        checks.check_head(hidden, weight, bias)
        checks.check_target(target, hidden.shape[0], weight.shape[0], ignore_index)
        checks.check_devices(hidden.device, target=target)
    else:
        shard = resolve_shard(hidden, weight, bias, vocab_parallel)
        weight, bias = shard.weight, shard.bias
        check_target(target, hidden.shape[0], ignore_index, shard)
    options.check()
    low, up = (None, None) if lora is None else low_rank(hidden, weight, lora)
    return Inputs(hidden, weight, bias, low, up, shard)

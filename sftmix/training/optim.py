"""AdamW over float32 weights, the learning-rate schedule, and gradient clipping.

An update of 2e-6 is lost when added to a bfloat16 weight, so whatever the model computes in, the optimizer
works on float32: a float32 parameter is updated itself, a bfloat16 one through a float32 master copy whose
rounded value the model computes with. Gradients are moved to the master as soon as they are ready, so they
are summed over micro-batches in float32 and the bfloat16 ones live only for a moment.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sftmix.config import OptimConfig
from sftmix.model.parallel import spread, whole


class TrainableWeights:
    """The trainable parameters of a model as float32 tensors by name, in the model's order."""

    def __init__(self, model: nn.Module) -> None:
        self.masters: dict[str, Tensor] = {}
        self._copies: list[tuple[Tensor, Tensor]] = []  # (the model's parameter, its master)
        self._hooks: list[RemovableHandle] = []
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            if parameter.dtype == torch.float32:
                self.masters[name] = parameter
                continue
            master = parameter.detach().float()
            self.masters[name] = master
            self._copies.append((parameter, master))
            self._hooks.append(parameter.register_post_accumulate_grad_hook(_GradientMover(master)))
        if not self.masters:
            raise ValueError("model: expected trainable parameters, found none")

    def release(self) -> None:
        """Stop moving gradients, at the end of a run: another one may train the same model."""
        for hook in self._hooks:
            hook.remove()

    def zero_grad(self) -> None:
        for master in self.masters.values():
            master.grad = None

    @torch.no_grad()
    def copy_to_model(self) -> None:
        """Round the masters into the parameters the model computes with."""
        for parameter, master in self._copies:
            parameter.copy_(master)

    @torch.no_grad()
    def load(self, values: dict[str, Tensor]) -> None:
        """Set every master from a whole tensor of the same name and shape, and the model's copies with it."""
        for name, master in self.masters.items():
            master.copy_(spread(values[name], like=master))
        self.copy_to_model()


class _GradientMover:
    """Adds a parameter's gradient to its master's, in float32."""

    def __init__(self, master: Tensor) -> None:
        self.master = master

    def __call__(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        if self.master.grad is None:
            self.master.grad = parameter.grad.float()
        else:
            self.master.grad.add_(parameter.grad)
        parameter.grad = None


def build_optimizer(weights: TrainableWeights, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW; weight decay on matrices (embeddings among them), none on norms and biases (one dimension)."""
    matrices = [weight for weight in weights.masters.values() if weight.ndim >= 2]
    vectors = [weight for weight in weights.masters.values() if weight.ndim < 2]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        # One pass over memory in place of ten; other devices take torch's own choice.
        fused=True if next(iter(weights.masters.values())).device.type in ("cpu", "cuda") else None,
    )


def learning_rate(config: OptimConfig, step: int, total: int) -> float:
    """Learning rate of optimizer step ``step`` (0-based) of ``total``: linear warm-up, then the schedule."""
    return scheduled(config.lr, config.schedule, config.warmup_ratio, step, total)


def scheduled(peak: float, schedule: str, warmup_ratio: float, step: int, total: int) -> float:
    """What a number with this ``peak`` is in step ``step`` (0-based) of ``total``.

    The warm-up takes ``warmup_ratio`` of all steps, rounded up, and reaches the peak at its last step;
    cosine and linear then fall towards 0, which they would reach one step after the last.
    """
    warmup = math.ceil(warmup_ratio * total)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    if schedule == "cosine":
        return peak * 0.5 * (1.0 + math.cos(math.pi * progress))
    if schedule == "linear":
        return peak * (1.0 - progress)
    return peak


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def clip_gradients(weights: TrainableWeights, max_norm: float) -> Tensor:
    """Scale the gradients to a global norm of at most ``max_norm``; the norm before it, 0-d, no host read.

    Under FSDP the norm is that of the whole gradient, the same on every process.
    """
    return whole(nn.utils.clip_grad_norm_(list(weights.masters.values()), max_norm))

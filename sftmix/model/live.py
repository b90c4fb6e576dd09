"""One base model that the stages of a run share: read once, given to each stage as it was read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sftmix.config import LoraConfig, ModelConfig
from sftmix.model.causal_lm import SFTMixModel
from sftmix.model.lora import apply_lora, is_lora
from sftmix.progress import say


class Live:
    """A loaded model and, once a stage has been given it to train, a copy of what training changes."""

    def __init__(self, source: ModelConfig, model: SFTMixModel) -> None:
        self.source, self.model = source, model
        self._told = False
        self._first: dict[str, Tensor] | None = None  # trainable weights as they were, on the CPU

    def fresh(
        self, lora: LoraConfig | None, *, trainable: bool, seed: int, keep: bool, export: str = "merged"
    ) -> SFTMixModel | None:
        """The model as it was read, or with its first adapters; None where that cannot be had back.

        ``export`` is the knob of that name. ``keep``: the caller will ask again after this stage, so what it may train
        is copied first.
        """
        if is_lora(self.model) and lora is None:
            return None  # adapters were put in
        if lora is not None and not is_lora(self.model):
            if self._first is not None:
                return None  # it was trained whole
            apply_lora(self.model, lora, seed=seed, export=export)
        weights = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        with torch.no_grad():
            if self._first is not None:
                for name, parameter in weights.items():
                    parameter.copy_(self._first[name])
            elif trainable and keep:
                # Copies, not references: an optimizer writes into the parameters themselves.
                self._first = {name: p.detach().to("cpu", copy=True) for name, p in weights.items()}
        for parameter in weights.values():
            parameter.grad = None
        _without_checkpointing(self.model.base)
        if trainable and lora is None and not self._told:
            self._told = True
            every = dict(self.model.named_parameters())
            share = sum(p.numel() for p in weights.values()), sum(p.numel() for p in every.values())
            say(f"full: {share[0]:,} of {share[1]:,} parameters train")
        return self.model


def _without_checkpointing(causal_lm: Any) -> None:
    """Switch off the recomputation that a stage switched on, and the gradient of the embeddings that came with it."""
    if any(getattr(module, "gradient_checkpointing", False) for module in causal_lm.modules()):
        newer = getattr(causal_lm, "activation_checkpointing_disable", None)  # transformers 5.24
        (newer or causal_lm.gradient_checkpointing_disable)()
    if hasattr(causal_lm, "_require_grads_hook"):  # older versions of transformers have none without peft
        causal_lm.disable_input_require_grads()

"""Flops that training a model asks for, whatever is computed twice: what a utilisation is counted in.

As in appendix B of the PaLM paper (arXiv 2204.02311): a multiplication and an addition are two; a matrix meets each
token in the forward pass, once more for the gradient of its input and, where it trains, for its own; attention takes
4 T^2 heads head_dim a sequence and block, thrice. Of the head only rows that bear loss count, and no padding.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sftmix.model.causal_lm import SFTMixModel
from sftmix.model.targets import decoder_blocks


class ModelFlops:
    """Flops of an optimizer step of ``model``, from the lengths of its sequences; made before the model is sharded."""

    def __init__(self, model: SFTMixModel) -> None:
        config = model.base.config.get_text_config()
        blocks = decoder_blocks(model)[1]
        self.per_token = 0.0  # forward and backward of the blocks' matrices
        for block in blocks:
            for weight in block.parameters():
                if weight.ndim >= 2:
                    active = weight.numel() * active_share(weight.ndim, model.base.config)
                    self.per_token += 2 * active * (3 if weight.requires_grad else 2)
        self.per_square = 12.0 * sum(attention_widths(config, len(blocks)))
        head = model.head.weight
        self.per_row = 2.0 * head.numel() * (3 if head.requires_grad else 2)

    def of(self, lengths: Iterable[int], num_rows: int) -> float:
        """Of sequences of so many tokens, and ``num_rows`` rows that bear loss."""
        listed = list(lengths)
        squares = sum(length * length for length in listed)
        return self.per_token * sum(listed) + self.per_square * squares + self.per_row * num_rows


def attention_widths(config: Any, num_blocks: int) -> list[int]:
    """heads x head_dim of each block; some configurations give a block another head_dim than the rest."""
    own = getattr(config, "per_layer_config", None)
    layers = [own[index] if own is not None else config for index in range(num_blocks)]
    widths = []
    for layer in layers:
        heads = int(getattr(layer, "num_attention_heads", 0) or 0)
        head_dim = getattr(layer, "head_dim", None) or int(getattr(layer, "hidden_size", 0) or 0) // max(
            heads, 1
        )
        widths.append(heads * int(head_dim))
    return widths


def active_share(dimensions: int, config: Any) -> float:
    """The share of a weight that a token is multiplied with: of fused experts [E, ., .] those that it is sent to."""
    if dimensions < 3:
        return 1.0
    text = config.get_text_config() if config is not None else None
    chosen = getattr(text, "num_experts_per_tok", None) or getattr(text, "moe_k", None)
    experts = next(
        (
            getattr(text, n)
            for n in ("num_local_experts", "num_experts", "moe_num_experts")
            if hasattr(text, n)
        ),
        None,
    )
    return chosen / experts if chosen and experts else 1.0

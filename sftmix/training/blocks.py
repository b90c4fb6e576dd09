"""What is done to the decoder's blocks for training: activations that are recomputed, compilation."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from sftmix.model.causal_lm import SFTMixModel
from sftmix.model.targets import decoder_blocks

# Products and attention: what takes the time. All else is recomputed from them.
_KEPT = ("mm", "addmm", "bmm", "baddbmm", "_grouped_mm", "_scaled_mm")


def recompute(model: SFTMixModel, kind: str) -> None:
    """Have each decoder block recompute its activations: ``none``, ``full``, or ``selective``.

    ``selective`` keeps the results of matrix products and of attention and recomputes the rest.
    """
    if kind == "none":
        return
    options: dict[str, Any] = {"use_reentrant": False}
    if kind == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    causal_lm = model.base
    newer = getattr(causal_lm, "activation_checkpointing_enable", None)  # transformers 5.24
    (newer or causal_lm.gradient_checkpointing_enable)(options)


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    name = operator.__name__.partition(".")[0] if hasattr(operator, "__name__") else str(operator)
    kept = name in _KEPT or "attention" in name or "flash_attn" in name
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def compile_blocks(model: SFTMixModel) -> None:
    """Compile each decoder block by itself, in place: one graph serves all of a kind, and FSDP gathers around it."""
    for block in decoder_blocks(model)[1]:
        block.compile()

"""LoRA adapters (peft) on the linear layers of the decoder's blocks and, where it is named, on the head.

The frozen base keeps its dtype, the adapters are float32. The head's forward is the loss, so its adapter goes
into the loss as two factors; all-linear leaves it out. Blocks below the first adapted one record no graph, so
training only upper layers is cheaper.
"""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from sftmix.config import LoraConfig
from sftmix_kernels import adapt_head

if TYPE_CHECKING:
    from sftmix.model.causal_lm import SFTMixModel

ADAPTER = "default"


def decoder_blocks(model: SFTMixModel) -> tuple[str, nn.ModuleList]:
    """The list of transformer blocks and its name inside the decoder.

    Raises ``ValueError`` when no module list of the decoder has as many entries as the model has layers.
    """
    config = model.base.config
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    for name, module in model.decoder.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == config.num_hidden_layers:
            return name, module
    raise ValueError(
        f"model: expected the decoder of {type(model.base).__name__} to hold a list of "
        f"{config.num_hidden_layers} blocks, found none"
    )


def apply_lora(model: SFTMixModel, lora: LoraConfig, *, seed: int = 0) -> SFTMixModel:
    """Freeze the model, add float32 adapters in place, and return it; ``seed`` decides their first values.

    Raises ``ValueError`` for a target that no chosen block has, a layer range outside the model, and a head
    as a target that is tied to the embedding or would get dropout.
    """
    from peft import LoraConfig as PeftLoraConfig
    from peft import get_peft_model

    names = find_targets(model, lora)
    peft_config = PeftLoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=names,
        bias="none",
        task_type="CAUSAL_LM",
        # Conv1D (GPT-2) keeps its weight transposed.
        fan_in_fan_out=any(isinstance(model.base.get_submodule(name), Conv1D) for name in names),
    )
    devices = [model.device] if model.device.type == "cuda" else []
    # Whatever peft draws, our caller's generator stays put; peft asks transformers for an attribute it renamed.
    with torch.random.fork_rng(devices=devices), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")
        model.model = get_peft_model(model.base, peft_config, adapter_name=ADAPTER)
    adapt_head(model.head)
    # Drawn anew on the CPU, as peft does it: the same adapters on every device and process.
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_A." in name:
                drawn = nn.init.kaiming_uniform_(
                    torch.empty(parameter.shape), a=math.sqrt(5), generator=generator
                )
                parameter.copy_(drawn)
    return model


def find_targets(model: SFTMixModel, lora: LoraConfig) -> list[str]:
    """Full names, inside the causal LM, of the linear layers that get an adapter."""
    wanted = [name.strip() for name in lora.target_modules.split(",")]
    head = next(name for name, module in model.base.named_modules() if module is model.head)
    adapted_head = [name for name in wanted if f".{head}".endswith(f".{name}")]
    if adapted_head:
        _check_head(model, lora, adapted_head[0])
        wanted = [name for name in wanted if name not in adapted_head]
    start, stop = _layer_range(model, lora.layers)
    blocks = decoder_blocks(model)[1]
    chosen = {id(module) for block in blocks[start:stop] for module in block.modules()}
    linear = [
        name
        for name, module in model.base.named_modules()
        if id(module) in chosen and isinstance(module, nn.Linear | Conv1D)
    ]
    if wanted == ["all-linear"]:
        found = linear
    else:
        matches: dict[str, list[str]] = {
            want: [name for name in linear if f".{name}".endswith(f".{want}")] for want in wanted
        }
        missing = [want for want, names in matches.items() if not names]
        if missing:
            leaves = sorted({name.rpartition(".")[2] for name in linear})
            raise ValueError(
                f"lora.target_modules: expected all-linear or some of {', '.join(leaves)}, "
                f"got {', '.join(missing)}"
            )
        found = [name for name in linear if any(name in names for names in matches.values())]
    if adapted_head:
        found.append(head)
    if not found:
        raise ValueError(f"lora: expected {type(model.base).__name__} to have linear layers, found none")
    return found


def _check_head(model: SFTMixModel, lora: LoraConfig, name: str) -> None:
    """What an adapter on the head cannot be combined with."""
    if model.is_tied:
        raise ValueError(
            f"lora.target_modules: expected modules with weights of their own, got {name}, the head, which "
            f"{type(model.base).__name__} ties to the input embedding: the adapter would be merged into both"
        )
    if lora.dropout:
        raise ValueError(f"lora.dropout: expected 0 with {name} (the head) as a target, got {lora.dropout}")


def _layer_range(model: SFTMixModel, layers: str | None) -> tuple[int, int]:
    """``"20:30"`` as (20, 30), checked against the model."""
    count = len(decoder_blocks(model)[1])
    if layers is None:
        return 0, count
    start, _, stop = layers.partition(":")
    if not (start.isdigit() and stop.isdigit() and int(start) < int(stop) <= count):
        raise ValueError(
            f"lora.layers: expected start:stop with 0 <= start < stop <= {count}, got {layers!r}"
        )
    return int(start), int(stop)


def is_lora(model: SFTMixModel) -> bool:
    return hasattr(model.model, "peft_config")

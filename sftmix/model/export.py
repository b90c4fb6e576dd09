"""The trained model as files that plain ``AutoModelForCausalLM.from_pretrained`` loads.

The trained model itself is left as it is: adapters are added to copies of their weights, and the copies go
into a fresh model of the same class, without ``LossHead``, adapters or quantisation settings.
"""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from sftmix.model.lora import ADAPTER, is_lora
from sftmix.model.parallel import whole
from sftmix.rank import is_main

if TYPE_CHECKING:
    from sftmix.model.causal_lm import SFTMixModel


def merge_and_export(model: SFTMixModel, tokenizer: Any, folder: str | Path) -> None:
    """Write the model (adapters merged, safetensors, its own dtype) and the tokenizer into ``folder``.

    ``folder`` is written under another name and then replaced, so it is never half there. A sharded model is
    gathered by all processes together; the first one writes.
    """
    state = merged_state(model)
    if is_main():
        _write(model, state, tokenizer, Path(folder))
    if dist.is_initialized():
        dist.barrier()


@torch.no_grad()
def merged_state(model: SFTMixModel) -> dict[str, Tensor]:
    """The causal LM's state dict under its own names, on the CPU; empty on all but the main process."""
    if is_lora(model):
        return _merged_lora_state(model)
    parameters = {name for name, _ in model.base.named_parameters(remove_duplicate=False)}
    state = {}
    for name, tensor in model.base.state_dict().items():
        full = whole(tensor)
        if is_main():  # shards are float32 whatever the model computes in
            state[name] = (full.to(model.dtype) if name in parameters else full).cpu()
    return state


def _merged_lora_state(model: SFTMixModel) -> dict[str, Tensor]:
    adapted = {name: module for name, module in model.base.named_modules() if hasattr(module, "lora_A")}
    state = {}
    for name, tensor in model.base.state_dict().items():
        if ".lora_" in name:
            continue
        owner, _, leaf = name.rpartition(".")
        layer = adapted.get(owner.removesuffix(".base_layer"))
        if layer is not None and leaf == "weight":
            full = _merged_weight(layer)
        else:
            full = whole(tensor)
        if is_main():
            state[name.replace(".base_layer.", ".")] = full.cpu()
    return state


def _merged_weight(layer: Any) -> Tensor:
    """Weight of one adapted layer, unsharded, with its adapter added in float32, in the layer's own dtype."""
    base = whole(layer.get_base_layer().weight)
    down, up = (whole(part[ADAPTER].weight).float() for part in (layer.lora_A, layer.lora_B))
    delta = layer.scaling[ADAPTER] * (up @ down)
    return (base.float() + (delta.T if layer.fan_in_fan_out else delta)).to(base.dtype)


def _write(model: SFTMixModel, state: dict[str, Tensor], tokenizer: Any, folder: Path) -> None:
    config = copy.deepcopy(model.base.config)
    if hasattr(config, "quantization_config"):  # left by a GGUF file; it would refuse to be saved
        del config.quantization_config
    with torch.device("meta"):
        plain = type(model.base)(config)
    plain.load_state_dict(state, strict=True, assign=True)
    plain.tie_weights()
    plain.generation_config = copy.deepcopy(model.base.generation_config)
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    plain.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    if folder.exists():
        shutil.rmtree(folder)
    temporary.rename(folder)

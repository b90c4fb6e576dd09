"""What LoRA adapts and what it trains whole: linear layers of the decoder's blocks, weights of fused experts, the head.

A mixture of experts keeps the weights of all its experts in one parameter [E, out, in] or [E, in, out]; such a
parameter is a target like a linear layer and is named as one, e.g. ``down_proj`` or ``experts.down_proj``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

from sftmix.config import LoraConfig
from sftmix.model.bypass import bypassed
from sftmix.model.quantised import is_quantised

if TYPE_CHECKING:
    from sftmix.model.causal_lm import SFTMixModel

ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class Targets:
    """Full names inside the causal LM, in its order."""

    modules: tuple[str, ...]  # linear layers and Conv1D
    parameters: tuple[str, ...]  # experts' weights, three-dimensional
    unadapted: tuple[str, ...]  # experts' weights of the chosen blocks that get no adapter
    bypassed: tuple[str, ...] = ()  # layers whose weight the model reads past them
    shared: tuple[str, ...] = ()  # layers whose weight is that of other layers too

    def weights(self) -> set[str]:
        """Names of all adapted weights in the causal LM's state dict."""
        return {f"{name}.weight" for name in self.modules} | set(self.parameters)


def decoder_blocks(model: SFTMixModel) -> tuple[str, nn.ModuleList]:
    """The list of transformer blocks and its name inside the causal LM, as measured when the head was installed.

    Raises ``ValueError`` for a model that ran no whole list of modules.
    """
    name = model.around.blocks
    if name is None:
        raise ValueError(
            f"model: expected {type(model.base).__name__} to run a list of blocks, one after the other, found none: "
            "adapters and shards need one"
        )
    return name, cast(nn.ModuleList, model.base.get_submodule(name))


def is_lora(model: SFTMixModel) -> bool:
    return hasattr(model.model, "peft_config")


def find_targets(model: SFTMixModel, lora: LoraConfig) -> Targets:
    """What gets an adapter; to be asked before the adapters are there.

    ``all-linear`` is every linear layer of the chosen blocks, and may stand beside names. A name is the end of a linear
    layer's or of an expert weight's name. Raises ``ValueError`` for a name that matches neither, with what it is
    instead, for a layer range outside the model, and for what cannot be combined with a target.
    """
    wanted = [name.strip() for name in lora.target_modules.split(",")]
    head = head_name(model)
    adapted_head = [name for name in wanted if _ends(head, name)]
    if adapted_head:
        _check_head(model, lora, adapted_head[0])
        wanted = [name for name in wanted if name not in adapted_head]
    linear, experts = _candidates(model, lora)
    owners = dict.fromkeys([*linear, *(full.rpartition(".")[0] for full in experts)])
    past = bypassed(model, list(owners))
    shared = _shared(model, linear)
    linear = [full for full in linear if full not in past and full not in shared]
    experts = [full for full in experts if full.rpartition(".")[0] not in past]
    names = [name for name in wanted if name != ALL_LINEAR]
    known = (*linear, *(full.removesuffix(".weight") for full in experts))
    missing = [name for name in names if not any(_ends(full, name) for full in (*known, *experts))]
    if missing:
        raise ValueError(_why_not(model, lora, missing, known, past, shared))
    modules = [full for full in linear if ALL_LINEAR in wanted or any(_ends(full, name) for name in names)]
    parameters = [
        full
        for full in experts
        if any(_ends(full, name) or _ends(full.removesuffix(".weight"), name) for name in names)
    ]
    if adapted_head:
        modules.append(head)
    if not modules and not parameters:
        raise ValueError(
            f"lora.target_modules: expected linear layers in {type(model.base).__name__}, found none"
            + (f"; {_leaves(experts)} can be named" if experts else "")
        )
    _check_experts(lora, parameters)
    unadapted = tuple(full for full in experts if full not in parameters)
    return Targets(tuple(modules), tuple(parameters), unadapted, tuple(past), tuple(shared))


def head_name(model: SFTMixModel) -> str:
    """The head's name inside the causal LM."""
    return next(name for name, module in model.base.named_modules() if module is model.head)


def find_whole(model: SFTMixModel, lora: LoraConfig, targets: Targets) -> list[str]:
    """Full names of the modules that are trained whole; ``lora.layers`` does not restrict them.

    Raises ``ValueError`` for a name that matches no module with parameters and for a module with an adapter in it.
    """
    if lora.modules_to_save is None:
        return []
    wanted = [name.strip() for name in lora.modules_to_save.split(",")]
    modules = dict(model.base.named_modules(remove_duplicate=False))
    found: list[str] = []
    for want in wanted:
        matches = [
            name
            for name, module in modules.items()
            if want and _ends(name, want) and next(module.parameters(), None) is not None
        ]
        if not matches:
            raise ValueError(
                "lora.modules_to_save: expected names of modules with parameters, e.g. embed_tokens or "
                f"{head_name(model)}, got {want!r}, which matches none of {type(model.base).__name__}"
            )
        found += [name for name in matches if name not in found]
    for name in found:
        if isinstance(modules[name], nn.ModuleList | nn.ModuleDict):
            raise ValueError(
                f"lora.modules_to_save: expected modules with a forward of their own, got {name}, a list of modules"
            )
        inside = [weight for weight in sorted(targets.weights()) if f"{weight}.".startswith(f"{name}.")]
        if inside:
            raise ValueError(
                f"lora.modules_to_save: expected modules without an adapter, got {name}, whose "
                f"{inside[0].removeprefix(name).strip('.')} lora.target_modules adapts"
            )
    return found


def _shared(model: SFTMixModel, linear: list[str]) -> list[str]:
    """Layers whose weight stands in other modules too: each adapter would be merged into all of them."""
    holders: dict[int, int] = {}
    for module in model.base.modules():
        for weight in module.parameters(recurse=False):
            holders[id(weight)] = holders.get(id(weight), 0) + 1
    return [full for full in linear if holders[id(model.base.get_submodule(full).weight)] > 1]


def _candidates(model: SFTMixModel, lora: LoraConfig) -> tuple[list[str], list[str]]:
    """Linear layers and expert weights of the chosen blocks, by full name."""
    start, stop = _layer_range(model, lora.layers)
    chosen = {id(module) for block in decoder_blocks(model)[1][start:stop] for module in block.modules()}
    linear, experts = [], []
    for name, module in model.base.named_modules():
        if id(module) not in chosen:
            continue
        if isinstance(module, nn.Linear | Conv1D):
            if _is_linear(module):
                linear.append(name)
        elif not isinstance(module, _ConvNd):
            found = module.named_parameters(recurse=False)
            # Three dimensions longer than one: experts, in, out. A scale [1, 1, D] is none.
            experts += [
                f"{name}.{leaf}" for leaf, weight in found if weight.ndim == 3 and min(weight.shape) > 1
            ]
    return linear, experts


@torch.no_grad()
def _is_linear(module: nn.Linear | Conv1D) -> bool:
    """Whether a linear layer is no more than that: a router may be one that also chooses the experts."""
    if type(module).forward in (nn.Linear.forward, Conv1D.forward) or not isinstance(module, nn.Linear):
        return True
    if is_quantised(module):  # a linear layer of bits, whose forward is that of its package
        return True
    probe = torch.linspace(-1, 1, module.in_features).unsqueeze(0).to(module.weight)  # [1, in]
    try:
        found = module(probe)
    except (RuntimeError, TypeError, ValueError, IndexError):
        return False
    expected = F.linear(probe, module.weight, module.bias)
    return isinstance(found, Tensor) and found.shape == expected.shape and torch.allclose(found, expected)


def _ends(full: str, name: str) -> bool:
    return f".{full}".endswith(f".{name}")


def _leaves(names: tuple[str, ...] | list[str]) -> str:
    return ", ".join(sorted({name.removesuffix(".weight").rpartition(".")[2] for name in names}))


def expert_names(names: tuple[str, ...]) -> str:
    """Expert weights as they are named on the command line: ``experts.down_proj,experts.gate_up_proj``."""
    return ",".join(sorted({".".join(name.removesuffix(".weight").split(".")[-2:]) for name in names}))


def _why_not(
    model: SFTMixModel, lora: LoraConfig, missing: list[str], known: tuple[str, ...], past: list[str],
    shared: list[str],
) -> str:  # fmt: skip
    """The message for names that match nothing adaptable: what the first of them is instead."""
    name = missing[0]
    modules = {full: module for full, module in model.base.named_modules() if _ends(full, name)}
    weights = {full: weight for full, weight in model.base.named_parameters() if _ends(full, name)}
    whole = f"; lora.modules_to_save={name} trains it whole"
    if not modules and not weights:
        return f"lora.target_modules: expected {ALL_LINEAR} or some of {_leaves(known)}, got {', '.join(missing)}"
    prefix = "lora.target_modules: expected linear layers or expert weights of the decoder's blocks, got "
    if not modules:
        full, weight = next(iter(weights.items()))
        return f"{prefix}{name}, a parameter of shape {list(weight.shape)} ({full})"
    full, module = next(iter(modules.items()))
    if full in past:
        return f"{prefix}{name}, whose weight the model reads past the layer ({full}){whole}"
    if full in shared:
        return f"{prefix}{name}, whose weight several layers share ({full}){whole}"
    if isinstance(module, nn.Embedding):
        return f"{prefix}{name}, an embedding ({full}){whole}"
    if isinstance(module, nn.Linear | Conv1D) and _is_linear(module):
        inside = {id(part) for block in decoder_blocks(model)[1] for part in block.modules()}
        if id(module) in inside:
            return f"{prefix}{name}, which lora.layers={lora.layers} leaves out ({full})"
        return f"{prefix}{name}, a linear layer outside the blocks ({full}){whole}"
    return f"{prefix}{name}, a {type(module).__name__}, which is not a linear layer alone ({full}){whole}"


def _check_head(model: SFTMixModel, lora: LoraConfig, name: str) -> None:
    """What an adapter on the head cannot be combined with."""
    if model.is_tied:
        raise ValueError(
            f"lora.target_modules: expected modules with weights of their own, got {name}, the head, which "
            f"{type(model.base).__name__} ties to the input embedding: the adapter would be merged into both"
        )
    if lora.dropout:
        raise ValueError(f"lora.dropout: expected 0 with {name} (the head) as a target, got {lora.dropout}")
    if lora.dora:
        raise ValueError(f"lora.dora: expected false with {name} (the head) as a target, got true")


def _check_experts(lora: LoraConfig, parameters: list[str]) -> None:
    """What an adapter on the weights of fused experts cannot be combined with: their forward sees no input of its."""
    if not parameters:
        return
    named = f"the fused experts' {_leaves(parameters)} as targets"
    instead = "; name linear layers alone, e.g. all-linear"
    if lora.dropout:
        raise ValueError(f"lora.dropout: expected 0 with {named}, got {lora.dropout}{instead}")
    if lora.dora:
        raise ValueError(f"lora.dora: expected false with {named}, got true{instead}")


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

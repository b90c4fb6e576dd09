"""A model's weights under the names of the plain causal LM, adapters added.

    W' = W + s B A                        LoRA, rsLoRA (s = alpha / rank, alpha / sqrt(rank)), all active adapters
    W' = m (W + s B A) / |W + s B A|      DoRA, row by row
    W'[e] = W[e] + s B[e] A[e]            an expert weight of a mixture, expert by expert

Sums are taken in float32, one layer at a time, and rounded once, to the weight's own dtype. A change that is smaller
than the weight's last digit is lost in that rounding; what is lost of all changes is measured and said.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sftmix.model.parallel import whole
from sftmix.model.quantised import dequantised, is_quantised
from sftmix.progress import say
from sftmix.rank import is_main

if TYPE_CHECKING:
    from sftmix.model.causal_lm import SFTMixModel

SAID_LOSS = 0.03  # a smaller share of the adapters' change is lost in rounding without a word
SIXTEEN_BIT = (torch.bfloat16, torch.float16)


@dataclass
class Plan:
    """Where each tensor of the plain causal LM comes from."""

    sources: dict[str, str]  # plain name -> key of the adapted model's state dict
    layers: dict[str, Any]  # plain name of an adapted weight -> peft's layer around it
    consumed: set[int] = field(default_factory=set)  # ids of all parameters that the merge reads


@dataclass
class Rounding:
    """Squared norms of the adapters' change of 16-bit weights, and of what rounding took from it."""

    change: float = 0.0
    lost: float = 0.0
    dtype: torch.dtype | None = None

    @property
    def share(self) -> float:
        """The lost part of the change's norm, 0 to 1."""
        return (self.lost / self.change) ** 0.5 if self.change else 0.0

    def say(self, where: str, remedy: str = "") -> None:
        """A line when more than a few per cent are lost."""
        if self.share > SAID_LOSS:
            name = str(self.dtype).removeprefix("torch.")
            say(
                f"{where}: {100 * self.share:.0f} % of the adapters' change is lost in rounding to {name}{remedy}"
            )


@torch.no_grad()
def merged_state(model: SFTMixModel) -> dict[str, Tensor]:
    """The causal LM's state dict under its own names, on the CPU; empty on all but the main process.

    Raises ``ValueError`` for adapters that cannot be merged and for a trained parameter that the result would miss.
    """
    state, rounding = merged_weights(model.base, model.dtypes, model.dtype)
    rounding.say("export", " (export=adapter keeps it)")
    return state


@torch.no_grad()
def merged_weights(
    base: nn.Module, dtypes: Mapping[str, torch.dtype], dtype: torch.dtype
) -> tuple[dict[str, Tensor], Rounding]:
    """``merged_state`` of a causal LM with or without peft layers in it, and what rounding lost.

    ``dtypes`` has each parameter's own data type by its plain name: shards are float32 whatever the model computes in.
    Quantised weights become numbers in ``dtype``.
    """
    plan = merge_plan(base)
    tensors = base.state_dict()
    bits = {f"{name}.weight": module for name, module in base.named_modules() if is_quantised(module)}
    state, rounding = {}, Rounding()
    for name, key in plan.sources.items():
        layer = plan.layers.get(name)
        merged = dequantised(bits[key], dtype) if key in bits else whole(tensors[key])
        if layer is not None:
            merged = merge_weight(layer, merged, rounding)
        if is_main():
            own = dtype if key in bits else dtypes.get(name, merged.dtype)
            state[name] = merged.to(own).cpu()
    return state, rounding


def merge_plan(base: nn.Module) -> Plan:
    """What ``merged_weights`` will do, from names alone; nothing is computed.

    Raises ``ValueError`` as ``merged_state`` does, so that it can be asked before training.
    """
    layers = dict(_lora_layers(base))
    plan = Plan(sources={}, layers=layers)
    wrappers = {name: module for name, module in base.named_modules() if hasattr(module, "modules_to_save")}
    parameters = dict(base.named_parameters(remove_duplicate=False))
    bits = [f"{name}." for name, module in base.named_modules() if is_quantised(module)]
    for key in base.state_dict():
        name = _plain_key(key, wrappers)
        beside = any(key.startswith(at) and key.removeprefix(at) not in ("weight", "bias") for at in bits)
        if name is None or beside:  # scales of a quantised weight: they are in the numbers that it becomes
            continue
        plan.sources[name] = key
        if key in parameters:
            plan.consumed.add(id(parameters[key]))
    for name, layer in layers.items():
        if name not in plan.sources:
            raise ValueError(f"model: expected adapters around weights, got one around {name}, which is none")
        for adapter in active_adapters(layer):
            _check_layer(name, layer, adapter)
            plan.consumed |= {id(weight) for weight in _parts(layer, adapter)}
    left = [
        name
        for name, weight in parameters.items()
        if weight.requires_grad and id(weight) not in plan.consumed
    ]
    if left:
        raise ValueError(
            f"model: expected every trained parameter to reach the exported weights, but {len(left)} would not, "
            f"e.g. {left[0]}"
        )
    return plan


def _lora_layers(base: nn.Module) -> Iterator[tuple[str, Any]]:
    """(plain name of the adapted weight, peft's layer around it), the outer of nested layers first."""
    for name, module in base.named_modules():
        if hasattr(module, "lora_A") and hasattr(module, "get_base_layer"):
            leaf = getattr(module, "parameter_name", "weight")
            yield plain_name(f"{name}.{leaf}"), module


def plain_name(name: str) -> str:
    """A module's or parameter's name without the layers that peft put around it."""
    return ".".join(part for part in name.split(".") if part != "base_layer")


def _plain_key(key: str, wrappers: dict[str, Any]) -> str | None:
    """The plain name of a state dict's key; None for an adapter's and for a copy that another one stands for."""
    if any(part.startswith("lora_") for part in key.split(".")):
        return None
    for name, wrapper in wrappers.items():  # peft's own modules_to_save, in a model that a caller made
        if not key.startswith(f"{name}."):
            continue
        rest = key.removeprefix(f"{name}.")
        active = [adapter for adapter in wrapper.active_adapters if adapter in wrapper.modules_to_save]
        used = (
            f"modules_to_save.{active[0]}." if active and not wrapper.disable_adapters else "original_module."
        )
        return f"{name}.{rest.removeprefix(used)}" if rest.startswith(used) else None
    return plain_name(key)


def active_adapters(layer: Any) -> list[str]:
    """Names of the adapters that a layer adds to its weight."""
    if layer.merged:
        raise ValueError(
            "model: expected adapters beside the weights, got merged ones; unmerge_adapter() first"
        )
    if layer.disable_adapters:
        return []
    return [name for name in layer.active_adapters if name in layer.lora_A]


def _check_layer(name: str, layer: Any, adapter: str) -> None:
    """Refuse what the equations above do not say."""
    if not hasattr(layer, "parameter_name") and not isinstance(layer.get_base_layer(), nn.Linear | Conv1D):
        kind = type(layer.get_base_layer()).__name__
        raise ValueError(
            f"model: expected adapters on linear layers or expert weights, got {name} of a {kind}"
        )
    variant = type(getattr(layer, "lora_variant", {}).get(adapter)).__name__
    if variant not in ("NoneType", "DoraLinearVariant"):
        raise ValueError(f"model: expected LoRA, rsLoRA or DoRA, got {variant} on {name}")
    if any(part[adapter].bias is not None for part in (layer.lora_A, layer.lora_B)):
        raise ValueError(f"model: expected adapters without a bias, got lora_bias=True on {name}")
    if _magnitude(layer, adapter) is not None and len(active_adapters(layer)) > 1:
        raise ValueError(f"model: expected one active adapter with DoRA, got several on {name}")


def _magnitude(layer: Any, adapter: str) -> Tensor | None:
    """DoRA's magnitude [out], or None without DoRA."""
    vectors = getattr(layer, "lora_magnitude_vector", None)
    if not vectors or adapter not in vectors:
        return None
    weight: Tensor = vectors[adapter].weight
    return weight


def _parts(layer: Any, adapter: str) -> list[Tensor]:
    magnitude = _magnitude(layer, adapter)
    parts = [layer.lora_A[adapter].weight, layer.lora_B[adapter].weight]
    return parts if magnitude is None else [*parts, magnitude]


def merge_weight(layer: Any, base: Tensor, rounding: Rounding) -> Tensor:
    """One layer's whole weight with its active adapters, in the weight's own dtype; collective when sharded."""
    adapters = [
        (layer.scaling[name], [whole(part).float() for part in _parts(layer, name)])
        for name in active_adapters(layer)
    ]
    if not adapters:
        return base
    merged = torch.empty_like(base)
    if hasattr(layer, "parameter_name") and base.ndim == 3:
        for expert in range(base.shape[0]):
            exact = base[expert].float()
            for scale, (down, up) in adapters:
                exact = exact + scale * _expert_delta(layer, down, up, expert, base.shape[0])
            merged[expert] = exact
            _measure(base[expert], exact, merged[expert], rounding)
        return merged
    transposed = getattr(layer, "fan_in_fan_out", False)  # Conv1D keeps its weight [in, out]
    exact = (base.T if transposed else base).float()
    for scale, (down, up, *_) in adapters:
        exact = exact + scale * (up @ down)
    if len(adapters[0][1]) == 3:
        exact = exact * (adapters[0][1][2] / torch.linalg.norm(exact, dim=1)).unsqueeze(1)
    exact = exact.T if transposed else exact
    merged.copy_(exact)
    _measure(base, exact, merged, rounding)
    return merged


def _expert_delta(layer: Any, down: Tensor, up: Tensor, expert: int, count: int) -> Tensor:
    """One expert's B A from peft's stacked factors: A [E r, in], B [out, r E], the expert fastest in B's columns."""
    down = down.view(count, -1, down.shape[1])[expert]  # [r, in]
    up = up.view(up.shape[0], -1, count)[:, :, expert]  # [out, r]
    return up @ down if getattr(layer, "_did_swap_in_out_features", False) else (up @ down).T


def _measure(base: Tensor, exact: Tensor, merged: Tensor, rounding: Rounding) -> None:
    if base.dtype in SIXTEEN_BIT:
        rounding.dtype = base.dtype
        rounding.change += float((exact - base.float()).double().square().sum())
        rounding.lost += float((merged.float() - exact).double().square().sum())

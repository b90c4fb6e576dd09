"""Models whose files hold quantised weights: made plain while loading, trained with LoRA, or refused by name.

mxfp4 and fp8 are formats that transformers turns back into numbers: they are trained and exported as those. The
weights of bitsandbytes stay as they are, in 4 or 8 bits, and frozen: adapters beside them are trained (QLoRA), and the
export holds the numbers that the bits stand for, with the adapters added.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sftmix.config import ModelConfig
from sftmix.model.source import read_configuration
from sftmix.progress import say

DEQUANTISED = ("mxfp4", "fp8")
BITS = "bitsandbytes"
TORCHAO = "torchao"
FROZEN = (BITS, TORCHAO)  # kept as they are, with adapters beside them


def quantisation(config: Any) -> dict[str, Any]:
    """The settings of quantisation in a transformers configuration; empty for a plain model."""
    for part in (config, config.get_text_config()):
        found = getattr(part, "quantization_config", None)
        if found is not None:
            return dict(found if isinstance(found, dict) else found.to_dict())
    return {}


def kind_of(settings: dict[str, Any]) -> str | None:
    """The name of a quantisation, such as ``mxfp4``; None where there is none."""
    if not settings:
        return None
    if settings.get("load_in_4bit") or settings.get("load_in_8bit"):
        return BITS
    return str(settings.get("quant_method") or "unnamed").removeprefix("QuantizationMethod.").lower()


def check_quantised(model: ModelConfig, tuning: str) -> None:
    """Read the model's configuration; ``ValueError`` for a quantisation that ``tuning`` (full, lora) cannot train.

    Needs no weights: whoever prepares data calls it first.
    """
    check_kind(model, None if model.gguf_file else read_configuration(model), tuning)


def check_kind(model: ModelConfig, config: Any, tuning: str) -> str | None:
    """The kind of a model's quantisation, by its transformers configuration (unread of a GGUF file); checked."""
    kind = None if model.gguf_file else kind_of(quantisation(config))
    _check(model, config, kind, tuning)
    return kind


def _torchao_type(config: Any) -> str:
    """The name of the only way in which torchao quantised a model's layers; of several, all their settings."""
    told = quantisation(config).get("quant_type")
    default = told.get("default") if isinstance(told, dict) and len(told) == 1 else None
    return str(default.get("_type") if isinstance(default, dict) else told)


def _check(model: ModelConfig, config: Any, kind: str | None, tuning: str) -> None:
    if kind is None or kind in DEQUANTISED:
        return
    start = f"model.name: {model.name} is quantised with {kind}, "
    if kind not in FROZEN:
        raise ValueError(
            f"{start}which cannot be trained here: expected a model without quantisation, or with one of "
            f"{', '.join((*DEQUANTISED, *FROZEN))}"
        )
    if kind == TORCHAO and (found := _torchao_type(config)) != "Int8WeightOnlyConfig":
        raise ValueError(
            f"{start}as {found}: expected its Int8WeightOnlyConfig, whose numbers can be had back, or a model without "
            "quantisation"
        )
    if tuning != "lora":
        raise ValueError(
            f"{start}whose weights stay frozen: expected train.tuning=lora, or a model without quantisation, got "
            f"train.tuning={tuning}"
        )
    if importlib.util.find_spec(kind) is None:
        raise ValueError(f"{start}which is not installed: install it, or take a model without quantisation")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            f"{start}whose weights cannot be sharded: expected one process, got {os.environ['WORLD_SIZE']}"
        )


def say_kind(model: ModelConfig, kind: str | None, dtype: torch.dtype, *, merged: bool) -> None:
    """One line for a quantised model: what becomes of it; ``merged`` where an adapter is added to its weights."""
    name = str(dtype).removeprefix("torch.")
    if kind in FROZEN and not merged:
        bits = 4 if quantisation(read_configuration(model)).get("load_in_4bit") else 8
        say(
            f"{model.name}: quantised with {kind}, {bits} bits: kept so and frozen, its adapters are trained; merged, "
            f"it is exported in {name}"
            + ("" if bits == 4 or kind == TORCHAO else "; products round activations to float16 and 8 bits")
        )
    elif kind is not None:
        say(
            f"{model.name}: quantised with {kind}: dequantised to {name}, trained and exported without quantisation"
        )


def settled(config: Any, dtype: torch.dtype) -> tuple[Any, str | None]:
    """A configuration to load with, and the kind of quantisation; products of 4-bit weights take ``dtype``."""
    settings = quantisation(config)
    kind = kind_of(settings)
    if kind is None:
        return config, None
    if kind == BITS:
        settings["bnb_4bit_compute_dtype"] = str(dtype).removeprefix("torch.")
    elif kind in DEQUANTISED:
        settings["dequantize"] = True
    for part in (config, config.get_text_config()):
        if getattr(part, "quantization_config", None) is not None:
            part.quantization_config = settings
    return config, kind


def drop_quantisation(causal_lm: Any) -> None:
    """Forget the settings of a quantisation that the weights no longer have, and how its files are written."""
    forget_settings(causal_lm.config)
    drop_conversions(causal_lm)
    causal_lm.hf_quantizer = None
    causal_lm.is_quantized = False


def forget_settings(config: Any) -> None:
    """Take the settings of a quantisation out of a transformers configuration, in place."""
    for part in (config, config.get_text_config()):
        if hasattr(part, "quantization_config"):
            del part.quantization_config


def plain_conversions(causal_lm: Any) -> list[Any] | None:
    """What saving has to reverse of a model's loading, without a quantisation's part; None where nothing is known.

    That part would write scales beside the numbers that the weights have become.
    """
    used: list[Any] | None = getattr(causal_lm, "_weight_conversions", None)
    if used is None:
        return None
    from transformers.conversion_mapping import get_model_conversion_mapping

    # Whether the files' names have the model's prefix shows in the ones that were used; all else is the class's own.
    kept = [one for one in used if type(one).__name__ == "PrefixChange"]
    own = get_model_conversion_mapping(causal_lm, add_legacy=False)
    return [*kept, *(one for one in own if type(one).__name__ != "PrefixChange")]


def drop_conversions(causal_lm: Any) -> None:
    """Forget how quantised files became parameters: undone while saving, it would pack the numbers or fail."""
    conversions = plain_conversions(causal_lm)
    if conversions is not None:
        causal_lm._weight_conversions = conversions


def is_quantised(module: nn.Module) -> bool:
    """Whether a module's own weight is held as bits of bitsandbytes or torchao; a layer of peft around it has none."""
    return is_bits(module._parameters.get("weight"))


def is_bits(weight: Tensor | None) -> bool:
    """Whether a parameter is bits of bitsandbytes or torchao."""
    return type(weight).__name__ in ("Params4bit", "Int8Params", "Int8Tensor")


def has_8_bits(module: nn.Module) -> bool:
    """Whether a module's own weight is 8 bits of bitsandbytes: its products round what they are given."""
    return is_quantised(module) and type(module.weight).__name__ == "Int8Params"  # type: ignore[union-attr]


def numbers(weight: Tensor) -> int:
    """How many numbers a parameter stands for; two of them share a byte where they have 4 bits."""
    state = getattr(weight, "quant_state", None)
    return weight.numel() if state is None else math.prod(state.shape)


def dequantised(module: nn.Module, dtype: torch.dtype) -> Tensor:
    """The weight [out, in] that a module of bitsandbytes multiplies with, in ``dtype``; a new tensor."""
    from peft.utils.integrations import dequantize_bnb_weight

    if not is_quantised(module):
        raise ValueError(f"module: expected a quantised weight, got {type(module).__name__}")
    if type(module.weight).__name__ == "Int8Tensor":
        return cast(Any, module.weight).dequantize().detach().to(dtype)  # type: ignore[no-any-return]
    found: Tensor = dequantize_bnb_weight(cast(Any, module.weight), state=getattr(module, "state", None))
    return found.detach().to(dtype)


def make_plain(causal_lm: Any, dtype: torch.dtype) -> None:
    """Put linear layers of numbers in ``dtype`` in the place of those of bitsandbytes, if there are any."""
    names = [name for name, module in causal_lm.named_modules() if is_quantised(module)]
    for name in names:
        module = causal_lm.get_submodule(name)
        with torch.device("meta"):
            linear = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
        linear.weight = nn.Parameter(dequantised(module, dtype))
        if module.bias is not None:
            linear.bias = module.bias
        causal_lm.set_submodule(name, linear.train(module.training))
    if names:
        drop_quantisation(causal_lm)


@contextmanager
def exact_products(causal_lm: nn.Module) -> Iterator[None]:
    """Inside the block 8-bit layers multiply with their numbers and do not round what they are given."""

    def exact(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return F.linear(args[0], dequantised(module, args[0].dtype), cast(Tensor | None, module.bias)).to(
            output.dtype
        )

    handles = [module.register_forward_hook(exact) for module in causal_lm.modules() if has_8_bits(module)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _not_said(record: logging.LogRecord) -> bool:
    """Leaves out what 8-bit products say of every product of every step; ``settled`` says it once."""
    return "inputs will be cast" not in str(record.msg)


def keep_bits(causal_lm: nn.Module) -> None:
    """Let no module of bitsandbytes repack its weight in eval mode: a repacked one has no gradient, other roundings.

    Raises ``ValueError`` where that has happened, as an evaluation on a CPU with bfloat16 products does it.
    """
    for name, module in causal_lm.named_modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
                raise ValueError(
                    f"model: expected 4-bit weights as they were loaded, got {name} repacked by an evaluation on this "
                    "CPU, which has no gradient: load the model again"
                )
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def keep_layout(causal_lm: Any, model: ModelConfig) -> None:
    """``keep_bits``, and one word about 8-bit products instead of many.

    Raises ``ValueError`` when head or embedding are quantised: the loss needs the head's numbers.
    """
    keep_bits(causal_lm)
    logging.getLogger(f"{BITS}.autograd._functions").addFilter(_not_said)
    for part in (causal_lm.get_output_embeddings(), causal_lm.get_input_embeddings()):
        if part is not None and is_quantised(part):
            raise ValueError(
                f"model.name: expected a head and an embedding that are not quantised, got {model.name}, whose "
                f"{type(part).__name__} is: take a model that was quantised without them"
            )

"""Models whose files hold quantised weights: made plain while loading, trained with LoRA, or refused by name.

mxfp4 and fp8 are formats that transformers turns back into numbers: they are trained and exported as those. The
weights of bitsandbytes stay as they are, in 4 or 8 bits, and frozen: adapters beside them are trained (QLoRA), and the
export holds the numbers that the bits stand for, with the adapters added.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sftmix.config import ModelConfig
from sftmix.model.source import read_configuration
from sftmix.progress import say

DEQUANTISED = ("mxfp4", "fp8")
BITS = "bitsandbytes"


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
    if model.gguf_file is None:
        _check(model, kind_of(quantisation(read_configuration(model))), tuning)


def _check(model: ModelConfig, kind: str | None, tuning: str) -> None:
    if kind is None or kind in DEQUANTISED:
        return
    start = f"model.name: {model.name} is quantised with {kind}, "
    if kind != BITS:
        raise ValueError(
            f"{start}which cannot be trained here: expected a model without quantisation, or with one of "
            f"{', '.join((*DEQUANTISED, BITS))}"
        )
    if tuning != "lora":
        raise ValueError(
            f"{start}whose weights stay frozen: expected train.tuning=lora, or a model without quantisation, got "
            f"train.tuning={tuning}"
        )
    if importlib.util.find_spec(BITS) is None:
        raise ValueError(f"{start}which is not installed: install it, or take a model without quantisation")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            f"{start}whose weights cannot be sharded: expected one process, got {os.environ['WORLD_SIZE']}"
        )


def settled(model: ModelConfig, config: Any, tuning: str, dtype: torch.dtype) -> tuple[Any, str | None]:
    """A checked configuration to load with, and the kind of quantisation; products of 4-bit weights take ``dtype``."""
    if model.gguf_file is not None:
        return config, None
    settings = quantisation(config)
    kind = kind_of(settings)
    _check(model, kind, tuning)
    if kind is None:
        return config, None
    name = str(dtype).removeprefix("torch.")
    if kind == BITS:
        settings["bnb_4bit_compute_dtype"] = name
        bits = 4 if settings.get("load_in_4bit") else 8
        say(
            f"{model.name}: quantised with {kind}, {bits} bits: kept so and frozen, its adapters are trained; merged, "
            f"it is exported in {name}"
            + ("" if bits == 4 else "; products round activations to float16 and 8 bits")
        )
    else:
        settings["dequantize"] = True
        say(
            f"{model.name}: quantised with {kind}: dequantised to {name}, trained and exported without quantisation"
        )
    for part in (config, config.get_text_config()):
        if getattr(part, "quantization_config", None) is not None:
            part.quantization_config = settings
    return config, kind


def drop_quantisation(causal_lm: Any) -> None:
    """Forget the settings of a quantisation that the weights no longer have, and how its files are written."""
    forget_settings(causal_lm.config)
    conversions = plain_conversions(causal_lm)
    causal_lm.hf_quantizer = None
    causal_lm.is_quantized = False
    if conversions is not None:
        causal_lm._weight_conversions = conversions


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


def is_quantised(module: nn.Module) -> bool:
    """Whether a module holds its weight as the bits of bitsandbytes; peft's layer around one does not."""
    if hasattr(module, "get_base_layer"):
        return False
    weight = getattr(module, "weight", None)
    return type(weight).__name__ in ("Params4bit", "Int8Params")


def dequantised(module: nn.Module, dtype: torch.dtype) -> Tensor:
    """The weight [out, in] that a module of bitsandbytes multiplies with, in ``dtype``; a new tensor."""
    from peft.utils.integrations import dequantize_bnb_weight

    if not is_quantised(module):
        raise ValueError(f"module: expected a weight of bitsandbytes, got {type(module).__name__}")
    found: Tensor = dequantize_bnb_weight(cast(Any, module.weight), state=getattr(module, "state", None))
    return found.detach().to(dtype)


@contextmanager
def exact_products(model: nn.Module) -> Iterator[None]:
    """Inside the block, 8-bit layers multiply with the numbers of their weights, without rounding the activations.

    So the model is the one that an export holds; in training it rounds them.
    """
    held = [module for module in model.modules() if is_quantised(module)]
    held = [module for module in held if type(module.weight).__name__ == "Int8Params"]
    before = [module.__dict__.get("forward") for module in held]
    try:
        for module in held:
            module.forward = partial(_exact, module)
        yield
    finally:
        for module, forward in zip(held, before, strict=True):
            del module.forward
            if forward is not None:
                module.forward = forward


def _exact(module: Any, hidden: Tensor) -> Tensor:
    bias = None if module.bias is None else module.bias.to(hidden.dtype)
    return F.linear(hidden, dequantised(module, hidden.dtype), bias)


def _not_said(record: logging.LogRecord) -> bool:
    """Leaves out what 8-bit products say of every product of every step; ``settled`` says it once."""
    return "inputs will be cast" not in str(record.msg)


def keep_layout(causal_lm: Any, model: ModelConfig) -> None:
    """Let no module of bitsandbytes repack its weight: a repacked one has no gradient and other roundings.

    Raises ``ValueError`` where head or embedding are quantised: the loss needs the head's numbers.
    """
    for module in causal_lm.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    logging.getLogger(f"{BITS}.autograd._functions").addFilter(_not_said)
    for part in (causal_lm.get_output_embeddings(), causal_lm.get_input_embeddings()):
        if part is not None and is_quantised(part):
            raise ValueError(
                f"model.name: expected a head and an embedding that are not quantised, got {model.name}, whose "
                f"{type(part).__name__} is: take a model that was quantised without them"
            )

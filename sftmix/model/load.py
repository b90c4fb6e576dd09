"""The model named by the configuration: its tokenizer, and its weights read once into the run's data type.

Every parameter has the data type that transformers gives it for the run's, so what a class keeps in float32 (router
weights) stays so. No weight is left at random and none is left out without a word.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

from sftmix.config import ModelConfig
from sftmix.model.adapter import merge_adapter
from sftmix.model.buffers import check_buffers
from sftmix.model.causal_lm import SFTMixModel, install_head, verify_head
from sftmix.model.dtype import torch_dtype
from sftmix.model.quantised import (
    FROZEN,
    check_kind,
    drop_conversions,
    drop_quantisation,
    keep_layout,
    make_plain,
    say_kind,
    settled,
)
from sftmix.model.source import check_folder, options, place, read_configuration, reading, underlying
from sftmix.model.tokenizer import extended_tokenizer
from sftmix.model.vocabulary import extend_model
from sftmix.model.weight_files import check_complete, check_finite, say_left_out, weights_in_files
from sftmix.progress import say

# What transformers prints on many lines, and what is said of it here in one.
_SAID = (
    "LOAD REPORT",
    "The new embeddings will be",
    "The new lm_head weights will be",
    "MXFP4 inference on CPU",
)


def load_model(
    config: ModelConfig, *, device: torch.device | str = "cpu", tuning: str = "full"
) -> tuple[SFTMixModel, Any]:
    """The model named by ``config`` with its ``LossHead``, checked by ``verify_head``, and its tokenizer.

    Parameters have the dtype ``config.dtype`` (auto: the device's), but for those that transformers keeps in float32
    and, where ``tuning`` is lora, quantised ones; the model is in eval mode. Raises ``ValueError`` naming what to do
    for files that cannot be read or lack weights, a quantisation that cannot be trained, a model without a linear
    head, and one whose loss is not what ``LossHead`` computes.
    """
    check_folder(config)
    adapter, own = None, config
    found = read_configuration(config)
    if (base := underlying(config)) is not config:
        adapter, config = place(config), base
        say(f"model.name: {adapter} is an adapter, merged into its base {base.name}")
        check_folder(config)
    dtype = torch_dtype(config.dtype, device)
    kind = check_kind(config, found, tuning)
    say_kind(config, kind, dtype, merged=adapter is not None)
    weights_in_files(config)  # refuses a file that is cut short or missing before any is read
    tokenizer, new = extended_tokenizer(own)
    with quiet():
        causal_lm, told = read_causal_lm(config, dtype, device)
        check_complete(config, told["missing_keys"], told["mismatched_keys"])
        say_left_out(causal_lm, told["unexpected_keys"], weights_in_files(config))
        if adapter is not None:
            make_plain(causal_lm, dtype)
            causal_lm = merge_adapter(causal_lm, adapter)
        check_finite(own, causal_lm)
        check_buffers(causal_lm, config.name)
        if config.added_tokens is not None:
            extend_model(causal_lm, tokenizer, new)
    with reading(config, "weights"):
        causal_lm.to(device)
    model = install_head(causal_lm.eval())
    verify_head(model)
    return model, tokenizer


def read_causal_lm(
    config: ModelConfig, dtype: torch.dtype, device: torch.device | str
) -> tuple[Any, dict[str, Any]]:
    """The transformers model as it is trained, and what its loading tells of its weights; nothing is said or checked.

    Bits of bitsandbytes stay on ``device``, every other quantisation becomes numbers; floating parameters have the
    data types that the class declares in ``dtype``. Raises ``ValueError`` for files that cannot be read.
    """
    configuration, kind = read_configuration(config), None
    if config.gguf_file is None:
        configuration, kind = settled(configuration, dtype)
    causal_lm, found = _read(config, configuration, dtype, device if kind in FROZEN else None)
    if kind is not None:
        drop_conversions(causal_lm)
    if kind in FROZEN:
        keep_layout(causal_lm, config)
    elif kind is not None or config.gguf_file:
        drop_quantisation(causal_lm)
    if kind is not None or config.gguf_file:
        cast_as_declared(causal_lm, dtype)
    return causal_lm, found


def _read(
    config: ModelConfig, configuration: Any, dtype: torch.dtype, place_on: torch.device | str | None
) -> tuple[Any, dict[str, Any]]:
    """The transformers model, and what its loading tells of missing, mismatched and unexpected weights."""
    told: dict[str, Any] = {**options(config), "dtype": dtype, "output_loading_info": True}
    # Reported like the missing ones; transformers' own error names no weight.
    told["ignore_mismatched_sizes"] = True
    if not config.gguf_file:
        told["config"] = configuration
    elif hasattr(transformers, "GgufConfig"):  # newer versions may keep weights packed
        told["quantization_config"] = transformers.GgufConfig(dequantize=True)
    if config.attn_implementation:
        told["attn_implementation"] = config.attn_implementation
    if place_on is not None:
        told["device_map"] = {"": place_on}
    with reading(config, "weights"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(place(config), **told)
    causal_lm, found = loaded
    if getattr(causal_lm, "_hf_peft_config_loaded", False):  # a hub id: a folder's adapter is merged
        raise ValueError(
            f"model.name: expected a model, or the folder of an adapter, got {config.name}, an adapter on the hub: "
            "download it and give its folder"
        )
    return causal_lm, found


def cast_as_declared(causal_lm: Any, dtype: torch.dtype) -> None:
    """Give floating parameters, in place, the dtype that their class declares when it is built in ``dtype``.

    For quantised files: their loaders leave some weights in the file's float type.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            declared = {name: p.dtype for name, p in type(causal_lm)(causal_lm.config).named_parameters()}
    finally:
        torch.set_default_dtype(before)
    strict = causal_lm._keep_in_fp32_modules_strict or ()
    for name, parameter in causal_lm.named_parameters():
        kept = any(fnmatch(name, f"*{pattern}*") for pattern in strict)
        wanted = torch.float32 if kept else declared.get(name, dtype)
        if parameter.is_floating_point() and parameter.dtype != wanted:
            parameter.data = parameter.data.to(wanted)


@contextmanager
def quiet() -> Iterator[None]:
    """Without those lines of transformers that are said here in one, or raised."""

    def wanted(record: logging.LogRecord) -> bool:
        return not any(text in str(record.msg) for text in _SAID)

    handlers = list(logging.getLogger("transformers").handlers)  # a logger's filter leaves its children alone
    for handler in handlers:
        handler.addFilter(wanted)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(wanted)

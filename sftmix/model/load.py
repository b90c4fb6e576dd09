"""The model named by the configuration: its tokenizer, and its weights read once into the run's data type."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from sftmix.config import ModelConfig
from sftmix.model.causal_lm import SFTMixModel, cast_parameters, install_head, verify_head
from sftmix.model.dtype import torch_dtype


def load_model(config: ModelConfig, *, device: torch.device | str = "cpu") -> tuple[SFTMixModel, Any]:
    """The model named by ``config`` with its ``LossHead``, checked by ``verify_head``, and its tokenizer.

    Parameters have the dtype ``config.dtype`` (auto: the device's); the model is in eval mode. Raises
    ``ValueError`` for a model without a linear head, or one whose loss is not what ``LossHead`` computes.
    """
    dtype = torch_dtype(config.dtype, device)
    source = {"revision": config.revision} if config.revision else {}
    if config.gguf_file:
        source["gguf_file"] = config.gguf_file
    options: dict[str, Any] = {**source, "dtype": dtype}
    if config.gguf_file and hasattr(transformers, "GgufConfig"):  # newer versions may keep weights packed
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    if config.attn_implementation:
        options["attn_implementation"] = config.attn_implementation
    tokenizer = AutoTokenizer.from_pretrained(config.name, **source)
    causal_lm = AutoModelForCausalLM.from_pretrained(config.name, **options)
    # A file may hold some tensors in a dtype of their own. Parameters only: rotary frequencies stay float32.
    cast_parameters(causal_lm, dtype)
    model = install_head(causal_lm.eval())
    model.to(device)
    verify_head(model)
    return model, tokenizer

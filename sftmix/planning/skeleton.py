"""A model without numbers, from its configuration alone: shapes, data types, modules; no weight is read or made.

What is built is the class that transformers would load, on the meta device, and with LoRA where it is asked for: so
what is trained, adapted and tied is what a run would train, adapt and tie.
"""

from __future__ import annotations

import dataclasses
import io
import json
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from sftmix.config import Config, ModelConfig
from sftmix.model.causal_lm import SFTMixModel
from sftmix.model.dtype import DTYPES
from sftmix.model.lora import apply_lora
from sftmix.model.probe import Surroundings
from sftmix.model.targets import decoder_blocks, is_lora
from sftmix_kernels import LossHead

ROOT, HEAD, BLOCK = "root", "head", "block"
DEFAULT_LENGTH = 2048  # of data.max_length where the model has more positions, as in sftmix.data


@dataclass(frozen=True)
class Weight:
    """One parameter: its unit of FSDP (``root``, ``head`` or ``block``, with the block's number), shape and kind."""

    name: str
    unit: str
    block: int  # -1 outside blocks
    shape: tuple[int, ...]
    itemsize: int  # bytes of a number, as the model computes with it
    trained: bool

    @property
    def count(self) -> int:
        return torch.Size(self.shape).numel()

    def share(self, shards: int) -> int:
        """Numbers on the first of ``shards`` processes: rows are dealt out in equal runs, the last may be short."""
        if not self.shape:
            return 1
        return -(-self.shape[0] // shards) * (self.count // max(self.shape[0], 1))


@dataclass(frozen=True)
class Skeleton:
    """What a plan needs of a model, beside the trace of its blocks."""

    kind: str  # the class's name
    weights: tuple[Weight, ...]
    num_blocks: int
    first_trained: int  # blocks below it record no graph; 0 under full tuning
    vocab_size: int
    hidden_size: int
    num_heads: int
    head_dim: int
    positions: int  # longest sequence of the model
    itemsize: int  # bytes of a number that the model computes with
    is_tied: bool
    head_trained: bool
    is_lora: bool

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.itemsize == 4 else torch.bfloat16

    @property
    def count(self) -> int:
        return sum(weight.count for weight in self.weights)

    @property
    def trained(self) -> int:
        return sum(weight.count for weight in self.weights if weight.trained)

    def of(self, unit: str, block: int | None = None) -> tuple[Weight, ...]:
        """A unit's parameters; of ``block`` alone where one is named."""
        return tuple(w for w in self.weights if w.unit == unit and block in (None, w.block))


def read_model_config(model: ModelConfig) -> Any:
    """The transformers configuration of a folder with config.json, such a file, or a hub id.

    Raises ``ValueError`` for what cannot be read, and for a model of which transformers knows no causal LM.
    """
    place = Path(model.name).expanduser()
    try:
        if place.is_file():
            told = json.loads(place.read_text(encoding="utf-8"))
            return AutoConfig.for_model(told.pop("model_type"), **told)
        return AutoConfig.from_pretrained(
            str(place) if place.is_dir() else model.name, revision=model.revision or "main",
            trust_remote_code=model.trust_remote_code,
        )  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"model.name: expected a folder or file with a model's config.json, got {model.name}: {reason}"
        ) from error


def build_model(model_config: Any, config: Config) -> SFTMixModel:
    """The model, LoRA included, on the meta device.

    Raises ``ValueError`` for a model without a list of blocks or a linear head, and what ``apply_lora`` refuses.
    """
    if config.model.dtype not in DTYPES:
        raise ValueError(f"model.dtype: expected one of {', '.join(DTYPES)} to plan, got {config.model.dtype}")
    try:
        with torch.device("meta"):
            causal_lm = AutoModelForCausalLM.from_config(model_config, dtype=DTYPES[config.model.dtype])
    except ValueError as error:
        raise ValueError(
            f"model.name: expected a causal language model, got {type(model_config).__name__}"
        ) from error
    model = _with_head(causal_lm)
    if config.train.tuning == "lora":
        own = causal_lm.config._attn_implementation
        # The others ask whether anything is padded, which tensors without numbers cannot answer.
        causal_lm.set_attn_implementation("eager")
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            apply_lora(model, config.lora, seed=config.seed)
        causal_lm.set_attn_implementation(own)
    return model


def _with_head(causal_lm: Any) -> SFTMixModel:
    """The model with its head in a ``LossHead``, as ``install_head`` leaves it, which would need numbers."""
    linear = causal_lm.get_output_embeddings()
    if not isinstance(linear, nn.Linear):
        raise ValueError(f"model: expected a linear output embedding in {type(causal_lm).__name__}, got none")
    lists = [
        (name, module)
        for name, module in causal_lm.named_modules()
        if isinstance(module, nn.ModuleList) and next(module.parameters(), None) is not None
    ]
    if not lists:
        raise ValueError(f"model: expected a list of blocks in {type(causal_lm).__name__}, found none")
    blocks = max(lists, key=lambda pair: sum(p.numel() for p in pair[1].parameters()))[0]
    head = next(name for name, module in causal_lm.named_modules() if module is linear)
    causal_lm.set_submodule(head, LossHead.from_linear(linear))
    names = tuple(name for name, _ in causal_lm.named_modules())
    return SFTMixModel(causal_lm, Surroundings(head, blocks=blocks, names=names))


def describe_model(model: SFTMixModel) -> Skeleton:
    """Parameters by unit, as ``sftmix.model.parallel.shard`` makes the units."""
    name, blocks = decoder_blocks(model)
    place = {id(p): (BLOCK, index) for index, block in enumerate(blocks) for p in block.parameters()}
    if not model.is_tied:
        decoder = model.base.get_submodule(name.rpartition(".")[0])
        children = list(decoder.named_children())
        last = [key for key, _ in children].index(name.rpartition(".")[2])
        for module in [*(child for _, child in children[last + 1 :]), model.head]:
            place.update({id(p): (HEAD, -1) for p in module.parameters() if id(p) not in place})
    weights = tuple(
        Weight(key, *place.get(id(p), (ROOT, -1)), tuple(p.shape), p.element_size(), p.requires_grad)
        for key, p in model.base.named_parameters()
    )
    text = model.base.config.get_text_config()
    heads = int(getattr(text, "num_attention_heads", 1))
    trained = [weight.block for weight in weights if weight.trained and weight.unit == BLOCK]
    below = any(weight.trained and weight.unit == ROOT for weight in weights)
    vocab_size, hidden_size = _sizes(model.head.weight)
    return Skeleton(
        kind=type(model.base).__name__, weights=weights, num_blocks=len(blocks),
        first_trained=0 if below or not trained else min(trained), vocab_size=vocab_size,
        hidden_size=hidden_size, num_heads=heads,
        head_dim=int(getattr(text, "head_dim", None) or text.hidden_size // heads),
        positions=int(getattr(text, "max_position_embeddings", None) or DEFAULT_LENGTH),
        itemsize=model.dtype.itemsize, is_tied=model.is_tied,
        head_trained=model.head.weight.requires_grad, is_lora=is_lora(model),
    )  # fmt: skip


def _sizes(weight: Tensor) -> tuple[int, int]:
    rows, columns = weight.shape
    return int(rows), int(columns)


def with_model(config: Config, name: str) -> Config:
    """The configuration with another model."""
    return dataclasses.replace(config, model=dataclasses.replace(config.model, name=name))

"""A model without numbers, from its configuration alone: shapes, data types, modules; no weight is read or made.

What is built is the class that transformers would load, on the meta device, and with LoRA where it is asked for: so
what is trained, adapted and tied is what a run would train, adapt and tie.
"""

from __future__ import annotations

import copy
import dataclasses
import io
import json
import math
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from sftmix.config import Config, LoraConfig, ModelConfig
from sftmix.model.causal_lm import SFTMixModel
from sftmix.model.dtype import DTYPES
from sftmix.model.flops import attention_widths
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

    @cached_property
    def count(self) -> int:
        return math.prod(self.shape)

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
    def is_uniform(self) -> bool:
        """Whether all blocks have the same parameters."""
        kinds = {
            tuple((weight.shape, weight.itemsize) for weight in self.of(BLOCK, index))
            for index in range(self.num_blocks)
        }
        return len(kinds) == 1

    @cached_property
    def count(self) -> int:
        return sum(weight.count for weight in self.weights)

    @cached_property
    def trained(self) -> int:
        return sum(weight.count for weight in self.weights if weight.trained)

    def of(self, unit: str, block: int | None = None) -> tuple[Weight, ...]:
        """A unit's parameters; of ``block`` alone where one is named."""
        found = self._units.get(unit, {})
        return tuple(chain(*found.values())) if block is None else tuple(found.get(block, ()))

    @cached_property
    def _units(self) -> dict[str, dict[int, list[Weight]]]:
        found: dict[str, dict[int, list[Weight]]] = {}
        for weight in self.weights:
            found.setdefault(weight.unit, {}).setdefault(weight.block, []).append(weight)
        return found


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


def build(model: ModelConfig, tuning: str, lora: LoraConfig) -> tuple[Skeleton, SFTMixModel]:
    """The description of a model, and the model on the meta device with two of its blocks, to run.

    Raises ``ValueError`` for what is no causal LM with a list of blocks and a linear head, and as ``apply_lora`` does.
    """
    built = build_model(read_model_config(model), model.dtype)
    whole = describe_model(built)
    if tuning == "lora":
        if lora.layers is None and whole.is_uniform:
            # One block stands for all: peft takes seconds for a hundred.
            keep_two(built, 0)
            _adapt(built, lora)
            return _repeated(describe_model(built), whole.num_blocks), built
        _adapt(built, lora)
        whole = describe_model(built)
    keep_two(built, whole.first_trained)
    return whole, built


def build_model(model_config: Any, dtype: str) -> SFTMixModel:
    """The model, without LoRA, on the meta device."""
    if dtype not in DTYPES:
        raise ValueError(f"model.dtype: expected one of {', '.join(DTYPES)} to plan, got {dtype}")
    try:
        with torch.device("meta"):
            causal_lm = AutoModelForCausalLM.from_config(model_config, dtype=DTYPES[dtype])
    except ValueError as error:
        raise ValueError(
            f"model.name: expected a causal language model, got {type(model_config).__name__}"
        ) from error
    return _with_head(causal_lm)


def _adapt(model: SFTMixModel, lora: LoraConfig) -> None:
    """Add adapters, without a word."""
    causal_lm = model.base
    own = causal_lm.config._attn_implementation
    # The others ask whether anything is padded, which tensors without numbers cannot answer.
    causal_lm.set_attn_implementation("eager")
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        apply_lora(model, lora)
    causal_lm.set_attn_implementation(own)


def _repeated(two: Skeleton, num_blocks: int) -> Skeleton:
    """A model of ``num_blocks`` blocks like the first of ``two``."""
    others = [weight for weight in two.weights if weight.unit != BLOCK]
    block = two.of(BLOCK, 0)
    blocks = [dataclasses.replace(weight, block=index) for index in range(num_blocks) for weight in block]
    return dataclasses.replace(two, weights=(*others, *blocks), num_blocks=num_blocks)


def keep_two(model: SFTMixModel, first: int) -> None:
    """Leave two of the blocks from ``first`` on, the largest last; a model of one has it twice."""
    name, blocks = decoder_blocks(model)
    candidates = list(blocks)[first:]
    sizes = [sum(p.numel() for p in block.parameters()) for block in candidates]
    last = sizes.index(max(sizes))
    others = [*reversed(candidates[:last]), *candidates[last + 1 :], *blocks]
    two = [others[0], candidates[last]]
    if two[0] is two[1]:
        two[0] = copy.deepcopy(two[1])
    model.base.set_submodule(name, nn.ModuleList(two))
    config = model.base.config.get_text_config()
    config.num_hidden_layers = 2


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
        head_dim=round(sum(attention_widths(text, len(blocks))) / (len(blocks) * heads)),
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

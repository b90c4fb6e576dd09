"""Flops of a step and of each stage, and the seconds they take on a GPU: a roofline with stated assumptions.

    products     2 flops for each number of a block's matrices and token, forward; as much again for the gradient of
                 the inputs, and of the weights where they train
    attention    4 T^2 heads head_dim a sequence and block, forward (masked positions are computed); 2.5 times backward
    head         2 N V D a unit: 1 forward alone, 3 or 4 with gradients, as the loss's schedule has them
    recomputing  one more forward of the blocks under full checkpointing

Seconds of a micro-batch are the longer of its flops at ``EFFICIENCY`` of the GPU's peak and its traffic at
``LINK_SHARE`` of the links, since units are fetched ahead; the optimizer's are its passes over memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sftmix.hardware import BANDWIDTH_SHARE, EFFICIENCY, LINK_SHARE, Gpu
from sftmix.model.flops import active_share
from sftmix.planning.memory import numbers, trained
from sftmix.planning.skeleton import BLOCK, Skeleton
from sftmix.planning.traffic import Traffic

# Bytes through memory for each trained number: gradient, weight, two moments read, all but the gradient written.
OPTIMIZER_BYTES = 28


@dataclass(frozen=True)
class Flops:
    """Of one micro-batch, by cause."""

    products: int
    attention: int
    head: int
    recomputing: int

    @property
    def total(self) -> int:
        return self.products + self.attention + self.head + self.recomputing


def forward_flops(model: Skeleton, *, sequences: int, length: int, rows: int, config: Any = None) -> Flops:
    """Without gradients. ``config``: the transformers configuration, for the share of experts that a token passes."""
    weights = model.of(BLOCK)
    matrices = sum(w.count * active_share(len(w.shape), config) for w in weights if len(w.shape) >= 2)
    attention = 4 * sequences * length**2 * model.num_heads * model.head_dim * model.num_blocks
    head = 2 * rows * model.vocab_size * model.hidden_size
    return Flops(round(2 * sequences * length * matrices), attention, head, 0)


def step_flops(
    model: Skeleton, *, sequences: int, length: int, rows: int, head_units: int, recomputes: bool,
    config: Any = None,
) -> Flops:  # fmt: skip
    """Forward and backward; blocks below the first that trains have no backward."""
    forward = forward_flops(model, sequences=sequences, length=length, rows=rows, config=config)
    tokens, deep = sequences * length, model.num_blocks - model.first_trained
    products = forward.products
    for weight in model.of(BLOCK):
        if len(weight.shape) >= 2:
            active = weight.count * active_share(len(weight.shape), config)
            times = (weight.block >= model.first_trained) + weight.trained
            products += round(2 * tokens * active * times)
    attention = forward.attention + forward.attention * deep * 5 // (2 * model.num_blocks)
    once = forward.products + forward.attention
    # Without dweight a unit is saved.
    head = forward.head * (head_units - (not model.head_trained))
    return Flops(products, attention, head, once * deep // model.num_blocks if recomputes else 0)


@dataclass(frozen=True)
class Links:
    """Where traffic goes: within the shards' group, and between the groups."""

    sharded: float  # bytes a second that a GPU receives
    repeated: float


def links_of(gpu: Gpu, *, shards: int, per_node: int) -> Links:
    """A group within a node uses its links, a larger one the network."""
    return Links(gpu.link if shards <= per_node else gpu.network, gpu.network)


@dataclass(frozen=True)
class Seconds:
    """Of one optimizer step."""

    compute: float
    traffic: float
    optimizer: float

    @property
    def total(self) -> float:
        return max(self.compute, self.traffic) + self.optimizer


def step_seconds(
    model: Skeleton, flops: Flops, moved: Traffic, gpu: Gpu, links: Links, *, shards: int, micro_batches: int,
    efficiency: float = EFFICIENCY,
) -> Seconds:  # fmt: skip
    """``flops`` of one micro-batch, ``moved`` of the whole step."""
    # float32 products run at an eighth or less of the 16-bit rate; TF32, which nothing asks for, at half.
    rate = gpu.flops * efficiency / (8 if model.itemsize == 4 else 1)
    held = numbers(trained(model.weights), shards)
    seconds = sum(moved.sharded.values()) / links.sharded + sum(moved.repeated.values()) / links.repeated
    return Seconds(
        micro_batches * flops.total / rate, seconds / LINK_SHARE,
        OPTIMIZER_BYTES * held / (gpu.bandwidth * BANDWIDTH_SHARE),
    )  # fmt: skip

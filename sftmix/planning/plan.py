"""The plan of a run: a question (configuration, GPUs, tokens) and its answer, with nothing read but config.json.

``make_plan`` answers; ``remedies.py`` asks again with one thing changed where the answer does not fit.
"""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from sftmix.config import Config, LoraConfig, ModelConfig
from sftmix.hardware import EFFICIENCY, LINK_SHARE, Gpu
from sftmix.model.causal_lm import SFTMixModel
from sftmix.planning.activations import Activations, trace
from sftmix.planning.memory import Load, Memory, in_bytes, memory
from sftmix.planning.skeleton import (
    DEFAULT_LENGTH,
    Skeleton,
    build,
    read_model_config,
    with_model,
)
from sftmix.planning.traffic import Traffic, exchangeable, traffic
from sftmix.planning.work import Flops, Seconds, forward_flops, links_of, step_flops, step_seconds
from sftmix_kernels import LossBytes, loss_bytes

MOST_GPUS = 4096
PER_NODE = 8
NO_ACTIVATIONS = Activations(0, 0, 0, 0, 0, 0, 0)


@dataclass(frozen=True)
class Question:
    """What is asked; how the model is sharded, repeated and recomputed is the configuration's (``train``).

    ``tokens`` are those of the training examples, an epoch; ``length`` those of a sequence (None: data.max_length, or
    the model's positions, at most 2048); ``answers`` the share of tokens that bears loss.
    """

    config: Config
    gpu: Gpu
    gpus: int = 1
    tokens: int = 0
    per_node: int | None = None
    length: int | None = None
    answers: float = 1.0
    efficiency: float = EFFICIENCY

    def check(self) -> None:
        """Raise ``ValueError`` naming the first value that is out of range."""
        if not 1 <= self.gpus <= MOST_GPUS:
            raise ValueError(f"gpus: expected 1 to {MOST_GPUS}, got {self.gpus}")
        for name, value in {"gpus_per_node": self.per_node, "length": self.length}.items():
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if self.gpus % self.copies:
            raise ValueError(f"train.replicas: expected a divisor of gpus={self.gpus}, got {self.copies}")
        if self.tokens < 0:
            raise ValueError(f"tokens: expected at least 0, got {self.tokens}")
        for name in ("answers", "efficiency"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected a share above 0 and at most 1, got {getattr(self, name)}")

    @property
    def copies(self) -> int:
        """Groups of GPUs, each of which holds the whole model."""
        return self.config.train.replicas

    @property
    def shards(self) -> int:
        return self.gpus // self.copies

    @property
    def in_a_node(self) -> int:
        return self.per_node or (self.shards if self.copies > 1 else min(self.gpus, PER_NODE))

    @property
    def kind(self) -> str:
        """Of activation checkpointing."""
        return self.config.train.gradient_checkpointing


@dataclass(frozen=True)
class Stage:
    """One stage of a run."""

    name: str
    tokens: int  # that go through the model, all passes together
    flops: int
    seconds: float
    gpu_hours: float


@dataclass(frozen=True)
class Plan:
    """The answer; bytes and flops are those of one GPU, ``seconds`` of one optimizer step."""

    question: Question
    model: Skeleton
    load: Load
    micro_batches: int  # of a GPU, in a step
    idle: int  # GPUs that get no micro-batch of a step
    activations: Activations
    loss: LossBytes
    memory: Memory
    traffic: Traffic
    flops: Flops  # of one micro-batch
    seconds: Seconds
    stages: tuple[Stage, ...]

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.question.gpu.memory_bytes

    @property
    def starts(self) -> bool:
        """Whether the model fits as each process reads it, before it is sharded."""
        return self.memory.start <= self.question.gpu.memory_bytes

    @property
    def tokens_per_second(self) -> float:
        """Of all GPUs, padding included."""
        return self.question.config.train.batch_size * self.load.length / self.seconds.total


def make_plan(question: Question) -> Plan:
    """Everything about a run. Raises ``ValueError`` for a bad question and a model that cannot be planned."""
    question.check()
    plan = _of_step(question)
    return dataclasses.replace(plan, stages=_stages(plan))


def least_bytes(question: Question) -> int:
    """What a GPU holds without activations, the loss's tensors included: found at once."""
    return _of_step(question, with_activations=False).memory.total


def _of_step(question: Question, *, with_activations: bool = True) -> Plan:
    """The plan of an optimizer step, without stages."""
    train, config = question.config.train, question.config
    sequences = min(train.micro_batch_size, train.batch_size)
    model = model_of(config.model, train.tuning, config.lora)
    _check_head(question, model)
    length = question.length or config.data.max_length or min(model.positions, DEFAULT_LENGTH)
    if length > model.positions:
        raise ValueError(f"length: expected at most the model's {model.positions} positions, got {length}")
    chunks = -(-train.batch_size // sequences)
    micro_batches, shards = -(-chunks // question.gpus), question.shards
    rows = max(2, round(sequences * length * question.answers) // 2 * 2)
    load = Load(sequences, length, rows, rows // 2, micro_batches > 1)
    kept = NO_ACTIVATIONS
    if with_activations:
        kept = _traced(config.model, train.tuning, config.lora, sequences, length, question.kind)
    moved = traffic(
        model, rows=rows, shards=shards, copies=question.copies, micro_batches=micro_batches,
        head=train.head_sharding,
    )  # fmt: skip
    gathered = moved.head.chosen == "gather" or shards == 1
    loss = _loss(question, model, load, gathered)
    flops = step_flops(
        model, sequences=sequences, length=length, rows=rows, head_units=loss.products,
        recomputes=question.kind == "full", config=_transformers_config(config.model),
    )  # fmt: skip
    links = links_of(question.gpu, shards=shards, per_node=question.in_a_node)
    seconds = step_seconds(
        model, flops, moved, question.gpu, links, shards=shards, micro_batches=micro_batches,
        efficiency=question.efficiency,
    )  # fmt: skip
    found = memory(model, kept, loss, load, shards=shards, head_gathered=gathered)
    idle = max(0, question.gpus - chunks)
    return Plan(question, model, load, micro_batches, idle, kept, loss, found, moved, flops, seconds, ())


def _check_head(question: Question, model: Skeleton) -> None:
    """Refuse what ``sftmix.model.head_exchange`` refuses."""
    if question.config.train.head_sharding == "exchange" and not exchangeable(model, question.copies):
        raise ValueError(
            "train.head_sharding: expected gather or auto for a head that is tied, frozen or beside adapters, and with "
            "replicas, got exchange"
        )


def _loss(question: Question, model: Skeleton, load: Load, gathered: bool) -> LossBytes:
    """The loss on this GPU: of its own rows, or of every process's on its columns of the head."""
    gpu, impl = question.gpu, question.config.train.impl
    told: dict[str, Any] = {"arch": gpu.arch, "memory_bytes": gpu.memory_bytes, "dweight": model.head_trained}
    if gathered:
        return loss_bytes(
            load.rows,
            model.vocab_size,
            model.hidden_size,
            model.dtype,
            num_pairs=load.pairs,
            impl=impl,
            **told,
        )
    rows, columns = load.rows * question.shards, -(-model.vocab_size // question.shards)
    found = loss_bytes(rows, columns, model.hidden_size, model.dtype, schedule="recompute", **told)
    own = model.itemsize * model.hidden_size * rows  # everybody's hidden states
    return dataclasses.replace(found, forward=found.forward + own, backward=found.backward + own)


def _stages(plan: Plan) -> tuple[Stage, ...]:
    question, config = plan.question, plan.question.config
    reference = plan
    if config.reference.model is not None:
        other = with_model(config, config.reference.model)
        reference = _of_step(dataclasses.replace(question, config=other))
    points = config.reference.epochs * config.reference.checkpoints_per_epoch
    ready = config.reference.scores is not None
    scored = 0 if ready or config.reference.dynamics == "online" else points
    held_out = 0 if config.data.heldout else round(question.tokens * config.data.heldout_fraction)
    return (
        _trained("reference", reference, 0 if ready else config.reference.epochs),
        _read("score", reference, question.tokens * scored),
        *(_trained(f"train {method}", plan, config.train.epochs) for method in ("ntp", "sftmix")),
        _read("evaluate", plan, 3 * held_out),
    )


def _trained(name: str, plan: Plan, epochs: int) -> Stage:
    train, load = plan.question.config.train, plan.load
    in_step = train.batch_size * load.length
    steps = min(epochs * -(-plan.question.tokens // in_step), train.max_steps or 10**12)
    chunks = -(-train.batch_size // load.sequences)
    seconds = steps * plan.seconds.total
    hours = seconds * plan.question.gpus / 3600
    tokens = min(steps * in_step, epochs * plan.question.tokens)
    return Stage(name, tokens, steps * chunks * plan.flops.total, seconds, hours)


def _read(name: str, plan: Plan, tokens: int) -> Stage:
    """A pass without gradients, its batches dealt out to all processes."""
    question, model, length = plan.question, plan.model, plan.load.length
    sequences = question.config.evaluate.batch_size
    batches = -(-tokens // (sequences * length))
    flops = forward_flops(
        model, sequences=sequences, length=length, rows=round(sequences * length * question.answers),
        config=_transformers_config(question.config.model),
    )  # fmt: skip
    rate = question.gpu.flops * question.efficiency / (8 if model.itemsize == 4 else 1)
    links = links_of(question.gpu, shards=question.shards, per_node=question.in_a_node)
    gathered = in_bytes(model.weights) * (question.shards - 1) / question.shards
    seconds = -(-batches // question.gpus) * max(flops.total / rate, gathered / (links.sharded * LINK_SHARE))
    hours = seconds * question.gpus / 3600
    return Stage(name, tokens, batches * flops.total, seconds, hours)


@lru_cache(maxsize=8)
def _transformers_config(model: ModelConfig) -> Any:
    return read_model_config(model)


def model_of(model: ModelConfig, tuning: str, lora: LoraConfig) -> Skeleton:
    """The model without numbers of a configuration."""
    return _built(model, tuning, lora)[0]


@lru_cache(maxsize=16)
def _built(model: ModelConfig, tuning: str, lora: LoraConfig) -> tuple[Skeleton, SFTMixModel]:
    """Its description, and two of its blocks to run."""
    return build(model, tuning, lora)


@lru_cache(maxsize=256)
def _traced(
    model: ModelConfig, tuning: str, lora: LoraConfig, sequences: int, length: int, kind: str
) -> Activations:
    built = copy.deepcopy(_built(model, tuning, lora)[1])
    return trace(built, sequences=sequences, length=length, checkpointing=kind)

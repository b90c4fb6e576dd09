"""Bytes on one GPU by cause, at each phase of an optimizer step: the fullest phase is what must fit.

One process holds the model in its own dtype and, where that is 16-bit, float32 main weights; gradients arrive in the
model's dtype and are added to float32 ones at once (``TrainableWeights``). Several processes hold shards: float32 main
weights (frozen ones as they are), gathered a unit at a time in the model's dtype, gradients reduced in float32
(``sftmix.model.parallel``). The step is not the first, so AdamW's moments are there.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from sftmix.planning.activations import Activations
from sftmix.planning.skeleton import BLOCK, HEAD, ROOT, Skeleton, Weight
from sftmix_kernels import LossBytes

CAUSES = (
    "parameters", "main weights", "AdamW moments", "gradients", "gathered units", "reduction buffers",
    "activations", "loss", "batch", "optimizer scratch",
)  # fmt: skip
Bytes = dict[str, int]
# Units of a block's size: the one at work, the one fetched ahead, and the flat buffer that is copied out.
UNITS_AT_ONCE = 3


@dataclass(frozen=True)
class Load:
    """What a GPU is given at a time: ``sequences`` of ``length`` tokens, ``rows`` of which bear loss."""

    sequences: int
    length: int
    rows: int
    pairs: int
    accumulates: bool  # more than one micro-batch a step, so gradients are there when a backward begins


@dataclass(frozen=True)
class Memory:
    """Bytes by phase and cause; ``start`` is what a process holds before the first step, all causes together."""

    phases: dict[str, Bytes]
    start: int

    @property
    def phase(self) -> str:
        """The fullest one."""
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def causes(self) -> Bytes:
        """Of the fullest phase."""
        return self.phases[self.phase]

    @property
    def total(self) -> int:
        return sum(self.causes.values())


def memory(
    model: Skeleton, kept: Activations, loss: LossBytes, load: Load, *, shards: int = 1, on_cpu: bool = False,
    head_gathered: bool = True,
) -> Memory:  # fmt: skip
    """Bytes on the first of ``shards`` processes. ``kept`` and ``loss`` are those of ``load``.

    ``head_gathered``: the head's weight is gathered, not the hidden rows of all processes. Raises ``ValueError`` for
    fewer shards than one.
    """
    if shards < 1:
        raise ValueError(f"shards: expected at least 1, got {shards}")
    step = _Step(model, kept, loss, load, shards, on_cpu, head_gathered)
    phases = {
        "forward": step.forward(), "loss": step.loss_forward(), "loss backward": step.loss_backward(),
        "head backward": step.head_backward(), "last block backward": step.block_backward(step.deep),
        "first block backward": step.block_backward(1), "embedding backward": step.root_backward(),
        "optimizer": step.optimizer(),
    }  # fmt: skip
    return Memory(
        {name: {c: found.get(c, 0) for c in CAUSES} for name, found in phases.items()}, step.start()
    )


def numbers(weights: Iterable[Weight], shards: int = 1) -> int:
    return sum(weight.count if shards == 1 else weight.share(shards) for weight in weights)


def in_bytes(weights: Iterable[Weight]) -> int:
    """Of whole weights in the dtype they are computed with."""
    return sum(weight.count * weight.itemsize for weight in weights)


def trained(weights: Iterable[Weight]) -> list[Weight]:
    return [weight for weight in weights if weight.trained]


class _Step:
    """The phases of one optimizer step."""

    def __init__(
        self, model: Skeleton, kept: Activations, loss: LossBytes, load: Load, shards: int, on_cpu: bool,
        head_gathered: bool,
    ) -> None:  # fmt: skip
        self.model, self.kept, self.loss, self.load = model, kept, loss, load
        self.shards, self.on_cpu, self.head_gathered = shards, on_cpu, head_gathered
        self.deep = model.num_blocks - model.first_trained  # blocks that keep something
        self.units = {unit: model.of(unit) for unit in (ROOT, HEAD)}
        # The largest block stands for all: what is fetched ahead is never less.
        blocks = [model.of(BLOCK, index) for index in range(model.num_blocks)]
        self.block = max(blocks, key=in_bytes)
        self.block_trained = max((trained(block) for block in blocks), key=in_bytes)
        self.token_bytes = load.sequences * load.length * model.hidden_size * model.itemsize
        self.row_bytes = load.rows * model.hidden_size * model.itemsize
        self.head_weight = model.vocab_size * model.hidden_size * model.head_trained

    @property
    def sharded(self) -> bool:
        return self.shards > 1

    @cached_property
    def persistent(self) -> Bytes:
        """What is there all the time, the batch included."""
        parameters = main = 0
        for weight in self.model.weights:
            share = weight.share(self.shards) if self.sharded else weight.count
            is_narrow = weight.trained and weight.itemsize < 4
            main += 4 * share * is_narrow
            parameters += weight.itemsize * share * (not (is_narrow and self.sharded))
        load = self.load
        # ids and mask, and of a row its index, target, example, lambda; the same on the host is not counted.
        batch = 16 * load.sequences * load.length + 24 * load.rows + 4 * load.pairs
        moments = 8 * self.shares(self.model.weights)
        return {"parameters": parameters, "main weights": main, "AdamW moments": moments, "batch": batch}

    def shares(self, weights: Iterable[Weight]) -> int:
        """Numbers of the trained ones that a process holds."""
        return numbers(trained(weights), self.shards)

    def gradients(self, *, done: int, head: bool = True) -> int:
        """float32 gradients when the backward of ``done`` blocks, and of the head, is over."""
        if self.load.accumulates:
            return 4 * self.shares(self.model.weights)
        of_head = self.shares(self.units[HEAD]) * head
        return 4 * (of_head + done * self.shares(self.block_trained))

    def pending(self) -> int:
        """A tied head's gradient waits for the embedding's."""
        return self.head_weight * self.model.itemsize if self.model.is_tied else 0

    def activations(self, blocks: int) -> int:
        return self.kept.before + blocks * self.kept.block

    def gathered(self, *, blocks: bool, head: bool) -> int:
        """Units that are whole: the root's always, the head's from its forward to its backward."""
        if not self.sharded:
            return 0
        root = in_bytes(self.units[ROOT])
        head_bytes = in_bytes(self.units[HEAD]) * (head and self.head_gathered)
        return root + head_bytes + UNITS_AT_ONCE * in_bytes(self.block) * blocks

    def reduction(self, weights: Iterable[Weight]) -> int:
        """The flat float32 input of a unit's reduce-scatter, and its output."""
        weights = trained(weights)
        return 4 * numbers(weights) + 4 * self.shares(weights) if self.sharded else 0

    def phase(self, **causes: int) -> Bytes:
        named = {name.replace("_", " "): value for name, value in causes.items()}
        return {**self.persistent, **named}

    def forward(self) -> Bytes:
        return self.phase(
            gradients=self.gradients(done=0, head=False),
            activations=self.activations(max(0, self.deep - 1)) + self.kept.forward,
            gathered_units=self.gathered(blocks=True, head=False),
        )

    def loss_forward(self) -> Bytes:
        # The head's flat buffer is copied out before the loss begins: the larger of the two.
        buffer = in_bytes(self.units[HEAD]) * (self.sharded and self.head_gathered)
        return self.phase(
            gradients=self.gradients(done=0, head=False),
            activations=self.activations(self.deep) + self.kept.after,
            gathered_units=self.gathered(blocks=False, head=True) + max(0, buffer - self.loss.forward),
            loss=self.row_bytes + self.loss.forward,
        )

    def loss_backward(self) -> Bytes:
        return self.phase(
            gradients=self.gradients(done=0, head=False),
            activations=self.activations(self.deep) + self.kept.after,
            gathered_units=self.gathered(blocks=False, head=True),
            loss=self.loss.backward,
        )

    def head_backward(self) -> Bytes:
        """The loss's own tensors are gone; its gradients become the weight's and the hidden states'."""
        item, arrived = self.model.itemsize, self.head_weight * self.model.itemsize
        if self.model.is_tied:
            made, buffers = 0, 0
        elif self.sharded:
            made, buffers = 0, self.reduction(self.units[HEAD])
        else:
            made = 4 * self.head_weight * (not self.load.accumulates and item < 4)
            buffers = 0
        return self.phase(
            gradients=self.gradients(done=0, head=False) + arrived + made,
            activations=self.activations(self.deep) + self.kept.after,
            gathered_units=self.gathered(blocks=True, head=True),
            reduction_buffers=buffers,
            loss=self.row_bytes + self.token_bytes,
        )

    def block_backward(self, blocks: int) -> Bytes:
        """The backward of a block when ``blocks``, itself included, are still to be done."""
        kept = self.kept
        own = 0
        if self.sharded:
            own = kept.backward_kept - kept.backward
        elif not self.load.accumulates:
            own = kept.backward_float32 - kept.backward
        before = self.units[HEAD] if blocks == self.deep else self.block
        return self.phase(
            gradients=self.gradients(done=self.deep - blocks) + self.pending() + own,
            activations=self.activations(blocks - 1) + kept.backward,
            gathered_units=self.gathered(blocks=True, head=False),
            reduction_buffers=self.reduction(before),
        )

    def root_backward(self) -> Bytes:
        """The embedding's gradient is dense; a tied head's is added to it."""
        weights = trained(self.units[ROOT])
        arrived = self.model.itemsize * numbers(weights)
        made = 0
        if not (self.sharded or self.load.accumulates or self.model.itemsize == 4):
            made = 4 * numbers(weights)
        return self.phase(
            gradients=self.gradients(done=self.deep) + arrived + self.pending() + made,
            activations=self.kept.before,
            gathered_units=self.gathered(blocks=False, head=False),
            reduction_buffers=self.reduction(weights) + self.reduction(self.block),
        )

    def optimizer(self) -> Bytes:
        """Without the batch, which is gone; gathered units are not."""
        shares = [w.share(self.shards) if self.sharded else w.count for w in trained(self.model.weights)]
        # torch's loop over tensors, which DTensors and a CPU take, holds two of one; over all at once, one of each.
        scratch = 8 * max(shares) if self.on_cpu or self.sharded else 4 * sum(shares)
        found = self.phase(gradients=4 * sum(shares), optimizer_scratch=scratch)
        return {**found, "batch": 0}

    def start(self) -> int:
        """The shards, and the largest unit whole: units come from the CPU one at a time."""
        found = self.persistent
        held = found["parameters"] + found["main weights"]
        if not self.sharded:
            return held
        units = [self.units[ROOT], self.units[HEAD], self.block]
        return held + max(
            sum(weight.count * (4 if weight.trained else weight.itemsize) for weight in unit)
            for unit in units
        )

"""Bytes that one GPU receives in an optimizer step, by cause.

Rings: gathering U bytes over R processes brings each (R - 1) / R U, as does reducing and scattering them; an all-reduce
of what a process holds over K nodes brings 2 (K - 1) / K of it. Units are gathered in the dtype that computes, twice
for a block (its forward and its backward), once for the root and the head; gradients are reduced in float32, after
every micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass

from sftmix.model.head_exchange import HEAD_SHARDINGS, head_traffic
from sftmix.planning.memory import in_bytes, numbers, trained
from sftmix.planning.skeleton import BLOCK, HEAD, ROOT, Skeleton


@dataclass(frozen=True)
class HeadBytes:
    """Bytes that a GPU receives in a step for the head, either way, and which way is taken."""

    gather: int
    exchange: int
    chosen: str  # "gather" or "exchange"

    @property
    def bytes(self) -> int:
        return self.exchange if self.chosen == "exchange" else self.gather


def head_bytes(
    rows: int, vocab_size: int, hidden_size: int, *, shards: int, itemsize: int = 2, micro_batches: int = 1,
    trained: bool = True, choice: str = "auto",
) -> HeadBytes:  # fmt: skip
    """What the head [V, D] costs in traffic when ``shards`` processes have ``rows`` rows [N, D] each.

    The formulas are ``head_traffic``'s, by which a run itself decides. ``auto`` takes the fewer
    bytes, and gather where they are equal. Raises ``ValueError`` naming what is out of range.
    """
    sizes = {"vocab_size": vocab_size, "hidden_size": hidden_size, "shards": shards, "itemsize": itemsize}
    for name, value in {**sizes, "micro_batches": micro_batches}.items():
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    if rows < 0:
        raise ValueError(f"rows: expected at least 0, got {rows}")
    if choice not in HEAD_SHARDINGS:
        raise ValueError(f"head_sharding: expected one of {', '.join(HEAD_SHARDINGS)}, got {choice!r}")
    found = head_traffic(
        rows=rows, vocab_size=vocab_size, hidden_size=hidden_size, processes=shards, itemsize=itemsize, trained=trained
    )  # fmt: skip
    gather, exchange = micro_batches * found.gather, micro_batches * found.exchange
    best = "exchange" if exchange < gather else "gather"
    return HeadBytes(gather, exchange, best if choice == "auto" else choice)


def exchangeable(model: Skeleton, copies: int) -> bool:
    """Whether a run could exchange hidden rows in place of the head (``sftmix.model.head_exchange``)."""
    return not (model.is_tied or model.is_lora or copies > 1) and model.head_trained


@dataclass(frozen=True)
class Traffic:
    """Bytes received in a step by cause: within the shards' group, and between the nodes that repeat it."""

    sharded: dict[str, int]
    repeated: dict[str, int]
    head: HeadBytes

    @property
    def causes(self) -> dict[str, int]:
        return {**self.sharded, **self.repeated}

    @property
    def total(self) -> int:
        return sum(self.causes.values())


def traffic(
    model: Skeleton, *, rows: int, shards: int, copies: int = 1, micro_batches: int = 1, head: str = "gather"
) -> Traffic:
    """Of a process among ``shards``, in one of ``copies`` groups, that runs ``micro_batches`` of ``rows`` rows a step.

    A head that cannot be exchanged is gathered; a tied one in the root's unit, with the embedding.
    """
    choice = head if exchangeable(model, copies) else "gather"
    of_head = head_bytes(
        rows, model.vocab_size, model.hidden_size, shards=shards, itemsize=model.itemsize,
        micro_batches=micro_batches, trained=model.head_trained, choice=choice,
    )  # fmt: skip

    def ring(size: int) -> int:
        return micro_batches * size * (shards - 1) // shards

    blocks, root, last = (model.of(unit) for unit in (BLOCK, ROOT, HEAD))
    below = sum(in_bytes(model.of(BLOCK, index)) for index in range(model.first_trained))
    weight = model.vocab_size * model.hidden_size
    norm_bytes = in_bytes(last) - weight * model.itemsize * (not model.is_tied)
    norm_trained = numbers(trained(last)) - weight * (model.head_trained and not model.is_tied)
    others = numbers(trained([*blocks, *root])) + norm_trained
    sharded = {
        "blocks, all-gather": ring(2 * in_bytes(blocks) - below),
        "embedding, all-gather": ring(in_bytes(root) + norm_bytes),
        "gradients, reduce-scatter": ring(4 * others),
        "head": 0 if model.is_tied else of_head.bytes,
    }
    held = 4 * numbers(trained(model.weights), shards)
    repeated = {"gradients, all-reduce over nodes": micro_batches * 2 * held * (copies - 1) // copies}
    return Traffic(sharded, repeated, of_head)

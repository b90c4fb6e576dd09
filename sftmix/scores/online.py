"""Training dynamics taken from the training steps themselves, without a scoring pass.

Each example is met once an epoch, so an epoch gives one row per example. Unlike scores of a checkpoint these
are taken at different weights through the epoch, before the step that trains on the example, and in training
mode (dropout on). They are sums over tokens, each counted once: weights are the loss's, and the paper's perplexity
has none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sftmix.data.tokenized import TokenizedExample
from sftmix.model.parallel import World, gather_objects
from sftmix.scores.dynamics import accumulate

Row = dict[str, Any]  # columns of dynamics.parquet


class OnlineDynamics:
    """Sums per example, kept on the device and read once an epoch; ``rows`` are those of past epochs."""

    def __init__(self, examples: Mapping[str, TokenizedExample], *, enabled: bool) -> None:
        self.examples, self.enabled = examples, enabled
        self.rows: list[Row] = []
        self._partial: list[Row] = []  # of the epoch under way, from all processes
        self._pending: list[tuple[list[str], Tensor]] = []

    def add(self, nll: Tensor, is_top1: Tensor, example: Tensor, ids: Sequence[str]) -> None:
        """nll [N] float32, is_top1 [N] bool, example [N] (the sequence of each row), ids [B]."""
        if not self.enabled:
            return
        sums = accumulate(nll, is_top1, example, len(ids))
        self._pending.append((list(ids), torch.stack([sums.nll_sum, sums.num_top1.double()])))

    def so_far(self, epoch: int, world: World) -> list[Row]:
        """All rows up to now, over all processes, those of the epoch under way among them; for a checkpoint."""
        self._collect(epoch, world)
        return [*self.rows, *self._partial]

    def restore(self, rows: Sequence[Row], epoch: int) -> None:
        """Go on from ``so_far`` in ``epoch``."""
        self.rows = [row for row in rows if row["checkpoint"] < epoch]
        self._partial = [row for row in rows if row["checkpoint"] >= epoch]

    def close_epoch(self, epoch: int, step: int, world: World) -> None:
        """Turn the epoch's sums into rows, over all processes, in the order of the ids."""
        self._collect(epoch, world)
        self.rows += sorted(({**row, "step": step} for row in self._partial), key=lambda row: row["example"])
        self._partial = []

    def _collect(self, epoch: int, world: World) -> None:
        """Read the sums that are on the device, and put all processes' together."""
        if not self.enabled:
            return
        local = [
            {
                "example": name, "checkpoint": epoch, "step": 0, "nll_sum": nll,
                "num_tokens": self.examples[name].num_supervised,
                "top1_share": top1 / self.examples[name].num_supervised, "source": "online",
            }
            for ids, sums in self._pending
            for name, nll, top1 in zip(ids, *sums.tolist(), strict=True)
        ]  # fmt: skip
        self._pending = []
        self._partial += [row for rows in gather_objects(local, world) for row in rows]

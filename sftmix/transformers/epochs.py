"""The turn of an epoch inside a ``Trainer``: which pairs are drawn next, and the scores of those that are over."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

if TYPE_CHECKING:
    from sftmix.transformers.training import PairTraining


class Epochs(TrainerCallback):  # type: ignore[misc]
    """Sets the sampler's epoch, and closes the scores of every epoch.

    accelerate sets a sampler's epoch too, but does not reach one inside a sharded batch sampler that leaves out its
    first batches: processes that are resumed in the middle of an epoch would draw the first epoch's pairs.
    """

    def __init__(self, trainer: PairTraining) -> None:
        self.trainer = trainer

    def on_epoch_begin(self, args: Any, state: Any, *arguments: Any, **options: Any) -> None:
        self.trainer.sampler.set_epoch(math.floor(float(state.epoch or 0) + 1e-6))

    def on_epoch_end(self, *arguments: Any, **options: Any) -> None:
        self.trainer.close_epoch()

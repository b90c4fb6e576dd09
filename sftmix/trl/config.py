"""``SFTMixConfig``: TRL's ``SFTConfig`` and the knobs of SFTMix."""

from __future__ import annotations

from dataclasses import dataclass

from trl import SFTConfig

from sftmix.transformers.arguments import PairArguments


@dataclass
class SFTMixConfig(PairArguments, SFTConfig):  # type: ignore[misc]
    """Every option of ``SFTConfig``, and where the halves come from and how they are mixed.

    Raises ``ValueError`` naming the option for a value that it cannot have, and for what SFTMix cannot be beside: TRL's
    own packing, which joins examples before they can be paired, another loss, and an odd batch.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_pairs()
        if self.packing:
            self.refuse(
                "packing",
                "False, as it joins examples before they can be paired (padding_free=True has no padding)",
            )
        if self.loss_type != "nll":
            self.refuse("loss_type", "'nll', as the loss is SFTMix's")
        if self.per_device_train_batch_size % 2:
            self.refuse("per_device_train_batch_size", "an even number, whole pairs")
        if self.group_by_length_asked():
            self.refuse("train_sampling_strategy", "'random', as the batches are those of the pairs")

    def group_by_length_asked(self) -> bool:
        """Whether transformers was asked for batches in another order than at random."""
        return getattr(self, "train_sampling_strategy", "random") not in ("random", None)

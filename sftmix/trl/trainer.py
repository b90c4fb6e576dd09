"""``SFTMixTrainer``: TRL's ``SFTTrainer``, whose loss is SFTMix and whose batches are pairs.

What the user's script passes goes to ``SFTTrainer``, which loads, templates, tokenises, masks and wraps as ever. Ours
are: the order of the training examples (pairs of the two halves, new ones every epoch), the head (``LossHead``, in the
place of TRL's fused one), the loss over all tokens of an optimizer step (both denominators, over accumulation and
processes), and scores of every example from the same forward. Evaluation is the next-token loss.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trl import SFTTrainer

from sftmix.scores.dynamics import Dynamics
from sftmix.scores.halves import Split
from sftmix.transformers.training import PairTraining
from sftmix.trl.checks import check_made, check_options, without_trls_head
from sftmix.trl.config import SFTMixConfig


class SFTMixTrainer(PairTraining, SFTTrainer):  # type: ignore[misc]
    """``SFTTrainer`` with the SFTMix loss (Xiao et al., 2026): takes all that it takes, ``args`` an ``SFTMixConfig``.

    ``dynamics``: the scores of every training example, ``Dynamics``, their file, or rows as ``dynamics.parquet`` has
    them, by the ids of ``args.id_column``; ``split``: the two halves, in their place. With neither, ``args.dynamics``
    is read, or ``args.reference="online"`` trains next-token first. After ``train`` the scores taken on the way are in
    ``dynamics_rows`` and in ``dynamics.parquet`` of the output folder.

    Raises ``ValueError`` naming the argument for what it cannot be beside: an iterable dataset, images, Liger's head,
    label smoothing, a loss of one's own, DeepSpeed.
    """

    _tag_names = ["trl", "sftmix"]  # noqa: RUF012  # TRL's own name and type
    args: SFTMixConfig
    data_collator: Any

    def __init__(
        self, model: Any, args: SFTMixConfig | None = None, *positional: Any,
        dynamics: Dynamics | str | Path | None = None, split: Split | None = None, **options: Any,
    ) -> None:  # fmt: skip
        if args is None:
            args = SFTMixConfig("sftmix-output")
        if not isinstance(args, SFTMixConfig):
            raise ValueError(f"args: expected an SFTMixConfig, got {type(args).__name__}")
        check_options(args, options)
        with without_trls_head():
            super().__init__(model, args, *positional, **options)
        check_made(self)
        self.prepare_pairs(dynamics, split)

    @classmethod
    def from_dynamics(cls, dynamics: Dynamics | str | Path, *arguments: Any, **options: Any) -> SFTMixTrainer:
        """A trainer whose halves come from scores: ``Dynamics`` or the path of a ``dynamics.parquet``."""
        return cls(*arguments, dynamics=dynamics, **options)

    @property
    def aux_weight(self) -> float:
        return float(self.router_aux_loss_coef) if self.aux_loss_enabled else 0.0

    def model_options(self) -> dict[str, Any]:
        return {"output_router_logits": True} if self.aux_loss_enabled else {}

    def tell_aux_loss(self, value: float, mode: str) -> None:
        self._metrics[mode]["aux_loss"].append(value)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's metrics and ours, each over all tokens since the newest log."""
        mode = "train" if self.model.training else "eval"
        for name, value in self.window_metrics(mode).items():
            self._metrics[mode][name] = [value]
        SFTTrainer.log(self, logs, start_time)

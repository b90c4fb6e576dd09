"""The runs of the recipe: on pairs, with or without the Mixup term, and the plain one of the reference."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from sftmix.config import Config
from sftmix.data.tokenized import TokenizedExample
from sftmix.model.causal_lm import SFTMixModel
from sftmix.progress import say
from sftmix.scores.halves import Split, used_halves
from sftmix.scores.online import Row
from sftmix.training.pairs import epoch_order, epoch_pairs
from sftmix.training.plan import Step, plain_entries, plan_steps
from sftmix.training.trainer import OnPoint, Progress, Trainer


def train_pairs(
    config: Config, model: SFTMixModel, examples: Mapping[str, TokenizedExample], split: Split, *,
    folder: str | Path, pad_id: int = 0, progress: Progress | None = None,
    identity: Mapping[str, Any] | None = None,
) -> Trainer:  # fmt: skip
    """Train on pairs of confident and unconfident examples, ``config.train.method`` being sftmix or ntp.

    Both draw the same batches; they differ in the weight of the Mixup term, which is 0 for ntp. Resumes from
    ``folder/checkpoints`` when a checkpoint is there. Raises ``ValueError`` for a checkpoint of another run
    and for a loss that is not finite. ``identity``: see ``Trainer``. Of the halves those are trained on that
    ``split.use`` names.
    """
    halves = used_halves(split, config.split.use, seed=config.seed)
    left = len(split.confident) + len(split.unconfident) - len(halves.confident) - len(halves.unconfident)
    if left:
        say(
            f"train {config.train.method}: on the {config.split.use} half alone, {left} examples are left out"
        )

    @cache
    def length(name: str) -> int:
        return examples[name].num_supervised

    @lru_cache(maxsize=1)
    def plan(epoch: int) -> list[Step]:
        entries = epoch_pairs(
            halves,
            seed=config.seed,
            epoch=epoch,
            alpha=config.mixup.alpha,
            pairing=config.mixup.pairing,
            length=length,
        )
        return plan_steps(entries, examples, epoch=epoch, **_sizes(config))

    weight = config.mixup.weight if config.train.method == "sftmix" else 0.0
    trainer = Trainer(
        config, model, examples, Path(folder), plan=plan, epochs=config.train.epochs, mixup_weight=weight,
        stage=f"train-{config.train.method}", pad_id=pad_id, progress=progress, identity=identity,
    )  # fmt: skip
    if weight:
        say(f"train {config.train.method}: {_unmixed(plan(0), config.mixup.pairing)}")
    trainer.run()
    return trainer


def _unmixed(steps: list[Step], pairing: str) -> str:
    """What the first epoch's pairs leave unmixed, in words."""
    tokens = sum(step.num_supervised for step in steps)
    cut = sum(step.num_cut for step in steps)
    alone = tokens - cut - 2 * sum(step.num_mixed for step in steps)
    told = (
        f"pairing {pairing}: {cut / tokens:.1%} of the tokens that bear loss are cut by the shorter partner"
    )
    return told + (f", {alone / tokens:.1%} have none" if alone else "")


def train_plain(
    config: Config, model: SFTMixModel, examples: Mapping[str, TokenizedExample], *,
    folder: str | Path, pad_id: int = 0, on_point: OnPoint | None = None, progress: Progress | None = None,
    identity: Mapping[str, Any] | None = None,
) -> list[Row]:  # fmt: skip
    """The reference run: next-token prediction on single examples for ``config.reference.epochs`` epochs.

    ``on_point(index, step)`` is called at ``reference.checkpoints_per_epoch`` evenly spaced steps of each
    epoch, on every process; a resumed run calls it again for the points of the epoch it repeats. Returns the
    online dynamics: one row per example and epoch, taken while training, as ``write_dynamics`` wants them.
    ``identity``: see ``Trainer``.
    """

    def plan(epoch: int) -> list[Step]:
        entries = plain_entries(epoch_order(list(examples), seed=config.seed, epoch=epoch))
        return plan_steps(entries, examples, epoch=epoch, **_sizes(config))

    trainer = Trainer(
        config, model, examples, Path(folder), plan=plan, epochs=config.reference.epochs, mixup_weight=0.0,
        stage="reference", pad_id=pad_id, progress=progress, on_point=on_point,
        points_per_epoch=config.reference.checkpoints_per_epoch, online=True, identity=identity,
    )  # fmt: skip
    trainer.run()
    if config.reference.dynamics != "checkpoint" and trainer.total % trainer.steps_per_epoch:
        say(
            "reference: online scores of the last epoch are left out, train.max_steps ends it before all were met"
        )
    return trainer.online.rows


def _sizes(config: Config) -> dict[str, int]:
    return {"batch_size": config.train.batch_size, "micro_batch_size": config.train.micro_batch_size}

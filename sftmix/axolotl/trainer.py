"""``AxolotlSFTMixTrainer``: axolotl's trainer, whose loss is SFTMix and whose batches are pairs.

Data, templates, masks, model, adapters, optimizer and saving are axolotl's. An example's id is a hash of its tokens and
labels, as axolotl keeps no other column of a conversation; examples with the same ones are told apart by -2, -3.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from axolotl.core.trainers.base import AxolotlTrainer
from datasets import Dataset
from transformers import Trainer

from sftmix.axolotl.section import SFTMixSection
from sftmix.scores.confidence import read_split
from sftmix.transformers.pairs import PairDataset
from sftmix.transformers.training import PairTraining


class AxolotlSFTMixTrainer(PairTraining, AxolotlTrainer):  # type: ignore[misc]
    """Built by axolotl, see ``SFTMixPlugin``; ``args`` gets the fields of ``section``.

    Raises ``ValueError`` for a data set that is a stream or empty, a model that has another loss, and scores that are
    not those of the examples.
    """

    tag_names = ["axolotl", "sftmix"]  # noqa: RUF012  # axolotl's own name and type

    section: SFTMixSection

    def __init__(self, model: Any, args: Any, **options: Any) -> None:
        for field in dataclasses.fields(self.section):
            setattr(args, field.name, getattr(self.section, field.name))
        super().__init__(model, args, **options)
        if not isinstance(self.train_dataset, Dataset):
            raise ValueError(
                f"train_dataset: expected a datasets.Dataset, whose examples can be paired, got "
                f"{type(self.train_dataset).__name__}"
            )
        self.prepare_pairs(None, None if self.args.split is None else read_split(self.args.split))

    def next_token_run(self, args: Any) -> PairTraining:
        run: Any = super().next_token_run(args)
        run.axolotl_cfg = self.axolotl_cfg
        return run

    def _get_dataloader(self, dataset: Any, *arguments: Any, **options: Any) -> Any:
        """axolotl's reads columns and packs; pairs have none."""
        kind = Trainer if isinstance(dataset, PairDataset) else AxolotlTrainer
        return kind._get_dataloader(self, dataset, *arguments, **options)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if self.args.include_tkps and "rows" in inputs:
            self._count_tokens(inputs)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def _count_tokens(self, inputs: dict[str, Any]) -> None:
        """What axolotl's tokens per second are made of: tokens that bear loss, and places, over all processes."""
        here = torch.tensor([[inputs["rows"].numel(), inputs["input_ids"].numel()]], device=self.args.device)
        trainable, total = self.accelerator.gather(here).sum(0).cpu()
        state: Any = self.state
        before = getattr(state, "tokens", {"trainable": torch.zeros(1), "total": torch.zeros(1)})
        state.tokens = {
            "trainable": before["trainable"] + trainable, "total": before["total"] + total
        }  # fmt: skip

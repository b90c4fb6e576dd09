"""The pairs of an epoch as a dataset, its sampler and its collator, for transformers' ``Trainer``.

A number k asks for place k % n of epoch k // n: what stands there is a pure function of the seed, in the workers of
a data loader too, and after a resumption. A pair's members are neighbours, so that a batch of an even size holds whole
pairs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from sftmix.config import MixupConfig
from sftmix.data.tokenized import TokenizedExample
from sftmix.progress import say
from sftmix.scores.halves import Split
from sftmix.training.batch import PairItem, check_batch, collate_pairs, count_mixed
from sftmix.training.pairs import Pair, draw_lam, epoch_order, epoch_pairs
from sftmix.training.plan import plain_entries

IGNORED = -100


def tokenized(name: str, input_ids: Sequence[int], labels: Sequence[int]) -> TokenizedExample:
    """An example of TRL's columns: a label of -100 bears no loss, and another one than the token replaces it.

    The first token's label is not trained: nothing predicts it.
    """
    if len(input_ids) != len(labels):
        raise ValueError(f"labels: expected [T={len(input_ids)}] for {name}, got [{len(labels)}]")
    supervised = tuple(at > 0 and label != IGNORED for at, label in enumerate(labels))
    replaced = tuple(
        (at, int(label))
        for at, (token, label) in enumerate(zip(input_ids, labels, strict=True))
        if supervised[at] and label != token
    )
    return TokenizedExample(name, tuple(map(int, input_ids)), supervised, replaced=replaced)


class Examples(Mapping[str, TokenizedExample]):
    """A dataset's examples by id, each made when it is asked for: Python's numbers take nine times Arrow's memory."""

    def __init__(self, dataset: Any, index: Mapping[str, int]) -> None:
        self.dataset, self.index = dataset, index

    def __getitem__(self, name: str) -> TokenizedExample:
        row = self.dataset[self.index[name]]
        return tokenized(name, row["input_ids"], row["labels"])

    def __iter__(self) -> Iterator[str]:
        return iter(self.index)

    def __len__(self) -> int:
        return len(self.index)


def examples_of(dataset: Any, id_column: str) -> Examples:
    """The examples of a dataset that TRL prepared (``input_ids``, ``labels``), by ``id_column`` where there is one.

    Without it an id is a hash of tokens and labels; equal ones are told apart by -2, -3. Raises ``ValueError`` for an
    id that two rows have, or that is missing, and for an example without a token that bears loss.
    """
    columns = dataset.column_names
    has_ids = id_column in columns
    dataset = dataset.select_columns(["input_ids", "labels", *([id_column] if has_ids else [])])
    index: dict[str, int] = {}
    seen: dict[str, int] = {}
    for at, row in enumerate(dataset):
        if has_ids:
            if row[id_column] is None:
                raise ValueError(f"{id_column}: expected an id for every row, got none in row {at}")
            name = str(row[id_column])
            if name in index:
                raise ValueError(
                    f"{id_column}: expected every id once, got {name!r} in rows {index[name]} and {at}"
                )
        else:
            name = hashlib.sha256(repr((row["input_ids"], row["labels"])).encode()).hexdigest()[:16]
            seen[name] = seen.get(name, 0) + 1
            name += f"-{seen[name]}" if seen[name] > 1 else ""
        if not any(label != IGNORED for label in row["labels"][1:]):
            raise ValueError(
                f"train_dataset: expected a token that bears loss in every example, got none in {name}"
            )
        index[name] = at
    if not index:
        raise ValueError("train_dataset: expected at least one example, got none")
    if len(seen) < len(index) and not has_ids:
        say(
            f"train_dataset: {len(index) - len(seen)} of {len(index)} examples have the tokens and labels of another "
            "one: their ids are told apart by -2, -3"
        )
    return Examples(dataset, index)


@dataclass(frozen=True)
class Place:
    """One place of an epoch: the example there, and the pair that it is a member of."""

    name: str
    pair: Pair
    is_confident: bool


class PairDataset(Dataset[dict[str, Any]]):
    """The training examples in the order of their pairs, epoch after epoch; ``split`` None: single examples."""

    def __init__(
        self, examples: Mapping[str, TokenizedExample], split: Split | None, *, seed: int, alpha: float,
        pairing: str = "random",
    ) -> None:  # fmt: skip
        self.examples, self.split, self.seed, self.alpha = examples, split, seed, alpha
        self.pairing = pairing
        self._epoch, self._places = -1, list[Place]()

    def __len__(self) -> int:
        return len(self.examples)

    def places(self, epoch: int) -> list[Place]:
        """What stands where in an epoch."""
        if epoch != self._epoch:
            if self.split is None:
                entries = plain_entries(epoch_order(self.examples, seed=self.seed, epoch=epoch))
            else:
                entries = epoch_pairs(
                    self.split, seed=self.seed, epoch=epoch, alpha=self.alpha, pairing=self.pairing,
                    length=lambda name: self.examples[name].num_supervised,
                )  # fmt: skip
            places = []
            for pair in entries:
                places.append(Place(pair.confident, pair, True))
                if pair.unconfident is not None:
                    places.append(Place(pair.unconfident, pair, False))
            self._epoch, self._places = epoch, places
        return self._places

    def __getitem__(self, key: int) -> dict[str, Any]:
        epoch, at = divmod(key, len(self))
        place = self.places(epoch)[at]
        return {"example": self.examples[place.name], "place": place, "epoch": epoch, "at": at}


class PairSampler(Sampler[int]):
    """The places of the epoch that was set, in order."""

    def __init__(self, size: int) -> None:
        self.size, self.epoch = size, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        yield from range(self.epoch * self.size, (self.epoch + 1) * self.size)


class PairCollator:
    """Places to a batch: what the model is given, labels in the same order, and the row plan of the loss.

    ``packed``: one row without padding, for a model that can read it. ``step_size``: examples of an optimizer step over
    accumulation and processes, for one lambda a step. A member whose partner is in another batch (what
    accelerate adds to an epoch's last batch to give all processes as many) trains unmixed.
    """

    def __init__(
        self, mixup: MixupConfig, *, seed: int, pad_id: int, vocab_size: int, packed: bool, step_size: int
    ) -> None:
        self.mixup, self.seed, self.pad_id, self.packed = mixup, seed, pad_id, packed
        self.vocab_size, self.step_size = vocab_size, step_size

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        by_pair: dict[int, list[Mapping[str, Any]]] = {}
        for item in items:
            by_pair.setdefault(item["place"].pair.index, []).append(item)
        pairs: list[PairItem] = []
        for members in by_pair.values():
            confident = [m["example"] for m in members if m["place"].is_confident]
            others = [m["example"] for m in members if not m["place"].is_confident]
            for one, other in zip(confident, others, strict=False):
                pairs.append((one, other, self._lam(one, other, members[0])))
            rest = confident[len(others) :] + others[len(confident) :]
            pairs += [(single, None, 1.0) for single in rest]
        batch = collate_pairs(pairs, pad_id=self.pad_id, packed=self.packed)
        check_batch(batch, self.vocab_size)
        labels = torch.full_like(batch.input_ids.flatten(), IGNORED)
        labels[batch.rows + 1] = batch.target
        found = {
            "input_ids": batch.input_ids, "labels": labels.view_as(batch.input_ids), "rows": batch.rows,
            "target": batch.target, "lam": batch.lam, "example": batch.example, "ids": batch.ids,
        }  # fmt: skip
        if batch.attention_mask is not None:
            found["attention_mask"] = batch.attention_mask
        else:
            found |= {"position_ids": batch.position_ids, "starts": batch.starts}
        return found

    def _lam(self, one: TokenizedExample, other: TokenizedExample, item: Mapping[str, Any]) -> Any:
        pair = item["place"].pair
        if self.mixup.lam == "pair":
            return pair.lam
        key = {"seed": self.seed, "epoch": item["epoch"], "alpha": self.mixup.alpha}
        if self.mixup.lam == "batch":
            return draw_lam(**key, index=item["at"] // self.step_size)
        return draw_lam(**key, index=pair.index, size=count_mixed(one, other))


def rows_of(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and targets of labels [B, T]: indices into the flattened positions [N], and what each predicts [N]."""
    at = (labels[:, 1:] != IGNORED).nonzero(as_tuple=True)
    rows = at[0] * labels.shape[1] + at[1]
    return rows, labels[:, 1:][at]

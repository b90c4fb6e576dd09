"""Training dynamics from any ``Trainer``, at no pass of their own: ``TrainingDynamicsCallback``.

The scores are those of the training's own forwards, taken where the model's output leaves them: logits, TRL's fused
log-probabilities, or the values of ``patch_lm_head``. What an example is called comes from its tokens: a batch has no
ids, so each sequence is told by a hash of its tokens, which the training data's own hashes name.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import TrainerCallback

from sftmix.model.parallel import World, gather_objects, join_world
from sftmix.progress import say
from sftmix.rank import is_main
from sftmix.scores.confidence import make_split
from sftmix.scores.dynamics import (
    SCHEMA,
    accumulate,
    read_dynamics,
    read_rows,
    to_table,
    write_dynamics,
    write_table,
)

IGNORED = -100
FILE, PICTURE = "dynamics.parquet", "data_map.png"
CHUNK = 1 << 24  # logits that are turned to float32 at a time


class TrainingDynamicsCallback(TrainerCallback):  # type: ignore[misc]
    """Writes ``dynamics.parquet`` (every example's NLL and top-1 share in every epoch) and a data map at the end.

    ``path``: the file, by default ``dynamics.parquet`` in the trainer's output folder, with ``data_map.png`` beside it.
    ``trainer``: the one it is added to, whose ``train_dataset`` has the column ``id_column``; without it, or without
    such a column, an example's id is its row's number (a trainer hands its data loader no columns that the model does
    not read). Examples of equal tokens get the same scores. They are saved with the trainer's checkpoints, and read
    from the one that is resumed.

    Raises ``ValueError`` as the training begins for a dataset without ``input_ids`` or without a length, and for packed
    examples; and while it runs for a sequence that is not in the dataset.
    """

    def __init__(self, path: str | Path | None = None, *, trainer: Any = None, id_column: str = "id") -> None:
        self.path = None if path is None else Path(path)
        self.trainer, self.id_column = trainer, id_column
        self.rows: list[dict[str, Any]] = []
        self._pending: list[
            tuple[Tensor, Tensor]
        ] = []  # hashes [B] and sums [B, 3] of batches, on the device
        self._names: dict[int, list[str]] = {}
        self._hook: Any = None
        self._world = World()

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **options: Any) -> None:
        self.path = self.path or Path(args.output_dir) / FILE
        self._world = join_world(args.device) if dist.is_initialized() else World()
        dataset = options["train_dataloader"].dataset if self.trainer is None else self.trainer.train_dataset
        self._names = names_by_hash(dataset, self.id_column)
        self.rows, self._pending = [], []
        saved = Path(args.output_dir) / f"checkpoint-{state.global_step}" / FILE
        if state.global_step and saved.exists():
            self.rows = read_rows(saved)
        elif state.global_step:
            say(f"dynamics: {saved} is missing; the scores of the epoch under way are not whole")
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._hook = base.register_forward_hook(self._take, with_kwargs=True)

    def _take(self, model: Any, args: Any, inputs: dict[str, Any], output: Any) -> None:
        """A training forward's sums per sequence; queued, nothing is read from the device."""
        labels = inputs.get("labels")
        if not model.training or not torch.is_grad_enabled():
            return
        if labels is None:
            raise ValueError(
                "labels: expected them among the model's inputs, got none: a loss of one's own hides them"
            )
        with torch.no_grad():
            nll, top1, at = row_values(output, labels)
            hashes, sequence = hashes_of(inputs)
            sums = accumulate(nll, top1, sequence.flatten()[at], len(hashes))
            values = [sums.nll_sum, sums.num_tokens.double(), sums.num_top1.double()]
            self._pending.append((hashes, torch.stack(values, 1)))

    def _collect(self, epoch: int) -> None:
        """Put all processes' sums among the rows, each example once."""
        local = [
            (key, *values)
            for keys, sums in self._pending
            for key, values in zip(keys.tolist(), sums.tolist(), strict=True)
        ]
        self._pending = []
        known = {row["example"] for row in self.rows if row["checkpoint"] == epoch}
        for key, nll, tokens, top1 in (item for part in gather_objects(local, self._world) for item in part):
            if key not in self._names:
                raise ValueError(
                    "train_dataset: expected every sequence that is trained, got one that is not in it"
                )
            for name in self._names[key]:
                if name not in known and tokens:
                    known.add(name)
                    row = {
                        "example": name,
                        "checkpoint": epoch,
                        "step": 0,
                        "nll_sum": nll,
                        "source": "online",
                    }
                    self.rows.append({**row, "num_tokens": int(tokens), "top1_share": top1 / tokens})

    def on_epoch_end(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        epoch = epoch_of(state)
        self._collect(epoch)
        total = sum(map(len, self._names.values()))
        ours = [row for row in self.rows if row["checkpoint"] == epoch]
        self.rows = [row for row in self.rows if row["checkpoint"] != epoch]
        if len(ours) < total:
            say(f"dynamics: {len(ours)} of {total} examples were met in epoch {epoch}: it has no scores")
            return
        self.rows += sorted(
            ({**row, "step": state.global_step} for row in ours), key=lambda row: str(row["example"])
        )

    def on_save(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        if is_whole_epoch(state):  # a save at the epoch's last step comes before the epoch's end is told
            self.on_epoch_end(args, state, control)
        self._collect(epoch_of(state))
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if is_main() and self.rows and folder.is_dir():
            write_table(folder / FILE, to_table(self.rows, SCHEMA, "dynamics"))

    def on_train_end(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        if not is_main() or not self.rows:
            return
        assert self.path is not None
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_dynamics(self.path, self.rows)
        found = read_dynamics(self.path)
        if len(found.examples) >= 2:
            from sftmix.evaluation.plots import plot_data_map

            plot_data_map(found, make_split(found), self.path.with_name(PICTURE))
        say(f"dynamics: {self.path}, {len(found.examples)} examples at {found.num_checkpoints} epochs")


def epoch_of(state: Any) -> int:
    """The epoch (from 0) of the newest step of a trainer, by its ``state``."""
    return max(0, math.ceil(float(state.epoch or 0) - 1e-6) - 1)


def is_whole_epoch(state: Any) -> bool:
    """Whether the newest step was its epoch's last."""
    epoch = float(state.epoch or 0)
    return epoch > 0 and abs(epoch - round(epoch)) < 1e-6


def row_values(output: Any, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """NLL [N] float32, top-1 [N] bool and flattened position [N] of the rows that bear loss, from a model's output."""
    target = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED).flatten()
    at = (target != IGNORED).nonzero(as_tuple=True)[0]
    ours = getattr(output, "sftmix", None)
    if ours is not None:
        return ours.nll, ours.is_top1, at
    fused = getattr(output, "log_probs", None)
    if fused is not None:
        told = torch.nn.functional.pad(torch.stack([fused.float(), output.is_top1.float()]), (0, 1)).flatten(
            1
        )[:, at]
        return -told[0], told[1] > 0.5, at
    if getattr(output, "logits", None) is None or output.logits.dim() != 3:
        raise ValueError(
            "model: expected logits, TRL's fused head or patch_lm_head's in its output, got none"
        )
    logits = output.logits.flatten(0, 1)
    nll, top1 = [], []
    for part in at.split(max(1, CHUNK // logits.shape[-1])):
        chunk = logits[part].float()
        nll.append(torch.nn.functional.cross_entropy(chunk, target[part], reduction="none"))
        top1.append(chunk.argmax(-1) == target[part])
    return torch.cat(nll), torch.cat(top1), at


def hashes_of(inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """A hash of each sequence's tokens [S] int64, and which sequence each position [B, T] belongs to.

    Sequences are rows without their padding, on either side, or the documents of a flattened row.
    """
    ids, mask, positions = inputs["input_ids"], inputs.get("attention_mask"), inputs.get("position_ids")
    if mask is None and positions is not None and ids.shape[0] == 1:
        sequence = (positions == 0).cumsum(-1) - 1
        cuts = inputs.get("cu_seq_lens_q")
        count = len(cuts) - 1 if cuts is not None else int(sequence[0, -1]) + 1
        is_token = torch.ones_like(ids)
    else:
        is_token = torch.ones_like(ids) if mask is None else mask.to(ids.dtype)
        positions = (is_token.cumsum(-1) - 1).clamp(min=0)
        count = ids.shape[0]
        sequence = torch.arange(count, device=ids.device)[:, None].expand_as(ids)
    factors = _factors(ids.shape[1]).to(ids.device)
    terms = (ids.long() + 1) * factors[positions.long()] * is_token
    return torch.zeros(count, dtype=torch.int64, device=ids.device).index_add_(
        0, sequence.flatten(), terms.flatten()
    ), sequence


def _factors(length: int) -> Tensor:
    """Odd factors [length] int64, always the same: a hash is the sum of (token + 1) times its place's, modulo 2^64."""
    size = 1 << max(12, (length - 1).bit_length())
    if size not in _FACTORS:
        # Drawn one block of 4,096 after the other, so that a longer table begins with the shorter one.
        generator = torch.Generator().manual_seed(0)
        blocks = [torch.randint(-(2**62), 2**62, (4096,), generator=generator) for _ in range(size // 4096)]
        _FACTORS[size] = 2 * torch.cat(blocks) + 1
    return _FACTORS[size]


_FACTORS: dict[int, Tensor] = {}


def names_by_hash(dataset: Any, id_column: str) -> dict[int, list[str]]:
    """The ids of a dataset's examples by the hash of their tokens. Raises ``ValueError`` for what has none."""
    columns = getattr(dataset, "column_names", None)
    if not hasattr(dataset, "__len__"):
        raise ValueError("train_dataset: expected one with a length, got a stream")
    if columns is not None and "seq_lengths" in columns:
        raise ValueError("packing: expected False, as packed examples cannot be told apart, got True")
    found: dict[int, list[str]] = {}
    for at, row in enumerate(dataset):
        if "input_ids" not in row:
            raise ValueError(f"train_dataset: expected a column input_ids, got {', '.join(row)}")
        ids = torch.as_tensor(row["input_ids"])[None]
        mask = row.get("attention_mask")
        inputs = {"input_ids": ids, "attention_mask": None if mask is None else torch.as_tensor(mask)[None]}
        name = row.get(id_column)
        found.setdefault(int(hashes_of(inputs)[0]), []).append(str(at) if name is None else str(name))
    return found

"""What two processes of torchrun do for ``test_ranks``: train with DDP and leave weights, records and scores."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from tests.recipe import tiny
from tests.recipe.trl.small import dataset, trainer, weights


def main(out: Path) -> None:
    examples = tiny.examples(24, longest=20)
    split = tiny.halves(examples)
    for name, changes in (("mixed", {}), ("token", {"mixup_lam": "token"})):
        found = trainer(
            out / name, rows=dataset(examples), split=split, per_device_train_batch_size=2, **changes
        )
        found.train()
        if dist.get_rank() == 0:
            kept = {
                "weights": weights(found.model),
                "log": found.state.log_history,
                "rows": found.dynamics_rows,
            }
            torch.save(kept, out / f"{name}.pt")
    told = {"rows": dataset(examples), "split": split, "per_device_train_batch_size": 2}
    saving = {"save_strategy": "steps", "save_steps": 1}
    whole, again = (trainer(out / folder, **told, **saving) for folder in ("whole", "again"))
    whole.train()
    resumed = True
    try:
        again.train(resume_from_checkpoint=str(out / "whole" / "checkpoint-4"))
    except RuntimeError as error:  # torch 2.11 knows no device cpu:0, which transformers asks it for
        if "restore data location" not in str(error):
            raise
        resumed = False
    if dist.get_rank() == 0 and resumed:
        ends = {name: (weights(t.model), t.dynamics_rows) for name, t in (("whole", whole), ("again", again))}
        torch.save(ends, out / "resumed.pt")
    uneven = trainer(
        out / "uneven", per_device_train_batch_size=2
    )  # eleven batches: accelerate adds one again
    uneven.train()
    if dist.get_rank() == 0:
        torch.save({"rows": uneven.dynamics_rows, "steps": uneven.state.global_step}, out / "uneven.pt")
    online = trainer(
        out / "online",
        rows=dataset(examples),
        reference="online",
        per_device_train_batch_size=2,
        num_train_epochs=1,
    )
    online.train()
    if dist.get_rank() == 0:
        torch.save({"split": online.split.confident, "weights": weights(online.model)}, out / "online.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

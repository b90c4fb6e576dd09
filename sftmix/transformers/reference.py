"""The reference run of ``reference="online"``: next-token training on the trainer's own data, for its scores alone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sftmix.progress import say
from sftmix.scores.dynamics import Dynamics, read_dynamics, write_dynamics
from sftmix.training.randomness import own_randomness

if TYPE_CHECKING:
    from sftmix.transformers.training import PairTraining


def online_dynamics(trainer: PairTraining, path: Path) -> Dynamics:
    """Every example's scores, from ``path`` where an earlier call left them, else from a run of whole epochs.

    The model's trained weights, which the run changes, are as they were afterwards, and so is randomness. The run is
    that of the trainer's own arguments for ``reference_epochs`` (``max_steps``, evaluation and checkpoints aside).
    Raises ``ValueError`` where weights cannot be put back: sharded ones, and an optimizer of the caller's own.
    """
    if path.exists():
        say(f"reference: scores of {path} are used")
        return read_dynamics(path)
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise ValueError(
            "reference: expected None with sharded weights, got 'online': train the reference in a run of its own "
            "(TrainingDynamicsCallback writes dynamics.parquet) and pass dynamics="
        )
    if trainer.optimizer is not None:
        raise ValueError(
            "reference: expected None beside an optimizer of one's own, which it would use up, got 'online'"
        )
    args = copy.copy(trainer.args)
    args.output_dir, args.num_train_epochs, args.max_steps = str(path.parent), args.reference_epochs, -1
    args.eval_strategy = args.save_strategy = "no"
    args.load_best_model_at_end = args.push_to_hub = args.eval_on_start = False
    args.mixup_ntp_weight = 1.0  # it trains next-token, whatever the run after it does
    weights = [p for p in trainer.model.parameters() if p.requires_grad]
    start = [p.detach().to("cpu", copy=True) for p in weights]
    say(f"reference: next-token training for {args.reference_epochs} epochs, for the scores")
    with own_randomness(torch.device(args.device)):
        run = trainer.next_token_run(args)
        run.train_plain()
    if trainer.is_world_process_zero():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_dynamics(path, run.online.rows)
    trainer.accelerator.wait_for_everyone()
    with torch.no_grad():
        for weight, before in zip(weights, start, strict=True):
            weight.copy_(before)
            weight.grad = None
    run.accelerator.free_memory()
    return read_dynamics(path)

"""What ``SFTMixTrainer`` cannot be beside: refused by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from datasets import Dataset
from trl.trainer import sft_trainer

from sftmix.trl.config import SFTMixConfig


@contextmanager
def without_trls_head() -> Iterator[None]:
    """Let a trainer be made without TRL's fused head, which has no place for ours."""
    name = "add_fused_lm_head"
    before = getattr(sft_trainer, name, None)
    if before is None:  # another version of TRL
        yield
        return
    setattr(sft_trainer, name, lambda *arguments, **options: None)
    try:
        yield
    finally:
        setattr(sft_trainer, name, before)


def check_options(args: SFTMixConfig, options: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` for what the trainer cannot be beside."""
    refused = (
        ("compute_loss_func", options.get("compute_loss_func") is not None, "None, as the loss is SFTMix's"),
        (
            "use_liger_kernel",
            bool(args.use_liger_kernel),
            "False, as its head would stand in the place of ours",
        ),
        ("label_smoothing_factor", args.label_smoothing_factor > 0, "0, as the loss is SFTMix's"),
        ("deepspeed", args.deepspeed is not None, "None: use fsdp, whose parameters the head can see"),
    )
    for name, is_given, expected in refused:
        if is_given:
            raise ValueError(
                f"{name}: expected {expected}, got {options.get(name, getattr(args, name, True))!r}"
            )
    dataset = options.get("train_dataset")
    if dataset is not None and not isinstance(dataset, Dataset):
        raise ValueError(
            f"train_dataset: expected a datasets.Dataset, whose examples can be paired, got {type(dataset).__name__}"
        )


def check_made(trainer: Any) -> None:
    """The same for what only the made trainer knows."""
    if trainer.train_dataset is None:
        raise ValueError("train_dataset: expected a datasets.Dataset, got None")
    if getattr(trainer, "_is_vision_dataset", False):
        raise ValueError("train_dataset: expected text alone, got images")
    parallel = getattr(trainer.accelerator, "parallelism_config", None)
    if parallel is not None and (
        getattr(parallel, "cp_enabled", False) or getattr(parallel, "sp_enabled", False)
    ):
        raise ValueError("parallelism_config: expected no context or sequence parallelism, got one")

"""The section ``sftmix:`` of an axolotl YAML file, and the options of axolotl that cannot stand beside it.

axolotl merges ``SFTMixArgs`` into the class that its whole file is validated by, so that the checks here see every
option, with axolotl's defaults and those of its other plugins.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator

from sftmix.transformers.arguments import PairArguments

PLUGIN = "sftmix.axolotl.SFTMixPlugin"
_PACKING = "false, as it joins examples before they can be paired (sftmix: padding_free: true has no padding)"
_LOSS = "false, as the loss is SFTMix's"
_ORDER = "false, as the batches are those of the pairs"
_TRAINER = "none, as the trainer is SFTMix's"
_STREAM = "none, as examples of a stream cannot be paired"
_ONE = "1, as a sequence, its head and its experts are whole on every process"
_MOVING = "none, as weights change hands during training, which was not tried beside SFTMix"
# Options of axolotl and of its plugins that are refused where they are set, and what is expected instead.
REFUSED = {
    "sample_packing": _PACKING, "eval_sample_packing": _PACKING, "batch_flattening": _PACKING,
    "cut_cross_entropy": _LOSS, "chunked_cross_entropy": _LOSS, "flash_attn_cross_entropy": _LOSS,
    "liger_cross_entropy": _LOSS, "liger_fused_linear_cross_entropy": _LOSS, "use_eaft": _LOSS, "orpo_alpha": _LOSS,
    "group_by_length": _ORDER, "curriculum_sampling": _ORDER, "auto_find_batch_size": _ORDER,
    "streaming": _STREAM, "pretraining_dataset": _STREAM,
    "rl": _TRAINER, "reward_model": _TRAINER, "process_reward_model": _TRAINER, "trainer_cls": _TRAINER,
    "kd_trainer": _TRAINER,
    "context_parallel_size": _ONE, "sequence_parallel_degree": _ONE, "tensor_parallel_size": _ONE,
    "expert_parallel_size": _ONE,
    "deepspeed": "none: use fsdp_config, whose parameters the head can see",
    "processor_type": "none, as text alone is trained", "use_pose": "false, as positions are the tokens' own",
    "relora": _MOVING, "lisa_step_interval": _MOVING, "qat": _MOVING, "use_ray": "false, which was not tried",
}  # fmt: skip


@dataclass
class SFTMixSection(PairArguments):
    """The section itself: where the halves come from and how they are mixed; a key that is not a field is refused."""

    split: str | None = field(default=None, metadata={"help": "split.parquet, the two halves by id."})
    padding_free: bool = field(
        default=False,
        metadata={"help": "A training batch is one row without padding, where the model can read it."},
    )

    __pydantic_config__ = ConfigDict(extra="forbid")

    def __post_init__(self) -> None:
        self.check_pairs()
        given = [name for name in ("reference", "dynamics", "split") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                "sftmix: expected one of reference: online, dynamics: FILE and split: FILE, which say where the "
                f"halves come from, got {' and '.join(given) or 'none'}"
            )


class SFTMixArgs(BaseModel):
    """What the plugin adds to axolotl's file."""

    sftmix: SFTMixSection | None = None

    @model_validator(mode="after")
    def refuse_what_cannot_be_beside(self) -> Any:
        """Raise ``ValueError`` naming the option."""
        check_file(self)
        return self


def check_file(found: Any) -> None:
    """The same for any object that has axolotl's options as attributes."""
    listed = PLUGIN in (getattr(found, "plugins", None) or ())
    if found.sftmix is None:
        if listed:
            raise ValueError("sftmix: expected a section, e.g. sftmix: {reference: online}, got none")
        return
    for name, expected in REFUSED.items():
        value = getattr(found, name, None)
        if value and not (expected is _ONE and value == 1):
            raise ValueError(f"{name}: expected {expected}, got {value!r}")
    size = getattr(found, "micro_batch_size", None)
    if size is not None and size % 2:
        raise ValueError(f"micro_batch_size: expected an even number, whole pairs, got {size}")

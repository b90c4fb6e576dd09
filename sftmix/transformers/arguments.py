"""The knobs of SFTMix among a trainer's arguments, whoever's trainer it is: ``PairArguments``."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from sftmix.knobs import check_range
from sftmix.sections import MixupConfig

REFERENCES = ("online",)


@dataclass
class PairArguments:
    """Where the halves come from and how they are mixed; a base of a trainer's own arguments."""

    mixup_weight: float = field(
        default=0.2,
        metadata={"help": "Weight mu of the Mixup term; 0 is next-token loss on the same batches."},
    )
    mixup_alpha: float = field(
        default=0.5,
        metadata={"help": "lambda, the weight of the confident member, is drawn from Beta(alpha, alpha)."},
    )
    mixup_lam: str = field(
        default="pair",
        metadata={"help": "One lambda per 'pair', per mixed 'token', or per 'batch', an optimizer step."},
    )
    mixup_ntp_weight: float = field(
        default=1.0, metadata={"help": "Weight of the next-token term beside it; 0 is Mixup alone."}
    )
    mixup_schedule: str = field(
        default="constant",
        metadata={"help": "mu over the run: 'constant', 'linear' or 'cosine', falling to 0."},
    )
    mixup_warmup_ratio: float = field(
        default=0.0, metadata={"help": "Share of all steps over which mu rises from 0."}
    )
    mixup_pairing: str = field(
        default="random",
        metadata={"help": "Partners at 'random', or of similar 'length' among 64 at random."},
    )
    dynamics: str | None = field(
        default=None, metadata={"help": "dynamics.parquet with the scores of every training example, by id."}
    )
    reference: str | None = field(
        default=None,
        metadata={
            "help": "'online': without scores, train next-token first, on the same data, and take them there."
        },
    )
    reference_epochs: int = field(default=1, metadata={"help": "Epochs of the reference run."})
    id_column: str = field(
        default="id",
        metadata={"help": "Column with the examples' ids; without it an id is a hash of the tokens."},
    )
    sftmix_impl: str | None = field(
        default=None,
        metadata={"help": "The loss: 'fused', 'chunked' or 'reference'; None takes the fastest here."},
    )

    def check_pairs(self) -> None:
        """Raise ``ValueError`` naming the option for a value that it cannot have."""
        for item in dataclasses.fields(MixupConfig):
            name = f"mixup_{item.name}"
            check_range(name, getattr(self, name), item.metadata)
        if self.mixup_weight == self.mixup_ntp_weight == 0:
            self.refuse("mixup_ntp_weight", "more than 0 beside mixup_weight=0, which leaves no loss")
        if self.reference is not None and self.reference not in REFERENCES:
            self.refuse("reference", "'online' or None")
        if self.reference is not None and self.dynamics is not None:
            self.refuse("reference", "None beside dynamics, which has the scores already")
        if self.reference_epochs < 1:
            self.refuse("reference_epochs", "at least 1")

    def refuse(self, name: str, expected: str) -> None:
        raise ValueError(f"{name}: expected {expected}, got {getattr(self, name)!r}")


def mixup_of(args: Any) -> MixupConfig:
    """The knobs of the Mixup term as the recipe has them, from whatever arguments have the fields."""
    names = [item.name for item in dataclasses.fields(MixupConfig)]
    return MixupConfig(**{name: getattr(args, f"mixup_{name}") for name in names})

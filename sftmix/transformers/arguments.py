"""The knobs of SFTMix among a trainer's arguments, whoever's trainer it is: ``PairArguments``."""

from __future__ import annotations

from dataclasses import dataclass, field

from sftmix.sections import MixupConfig

REFERENCES = ("online",)
LAMS = ("pair", "token", "batch")


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
        MixupConfig(alpha=self.mixup_alpha, weight=self.mixup_weight, lam=self.mixup_lam)
        if not self.mixup_weight >= 0:
            self.refuse("mixup_weight", "a number of at least 0")
        if not self.mixup_alpha > 0:
            self.refuse("mixup_alpha", "a number above 0")
        if self.mixup_lam not in LAMS:
            self.refuse("mixup_lam", f"one of {', '.join(LAMS)}")
        if self.reference is not None and self.reference not in REFERENCES:
            self.refuse("reference", "'online' or None")
        if self.reference is not None and self.dynamics is not None:
            self.refuse("reference", "None beside dynamics, which has the scores already")
        if self.reference_epochs < 1:
            self.refuse("reference_epochs", "at least 1")

    def refuse(self, name: str, expected: str) -> None:
        raise ValueError(f"{name}: expected {expected}, got {getattr(self, name)!r}")

"""What a trainer logs of SFTMix: sums over all tokens since the newest log, over all processes."""

from __future__ import annotations

from collections.abc import Sequence

# Of a batch: NLL, mixup NLL, right tokens, tokens, mixed positions, entropy, tokens with one, tokens read.
PARTS = 8


class Window:
    """Sums of batches, apart for training and evaluation, and the metrics they come to."""

    def __init__(self) -> None:
        self.sums = {mode: [0.0] * PARTS for mode in ("train", "eval")}

    def add(self, mode: str, parts: Sequence[float]) -> None:
        self.sums[mode] = [a + b for a, b in zip(self.sums[mode], parts, strict=True)]

    def take(self, mode: str) -> dict[str, float]:
        """The metrics since the newest call, by TRL's names, and the parts of SFTMix's loss."""
        nll, mixup, top1, tokens, mixed, entropy, told, _ = self.sums[mode]
        self.sums[mode] = [0.0] * PARTS
        metrics: dict[str, float] = {}
        if tokens:
            metrics["mean_token_accuracy"] = top1 / tokens
            if told:
                metrics["entropy"] = entropy / told
            if mode == "train":
                metrics |= {"ntp_loss": nll / tokens, "mixed_share": 2 * mixed / tokens}
                if mixed:
                    metrics["mixup_loss"] = mixup / mixed
        return metrics

"""What an optimizer step leaves: sums on the device, read by the host once, and a line of metrics.jsonl."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sftmix.files import replacing
from sftmix.training.batch import Batch
from sftmix.training.plan import Step, chunk_ids
from sftmix_kernels import SFTMixLoss

Record = dict[str, Any]


def read_metrics(path: str | Path) -> list[Record]:
    """The records of a metrics file, in order; a last line cut short by a crash is left out.

    Raises ``ValueError`` naming the line for any other line that is not a JSON object with a step.
    """
    lines = Path(path).read_text(encoding="utf-8").splitlines(keepends=True)
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines) and not line.endswith("\n"):
                break
            raise ValueError(f"{path}: expected JSON in line {number}, got {line.strip()[:60]!r}") from error
        if not isinstance(record, dict) or "step" not in record:
            raise ValueError(f"{path}: expected a step in line {number}, got {line.strip()[:60]!r}")
        records.append(record)
    return records


class MetricsWriter:
    """Appends records; opening drops those after ``step``, which a resumed run is about to repeat."""

    def __init__(self, path: str | Path, *, step: int = 0) -> None:
        self.path = Path(path)
        kept = [r for r in read_metrics(path) if r["step"] <= step] if step and self.path.exists() else []
        with replacing(self.path) as temporary:
            temporary.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
        self._file = self.path.open("a", encoding="utf-8")

    def write(self, record: Record) -> None:
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class StepResults:
    """What a step's chunks leave on the device, read by the host once.

    ``denominators`` are the step's sums of weights. The two parts of the loss are reported as the weighted means
    they are in it, so that loss = ntp_loss + mu mixup_loss with weights too (and what the model adds by itself: its
    auxiliary loss, its z-loss); accuracy and counts are per token.
    """

    def __init__(self, step: Step, device: torch.device, denominators: tuple[float, float]) -> None:
        self.plan, self.denominators = step, denominators
        self.losses = torch.zeros(len(step.chunks), device=device)  # by chunk, so that a bad one can be named
        # Sums of weighted nll and mixup nll, of top-1, and of the auxiliary loss by shares of the step.
        self.parts = torch.zeros(4, dtype=torch.float64, device=device)

    def add(
        self, index: int, loss: SFTMixLoss, batch: Batch, *, aux: Tensor | None = None, share: float = 1.0
    ) -> None:
        self.losses[index] = loss.loss.detach()
        nll = loss.nll if batch.row_weight is None else batch.row_weight * loss.nll
        mixup = loss.mixup_nll if batch.pair_weight is None else batch.pair_weight * loss.mixup_nll
        parts = [
            nll.sum(),
            mixup.sum(),
            loss.is_top1.sum(),
            nll.new_zeros(()) if aux is None else share * aux,
        ]
        self.parts += torch.stack([part.double() for part in parts])

    def sums(self) -> Tensor:
        """Losses by chunk, then the four sums, float64."""
        return torch.cat([self.losses.double(), self.parts])

    def check(self, step: int, values: list[float]) -> None:
        """Raise ``ValueError`` naming the step and the examples of a loss or gradient that is not finite."""
        *losses, _nll, _mixup, _top1, _aux, grad_norm = values
        bad = [i for i, loss in enumerate(losses) if not math.isfinite(loss)]
        if not bad and math.isfinite(grad_norm):
            return
        what = "loss" if bad else "gradient norm"
        ids = [name for i in bad for name in chunk_ids(self.plan.chunks[i])] or self.plan.ids()
        raise ValueError(
            f"{what}: expected a finite number at step {step}, got {losses[bad[0]] if bad else grad_norm}; "
            f"examples: {', '.join(ids)}; the checkpoints before it are kept"
        )

    def record(self, values: list[float], mixup_weight: float, *, auxiliary: bool = False) -> Record:
        """The step's line; with ``auxiliary`` the model's own auxiliary loss, unweighted, is in it too."""
        *losses, nll, mixup, top1, aux, grad_norm = values
        step = self.plan
        has_mixup = mixup_weight != 0 and step.num_mixed > 0
        return {
            "loss": math.fsum(losses), "ntp_loss": nll / self.denominators[0],
            "mixup_loss": mixup / self.denominators[1] if has_mixup else None, "grad_norm": grad_norm,
            "num_tokens": step.num_supervised, "num_mixed": step.num_mixed,
            "token_accuracy": top1 / step.num_supervised, **({"aux_loss": aux} if auxiliary else {}),
        }  # fmt: skip

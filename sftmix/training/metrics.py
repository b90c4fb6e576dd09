"""What an optimizer step leaves: sums on the device, read by the host once, and a line of metrics.jsonl."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sftmix.config import Config
from sftmix.files import replacing
from sftmix.hardware import gpu_of
from sftmix.model.parallel import World, sum_over_world
from sftmix.progress import say
from sftmix.training.batch import Batch
from sftmix.training.plan import Step, chunk_ids
from sftmix.training.trackers import open_trackers
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
    """Appends records; opening drops those after ``step``, which a resumed run is about to repeat.

    A line that was damaged meanwhile is left out, with a word. ``report_to``: see ``trackers``.
    """

    def __init__(
        self, path: str | Path, *, step: int = 0, report_to: str | None = None, run: Config | None = None
    ) -> None:
        self.path = Path(path)
        kept = _kept(self.path, step) if step and self.path.exists() else []
        with replacing(self.path) as temporary:
            temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        self._file = self.path.open("a", encoding="utf-8")
        self._trackers = open_trackers(report_to, self.path.parent, run)

    def write(self, record: Record) -> None:
        """A number that is not finite is null: JSON has no word for it."""
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        self._file.write(json.dumps(finite, allow_nan=False) + "\n")
        self._file.flush()
        for tracker in self._trackers:
            tracker.log(finite)

    def close(self) -> None:
        self._file.close()
        for tracker in self._trackers:
            tracker.close()


def _kept(path: Path, step: int) -> list[str]:
    """The lines of whole records up to ``step``."""
    kept, bad = [], []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        try:
            if int(json.loads(line)["step"]) <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            bad.append(str(number))
    if bad:
        say(f"warning: {path}: left out what cannot be read: line {', '.join(bad)}")
    return kept


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
        sums = [nll.sum(), mixup.sum(), loss.is_top1.sum()] + ([] if aux is None else [share * aux])
        self.parts[: len(sums)] += torch.stack([each.double() for each in sums])

    def exchange(
        self, grad_norm: Tensor, words: list[float], world: World
    ) -> tuple[list[float], list[float]]:
        """The host's one read: losses by chunk, the four sums and the gradient's norm, then the words, all summed
        over the processes but the norm, which is whole already."""
        parts = [self.losses.double(), self.parts, torch.tensor(words).to(self.parts, non_blocking=True)]
        sums = sum_over_world(torch.cat(parts), world)
        values = torch.cat([sums, grad_norm.detach().to(sums).view(1)]).tolist()
        at = len(values) - 1 - len(words)
        return [*values[:at], values[-1]], values[at:-1]

    def problem(self, step: int, values: list[float]) -> str | None:
        """What of the step is not finite, naming its examples; None where all is."""
        *losses, _nll, _mixup, _top1, _aux, grad_norm = values
        bad = [i for i, loss in enumerate(losses) if not math.isfinite(loss)]
        if not bad and math.isfinite(grad_norm):
            return None
        what = "loss" if bad else "gradient norm"
        ids = [name for i in bad for name in chunk_ids(self.plan.chunks[i])] or self.plan.ids()
        return (
            f"{what}: expected a finite number at step {step}, got {losses[bad[0]] if bad else grad_norm}; "
            f"examples: {', '.join(ids)}"
        )

    def record(self, values: list[float], mixup_weight: float, *, auxiliary: bool = False) -> Record:
        """The step's line; with ``auxiliary`` the model's own auxiliary loss, unweighted, is in it too."""
        *losses, nll, mixup, top1, aux, grad_norm = values
        step = self.plan
        has_mixup = mixup_weight != 0 and step.num_mixed > 0
        return {
            "loss": math.fsum(losses), "ntp_loss": nll / self.denominators[0],
            "mixup_loss": mixup / self.denominators[1] if has_mixup else None,
            "mixup_weight": mixup_weight, "grad_norm": grad_norm,
            "num_tokens": step.num_supervised, "num_mixed": step.num_mixed,
            "mixed_share": 2 * step.num_mixed / step.num_supervised,
            "token_accuracy": top1 / step.num_supervised, **({"aux_loss": aux} if auxiliary else {}),
        }  # fmt: skip


def peak_memory(device: torch.device) -> int | None:
    """The most bytes held so far: on a GPU by torch's allocator, on a CPU by the whole process; None where unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return None
    import resource  # which Windows lacks

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def utilisation(flops: float, seconds: float, processes: int) -> Record:
    """Model flops a second of each process, and their share of the GPU's dense bfloat16 peak where it is known."""
    rate = flops / seconds / processes
    found: Record = {"model_tflops": rate / 1e12}
    if torch.cuda.is_available():
        gpu = gpu_of(torch.cuda.get_device_name())
        if gpu is not None:
            found["model_flops_utilisation"] = rate / gpu.flops
    return found

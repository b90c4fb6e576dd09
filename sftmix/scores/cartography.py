"""The files of allenai/cartography (Swayamdipta et al., EMNLP 2020), written from scores and read as scores.

Written: ``training_dynamics/dynamics_epoch_0.jsonl`` and on (``guid``, ``logits_epoch_0``, ``gold``), two classes a
line: an answer's token probability p = exp(-nll), the geometric mean over its tokens, and 1 - p. And
``td_metrics.jsonl``, of the same p: ``confidence`` its mean over the epochs, ``variability`` its standard deviation,
``correctness`` in how many epochs the most likely token was right in more than half of the places, ``forgetfulness``
how often that went from right to wrong (1000: never right), ``threshold_closeness`` confidence (1 - confidence). This
confidence is a probability; that of scores.parquet is minus a perplexity.

Read: such a folder of epochs, of classes of any number; ``nll_sum`` is -log p of the gold class, of one token.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from sftmix.files import replacing
from sftmix.scores.table import ExampleScores

FOLDER, METRICS = "training_dynamics", "td_metrics.jsonl"
_NEVER = 1000  # forgetfulness of an example that was never right, as cartography has it
_LEAST = 1e-300  # a probability of 0 has no logit


def export(scores: ExampleScores, folder: Path) -> list[Path]:
    """Write both kinds of file into ``folder``; their paths."""
    probability = np.exp(-scores.points["nll"])  # [C, E]
    right = scores.points["top1_share"] > 0.5
    paths = []
    for epoch in range(scores.num_points):
        path = folder / FOLDER / f"dynamics_epoch_{epoch}.jsonl"
        rows = (
            {"guid": name, f"logits_epoch_{epoch}": [-nll, _log_rest(nll)], "gold": 0}
            for name, nll in zip(scores.examples, scores.points["nll"][epoch].tolist(), strict=True)
        )
        paths.append(_write(path, rows))
    paths.append(_write(folder / METRICS, _metrics(scores, probability, right)))
    return paths


def _metrics(scores: ExampleScores, probability: Any, right: Any) -> Iterator[dict[str, Any]]:
    confidence, variability = probability.mean(0), np.std(probability, axis=0)
    for at, name in enumerate(scores.examples):
        trend = right[:, at].tolist()
        yield {
            "guid": name, "index": at, "threshold_closeness": float(confidence[at] * (1 - confidence[at])),
            "confidence": float(confidence[at]), "variability": float(variability[at]), "correctness": sum(trend),
            "forgetfulness": sum(a and not b for a, b in pairwise(trend)) if any(trend) else _NEVER,
        }  # fmt: skip


def is_export(path: str | Path) -> bool:
    """Whether ``path`` is a folder of cartography's epochs, or one that holds such a folder."""
    return bool(_epochs(Path(path).expanduser()))


def files(path: str | Path) -> list[Path]:
    """The epochs' files, in their order."""
    found = _epochs(Path(path).expanduser())
    return [found[epoch] for epoch in sorted(found)]


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """The rows of dynamics.parquet that a folder of epochs gives.

    Raises ``ValueError`` for epochs that do not count from 0, and naming the line for one that cannot be used.
    """
    found = _epochs(Path(path).expanduser())
    numbers = sorted(found)
    if not numbers or numbers != list(range(len(numbers))):
        raise ValueError(f"{path}: expected dynamics_epoch_0.jsonl and on, got epochs {numbers or 'none'}")
    rows = []
    for epoch in numbers:
        lines = found[epoch].read_text(encoding="utf-8").splitlines()
        for number, line in enumerate(lines, start=1):
            if line.strip():
                rows.append(_row(line, epoch, f"{found[epoch]}, line {number}"))
    return rows


def _row(line: str, epoch: int, place: str) -> dict[str, Any]:
    try:
        told = json.loads(line)
        name, gold, logits = (
            str(told["guid"]),
            told["gold"],
            np.asarray(told[f"logits_epoch_{epoch}"], np.float64),
        )
        if isinstance(gold, bool) or not isinstance(gold, int) or not 0 <= gold < len(logits):
            raise ValueError(f"gold {gold!r} among {len(logits)} logits")
        if logits.ndim != 1 or not np.isfinite(logits).all():
            raise ValueError(f"logits {told[f'logits_epoch_{epoch}']}")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{place}: expected guid, gold and logits_epoch_{epoch}, a list of finite numbers, got {error}"
        ) from error
    highest = float(logits.max())
    nll = highest + math.log(float(np.exp(logits - highest).sum())) - float(logits[gold])
    return {
        "example": name, "checkpoint": epoch, "step": epoch, "nll_sum": max(nll, 0.0), "num_tokens": 1,
        "top1_share": float(logits[gold] == highest), "source": "checkpoint",
    }  # fmt: skip


def _epochs(folder: Path) -> dict[int, Path]:
    place = folder / FOLDER if (folder / FOLDER).is_dir() else folder
    if not place.is_dir():
        return {}
    found = {re.fullmatch(r"dynamics_epoch_(\d+)\.jsonl", path.name): path for path in place.iterdir()}
    return {int(match[1]): path for match, path in found.items() if match}


def _log_rest(nll: float) -> float:
    """log(1 - exp(-nll))."""
    return math.log(max(-math.expm1(-nll), _LEAST))


def _write(path: Path, rows: Iterator[dict[str, Any]]) -> Path:
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, allow_nan=False) + "\n")
    return path

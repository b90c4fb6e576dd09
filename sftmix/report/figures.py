"""The closing figures of a run by model, as the terminal's table and the page both show them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sftmix.run.folder import RunFolder
from sftmix.training.metrics import read_metrics

LABELS = {"base": "base model", "ntp": "NTP", "sftmix": "SFTMix"}
COLUMNS = ("steps", "tokens", "mixed", "seconds", "NLL", "perplexity", "accuracy")


def training_figures(folder: RunFolder, method: str) -> dict[str, Any]:
    """Steps, supervised tokens, mixed tokens and seconds of a training run, from its metrics."""
    path = folder.train(method) / "metrics.jsonl"
    if not path.exists():
        return {}
    records = read_metrics(path)
    if not records:
        return {}
    return {
        "steps": records[-1]["step"],
        "tokens": sum(record["num_tokens"] for record in records),
        "mixed": sum(record["num_mixed"] for record in records if record["mixup_loss"] is not None),
        "seconds": sum(record["seconds"] for record in records),
    }


def result_row(folder: RunFolder, label: str, figures: Mapping[str, Any]) -> list[str]:
    """One model's cells in the order of ``COLUMNS``."""
    cost = training_figures(folder, label)
    spent = [f"{cost[key]:,.0f}" if cost else "–" for key in ("steps", "tokens", "mixed", "seconds")]
    return [
        *spent,
        f"{figures['nll']:.4f}",
        f"{figures['perplexity']:.3f}",
        f"{figures['token_accuracy']:.2%}",
    ]


def title(results: Mapping[str, Mapping[str, Any]]) -> str:
    """What the figures are about. The models are evaluated on the same examples."""
    first = next(iter(results.values()))
    return f"Held-out answers: {first['num_examples']} examples, {first['num_tokens']} tokens"

"""Run folders of any size and state, made without a model, and texts for them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from sftmix.config import load_config, save_config
from sftmix.report.gather import gather
from sftmix.report.page import write_report
from sftmix.report.texts import Text, Texts
from sftmix.scores.confidence import make_split, write_split
from sftmix.scores.dynamics import Dynamics, write_dynamics
from sftmix.scores.halves import split_digest

STAGES = ("score", "split", "ntp", "sftmix", "evaluate")
HOSTILE = (
    "</script><script>window.bad = 1</script>", "<img src=x onerror='window.bad = 1'>", "`${window.bad = 1}`",
    "a\u2028b\u2029c", "nul\x00inside", "\u202eright to left\u202c", "x" * 5000, "<!-- <script>", "]]>&lt;b&gt;&amp;",
    "@@script@@ @@style@@", "\U0001f600 é ß", "'\"><svg onload=window.bad=1>", "javascript:window.bad=1", "{{7*7}}",
)  # fmt: skip


def dynamics(
    examples: int = 40, points: int = 3, *, seed: int = 0, ids: Sequence[str] | None = None
) -> Dynamics:
    random = np.random.default_rng(seed)
    tokens = np.tile(random.integers(3, 60, examples), (points, 1))
    nll = random.gamma(2.0, 0.6, (1, examples)) + random.uniform(0, 0.4, (points, examples))
    share = np.round(np.exp(-nll) * tokens) / tokens
    names = sorted(ids or (f"{value:016x}" for value in random.integers(0, 1 << 62, examples)))
    return Dynamics(names, np.zeros((points, examples), np.int64), nll * tokens, tokens, share, "checkpoint")


def rows_of(scores: Dynamics) -> list[dict[str, Any]]:
    return [
        {"example": name, "checkpoint": c, "step": 3 * c, "nll_sum": float(scores.nll_sum[c, e]),
         "num_tokens": int(scores.num_tokens[c, e]), "top1_share": float(scores.top1_share[c, e]),
         "source": scores.source}
        for c in range(scores.num_checkpoints)
        for e, name in enumerate(scores.examples)
    ]  # fmt: skip


def records(steps: int, *, mixup: bool, seed: int = 0) -> list[dict[str, Any]]:
    random = np.random.default_rng(seed)
    return [
        {"step": k + 1, "epoch": (k + 1) / steps, "lr": 1e-3 * (1 - k / steps), "loss": 3 - k / steps,
         "ntp_loss": 3 - k / steps + random.normal() / 10, "mixup_loss": 5 - k / steps if mixup else None,
         "grad_norm": 1 + random.random(), "num_tokens": 100, "num_mixed": 40, "seconds": 0.5,
         "tokens_per_second": 200 + random.random(), "peak_memory_bytes": 2_000_000_000 + k}
        for k in range(steps)
    ]  # fmt: skip


def sample(answer: str, name: str = "s1") -> dict[str, Any]:
    return {"id": name, "prompt": "Why?", "answer": answer, "expected": "Because.", "stopped": True}


def figures(nll: float, **more: Any) -> dict[str, Any]:
    plain = {
        "nll": nll,
        "perplexity": float(np.exp(min(nll, 700))),
        "token_accuracy": 0.4131,
        "num_tokens": 1009,
        "num_examples": 64,
    }
    return {**plain, "samples": [sample(f"answer {nll}")], "about": {"heldout": "h1", "model": "m"}, **more}


def settings_of(split: Any, **more: Any) -> dict[str, Any]:
    """What stages.json records of the training of SFTMix."""
    plain = {
        "seed": 0,
        "mixup.alpha": 0.5,
        "mixup.lam": "pair",
        "train.batch_size": 8,
        "examples": "e1",
        "model": "m1",
    }
    return {**plain, "split": split_digest(split), **more}


def write_run(
    folder: Path, scores: Dynamics | None = None, *, stages: Sequence[str] = STAGES,
    steps: int = 12, knobs: Sequence[str] = (), evaluation: dict[str, Any] | None = None,
) -> Path:  # fmt: skip
    """A run folder as the stages leave it, as far as ``stages`` goes."""
    folder.mkdir(parents=True, exist_ok=True)
    scores = scores or dynamics()
    flags = [f"run_dir={folder}", "model.name=some/model", "data.train=train.jsonl", *knobs]
    save_config(load_config(None, flags), folder / "config.yaml")
    split, record = make_split(scores) if len(scores.examples) > 1 else None, {}
    write_metrics(folder, "reference", records(steps, mixup=False))
    if "score" in stages:
        write_dynamics(folder / "dynamics.parquet", rows_of(scores))
    if "split" in stages and split is not None:
        write_split(folder / "split.parquet", split)
    for method in ("ntp", "sftmix"):
        if method in stages:
            write_metrics(folder, f"train-{method}", records(steps, mixup=method == "sftmix", seed=1))
            record[f"train-{method}"] = {"state": "finished", "settings": settings_of(split), "files": {}}
    if "evaluate" in stages:
        told = evaluation or {"base": figures(4.0), "ntp": figures(3.2), "sftmix": figures(3.1)}
        (folder / "evaluation.json").write_text(json.dumps(told))
    (folder / "stages.json").write_text(json.dumps(record))
    (folder / "data.json").write_text(
        json.dumps({"train": {"rows_read": 40, "dropped": {"empty": 2}, "faults": []}})
    )
    return folder


def write_metrics(folder: Path, run: str, found: Sequence[dict[str, Any]]) -> None:
    (folder / run).mkdir(exist_ok=True)
    (folder / run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in found))


def texts(
    scores: Dynamics, prompts: Sequence[str] | None = None, *, sources: Sequence[str] = ("a.jsonl", "b.jsonl")
) -> Texts:
    """A prompt and an answer for every example, lengths, and sources by turns."""
    said = {
        name: Text(prompts[i % len(prompts)] if prompts else f"question {i}", f"answer {i}")
        for i, name in enumerate(scores.examples)
    }
    supervised = dict(zip(scores.examples, scores.num_tokens[-1].tolist(), strict=True))
    return Texts(
        short=said, long=said, num_supervised=supervised,
        num_tokens={name: 2 * size + 5 for name, size in supervised.items()},
        source={name: sources[i % len(sources)] for i, name in enumerate(scores.examples)},
    )  # fmt: skip


def report(folder: Path, told: Texts | None = None) -> Path:
    return write_report(
        gather(folder), told or Texts(missing="texts of the examples: not in this page, none were given")
    )


def nearly_equal(scores: Dynamics) -> Dynamics:
    """The same examples, all with one score."""
    return replace(
        scores, nll_sum=1.5 * scores.num_tokens.astype(float), top1_share=0 * scores.top1_share + 0.5
    )

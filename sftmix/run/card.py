"""The model card of an exported model: what it was made of, with which settings, and its figures."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
import yaml  # type: ignore[import-untyped]

import sftmix
from sftmix.evaluation.uncertainty import share
from sftmix.files import replacing
from sftmix.model.companions import home
from sftmix.model.export import CARD

if TYPE_CHECKING:
    from sftmix.run.session import Session

_TOLD = ("train", "mixup", "optim")


def card(session: Session, method: str, evaluation: dict[str, Any]) -> str:
    """README.md of the model that ``method`` trained; ``evaluation`` is by label, what evaluation.json holds so far."""
    config, source = session.config, session.config.model
    base = source.name if not Path(source.name).exists() else Path(source.name).name
    lora = config.train.tuning == "lora"
    head: dict[str, Any] = {
        "base_model": base, "library_name": "transformers", "pipeline_tag": "text-generation",
        "tags": ["sftmix" if method == "sftmix" else "sft", *(["lora"] if lora else [])], **_license(session),
    }  # fmt: skip
    settings = dataclasses.asdict(session.with_method(method))
    told = {name: settings[name] for name in (*_TOLD, *(("lora",) if lora else ()))}
    lines = [
        "---", yaml.safe_dump(head, sort_keys=False, allow_unicode=True).strip(), "---", "",
        f"# {base} trained with {'SFTMix' if method == 'sftmix' else 'next-token prediction'}", "",
        f"- base model: {base}, files {session.models.identity(session.models.source)}",
        f"- training examples: {len(session.train)}, tokens and masks {session.train_id}",
        f"- data type: {session.config.model.dtype}; seed: {config.seed}",
        f"- made with sftmix {sftmix.__version__}, torch {torch.__version__}, transformers {transformers.__version__}",
        "",
        *_figures(method, evaluation),
        "## Settings", "", "```yaml", yaml.safe_dump(told, sort_keys=False).strip(), "```", "",
    ]  # fmt: skip
    return "\n".join(lines)


def write_card(session: Session, method: str, evaluation: dict[str, Any]) -> None:
    """Put the held-out figures into the cards that stand beside the exported model and adapter."""
    for folder in (session.folder.model(method), session.folder.adapter(method)):
        if folder.is_dir():
            with replacing(folder / CARD) as temporary:
                temporary.write_text(card(session, method, evaluation), encoding="utf-8")


def _figures(method: str, evaluation: dict[str, Any]) -> list[str]:
    if method not in evaluation:
        return ["Held-out figures: none yet.", ""]
    rows = [
        "## Held-out figures", "",
        "| model | NLL (nats a token) | perplexity | token accuracy | examples |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for label in ("base", method):
        if label in evaluation:
            f = evaluation[label]
            shown = (
                f"{f['nll']:.4f}" + (f" ± {f['nll_stderr']:.4f}" if f.get("nll_stderr") is not None else ""),
                f"{f['perplexity']:.4g}",
                f"{f['token_accuracy']:.4f}",
                f["num_examples"],
            )
            rows.append(f"| {label} | {' | '.join(map(str, shown))} |")
    return [*rows, "", *_benchmarks(method, evaluation)]


def _benchmarks(method: str, evaluation: dict[str, Any]) -> list[str]:
    rows, versions = [], set()
    for label in ("base", method):
        for task, found in evaluation.get(label, {}).get("tasks", {}).items():
            asked = "chat template" if found["about"]["chat_template"] else "plain text"
            versions.add(str(found["about"]["lm_eval"]))
            counted = f"{found['num_examples']} of {found['num_rows']}"
            for metric in found["metrics"]:
                name = f"{metric['metric']} ({metric['filter']})"
                cells = (label, task, name, share(metric), counted, found["num_fewshot"], asked)
                rows.append(f"| {' | '.join(map(str, cells))} |")
    if not rows:
        return []
    made = f"By lm-evaluation-harness {', '.join(sorted(versions))}, greedy, with standard errors."
    head = ["## Benchmarks", "", made, ""]
    titles = "| model | task | metric | value | rows | shots | asked as |"
    return [*head, titles, "|---|---|---|---|---|---|---|", *rows, ""]


def _license(session: Session) -> dict[str, str]:
    """The base model's licence, as the front matter of its own card names it."""
    place = home(session.config.model)
    try:
        text = (place / CARD).read_text(encoding="utf-8") if place is not None else ""
        front = yaml.safe_load(text.split("---")[1]) if text.startswith("---") else {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError, IndexError):
        return {}
    if not isinstance(front, dict):
        return {}
    return {
        name: json.loads(json.dumps(front[name]))
        for name in ("license", "license_name", "license_link")
        if isinstance(front.get(name), str)
    }

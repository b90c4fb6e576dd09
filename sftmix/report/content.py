"""What the page of one run says, as plain data: the counterpart of ``page/report.js``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any, TypeVar

import numpy as np

from sftmix.report.curves import panels
from sftmix.report.examples import Scores, axis, halves_on
from sftmix.report.figures import COLUMNS, LABELS, result_row, title
from sftmix.report.gather import Found, changed, stages
from sftmix.report.lambdas import UNITS, histogram, lambdas
from sftmix.report.texts import Texts, cut
from sftmix.scores.dynamics import rank_correlation
from sftmix.scores.halves import split_digest

_SAMPLE = 4000  # characters of one sample's text
_PACKAGES = ("sftmix", "torch", "transformers", "peft", "numpy", "pyarrow", "datasets", "triton")
CURVES = {"reference": "reference", "train-ntp": "NTP", "train-sftmix": "SFTMix"}
_HASHES = {
    "examples": "training examples, tokens and masks", "model": "files of the model", "split": "halves",
    "chat template": "chat template", "reference.scores": "file of scores",
}  # fmt: skip
_BINS = 40
T = TypeVar("T")


def content(found: Found, texts: Texts) -> dict[str, Any]:
    """All but the columns of the examples (``examples.packed``); texts are plain, the page escapes nothing."""
    notes = list(found.notes)
    made: dict[str, Any] = {
        "title": found.folder.path.resolve().name,
        "facts": _facts(found),
        "stages": stages(found),
        "results": _part("held-out figures", lambda: results(found), notes),
        "samples": _part("sample answers", lambda: samples(found), notes) or [],
        "curves": _part("curves", lambda: curves(found), notes) or [],
        "lambdas": drawn_lambdas(found, texts, notes),
        "settings": [[name, _shown(value), same] for name, value, same in changed(found.settings)],
        "hashes": _hashes(found), "versions": _versions(found), "account": _account(found),
        "lengths": _lengths(texts),
    }  # fmt: skip
    if found.scores is not None:
        made["map"] = data_map(found.scores)
        made["extremes"] = _extremes(found.scores, texts)
    notes += [texts.missing] if texts.missing else []
    remarks = [texts.note] if texts.note else []
    if found.settings.get("reference.model") is not None:
        remarks.append(
            "Scores count the reference model's tokens, the histograms of lengths the trained model's."
        )
    return {**made, "notes": notes, "remarks": remarks}


def _part(name: str, making: Callable[[], T], notes: list[str]) -> T | None:
    """A part of the page; None, with a note, where its file holds something else than the stages write."""
    try:
        return making()
    except (KeyError, TypeError, ValueError) as error:
        notes.append(f"{name}: cannot be shown, their file holds something else: {error!r}")
        return None


def curves(found: Found) -> list[dict[str, Any]]:
    """The panels of the training runs of this folder."""
    return panels({name: found.metrics[key] for key, name in CURVES.items()})


def results(found: Found) -> dict[str, Any] | None:
    """The table at the end of a run, with the terminal's own digits."""
    if not found.evaluation:
        return None
    rows = [
        [LABELS.get(label, label), *result_row(found.folder, label, figures)]
        for label, figures in found.evaluation.items()
    ]
    return {"title": title(found.evaluation), "columns": ["model", *COLUMNS], "rows": rows}


def samples(found: Found) -> list[dict[str, Any]]:
    """The answers of every model to the same prompts; models that have none are left out."""
    told: dict[str, dict[str, Any]] = {}
    for label, figures in found.evaluation.items():
        for sample in figures.get("samples") or []:
            one = told.setdefault(
                str(sample.get("id")),
                {
                    "prompt": cut(str(sample.get("prompt", "")), _SAMPLE),
                    "expected": cut(str(sample.get("expected", "")), _SAMPLE),
                    "answers": [],
                },
            )
            ended = bool(sample.get("stopped", True))
            one["answers"].append(
                [LABELS.get(label, label), cut(str(sample.get("answer", "")), _SAMPLE), ended]
            )
    return [{"id": name, **one} for name, one in told.items()]


def data_map(found: Scores) -> dict[str, Any]:
    """Axes with the histograms of all examples, the border of the halves, and counts."""
    y = axis(found.perplexity)
    lengths = axis(found.num_tokens.astype(np.float64))
    made: dict[str, Any] = {
        "points": found.points, "source": found.source, "median": found.median, "border": found.border,
        "split": bool((found.half < 2).all()),
        "confident": int((found.half == 0).sum()), "unconfident": int((found.half == 1).sum()),
        "confidence": {**y, "halves": halves_on(found.perplexity, found.half, y)}, "length": lengths,
        "length_correlation": _correlation(found),
    }  # fmt: skip
    if found.variability is not None:
        made["variability"] = axis(found.variability)
    return made


def _correlation(found: Scores) -> float:
    """Spearman's rank correlation of confidence and tokens that bear loss; NaN where there is none."""
    if len(found.ids) < 2 or bool(np.isnan(found.perplexity).any()):
        return float("nan")
    confidence = dict(zip(found.ids, (-found.perplexity).tolist(), strict=True))
    return rank_correlation(
        confidence, dict(zip(found.ids, found.num_tokens.astype(float).tolist(), strict=True))
    )


def drawn_lambdas(found: Found, texts: Texts, notes: list[str]) -> dict[str, Any] | None:
    """The λ that training drew, as a histogram; None, with a note, where they cannot be drawn again."""
    records = found.metrics["train-sftmix"]
    if not records:
        return None
    entry = found.record.get("train-sftmix", {})
    settings = entry.get("settings") if isinstance(entry, dict) else None
    if not isinstance(settings, dict):
        notes.append("λ: the settings with which SFTMix was trained are not recorded in stages.json")
        return None
    if found.split is None:
        notes.append("λ: without the halves the pairs are not known")
        return None
    if "split" in settings and settings["split"] != split_digest(found.split):
        notes.append("λ: split.parquet holds other halves than those that SFTMix was trained on")
        return None
    sizes = dict(texts.num_supervised) or None
    if sizes is None and found.scores is not None and found.settings.get("reference.model") is None:
        sizes = dict(zip(found.scores.ids, found.scores.num_tokens.tolist(), strict=True))
    try:
        drawn = histogram(
            lambdas(found.split, settings, steps=int(records[-1]["step"]), num_supervised=sizes)
        )
    except (ValueError, KeyError) as error:
        notes.append(f"λ: cannot be drawn again: {error}")
        return None
    lam = settings["mixup.lam"]
    return {
        **drawn, "unit": UNITS[lam], "lam": lam, "alpha": settings["mixup.alpha"],
        "seed": settings["seed"], "steps": int(records[-1]["step"]),
    }  # fmt: skip


def _facts(found: Found) -> list[list[str]]:
    """The lines under the title."""
    told = found.settings
    method = ", ".join(CURVES[name] for name in CURVES if found.metrics.get(name))
    lines = [
        ["run folder", str(found.folder.path)],
        ["model", _shown(told.get("model.name"))],
        ["data", _shown(told.get("data.train"))],
        ["trained here", method or "nothing yet"],
        ["tuning", _shown(told.get("train.tuning"))],
        ["seed", _shown(told.get("seed"))],
    ]
    if found.scores is not None:
        points = f"{found.scores.points} point{'s' * (found.scores.points > 1)}"
        lines.append(["examples", f"{len(found.scores.ids):,}, scored at {points} ({found.scores.source})"])
    return lines


def _extremes(found: Scores, texts: Texts) -> dict[str, list[dict[str, Any]]]:
    """The most and the least confident examples with longer texts and numbers to six digits."""

    def told(place: int) -> dict[str, Any]:
        name = found.ids[place]
        text = texts.long.get(name)
        return {
            "id": name, "rank": place + 1, "confidence": -float(f"{found.perplexity[place]:.6g}"),
            "variability": None if found.variability is None else float(f"{found.variability[place]:.6g}"),
            "share": float(f"{found.share[place]:.6g}"), "loss": float(f"{found.loss[place]:.6g}"),
            "tokens": int(found.num_tokens[place]), "prompt": text.prompt if text else "",
            "answer": text.answer if text else "",
        }  # fmt: skip

    most, least = found.extremes
    return {"most": [told(place) for place in most], "least": [told(place) for place in least]}


def _lengths(texts: Texts) -> dict[str, Any] | None:
    """Histograms over the training examples: tokens, tokens that bear loss, and the share of these."""
    if not texts.num_tokens:
        return None
    names = list(texts.num_tokens)
    tokens = np.array([texts.num_tokens[name] for name in names], np.float64)
    supervised = np.array([texts.num_supervised[name] for name in names], np.float64)
    share = np.histogram(supervised / tokens, bins=_BINS, range=(0.0, 1.0))[0].tolist()
    return {
        "examples": len(names), "tokens": int(tokens.sum()), "supervised": int(supervised.sum()),
        "by_tokens": whole_numbers(tokens), "by_supervised": whole_numbers(supervised), "share": share,
    }  # fmt: skip


def whole_numbers(values: np.ndarray[Any, np.dtype[np.float64]]) -> dict[str, Any]:
    """A histogram of counts in parts of equally many whole numbers, with least, median and most."""
    ranked = np.sort(values)
    least, most = int(ranked[0]), int(ranked[-1])
    width = -(-(most - least + 1) // _BINS)
    size = -(-(most - least + 1) // width)
    edges = least + width * np.arange(size + 1)
    return {
        "from": int(edges[0]), "to": int(edges[-1]), "counts": np.histogram(ranked, edges)[0].tolist(),
        "least": least, "median": int(ranked[(len(ranked) - 1) // 2]), "most": most,
    }  # fmt: skip


def _hashes(found: Found) -> list[list[str]]:
    """What tells data, models and halves apart, as the stages recorded it."""
    lines = []
    for stage in ("reference", "score", "train-ntp", "train-sftmix"):
        entry = found.record.get(stage, {})
        settings = entry.get("settings") if isinstance(entry.get("settings"), dict) else {}
        lines += [
            [f"{stage}: {name}", str(settings[key])] for key, name in _HASHES.items() if key in settings
        ]
        files = entry.get("files") if isinstance(entry.get("files"), dict) else {}
        lines += [
            [f"SHA-256 of {name}", str(value)] for name, value in files.items() if name.endswith(".parquet")
        ]
    for label, figures in found.evaluation.items():
        about = figures.get("about") or {}
        lines += [
            [f"evaluation of {label}: {name}", str(about[key])]
            for key, name in (("heldout", "held-out tokens"), ("model", "files of the model"))
            if key in about
        ]
    return lines


def _versions(found: Found) -> list[list[str]]:
    """Versions that wrote the models, by their cards, and those that wrote this page."""
    lines = []
    for method in ("ntp", "sftmix"):
        card = found.folder.model(method) / "README.md"
        text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
        lines += [
            [f"model ({method})", line.removeprefix("- made with ")]
            for line in text.splitlines()
            if line.startswith("- made with ")
        ]
    here = [f"{name} {version}" for name in _PACKAGES if (version := _version(name))]
    return [*lines, ["this page", ", ".join([*here, f"Python {sys.version.split()[0]}"])]]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _account(found: Found) -> list[list[str]]:
    """What became of the rows, from data.json."""
    lines: list[list[str]] = []
    for part, told in found.account.items():
        if isinstance(told, dict):
            lines += [[f"{part}: {name.replace('_', ' ')}", _counts(value)] for name, value in told.items()]
    return lines


def _counts(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {count}" for name, count in value.items()) or "none"
    if isinstance(value, list):
        return f"{len(value)} listed" if value else "none"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _shown(value: Any) -> str:
    """A knob's value as YAML has it."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(str, value))
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)

"""Several runs side by side, with differences to the first: figures, settings, scores and halves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sftmix.report.content import CURVES, drawn_lambdas, whole_numbers
from sftmix.report.curves import panels
from sftmix.report.examples import MOST, Scores, axis
from sftmix.report.figures import LABELS, training_figures
from sftmix.report.gather import Found, gather
from sftmix.report.packing import pack_counts, pack_decimals, pack_texts
from sftmix.report.texts import Texts, cut
from sftmix.scores.dynamics import rank_correlation

_UNTOLD = ("run_dir",)
_ANSWER = 4000  # characters of one sample answer
_DIGITS = 5


@dataclass(frozen=True)
class Agreement:
    """How the scores of one run agree with the first's: over the ``common`` of its ``examples``.

    ``same_half`` is the share of common examples that are in the same half, ``shared_confident`` the confident ones
    of both over the confident ones of either; None where one of the runs has no halves.
    """

    label: str
    examples: int
    common: int
    spearman: float
    same_half: float | None
    shared_confident: float | None


def gather_runs(paths: Sequence[str | Path]) -> list[tuple[str, Found]]:
    """Each run with a name of its own: the last parts of its folder's path that tell it from the others.

    Raises ``ValueError`` for fewer than two, for one that is named twice, and for what is not a run folder.
    """
    if len(paths) < 2:
        raise ValueError(f"runs: expected at least two run folders, got {len(paths)}")
    places = [Path(path).resolve() for path in paths]
    for place, path in zip(places, paths, strict=True):
        if places.count(place) > 1:
            raise ValueError(f"runs: expected different run folders, got {path} more than once")
    depth = 1  # of the folders' last parts, as many as tell them apart
    while len({place.parts[-depth:] for place in places}) < len(places):
        depth += 1
    labels = ["/".join(place.parts[-depth:]) for place in places]
    return [(label, gather(path)) for label, path in zip(labels, paths, strict=True)]


def figures(runs: Sequence[tuple[str, Found]]) -> list[dict[str, Any]]:
    """One row a model and run; ``d_``: minus the first run's figure of the same model, None in its own row.

    ``same_heldout`` is False where the figures are about other held-out tokens than the first run's.
    """
    rows = []
    first = runs[0][1].evaluation
    for model in LABELS:
        base = first.get(model)
        for label, found in runs:
            told = found.evaluation.get(model)
            if told is None:
                continue
            row: dict[str, Any] = {"model": LABELS[model], "run": label}
            for key in ("nll", "perplexity", "token_accuracy"):
                row[key] = told[key]
                row["d_" + key] = None if base is None or told is base else told[key] - base[key]
            cost = training_figures(found.folder, model)
            row.update({key: cost.get(key) for key in ("steps", "tokens", "seconds")})
            row["same_heldout"] = base is not None and _heldout(base) == _heldout(told)
            rows.append(row)
    return rows


def _heldout(told: dict[str, Any]) -> Any:
    about = told.get("about") or {}
    return about.get("heldout", (told["num_examples"], told["num_tokens"]))


def differing(runs: Sequence[tuple[str, Found]]) -> list[list[Any]]:
    """[knob, value in each run] for every knob that is not the same in all; a knob that a run lacks is "not there"."""
    names = list(dict.fromkeys(name for _, found in runs for name in found.settings if name not in _UNTOLD))
    rows = [[name, *(found.settings.get(name, "not there") for _, found in runs)] for name in names]
    return [row for row in rows if any(value != row[1] for value in row[2:])]


def agreements(runs: Sequence[tuple[str, Found]]) -> list[Agreement]:
    """The agreement of every further run that has scores with the first; none where the first has no scores."""
    first = runs[0][1].scores
    if first is None:
        return []
    mine = _by_id(first)
    found = []
    for label, run in runs[1:]:
        if run.scores is None:
            continue
        theirs = _by_id(run.scores)
        common = sorted(mine.keys() & theirs.keys())
        a = {name: -float(first.perplexity[mine[name]]) for name in common}
        b = {name: -float(run.scores.perplexity[theirs[name]]) for name in common}
        spearman = rank_correlation(a, b) if len(common) > 1 else math.nan
        halves = np.array(
            [(first.half[mine[name]], run.scores.half[theirs[name]]) for name in common], np.int64
        )
        is_split = len(common) > 0 and bool((halves < 2).all())
        either = int((halves == 0).any(axis=1).sum()) if is_split else 0
        same = float((halves[:, 0] == halves[:, 1]).mean()) if is_split else None
        shared = float((halves == 0).all(axis=1).sum()) / either if either else None
        found.append(Agreement(label, len(run.scores.ids), len(common), spearman, same, shared))
    return found


def _by_id(scores: Scores) -> dict[str, int]:
    return {name: place for place, name in enumerate(scores.ids)}


def content(runs: Sequence[tuple[str, Found]]) -> dict[str, Any]:
    """All that the page of several runs says but the columns of ``common_examples``."""
    notes = [f"{label}: {note}" for label, found in runs for note in found.notes]
    rows = figures(runs)
    others = sorted({row["run"] for row in rows if not row["same_heldout"]})
    if others:
        notes.append(f"held-out figures of {', '.join(others)} are about other examples than {runs[0][0]}'s")
    lams = []
    for label, found in runs:
        own: list[str] = []
        lams.append({"label": label, "lambdas": drawn_lambdas(found, Texts(), own)})
        notes += [f"{label}: {note}" for note in own]
    return {
        "title": " · ".join(label for label, _ in runs), "labels": [label for label, _ in runs], "notes": notes,
        "figures": rows, "settings": [[row[0], *map(_shown, row[1:])] for row in differing(runs)],
        "agreements": [vars(each) for each in agreements(runs)], "lambdas": lams,
        "curves": [
            {"name": name, "panels": panels({label: found.metrics[key] for label, found in runs})}
            for key, name in reversed(CURVES.items())
        ],
        "lengths": [
            {"label": label, "by_supervised": whole_numbers(found.scores.num_tokens.astype(np.float64))}
            for label, found in runs
            if found.scores is not None
        ],
        "samples": _samples(runs),
        "folders": [[label, str(found.folder.path)] for label, found in runs],
    }  # fmt: skip


def common_examples(runs: Sequence[tuple[str, Found]]) -> tuple[dict[str, bytes], dict[str, Any] | None]:
    """The examples that the first run and those that share any with it have, as columns, and what the page must know.

    The order is the first run's. Of more than ``MOST`` an even choice by rank. None where no other run shares any with
    the first, or they none with each other.
    """
    scored = [(label, found.scores) for label, found in runs if found.scores is not None]
    first = runs[0][1].scores
    if first is None:
        return {}, None
    mine = set(first.ids)
    scored = [(label, each) for label, each in scored if each is first or not mine.isdisjoint(each.ids)]
    if len(scored) < 2:
        return {}, None
    places = [_by_id(scores) for _, scores in scored]
    names = [name for name in scored[0][1].ids if all(name in each for each in places[1:])]
    total = len(names)
    if not names:
        return {}, None
    if total > MOST:
        names = [names[i] for i in np.unique(np.linspace(0, total - 1, MOST).round().astype(int)).tolist()]
    at = [np.array([each[name] for name in names], np.int64) for each in places]
    means = [scores.perplexity[where] for (_, scores), where in zip(scored, at, strict=True)]
    spreads = [
        None if scores.variability is None else scores.variability[where]
        for (_, scores), where in zip(scored, at, strict=True)
    ]
    numbers = b"".join(pack_decimals(mean, _DIGITS) for mean in means)
    numbers += b"".join(pack_decimals(spread, _DIGITS) for spread in spreads if spread is not None)
    for (_, scores), where in zip(scored, at, strict=True):
        numbers += pack_counts(scores.half[where]) + pack_counts(where)
    about = {
        "labels": [label for label, _ in scored], "shown": len(names), "total": total, "digits": _DIGITS,
        "of": [len(scores.ids) for _, scores in scored], "medians": [scores.median for _, scores in scored],
        "borders": [scores.border or "median" for _, scores in scored],
        "without": [label for label, _ in runs if label not in {name for name, _ in scored}],
        "confidence": axis(np.concatenate(means)), "spread": [spread is not None for spread in spreads],
    }  # fmt: skip
    if any(spread is not None for spread in spreads):
        about["variability"] = axis(np.concatenate([spread for spread in spreads if spread is not None]))
    return {"ids": pack_texts(names), "numbers": numbers}, about


def _samples(runs: Sequence[tuple[str, Found]]) -> list[dict[str, Any]]:
    """Prompts by id, each with the answers of every run's models."""
    told: dict[str, dict[str, Any]] = {}
    for label, found in runs:
        for model, one in found.evaluation.items():
            for sample in one.get("samples") or []:
                entry = told.setdefault(
                    str(sample.get("id")),
                    {"prompt": cut(str(sample.get("prompt", "")), _ANSWER),
                     "expected": cut(str(sample.get("expected", "")), _ANSWER), "answers": []},
                )  # fmt: skip
                answer = cut(str(sample.get("answer", "")), _ANSWER)
                entry["answers"].append([label, LABELS.get(model, model), answer])
    return [{"id": name, **entry} for name, entry in told.items()]


def _shown(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)

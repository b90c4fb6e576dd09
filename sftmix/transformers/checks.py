"""Scores that do not fit a trainer's examples, and a model that has another loss already: refused by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from sftmix.progress import say
from sftmix.scores.dynamics import Dynamics
from sftmix.transformers.head import is_patched, patched_by


def check_ids(name: str, scored: Sequence[str], examples: Mapping[str, Any]) -> None:
    missing = examples.keys() - set(scored)
    if missing:
        raise ValueError(
            f"{name}: expected every training example, got {len(scored)} of which {len(missing)} of "
            f"{len(examples)} are missing, e.g. {min(missing)}; ids are those of args.id_column, or hashes of the "
            "tokens, which another template or length changes"
        )


def only_trained(scores: Dynamics, examples: Mapping[str, Any]) -> Dynamics:
    """The scores of the examples alone, with a word about the others."""
    keep = [at for at, name in enumerate(scores.examples) if name in examples]
    if len(keep) == len(scores.examples):
        return scores
    say(f"dynamics: {len(scores.examples) - len(keep)} scored examples are not among those that train")
    parts = {name: getattr(scores, name)[:, keep] for name in ("step", "nll_sum", "num_tokens", "top1_share")}
    return dataclasses.replace(scores, examples=[scores.examples[at] for at in keep], **parts)


def only_whole(rows: Sequence[dict[str, Any]], epoch: int, size: int) -> list[dict[str, Any]]:
    """The scores without those of an epoch that met fewer than ``size`` examples, with a word; each example once."""
    met: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row["checkpoint"] == epoch:
            met.setdefault(row["example"], row)
    others = [row for row in rows if row["checkpoint"] != epoch]
    if met and len(met) < size:
        say(f"dynamics: {len(met)} of {size} examples were met in epoch {epoch}: it has no scores")
        met = {}
    return others + list(met.values())


def check_unpatched(base: Any) -> None:
    """Raise ``ValueError`` for a causal LM whose forward is ``patch_lm_head``'s or another package's."""
    if is_patched(base):
        raise ValueError(
            "model: expected one without patch_lm_head, which has a head already: unpatch_lm_head it"
        )
    other = patched_by(base)
    if other is not None:
        raise ValueError(
            f"model: expected its own forward, got one of {other}, whose loss would stand in the place of ours"
        )

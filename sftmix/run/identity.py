"""What each stage's result depends on, and the refusal of a run folder that was begun with something else.

A stage's settings are the tokens and weights of its examples, the model's files, and the knobs in the tables below.
They are recorded when the stage begins. Knobs that only change speed, memory, what is printed or where a file lies
are in no table: they may change from one start to the next.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sftmix.data.fingerprint import content_hash
from sftmix.progress import say
from sftmix.rank import is_main
from sftmix.run.checksums import described
from sftmix.run.folder import EXTRA, FILES, Settings, stages_from
from sftmix.run.halves import check_same, make_halves, needs_scores
from sftmix.scores import cartography
from sftmix.scores.confidence import read_split
from sftmix.scores.halves import split_digest
from sftmix.training.plan import point_steps

if TYPE_CHECKING:
    from sftmix.run.session import Session

# A section's name stands for all of its knobs. Not here: train.micro_batch_size, packing, gradient_checkpointing and
# impl and model.attn_implementation (the same sums in another order; checkpoints know packing and, where it decides an
# auxiliary loss, the micro-batch), train.log_every, export (the files there are looked at), all of evaluate
# (evaluation.json says itself what it is about), and all of data, which acts through the examples.
_ALWAYS = (
    "seed",
    "model.dtype",
    "model.added_tokens",
    "optim",
    "train.batch_size",
    "train.tuning",
    "train.max_steps",
)
KNOBS = {
    "reference": (*_ALWAYS, "reference.epochs", "reference.checkpoints_per_epoch", "reference.dynamics"),
    "score": (*_ALWAYS, "reference.epochs", "reference.checkpoints_per_epoch", "reference.dynamics"),
    "train-ntp": (*_ALWAYS, "train.epochs", "split.use", "mixup.pairing"),
    "train-sftmix": (*_ALWAYS, "train.epochs", "split.use", "mixup"),
}
# Knobs that came later, and the value which means what was done before: it is not recorded, so that an older run
# folder is the same.
_LATER = {
    "split.use": "both", "mixup.pairing": "random", "mixup.ntp_weight": 1.0, "mixup.schedule": "constant",
    "mixup.warmup_ratio": 0.0,
}  # fmt: skip
# Settings whose value is a hash, and how a difference is told.
_HASHES = {
    "examples": "examples: other tokens", "model": "model: other files", "split": "split: other halves",
    "chat template": "chat template: another text", "reference.scores": "reference.scores: another file",
}  # fmt: skip
_LENGTHS = ("train.epochs", "reference.epochs", "train.max_steps")  # a finished stage may get more
_UNTOLD = ("data.num_workers", "model.attn_implementation", "model.dtype")
_SHOWN = 8  # differences named in a message


def settings(session: Session, stage: str) -> Settings:
    """What the result of ``stage`` depends on, as plain data by dotted name.

    For a training run the split must be there; where it cannot be read its part is left out.
    """
    config = session.config
    if stage == "score" and config.reference.scores is not None:
        return {"examples": session.train_id, "reference.scores": _file_digest(config.reference.scores)}
    found: Settings = {}
    flat = _flatten(dataclasses.asdict(config))
    lora = ("lora",) if config.train.tuning == "lora" else ()
    for knob in (*KNOBS[stage], *lora):
        found.update({name: value for name, value in flat.items() if (name + ".").startswith(f"{knob}.")})
    found = {name: value for name, value in found.items() if name not in _LATER or value != _LATER[name]}
    if stage in ("reference", "score"):
        return {
            "examples": session.reference_id, "model": session.models.identity(session.models.reference), **found
        }  # fmt: skip
    found = {"examples": session.train_id, "model": session.models.identity(session.models.source), **found}
    found["chat template"] = hashlib.sha256(str(session.tokenizer.chat_template).encode()).hexdigest()[:16]
    try:
        found["split"] = split_digest(read_split(session.folder.split))
    except ValueError:
        pass
    return found


def about(session: Session) -> Settings:
    """Knobs that decide nothing by themselves but tell why examples or model are others."""
    flat = _flatten(dataclasses.asdict(session.config))
    told = {k: v for k, v in flat.items() if k.startswith(("data.", "model.", "reference.model"))}
    return {k: v for k, v in told.items() if k not in _UNTOLD}


def passed(session: Session, stage: str, *, whole: bool) -> bool:
    """Whether ``stage`` is finished with the present settings and its files are ``whole``; if not, it begins now.

    Files are whole where they are there and have the sums that the stage recorded; what is damaged is said, and taken
    away. Raises ``ValueError`` where the stage was begun or finished with other settings.
    """
    present = settings(session, stage)
    _refuse(session, stage, present, restart=stage)
    more = _more_steps(stage, session.folder.record().get(stage, {}), present)
    if more:
        say(f"{stage}: goes on from where it was finished, with {'; '.join(more)}")
        session.forget_exports(stage)
    if session.folder.is_finished(stage, present):
        damaged = session.damage(stage)
        if damaged:
            say(f"{stage}: again, {described(damaged)}")
            session.discard(stage, damaged)
        elif whole:
            return True
    session.barrier()  # every process has read the record
    if is_main():
        session.folder.note(stage, "begun", present, about(session), before=more)
    session.barrier()
    return False


def _more_steps(stage: str, entry: Settings, present: Settings) -> list[str]:
    """How a finished training stage is asked for more epochs or steps, and nothing else; empty where it is not."""
    present, recorded = json.loads(json.dumps(present)), entry.get("settings")
    if stage == "score" or entry.get("state") != "finished" or not isinstance(recorded, dict):
        return []
    keys = [key for key in {*recorded, *present} if recorded.get(key) != present.get(key)]
    if not all(key in _LENGTHS and key in recorded and key in present for key in keys):
        return []

    def length(value: Any) -> float:
        return math.inf if value is None else float(value)

    grown = all(length(recorded[key]) <= length(present[key]) for key in keys)
    return differences(recorded, present) if grown else []


def check(session: Session, stages: Sequence[str], *, restart: str | None = None) -> None:
    """Before anything is written: the stages that will run were not begun with other settings.

    The recorded stages before them, and the other training run, must be about the same examples. Those that
    ``restart`` does anew are not looked at. Raises ``ValueError`` saying what differs and what to do.
    """
    if set(stages) == {"plot"}:  # draws what the files hold
        return
    try:
        _check(session, stages, restart)
    except ValueError:
        session.take_back()
        raise


def _check(session: Session, stages: Sequence[str], restart: str | None) -> None:
    anew = stages_from(restart)
    _ = session.train  # data that cannot be used are met before anything is written or removed
    order = list(FILES)
    last = max((order.index(stage) for stage in stages), default=0)
    for stage in order[: last + 1]:
        if stage not in KNOBS or stage in anew or stage not in session.folder.record():
            continue
        if stage == "reference" and session.config.reference.scores is not None:
            continue
        present = settings(session, stage)
        # score asks for a reference of the present settings, the others for one of the same examples
        exact = stage in stages or (stage == "reference" and "score" in stages)
        both = stage == "train-ntp" and "train-sftmix" in stages  # what differs for ntp does for sftmix
        compared = present if exact else {"examples": present["examples"]}
        _refuse(session, stage, compared, restart="train" if both else stage)
    if "reference" in stages and session.config.reference.scores is None:
        _check_points(session)
    _check_files(session, {*stages, *anew}, set(anew))


def _check_points(session: Session) -> None:
    """The reference run is long enough for its scores."""
    config = session.config
    steps = -(-len(session.train) // config.train.batch_size)
    point_steps(steps, config.reference.checkpoints_per_epoch)
    limit = config.train.max_steps
    if config.reference.dynamics != "checkpoint" and limit is not None and limit < steps:
        raise ValueError(
            f"reference.dynamics: expected checkpoint where train.max_steps={limit} ends the run before its first "
            f"epoch of {steps} steps, got {config.reference.dynamics}: examples that were not met have no online score"
        )


def _check_files(session: Session, made: set[str], anew: set[str]) -> None:
    """The files that the stages will read, and not make, are about the training examples; a split is as asked for."""
    folder, given = session.folder, session.config.split.file
    if "split" in made and (given is not None or ("score" not in made and folder.dynamics.exists())):
        halves, _ = make_halves(session)
        check_ids(session, halves.confident + halves.unconfident, given or str(folder.dynamics))
    if "split" in made - anew and folder.split.exists() and not session.damage("split"):
        if (folder.dynamics.exists() and not session.damage("score")) or not needs_scores(session.config):
            check_same(session, make_halves(session)[0], {})
    if {"train-ntp", "train-sftmix"} & made and "split" not in made and folder.split.exists():
        halves = read_split(folder.split)
        check_ids(session, halves.confident + halves.unconfident, str(folder.split))


def _refuse(session: Session, stage: str, present: Settings, *, restart: str) -> None:
    """Raise ``ValueError`` where the record of ``stage`` differs from ``present`` in what ``present`` holds."""
    entry = session.folder.record().get(stage)
    if entry is None:
        return
    recorded = entry.get("settings")
    if entry.get("state") == "begun" and not session.folder.has_left(stage):
        return  # nothing of it is there that could be mixed up
    if _more_steps(stage, entry, present):
        return
    if not isinstance(recorded, dict):
        raise ValueError(
            f"{session.folder.path}: expected a record of the settings of {stage}, got one of an older version; "
            + _ways_out(restart)
        )
    if len(present) == 1:  # the examples alone are compared
        recorded = {key: value for key, value in recorded.items() if key in present}
    elif "split" not in present:
        recorded = {key: value for key, value in recorded.items() if key != "split"}
    told = differences(recorded, json.loads(json.dumps(present)))
    if not told:
        return
    if {"examples", "model"} & {line.split(":")[0] for line in told}:
        before = entry.get("about")
        told += differences(before if isinstance(before, dict) else {}, about(session))
    shown = "; ".join(told[:_SHOWN]) + (f"; and {len(told) - _SHOWN} more" if len(told) > _SHOWN else "")
    raise ValueError(
        f"{session.folder.path}: expected the settings with which {stage} was {entry.get('state', 'begun')}, got "
        f"others: {shown}; {_ways_out(restart)}"
    )


def _ways_out(stage: str) -> str:
    names = ", ".join(name for each in stages_from(stage) for name in (FILES[each], EXTRA.get(each)) if name)
    return f"take another run folder, or --restart {stage}, which removes {names}"


def differences(recorded: Settings, present: Settings) -> list[str]:
    """``train.epochs: 2 → 3`` for each setting that is not the same in both; hashes in words."""
    told = []
    for name in [*present, *(name for name in recorded if name not in present)]:
        before, now = recorded.get(name), present.get(name)
        if before != now:
            told.append(_HASHES.get(name, f"{name}: {_shown(before)} → {_shown(now)}"))
    return told


def check_ids(session: Session, ids: Sequence[str], where: str) -> None:
    """Scores and examples must be about the same texts."""
    missing, unknown = sorted(session.train.keys() - set(ids)), sorted(set(ids) - session.train.keys())
    if missing or unknown:
        raise ValueError(
            f"{where}: expected exactly the examples of data.train, got {len(missing)} of them missing and "
            f"{len(unknown)} unknown (first: {(missing + unknown)[0]})"
        )


def _shown(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _flatten(values: dict[str, Any]) -> Settings:
    flat: Settings = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat.update({f"{name}.{key}": item for key, item in value.items()})
        else:
            flat[name] = value
    return flat


def _file_digest(path: str) -> str:
    place = Path(path).expanduser()
    try:
        if cartography.is_export(place):
            told = [content_hash(file) for file in cartography.files(place)]
            return hashlib.sha256(repr(told).encode()).hexdigest()[:16]
        return content_hash(place)[:16]
    except OSError as error:
        raise ValueError(
            f"reference.scores: expected a file, got {path} ({error.strerror or error})"
        ) from error

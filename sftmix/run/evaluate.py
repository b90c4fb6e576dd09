"""The evaluate stage: held-out figures, sample answers, benchmarks and answers of the base and the trained models.

evaluation.json says of every figure what it is about: a hash of the held-out tokens or of a benchmark's rows, and of
the model's files. Figures about something else are made anew, with a word; the others stand.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from sftmix.config import ModelConfig
from sftmix.data.digest import examples_digest
from sftmix.evaluation.figures import heldout_figures, sample_answers
from sftmix.evaluation.paired import Row, difference, read_rows, write_rows
from sftmix.evaluation.sums import Passes
from sftmix.files import replacing
from sftmix.model.identity import model_identity
from sftmix.model.packing import packs
from sftmix.model.parallel import shard
from sftmix.progress import activity, bar, say
from sftmix.rank import is_main
from sftmix.run.benchmarks import asks_more, check_more, more_figures
from sftmix.run.card import write_card
from sftmix.run.checksums import described, sums
from sftmix.run.folder import read_evaluation
from sftmix.run.session import Session

METHODS = ("ntp", "sftmix")
LABELS = ("base", *METHODS)
_FIGURES = 2  # counts the kinds of figures that there have been: older ones lack standard errors
_ABOUT = {
    "heldout": "held-out examples",
    "model": "model",
    "dtype": "model.dtype",
    "samples": "sample answers",
}


def evaluate(session: Session, *, generate: bool = True) -> dict[str, Any]:
    """Held-out figures of the base model and of each trained one, sample answers, and what else is asked for.

    All to evaluation.json. Raises ``ValueError`` where there are no held-out examples.
    """
    _require_heldout(session)
    check_more(session)
    trained = [method for method in METHODS if session.folder.exported(method) is not None]
    for label in ("base", *trained):
        evaluate_one(session, label, generate=generate)
    return _earlier(session)[0]


def evaluate_one(session: Session, label: str, *, plain: Any = None, generate: bool = True) -> dict[str, Any]:
    """Figures and sample answers of ``label`` (base, ntp or sftmix), put into evaluation.json and the model's card.

    ``plain`` is the model as transformers reads it, where the caller has just read it. Figures that stand there and
    are about the same are kept. Raises ``ValueError`` where there are no held-out examples.
    """
    _require_heldout(session)
    source = _source(session, label)
    about = _about(session, source, label, generate=generate)
    earlier, rows = _earlier(session)
    before = earlier.get(label, {})
    loaded = _Loaded(session, source, plain)
    if before.get("about") == about and label in rows:
        say(f"evaluate {label}: done before")
        result = {key: value for key, value in before.items() if key not in ("tasks", "answers")}
    else:
        if before:
            _tell_anew(label, before.get("about") or {}, about)
        figures, rows[label] = _figures(session, loaded, label, generate=generate)
        result = {**figures, "about": about}
    if asks_more(session.config.evaluate) or {"tasks", "answers"} & before.keys():
        result |= more_figures(session, loaded.alone, before, label, about)
    session.barrier()  # every process has read the earlier results
    if is_main():
        _write(session, {**earlier, label: result}, rows, label)
    session.barrier()
    return result


def _tell_anew(label: str, was: dict[str, Any], about: dict[str, Any]) -> None:
    others = [words for key, words in _ABOUT.items() if was.get(key) != about[key]]
    why = f"about other {', '.join(others)}" if others else "of an older version, without standard errors"
    say(f"evaluate {label}: anew, the figures that stand there are {why}")


class _Loaded:
    """The model that is evaluated, read when it is first needed."""

    def __init__(self, session: Session, source: ModelConfig, plain: Any) -> None:
        self.session, self.source, self._plain = session, source, plain
        self._model: Any = None

    def shared(self) -> Any:
        """The model of all processes together, not yet sharded."""
        if self._plain is None or self.session.world.mesh is not None:  # only the first has just read it
            model = self.session.models.load(self.source, trainable=False)
        else:
            model, self._plain = self.session.models.adopt(self._plain), None
        if self.session.world.mesh is None:
            self._model = model
        return model

    def alone(self) -> Any:
        """The whole model on this process's device."""
        if self._model is None:
            if self.session.world.mesh is None:
                return self.shared()
            self._model = self.session.models.load_alone(self.source)
        return self._model


def _write(session: Session, found: dict[str, Any], rows: dict[str, list[Row]], label: str) -> None:
    folder = session.folder
    found = {name: found[name] for name in LABELS if name in found}
    rows = {name: rows[name] for name in found if name in rows}
    for name, figures in found.items():
        same = [other for other in rows if other != name and _same_heldout(figures, found[other])]
        earlier = [other for other in same if LABELS.index(other) < LABELS.index(name)]
        figures["against"] = {other: difference(rows[name], rows[other]) for other in earlier if name in rows}
    write_rows(folder.heldout, rows)
    with replacing(folder.evaluation) as temporary:
        temporary.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    folder.note("evaluate", "finished", {}, {}, sums(folder.path, "evaluate"))
    for method in METHODS:  # an earlier card may tell of other figures of the base model
        if method in found and label in ("base", method):
            write_card(session, method, found)


def _same_heldout(ours: dict[str, Any], theirs: dict[str, Any]) -> bool:
    return bool((ours.get("about") or {}).get("heldout") == (theirs.get("about") or {}).get("heldout"))


def _require_heldout(session: Session) -> None:
    if not session.heldout:
        raise ValueError("data.heldout: expected held-out examples (or data.heldout_fraction > 0), got none")


def _source(session: Session, label: str) -> ModelConfig:
    """Where the model is read from."""
    if label == "base":
        return session.models.source
    exported = session.folder.exported(label)
    if exported is None:
        raise ValueError(f"{session.folder.train(label)}: expected a trained model, found none")
    session.require_whole(f"train-{label}", f"train --train.method {label}")
    return session.models.source_at(exported)


def _earlier(session: Session) -> tuple[dict[str, Any], dict[str, list[Row]]]:
    """The figures that stand in the folder, and their rows by model.

    None where they cannot be read or are damaged, which is said.
    """
    damaged = session.damage("evaluate")
    if not session.folder.evaluation.exists():
        return {}, {}
    if damaged:
        say(f"evaluate: anew, {described(damaged)}")
        return {}, {}
    try:
        return read_evaluation(session.folder.evaluation), read_rows(session.folder.heldout)
    except ValueError as error:
        say(f"evaluate: anew, {error}")
        return {}, {}


def _figures(
    session: Session, loaded: _Loaded, label: str, *, generate: bool
) -> tuple[dict[str, Any], list[Row]]:
    config = session.config
    model = loaded.shared()
    packed = packs(model, config.train.packing)
    shard(model, session.world)
    passes = Passes(config.evaluate.batch_size, session.pad_id, config.train.impl, packed, session.world)
    with bar(f"evaluate {label}") as progress:
        figures, rows = heldout_figures(model, session.heldout, passes, progress.batches)
    figures["num_examples"] = len(session.heldout)
    if generate:
        chosen = session.heldout_examples(config.evaluate.num_samples)
        with activity(f"writing sample answers ({label})"):
            figures["samples"] = sample_answers(
                model, session.tokenizer, chosen, max_new_tokens=config.evaluate.max_new_tokens,
                stop_ids=session.stop_ids, options=session.token_options,
            )  # fmt: skip
    return figures, rows


def _about(session: Session, source: ModelConfig, label: str, *, generate: bool) -> dict[str, Any]:
    config = session.config.evaluate
    template = hashlib.sha256(str(session.tokenizer.chat_template).encode()).hexdigest()[:16]
    data = session.config.data
    samples = [config.num_samples, config.max_new_tokens, list(session.stop_ids), template]
    samples += [data.template_arguments, data.date]
    # A trained model may have been written a moment ago, so its hash is not one that the session keeps.
    model = session.models.identity(source) if label == "base" else model_identity(source.name)
    return {
        "heldout": examples_digest({example.id: example for example in session.heldout}),
        "model": model,
        "dtype": source.dtype,
        "samples": samples if generate else None,
        "figures": _FIGURES,
    }

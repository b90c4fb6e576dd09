"""The evaluate stage: held-out figures and sample answers of the base model and of each trained one.

evaluation.json says of every model what its figures are about: a hash of the held-out tokens and of the model's
files. Figures about something else are made anew, with a word; the others stand.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from sftmix.config import ModelConfig
from sftmix.data.digest import examples_digest
from sftmix.evaluation.figures import evaluate_model, sample_answers
from sftmix.files import replacing
from sftmix.model.identity import model_identity
from sftmix.model.packing import packs
from sftmix.model.parallel import shard
from sftmix.progress import activity, bar, say
from sftmix.rank import is_main
from sftmix.run.card import write_card
from sftmix.run.checksums import described, sums
from sftmix.run.folder import read_evaluation
from sftmix.run.session import Session

METHODS = ("ntp", "sftmix")
_ABOUT = {
    "heldout": "held-out examples",
    "model": "model",
    "dtype": "model.dtype",
    "samples": "sample answers",
}


def evaluate(session: Session, *, generate: bool = True) -> dict[str, Any]:
    """Held-out figures of the base model and of each trained one, and sample answers; to evaluation.json.

    Raises ``ValueError`` where there are no held-out examples.
    """
    _require_heldout(session)
    trained = [method for method in METHODS if session.folder.exported(method) is not None]
    for label in ("base", *trained):
        evaluate_one(session, label, generate=generate)
    return _earlier(session)


def evaluate_one(session: Session, label: str, *, plain: Any = None, generate: bool = True) -> dict[str, Any]:
    """Figures and sample answers of ``label`` (base, ntp or sftmix), put into evaluation.json and the model's card.

    ``plain`` is the model as transformers reads it, where the caller has just read it. Figures that stand there and
    are about the same are kept. Raises ``ValueError`` where there are no held-out examples.
    """
    _require_heldout(session)
    source = _source(session, label)
    about = _about(session, source, label, generate=generate)
    earlier = _earlier(session)
    before = earlier.get(label, {})
    if before.get("about") == about:
        say(f"evaluate {label}: done before")
        result = before
    else:
        if before:
            was = before.get("about") or {}
            others = [words for key, words in _ABOUT.items() if was.get(key) != about[key]]
            say(f"evaluate {label}: anew, the figures that stand there are about other {', '.join(others)}")
        result = {**_figures(session, source, label, plain, generate=generate), "about": about}
    session.barrier()  # every process has read the earlier results
    if is_main():
        found = {**earlier, label: result}
        found = {name: found[name] for name in ("base", *METHODS) if name in found}
        with replacing(session.folder.evaluation) as temporary:
            temporary.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        folder = session.folder
        folder.note("evaluate", "finished", {}, {}, sums(folder.path, "evaluate"))
        if label != "base":
            write_card(session, label, found)
    session.barrier()
    return result


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


def _earlier(session: Session) -> dict[str, Any]:
    """The figures that stand in the folder; none where they cannot be read or are damaged, which is said."""
    damaged = session.damage("evaluate")
    if not session.folder.evaluation.exists():
        return {}
    if damaged:
        say(f"evaluate: anew, {described(damaged)}")
        return {}
    try:
        return read_evaluation(session.folder.evaluation)
    except ValueError as error:
        say(f"evaluate: anew, {error}")
        return {}


def _figures(
    session: Session, source: ModelConfig, label: str, plain: Any, *, generate: bool
) -> dict[str, Any]:
    config = session.config
    if plain is None or session.world.mesh is not None:  # of the processes only the first has just read it
        model = session.models.load(source, trainable=False)
    else:
        model = session.models.adopt(plain)
    packed = packs(model, config.train.packing)
    shard(model, session.world)
    with bar(f"evaluate {label}") as progress:
        figures: dict[str, Any] = evaluate_model(
            model, session.heldout, batch_size=config.evaluate.batch_size, pad_id=session.pad_id,
            impl=config.train.impl, packed=packed, progress=progress.batches, world=session.world,
        )  # fmt: skip
    figures["num_examples"] = len(session.heldout)
    if generate:
        chosen = session.heldout_examples(config.evaluate.num_samples)
        with activity(f"writing sample answers ({label})"):
            figures["samples"] = sample_answers(
                model, session.tokenizer, chosen, max_new_tokens=config.evaluate.max_new_tokens,
                stop_ids=session.stop_ids, options=session.token_options,
            )  # fmt: skip
    return figures


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
    }

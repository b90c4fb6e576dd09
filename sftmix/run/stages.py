"""The stages of a run, each from files to files: reference, score, split, train, evaluate, plot.

A stage that is already done with the same settings is passed over, so a stopped run goes on where it stood by
starting it again; inside a stage the trainer goes on from its newest checkpoint. One that was done or begun with
other settings is refused (``identity``); evaluation and pictures are cheap and made anew, with a word.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sftmix.model.export import export_adapter, merge_and_export
from sftmix.progress import activity, bar, say
from sftmix.rank import is_main
from sftmix.report.gather import gather
from sftmix.report.page import write_report
from sftmix.report.texts import Texts
from sftmix.run.benchmarks import check_more
from sftmix.run.card import card
from sftmix.run.evaluate import evaluate, evaluate_one
from sftmix.run.folder import stage_names
from sftmix.run.halves import check_same, make_halves, needs_scores, without_scores
from sftmix.run.identity import about, check, check_ids, differences, passed, settings
from sftmix.run.scoring import score_points
from sftmix.run.session import Session
from sftmix.run.texts import example_texts
from sftmix.scores import cartography
from sftmix.scores.confidence import confidence, read_split, write_split
from sftmix.scores.dynamics import rank_correlation, read_dynamics, read_rows, write_dynamics
from sftmix.scores.halves import split_digest
from sftmix.training.checkpoint import save_trainable
from sftmix.training.metrics import Record, read_metrics
from sftmix.training.runs import train_pairs, train_plain
from sftmix.training.trainer import Progress

METHODS = ("ntp", "sftmix")
__all__ = [
    "evaluate",
    "plot",
    "reference",
    "run",
    "score",
    "split",
    "train",
]  # the commands of cli.py, by name


def reference(session: Session, *, watch: Progress | None = None) -> None:
    """Train the reference with next-token prediction, saving weights at each scoring point.

    ``watch`` sees every step after the progress bar does; what it raises ends the stage, which is then not finished.
    """
    config, folder = session.config, session.folder
    if config.reference.scores is not None or not needs_scores(config):
        say(
            f"reference: not needed, {without_scores(config) or f'scores come from {config.reference.scores}'}"
        )
        return
    wants_points = config.reference.dynamics != "online"
    whole = folder.point_step(0).exists() if wants_points else folder.online.exists()
    if passed(session, "reference", whole=whole):
        say("reference: done before")
        return
    model = session.models.load(session.models.reference, trainable=True)

    def on_point(index: int, step: int) -> None:
        save_trainable(model, folder.point(index))
        if is_main():
            folder.point_step(index).write_text(json.dumps({"step": step}), encoding="utf-8")

    with bar("reference") as progress:

        def on_step(step: int, total: int, record: Record) -> None:
            progress.steps(step, total, record)
            if watch is not None:
                watch(step, total, record)

        rows = train_plain(
            config, model, session.reference_examples, folder=folder.reference, pad_id=session.pad_id,
            on_point=on_point if wants_points else None, progress=on_step,
            identity=_identity(session.reference_id, session.models.identity(session.models.reference)),
        )  # fmt: skip
    if is_main() and config.reference.dynamics != "checkpoint":
        write_dynamics(folder.online, rows)
    session.finish("reference", settings(session, "reference"), about(session))


def _identity(examples: str, files: str) -> dict[str, str]:
    return {"examples": examples, "model files": files}


def score(session: Session) -> None:
    """Collect the training dynamics: score the saved points, take the online scores, or read a ready file."""
    config, folder = session.config, session.folder
    if not needs_scores(config):
        say(f"score: not needed, {without_scores(config)}")
        return
    if passed(session, "score", whole=folder.dynamics.exists()):
        say("score: done before")
        return
    if config.reference.scores is not None:
        path = config.reference.scores
        rows = _of_training(
            session, cartography.read_rows(path) if cartography.is_export(path) else read_rows(path)
        )
    else:
        _require(session, "reference")
        rows = score_points(session) if config.reference.dynamics != "online" else []
        if config.reference.dynamics != "checkpoint":
            rows += read_rows(folder.online)
    if is_main():
        write_dynamics(folder.dynamics, rows)
    session.barrier()
    check_ids(
        session, read_dynamics(folder.dynamics).examples, str(config.reference.scores or folder.dynamics)
    )
    _tell_correlation(session)
    session.finish("score", settings(session, "score"), about(session))
    session.folder.remove_scoring()


def _tell_correlation(session: Session) -> None:
    """With both sources, how far the free scores order the examples as the checkpoints' do."""
    if session.config.reference.dynamics != "both" or session.config.reference.scores is not None:
        return
    by_source = [
        confidence(read_dynamics(session.folder.dynamics, source)) for source in ("checkpoint", "online")
    ]
    say(f"score: online and checkpoint confidence have rank correlation {rank_correlation(*by_source):.3f}")


def split(session: Session) -> None:
    """Cut the examples as ``split.by`` says: at their median confidence, a quantile, at random, or as a file does."""
    folder = session.folder
    if needs_scores(session.config):
        session.require_whole("score", "score")
    made, source = make_halves(session)
    check_ids(session, made.confident + made.unconfident, str(session.config.split.file or folder.dynamics))
    check_same(session, made, session.damage("split"))
    session.barrier()
    if is_main():
        write_split(folder.split, made)
    session.finish("split", {"split": split_digest(made)}, {})
    done = read_split(folder.split)
    border = ""
    if needs_scores(session.config):
        middle = (done.confidence[done.confident[-1]] + done.confidence[done.unconfident[0]]) / 2
        border = (
            f", {'cut at' if session.config.split.by == 'quantile' else 'median'} confidence {middle:.3g}"
        )
    say(
        f"split: {len(done.confident)} confident and {len(done.unconfident)} unconfident examples{border} ({source})"
    )


def _of_training(session: Session, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of a ready score file that are about training examples; the others are counted, in a line."""
    own = [row for row in rows if row["example"] in session.train]
    others = len({row["example"] for row in rows}) - len({row["example"] for row in own})
    if others and own:
        say(f"score: {others} examples of {session.config.reference.scores} are not trained on: left out")
    return own or rows


def train(session: Session, method: str) -> Any:
    """Train the model with ``method`` (sftmix or ntp) on the split's pairs and export it.

    Returns the exported model as plain transformers has just read it back, on the main process; None where there is
    nothing new or an adapter alone. Raises ``ValueError`` where what was exported is not what was trained: the stage
    is then not finished and its checkpoint stays, so that the export alone is repeated.
    """
    config, folder = session.config, session.folder
    session.require_whole("split", "split")
    halves = read_split(folder.split)
    check_ids(session, halves.confident + halves.unconfident, str(folder.split))
    if passed(session, f"train-{method}", whole=all(map(Path.exists, folder.exports(method, config.export)))):
        say(f"train {method}: done before")
        return None
    missing = [path for path in folder.exports(method, config.export) if not path.exists()]
    model = session.models.load(session.models.source, trainable=True)
    with bar(f"train {method}") as progress:
        train_pairs(
            session.with_method(method), model, session.train, halves, folder=folder.train(method),
            pad_id=session.pad_id, progress=progress.steps,
            identity=_identity(session.train_id, session.models.identity(session.models.source)),
        )  # fmt: skip
    plain = None
    if folder.model(method) in missing:
        with activity("writing the trained model, and reading it back"):
            plain = merge_and_export(
                model, session.tokenizer, folder.model(method), stop_ids=session.stop_ids,
                texts=session.proof_texts(), source=session.models.source, card=card(session, method, {}),
            )  # fmt: skip
    if folder.adapter(method) in missing:
        with activity("writing the adapter, and reading it back"):
            export_adapter(
                model, session.tokenizer, folder.adapter(method), base=session.models.source,
                texts=session.proof_texts(), card=card(session, method, {}),
            )  # fmt: skip
    session.finish(f"train-{method}", settings(session, f"train-{method}"), about(session))
    return plain


def plot(session: Session) -> list[str]:
    """Draw data map, loss curves and confidence histogram, and write report.html; the paths of what there is.

    Everything is from the files. Without scores and halves there are no pictures, which is said, but a report.
    """
    folder = session.folder
    paths = [folder.plots / name for name in ("data_map.png", "confidence.png", "loss_curves.png")]
    if is_main():
        # matplotlib takes a second to load, and a minute the first time, when it lists the fonts.
        with activity("drawing the pictures"):
            for path in (*paths, folder.report):  # a picture of files that are gone must not stand
                path.unlink(missing_ok=True)
            _draw(session, paths)
        with activity("writing the report"):
            found = gather(folder.path)
            texts = Texts(missing="texts of the examples: not in this page, there are no scores yet")
            if found.scores is not None:
                texts = example_texts(session, found.scores)
            write_report(found, texts)
    session.barrier()
    return [str(path) for path in (*paths, folder.report) if path.exists()]


def _draw(session: Session, paths: Sequence[Path]) -> None:
    """The pictures of what there is; what they lack is said."""
    from sftmix.evaluation import plots

    folder = session.folder
    if needs_scores(session.config):
        missing = [path.name for path in (folder.dynamics, folder.split) if not path.exists()]
        if missing:
            say(f"plot: no pictures, {' and '.join(missing)} not there yet; the report says what there is")
            return
    folder.plots.mkdir(parents=True, exist_ok=True)
    halves = read_split(folder.split) if folder.split.exists() else None
    if halves is not None and folder.dynamics.exists():
        plots.plot_data_map(read_dynamics(folder.dynamics), halves, paths[0])
    if halves is not None and halves.confidence:
        plots.plot_confidence(halves, paths[1])
    else:
        say(f"plot: no data map and no confidence, {without_scores(session.config)}")
    runs = {"reference": folder.reference, **{m: folder.train(m) for m in METHODS}}
    files = {name: run / "metrics.jsonl" for name, run in runs.items()}
    curves = {name: read_metrics(file) for name, file in files.items() if file.exists()}
    if any(curves.values()):
        plots.plot_loss_curves({k: v for k, v in curves.items() if v}, paths[2])


def run(session: Session, methods: Sequence[str] = METHODS, *, watch: Progress | None = None) -> None:
    """All stages in order; the ones that are done are passed over. ``watch``: see ``reference``.

    Raises ``ValueError``, before anything is done, where the folder was begun with other settings.
    """
    check(session, stage_names(methods))
    check_more(session)
    session.tell_data()
    session.models.keep_base = True  # every stage begins with it
    if not session.heldout:
        say("evaluate: left out, there are no held-out examples (data.heldout, data.heldout_fraction)")
        if session.folder.evaluation.exists() and is_main():
            session.folder.remove(("evaluate",))
            say("evaluate: removed evaluation.json, which is about other held-out examples")
    elif session.models.reference == session.models.source:
        evaluate_one(session, "base")  # now, while the model is as it was read
    reference(session, watch=watch)
    score(session)
    split(session)
    if session.heldout and session.models.reference != session.models.source:
        evaluate_one(session, "base")
    others = [m for m in METHODS if m not in methods and session.folder.exported(m) is not None]
    for method in [*others, *methods]:
        plain = train(session, method) if method in methods else None
        if session.heldout:
            evaluate_one(session, method, plain=plain)
        del plain
    session.models.forget()
    plot(session)


def _require(session: Session, stage: str) -> None:
    found = session.folder.record().get(stage, {})
    if found.get("state") != "finished":
        raise ValueError(
            f"{session.folder.path}: expected a finished {stage} stage with the present settings, found "
            f"{'one that is only begun' if found else 'none'}; run `sftmix {stage}`"
        )
    told = differences(found["settings"], json.loads(json.dumps(settings(session, stage))))
    if told:
        raise ValueError(
            f"{session.folder.path}: expected a finished {stage} stage with the present settings, found others: "
            f"{'; '.join(told)}; run `sftmix {stage} --restart {stage}`"
        )

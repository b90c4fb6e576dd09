"""The stages of a run, each from files to files: reference, score, split, train, evaluate, plot.

A stage that is already done with the same settings is passed over, so a stopped run goes on where it stood by
starting it again; inside a stage the trainer goes on from its newest checkpoint.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

from sftmix.evaluation.figures import evaluate_model, sample_answers, score_examples
from sftmix.files import replacing
from sftmix.model.export import merge_and_export
from sftmix.progress import activity, bar, say
from sftmix.rank import is_main
from sftmix.run.folder import Settings
from sftmix.run.session import Session, examples_digest
from sftmix.scores.confidence import confidence, make_split, read_split, write_split
from sftmix.scores.dynamics import rank_correlation, read_dynamics, read_rows, write_dynamics
from sftmix.scores.halves import Split
from sftmix.training.checkpoint import load_trainable, save_trainable
from sftmix.training.metrics import Record, read_metrics
from sftmix.training.trainer import Progress, train_pairs, train_plain

METHODS = ("ntp", "sftmix")


def reference(session: Session, *, watch: Progress | None = None) -> None:
    """Train the reference with next-token prediction, saving weights at each scoring point.

    ``watch`` sees every step after the progress bar does; what it raises ends the stage, which is then not finished.
    """
    config, folder = session.config, session.folder
    if config.reference.scores is not None:
        say(f"reference: not needed, scores come from {config.reference.scores}")
        return
    settings = reference_settings(session)
    if folder.is_finished("reference", settings):
        say("reference: done before")
        return
    model = session.load(session.reference_source, trainable=True)
    wants_points = config.reference.dynamics != "online"

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
        )  # fmt: skip
    if is_main() and config.reference.dynamics != "checkpoint":
        write_dynamics(folder.online, rows)
    session.finish("reference", settings)


def score(session: Session) -> None:
    """Collect the training dynamics: score the saved points, take the online scores, or read a ready file."""
    config, folder = session.config, session.folder
    settings = {**reference_settings(session), "scores": config.reference.scores}
    if folder.is_finished("score", settings) and folder.dynamics.exists():
        say("score: done before")
        return
    if config.reference.scores is not None:
        rows = read_rows(config.reference.scores)
    else:
        _require(session, "reference", reference_settings(session))
        rows = _score_points(session) if config.reference.dynamics != "online" else []
        if config.reference.dynamics != "checkpoint":
            rows += read_rows(folder.online)
    if is_main():
        write_dynamics(folder.dynamics, rows)
    session.barrier()
    _check_ids(
        session, read_dynamics(folder.dynamics).examples, str(config.reference.scores or folder.dynamics)
    )
    _tell_correlation(session)
    session.finish("score", settings)


def _score_points(session: Session) -> list[dict[str, Any]]:
    config, folder = session.config, session.folder
    model = session.load(session.reference_source, trainable=True)
    examples = list(session.reference_examples.values())
    num_points = config.reference.epochs * config.reference.checkpoints_per_epoch
    rows: list[dict[str, Any]] = []
    for index in range(num_points):
        if not folder.point(
            index
        ).exists():  # train.max_steps may end the reference run before its last points
            break
        step = json.loads(folder.point_step(index).read_text(encoding="utf-8"))["step"]
        load_trainable(model, folder.point(index))
        with bar(f"score point {index + 1}/{num_points}") as progress:
            rows += score_examples(
                model, examples, checkpoint=index, step=step, batch_size=config.evaluate.batch_size,
                pad_id=session.pad_id, impl=config.train.impl, progress=progress.batches,
            )  # fmt: skip
    if not rows:
        raise ValueError(
            f"{folder.point(0)}: expected the weights of a scoring point, found none; run `sftmix reference`"
        )
    return rows


def _tell_correlation(session: Session) -> None:
    """With both sources, how far the free scores order the examples as the checkpoints' do."""
    if session.config.reference.dynamics != "both" or session.config.reference.scores is not None:
        return
    by_source = [
        confidence(read_dynamics(session.folder.dynamics, source)) for source in ("checkpoint", "online")
    ]
    say(f"score: online and checkpoint confidence have rank correlation {rank_correlation(*by_source):.3f}")


def split(session: Session) -> None:
    """Cut the examples at their median confidence."""
    folder = session.folder
    dynamics = read_dynamics(folder.dynamics)
    _check_ids(session, dynamics.examples, str(folder.dynamics))
    if is_main():
        write_split(folder.split, make_split(dynamics))
    session.barrier()
    done = read_split(folder.split)
    border = (done.confidence[done.confident[-1]] + done.confidence[done.unconfident[0]]) / 2
    say(
        f"split: {len(done.confident)} confident and {len(done.unconfident)} unconfident examples, median "
        f"confidence {border:.3g} ({dynamics.num_checkpoints} scoring points, {dynamics.source})"
    )


def train(session: Session, method: str) -> None:
    """Train the model with ``method`` (sftmix or ntp) on the split's pairs and export it."""
    folder = session.folder
    halves = read_split(folder.split)
    _check_ids(session, halves.confident + halves.unconfident, str(folder.split))
    settings = train_settings(session, method)
    if folder.is_finished(f"train-{method}", settings) and folder.model(method).exists():
        say(f"train {method}: done before")
        return
    model = session.load(session.model_source, trainable=True)
    with bar(f"train {method}") as progress:
        train_pairs(
            session.with_method(method), model, session.train, halves, folder=folder.train(method),
            pad_id=session.pad_id, progress=progress.steps,
        )  # fmt: skip
    with activity("writing the trained model"):
        merge_and_export(model, session.tokenizer, folder.model(method))
    session.finish(f"train-{method}", settings)


def evaluate(session: Session, *, generate: bool = True) -> dict[str, Any]:
    """Held-out figures of the base model and of each trained one, and sample answers; to evaluation.json."""
    config, folder = session.config, session.folder
    if not session.heldout:
        raise ValueError("data.heldout: expected held-out examples (or data.heldout_fraction > 0), got none")
    sources = {"base": session.model_source}
    for method in METHODS:
        if folder.model(method).exists():
            sources[method] = session.source_at(folder.model(method))
    results: dict[str, Any] = {}
    for label, source in sources.items():
        model = session.load(source, trainable=False)
        with bar(f"evaluate {label}") as progress:
            figures: dict[str, Any] = evaluate_model(
                model, session.heldout, batch_size=config.evaluate.batch_size, pad_id=session.pad_id,
                impl=config.train.impl, progress=progress.batches,
            )  # fmt: skip
        figures["num_examples"] = len(session.heldout)
        if generate:
            chosen = session.heldout_examples[: config.evaluate.num_samples]
            with activity(f"writing sample answers ({label})"):
                figures["samples"] = sample_answers(
                    model, session.tokenizer, chosen, max_new_tokens=config.evaluate.max_new_tokens
                )
        results[label] = figures
    if is_main():
        with replacing(folder.evaluation) as temporary:
            temporary.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    session.barrier()
    return results


def plot(session: Session) -> list[str]:
    """Draw the data map, the loss curves and the confidence histogram from the files; the pictures' paths."""
    folder = session.folder
    dynamics, halves = read_dynamics(folder.dynamics), read_split(folder.split)
    paths = [folder.plots / name for name in ("data_map.png", "confidence.png", "loss_curves.png")]
    if is_main():
        # matplotlib takes a second to load, and a minute the first time, when it lists the fonts.
        with activity("drawing the pictures"):
            from sftmix.evaluation import plots

            folder.plots.mkdir(parents=True, exist_ok=True)
            plots.plot_data_map(dynamics, halves, paths[0])
            plots.plot_confidence(halves, paths[1])
            runs = {"reference": folder.reference, **{m: folder.train(m) for m in METHODS}}
            files = {name: run / "metrics.jsonl" for name, run in runs.items()}
            curves = {name: read_metrics(file) for name, file in files.items() if file.exists()}
            if any(curves.values()):
                plots.plot_loss_curves({k: v for k, v in curves.items() if v}, paths[2])
    session.barrier()
    return [str(path) for path in paths if path.exists()]


def run(session: Session, methods: Sequence[str] = METHODS, *, watch: Progress | None = None) -> None:
    """All stages in order; the ones that are done are passed over. ``watch``: see ``reference``."""
    steps: list[Callable[[], Any]] = [
        lambda: reference(session, watch=watch),
        lambda: score(session),
        lambda: split(session),
    ]
    steps += [lambda m=m: train(session, m) for m in methods]  # type: ignore[misc]
    if session.heldout:
        steps.append(lambda: evaluate(session))
    else:
        say("evaluate: left out, there are no held-out examples (data.heldout, data.heldout_fraction)")
    for step in [*steps, lambda: plot(session)]:
        step()


def reference_settings(session: Session) -> Settings:
    """What the reference run's results depend on."""
    examples = {"examples": examples_digest(session.reference_examples)}
    return {**session.settings("seed", "model", "reference", "optim", "train", "lora"), **examples}


def train_settings(session: Session, method: str) -> Settings:
    """What a training run's result depends on, its split included."""
    halves = read_split(session.folder.split)
    settings = session.settings("seed", "model", "mixup", "optim", "train", "lora")
    settings["train"] = {**settings["train"], "method": method}
    return {**settings, "examples": examples_digest(session.train), "split": digest(halves)}


def digest(halves: Split) -> str:
    """A short hash of which example is in which half."""
    return hashlib.sha256(repr((sorted(halves.confident), sorted(halves.unconfident))).encode()).hexdigest()[
        :16
    ]


def _require(session: Session, stage: str, settings: Settings) -> None:
    if not session.folder.is_finished(stage, settings):
        raise ValueError(
            f"{session.folder.path}: expected a finished {stage} stage with the present settings, found "
            f"{'other settings' if stage in session.folder.finished() else 'none'}; run `sftmix {stage}`"
        )


def _check_ids(session: Session, ids: Sequence[str], where: str) -> None:
    """Scores and examples must be about the same texts."""
    missing, unknown = sorted(session.train.keys() - set(ids)), sorted(set(ids) - session.train.keys())
    if missing or unknown:
        raise ValueError(
            f"{where}: expected exactly the examples of data.train, got {len(missing)} of them missing and "
            f"{len(unknown)} unknown (first: {(missing + unknown)[0]})"
        )

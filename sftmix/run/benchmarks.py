"""Benchmarks and answers within a run: what is asked of each model besides its held-out figures.

With several processes the first asks a whole copy of the model by itself while the others wait.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch.distributed as dist

from sftmix.data.fingerprint import content_hash
from sftmix.evaluation.answers import FORMS, Writer, read_questions, write_answers
from sftmix.evaluation.benchmarks import Asking, check_tasks, run_tasks
from sftmix.evaluation.requests import parse_files, parse_tasks
from sftmix.evaluation.task_rows import FORMS as TASKS
from sftmix.evaluation.task_sources import check_installed, check_rows, write_tasks
from sftmix.model.export import stops
from sftmix.model.tokenizer import positions
from sftmix.model.vocabulary import safe_pad_id
from sftmix.progress import bar, say
from sftmix.rank import is_main
from sftmix.run.session import Session
from sftmix.sections import EvaluateConfig

More = dict[str, dict[str, Any]]  # tasks and answers, by name


def asks_more(config: EvaluateConfig) -> bool:
    """Whether anything is asked besides held-out figures."""
    return bool(config.tasks or config.answers)


def check_more(session: Session) -> None:
    """Look at all that is asked before anything is trained.

    Raises ``ValueError`` for files that are missing or not of their form, lm-eval that is, a model without room for the
    answers, and a run without held-out examples, whose evaluation is left out.
    """
    config = session.config.evaluate
    unused = () if config.tasks else ("fewshot", "num_fewshot")
    for knob in (*unused, *(() if asks_more(config) else ("task_limit",))):
        if getattr(config, knob) is not None:
            say(f"warning: evaluate.{knob} is not used without benchmarks (evaluate.tasks)")
    if not asks_more(config):
        return
    if not session.heldout:
        raise ValueError("evaluate.tasks, evaluate.answers: expected held-out examples beside them, got none")
    if config.tasks:
        check_installed()
        requests = parse_tasks(config.tasks)
        fewshot = parse_files("evaluate.fewshot", config.fewshot, TASKS)
        check_rows(requests, fewshot, config.num_fewshot)
        asking = Asking(config.num_fewshot, template=config.task_template)
        paths = [request.path for request in requests if request.form is None]
        together(lambda: check_tasks(paths, session.tokenizer, asking))
    for form, path in parse_files("evaluate.answers", config.answers, tuple(FORMS)).items():
        read_questions(form, path)
    room = positions(session.models.source)
    if room is not None and config.answer_tokens >= room:
        raise ValueError(
            f"evaluate.answer_tokens: expected fewer than the {room} positions of the model, got {config.answer_tokens}"
        )


def more_figures(
    session: Session, load: Callable[[], Any], before: dict[str, Any], label: str, about: dict[str, Any]
) -> More:
    """Benchmarks and answers of one model; what stands in ``before`` and is about the same is kept.

    ``load`` gives the whole model on this process. Raises ``ValueError`` on every process where one of them fails.
    """
    found: More = together(lambda: _more(session, load, before, label, about))
    return found


def together(work: Callable[[], Any]) -> Any:
    """What ``work`` gives on the main process, on every process; its error is raised on every one too."""
    if not dist.is_initialized():
        return work()
    told: list[Any] = [None, None]
    problem: BaseException | None = None
    if is_main():
        try:
            told[0] = work()
        except BaseException as error:  # the others wait: whatever ends this process must end them
            problem, told[1] = error, f"{type(error).__name__}: {error}"
    dist.broadcast_object_list(told, src=0)
    if problem is not None:
        raise problem
    if told[1] is not None:
        raise ValueError(f"the main process ended with {told[1]}")
    return told[0]


def _more(
    session: Session, load: Callable[[], Any], before: dict[str, Any], label: str, about: dict[str, Any]
) -> More:
    config, options = session.config.evaluate, session.token_options
    template = hashlib.sha256(str(session.tokenizer.chat_template).encode()).hexdigest()[:16]
    if dist.is_initialized():
        say(f"evaluate {label}: benchmarks and answers by the first process alone, the others wait")
    shared = {
        "model": about["model"], "dtype": about["dtype"], "ends": list(session.stop_ids),
        "template": [template, session.config.data.template_arguments, session.config.data.date],
    }  # fmt: skip
    found = _standing(before, config, about["model"])
    if config.tasks:
        sources = write_tasks(
            parse_tasks(config.tasks), parse_files("evaluate.fewshot", config.fewshot, TASKS),
            session.folder.tasks, max_tokens=config.answer_tokens, quiet=label != "base",
        )  # fmt: skip
        asking = Asking(
            config.num_fewshot, config.task_limit, config.task_template, config.batch_size, config.unsafe_code,
            session.stop_ids, options, positions(session.models.source), shared,
        )  # fmt: skip
        found["tasks"] |= run_tasks(
            lambda: load().base, session.tokenizer, sources, asking, before.get("tasks", {}), label=label,
            folder=session.folder.tasks / label,
        )  # fmt: skip
    for form, path in parse_files("evaluate.answers", config.answers, tuple(FORMS)).items():
        mine = {
            **shared,
            "file": content_hash(path)[:16],
            "limit": config.task_limit,
            "tokens": config.answer_tokens,
        }
        standing = before.get("answers", {}).get(form, {})
        if standing.get("about") == mine:
            say(f"evaluate {label}: answers to {form} done before")
            found["answers"][form] = standing
            continue
        if standing:
            say(
                f"evaluate {label}: answers to {form} anew, those there are of another model, file or setting"
            )
        found["answers"][form] = {**_answer(session, load(), form, path, label), "about": mine}
    for kind, figures in found.items():
        for name in before.get(kind, {}).keys() - figures.keys():
            say(f"evaluate {label}: {kind} {name} left out: of another model, and not asked for now")
    return {kind: figures for kind, figures in found.items() if figures}


def _standing(before: dict[str, Any], config: EvaluateConfig, model: str) -> More:
    """What stands there of the same model and is not asked for now, which stays."""
    asked = parse_files("evaluate.answers", config.answers, tuple(FORMS))
    found: More = {"tasks": {}, "answers": {}}
    for kind in found:
        for name, figures in before.get(kind, {}).items():
            if (figures.get("about") or {}).get("model") == model and (kind == "tasks" or name not in asked):
                found[kind][name] = figures
    return found


def _answer(session: Session, model: Any, form: str, file: Path, label: str) -> dict[str, Any]:
    config = session.config.evaluate
    found = read_questions(form, file, config.task_limit)
    questions = found.asked
    if len(questions) < found.of:
        say(
            f"evaluate {label}: {form}: the first {len(questions)} of {found.of} questions (evaluate.task_limit)"
        )
    if found.ignored:
        names = ", ".join(f"{name} ({count} rows)" for name, count in found.ignored.items())
        say(f"evaluate.answers: {file}: fields that are not used: {names}")
    writer = Writer(
        model, session.tokenizer, stops(model.base, session.stop_ids), safe_pad_id(session.tokenizer, model.vocab_size),
        config.answer_tokens, config.batch_size, session.token_options, positions(session.models.source),
    )  # fmt: skip
    name = f"{session.folder.path.name}-{label}"
    path = session.folder.answers / label / FORMS[form]
    with bar(f"answers {label} {form}") if is_main() else nullcontext() as progress:
        told = write_answers(
            form, questions, writer, path, name=name,
            progress=None if progress is None else progress.batches,
        )  # fmt: skip
    told["num_rows"] = found.of
    say(f"answers ({label}): {path}")
    for count, words in (
        (told["unfinished"], "have no end within their tokens"),
        (told["empty"], "are empty"),
    ):
        if count:
            say(f"evaluate {label}: {form}: {count} of {told['num_answers']} answers {words}")
    return told

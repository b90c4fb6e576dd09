"""What would fit where a plan does not: the same question with one thing changed, then with several."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from sftmix.planning.plan import MOST_GPUS, Plan, Question, least_bytes, make_plan

SMALLEST = 2  # sequences of a micro-batch: a pair


@dataclass(frozen=True)
class Remedy:
    """A change that makes a plan fit, in words and flags, and the bytes on a GPU with it."""

    what: str
    flags: str
    total: int


Change = tuple[str, str, Question]  # words, flags, the changed question


def find_remedies(plan: Plan) -> list[Remedy]:
    """The changes that make ``plan`` fit, single ones first; empty where it fits, or where nothing here helps.

    Two or more things are changed together only where no single one of checkpointing, micro-batch and GPUs helps;
    LoRA, which trains something else, is tried in any case.
    """
    if plan.fits:
        return []
    question = plan.question
    singles = [
        _first_fit(changes)
        for changes in (_whole(question), _checkpointed(question), _smaller(question), _more_gpus(question))
    ]
    found = [remedy for remedy in singles if remedy is not None]
    if not found:
        least = list(_together(question))
        found = [remedy for remedy in (_first_fit(least), _first_fit(_more_gpus_of(least[-1:]))) if remedy]
    lora = list(_lora(question))
    if lora:
        least = [*lora, *_together(lora[0][2], *lora[0][:2])]
        tries = (_first_fit(least), _first_fit(_more_gpus_of(least[-1:])))
        found += [remedy for remedy in tries if remedy][:1]
    return found


def _first_fit(changes: Iterator[Change] | list[Change]) -> Remedy | None:
    for what, flags, question in changes:
        if least_bytes(question) > question.gpu.memory_bytes:
            continue  # before the seconds of a trace
        plan = make_plan(question)
        if plan.fits:
            return Remedy(what, flags, plan.memory.total)
    return None


def _with(question: Question, **changes: object) -> Question:
    """With other values of ``train``."""
    train = dataclasses.replace(question.config.train, **changes)  # type: ignore[arg-type]
    return dataclasses.replace(question, config=dataclasses.replace(question.config, train=train))


def _whole(question: Question) -> Iterator[Change]:
    if question.copies > 1:
        changed = dataclasses.replace(_with(question, replicas=1), per_node=question.in_a_node)
        yield f"sharding over all {question.gpus} GPUs", "--train.replicas 1", changed


def _checkpointed(question: Question) -> Iterator[Change]:
    if question.kind != "full":
        changed = _with(question, gradient_checkpointing="full")
        yield "activation checkpointing", "--train.gradient_checkpointing full", changed


def _smaller(question: Question) -> Iterator[Change]:
    size = min(question.config.train.micro_batch_size, question.config.train.batch_size)
    while size > SMALLEST:
        size = max(SMALLEST, size // 4 * 2)
        changed = _with(question, micro_batch_size=size)
        yield f"micro-batches of {size} sequences", f"--train.micro_batch_size {size}", changed


def _more_gpus(question: Question) -> Iterator[Change]:
    per_node, gpus = question.per_node, 2 * question.gpus
    while gpus <= MOST_GPUS:
        changed = dataclasses.replace(_with(question, replicas=1), gpus=gpus, per_node=per_node)
        yield f"{gpus} GPUs", f"--gpus {gpus}", changed
        gpus *= 2


def _more_gpus_of(changes: list[Change]) -> Iterator[Change]:
    for what, flags, question in changes:
        for more, flag, changed in _more_gpus(question):
            yield f"{what} and {more}", f"{flags} {flag}".strip(), changed


def _lora(question: Question) -> Iterator[Change]:
    if question.config.train.tuning != "lora":
        yield "LoRA", "--train.tuning lora", _with(question, tuning="lora")


def _together(question: Question, *before: str) -> Iterator[Change]:
    """Checkpointing, then smaller and smaller micro-batches with it; ``before``: words and flags of a change made."""
    for what, flags, changed in _checkpointed(question):
        question, before = changed, _joined(before, what, flags)
        yield *before, question
    for what, flags, changed in _smaller(question):
        yield *_joined(before, what, flags), changed


def _joined(before: tuple[str, ...], what: str, flags: str) -> tuple[str, str]:
    return (f"{before[0]}, {what}", f"{before[1]} {flags}") if before else (what, flags)

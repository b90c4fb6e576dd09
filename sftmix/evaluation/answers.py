"""Answers to the questions of MT-Bench and AlpacaEval, in the formats that their judges read.

- ``mt-bench``: rows of question_id, turns (and category, reference). Written: a line a question as FastChat's
  ``gen_model_answer`` does, with question_id, answer_id, model_id, choices (index, turns) and tstamp. A later turn is
  asked with the answers to the earlier ones before it.
- ``alpaca-eval``: rows of instruction (and dataset). Written: one list of dataset, instruction, output and generator.

Decoding is greedy for every question, where FastChat's own script samples some categories. Prompts are those of
training: the tokenizer's chat template with the run's arguments and date.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sftmix.data.prompts import prompt_ids
from sftmix.data.read import read_rows
from sftmix.data.rows import Example, Fault
from sftmix.data.tokens import TokenOptions
from sftmix.evaluation.decoding import answer_batch, batches, greedy
from sftmix.files import replacing
from sftmix.model.causal_lm import SFTMixModel, evaluating

FORMS = {"mt-bench": "mt_bench.jsonl", "alpaca-eval": "alpaca_eval.json"}  # and the file of the answers
_KNOB = "evaluate.answers"
OnAnswers = Callable[[int, int], None]  # (answers done, answers in all)


@dataclass(frozen=True)
class Question:
    """One conversation to be answered: the user's turns, and the fields that are written beside the answers."""

    name: str
    turns: tuple[str, ...]
    fields: Mapping[str, Any]


@dataclass(frozen=True)
class Writer:
    """How a model answers: greedily, up to an end token or ``max_new_tokens``; ``positions``: all that it has."""

    model: SFTMixModel
    tokenizer: Any
    ends: Sequence[int]
    pad_id: int
    max_new_tokens: int = 1024
    batch_size: int = 8
    options: TokenOptions | None = None
    positions: int | None = None


@dataclass(frozen=True)
class Questions:
    """The questions that are asked, how many the file has, and its unknown fields with the rows that have them."""

    asked: list[Question]
    of: int
    ignored: Counter[str]


def read_questions(form: str, path: str | Path, limit: int | None = None) -> Questions:
    """The first ``limit`` questions of a file in its public form.

    Raises ``ValueError`` naming file and row for the first that is none, and for ids and instructions that come twice.
    """
    make, known = _READERS[form]
    found: dict[str, Question] = {}
    ignored: Counter[str] = Counter()
    for row in read_rows(str(path)):
        try:
            if isinstance(row, Fault):
                raise ValueError(row.reason)
            if not isinstance(row.fields, dict):
                raise ValueError(f"expected an object, got {row.fields!r:.60}")
            question = make(row.fields)
            if question.name in found:
                raise ValueError(f"expected each question once, got {question.name!r:.60} again")
        except ValueError as error:
            raise ValueError(f"{_KNOB}: {row.place}: {error}") from None
        found[question.name] = question
        ignored.update(str(key) for key, value in row.fields.items() if key not in known and value)
    return Questions(list(found.values())[:limit], len(found), ignored)


def _mt_bench(fields: Mapping[str, Any]) -> Question:
    name, turns = fields.get("question_id"), fields.get("turns")
    if isinstance(name, bool) or not isinstance(name, (int, str)):
        raise ValueError(f"question_id: expected a number or a text, got {name!r:.60}")
    if not isinstance(turns, list) or not turns or not all(isinstance(t, str) and t.strip() for t in turns):
        raise ValueError(f"turns: expected a list of texts, got {turns!r:.60}")
    return Question(str(name), tuple(turns), {"question_id": name})


def _alpaca_eval(fields: Mapping[str, Any]) -> Question:
    instruction = fields.get("instruction")
    if not isinstance(instruction, str) or not instruction.strip():
        raise ValueError(f"instruction: expected a text, got {instruction!r:.60}")
    if fields.get("input"):
        raise ValueError("input: expected none, for the judge reads the instruction alone, got a text")
    kept = {"dataset": fields["dataset"]} if fields.get("dataset") else {}
    return Question(instruction, (instruction,), {**kept, "instruction": instruction})


_READERS: dict[str, tuple[Callable[[Mapping[str, Any]], Question], tuple[str, ...]]] = {
    "mt-bench": (_mt_bench, ("question_id", "turns", "category", "reference")),
    "alpaca-eval": (_alpaca_eval, ("instruction", "dataset", "output", "generator", "datasplit")),
}


def write_answers(
    form: str, questions: Sequence[Question], writer: Writer, path: Path, *, name: str,
    progress: OnAnswers | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Answer all questions and write the file of ``form``, whole or absent; ``name`` is the model's in it.

    Returns ``num_questions``, ``num_answers`` (turns), ``unfinished`` (no end within ``max_new_tokens`` or the model's
    positions), ``empty``, and the settings of generation. Raises ``ValueError`` for a prompt that fills all positions.
    """
    answers: list[list[str]] = [[] for _ in questions]
    unfinished = done = 0
    total = sum(len(question.turns) for question in questions)
    with evaluating(writer.model), greedy(writer.model.base, writer.ends):
        for turn in range(max((len(question.turns) for question in questions), default=0)):
            asked = [i for i, question in enumerate(questions) if len(question.turns) > turn]
            prompts = [_prompt(questions[i], answers[i], writer) for i in asked]
            for at, text, ended in _texts(prompts, [questions[i].name for i in asked], writer):
                answers[asked[at]].append(text)
                unfinished += not ended
                done += 1
                if progress is not None:
                    progress(done, total)
    if form == "mt-bench":
        lines = [
            json.dumps(_fastchat(q, turns, name), ensure_ascii=False)
            for q, turns in zip(questions, answers, strict=True)
        ]
        text = "".join(line + "\n" for line in lines)
    else:
        rows = [
            {**q.fields, "output": turns[0], "generator": name}
            for q, turns in zip(questions, answers, strict=True)
        ]
        text = json.dumps(rows, ensure_ascii=False, indent=1) + "\n"
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return {
        "file": path.name, "num_questions": len(questions), "num_answers": done, "unfinished": unfinished,
        "empty": sum(not text for turns in answers for text in turns),
        "generation": {"do_sample": False, "max_new_tokens": writer.max_new_tokens, "eos_token_id": list(writer.ends)},
    }  # fmt: skip


def _fastchat(question: Question, turns: list[str], name: str) -> dict[str, Any]:
    identity = hashlib.sha256(json.dumps([name, question.fields, turns], sort_keys=True).encode())
    return {
        **question.fields, "answer_id": identity.hexdigest()[:22], "model_id": name,
        "choices": [{"index": 0, "turns": turns}], "tstamp": time.time(),
    }  # fmt: skip


def _prompt(question: Question, answers: Sequence[str], writer: Writer) -> list[int]:
    """The tokens before the next answer: all earlier turns with their answers, and the next question."""
    messages = []
    for turn in range(len(answers) + 1):
        messages.append({"role": "user", "content": question.turns[turn]})
        content = answers[turn] if turn < len(answers) else ""
        messages.append({"role": "assistant", "content": content})
    return prompt_ids(Example(id=question.name, messages=tuple(messages)), writer.tokenizer, writer.options)


def _texts(
    prompts: Sequence[list[int]], names: Sequence[str], writer: Writer
) -> Iterator[tuple[int, str, bool]]:
    """Index, text and whether it ended, of the answer to each prompt; the longest prompts first."""
    lengths, positions, most = [len(prompt) for prompt in prompts], writer.positions, writer.max_new_tokens
    alone = None if positions is None else positions - most
    for batch in batches(lengths, writer.batch_size, alone_above=alone):
        room = most if positions is None else min(most, positions - lengths[batch[0]])
        if room < 1:
            raise ValueError(
                f"{_KNOB}: expected prompts shorter than the model's {positions} positions, got {lengths[batch[0]]} "
                f"tokens for {names[batch[0]]!r:.60}"
            )
        found = answer_batch(
            writer.model, [prompts[i] for i in batch], ends=writer.ends, pad_id=writer.pad_id,
            max_new_tokens=room,
        )  # fmt: skip
        for i, (tokens, ended) in zip(batch, found, strict=True):
            yield i, writer.tokenizer.decode(tokens, skip_special_tokens=True).strip(), ended

"""Benchmarks by lm-evaluation-harness, offline, on a model that is in memory.

What the harness does without a word is done otherwise here, or counted: a prompt that is too long loses its beginning,
an answer has no end within its tokens, a template drops the system's message, few-shot examples come from the rows that
are asked. Prompts are tokens of the rendered chat template alone, as in training; decoding is greedy whatever the
model's settings say; log-probabilities are float32. Its cache of responses, which does not know the model, is not used.
"""

from __future__ import annotations

import copy
import logging
import os
import random
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub.constants
import lm_eval
import numpy as np
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from torch import Tensor

from sftmix.data.tokens import Encoder, TokenOptions

SEED = 1234  # of the few-shot examples: the harness's own
BOOTSTRAP = 1000  # resamples for the standard errors that have no formula
VERSION = lm_eval.__version__
_TEMPLATE = "evaluate.task_template: expected off, or a chat template"
_GROUP = re.compile(r"^group\s*:", re.MULTILINE)


class Harness(HFLM):  # type: ignore[misc, unused-ignore]
    """A causal LM as the harness asks it.

    ``ends``: token ids at which an answer ends. ``chat``: prompts are rendered by the tokenizer's chat template as the
    training examples were, with ``options``, and nothing is put before its text. ``max_length``: the model's positions,
    None for the harness's guess. ``cut`` counts prompts that lost their beginning, ``unfinished`` answers without an
    end.
    """

    def __init__(
        self, model: Any, tokenizer: Any, *, ends: Sequence[int], batch_size: int, chat: bool,
        options: TokenOptions | None = None, max_length: int | None = None,
    ) -> None:  # fmt: skip
        if tokenizer.eos_token_id is None:
            raise ValueError("evaluate.tasks: expected a tokenizer with an end token, got one without")
        super().__init__(
            pretrained=model, tokenizer=copy.deepcopy(tokenizer), backend="causal", batch_size=batch_size,
            max_length=max_length, softmax_dtype="float32", add_bos_token=False if chat else None,
        )  # fmt: skip
        self.ends = frozenset(ends)
        self._options = options or TokenOptions()
        self.cut = self.unfinished = 0

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The rendered conversation and the beginning of an answer: the last message's text, or none.

        Raises ``ValueError`` where the template cannot render it, whereupon the harness would leave out the system's
        message, and where a message is not in the rendered text.
        """
        before, begun = chat_history, ""
        if not add_generation_prompt:
            before, begun = chat_history[:-1], chat_history[-1]["content"]
        roles = ", ".join(message["role"] for message in before)
        try:
            text = Encoder(self.tokenizer, self._options).renderer.prompt(before, (), {})
        except ValueError as error:
            raise ValueError(f"{_TEMPLATE} that renders {roles}, got one that does not: {error}") from error
        for message in before:
            if message["content"].strip() not in text:
                raise ValueError(
                    f"{_TEMPLATE} that shows all of {roles}, got one that leaves out {message['content']!r:.60}"
                )
        return text + begun

    def tok_batch_encode(
        self, strings: list[str], padding_side: str = "left", left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        ids, mask = super().tok_batch_encode(strings, padding_side, None, truncation)
        if left_truncate_len:
            self.cut += int((mask.sum(1) > left_truncate_len).sum())
            ids, mask = ids[:, -left_truncate_len:], mask[:, -left_truncate_len:]
        return ids, mask

    def _loglikelihood_tokens(self, requests: Any, *args: Any, **options: Any) -> Any:
        self.cut += sum(
            len(context) + len(answer) > self.max_length + 1 for _, context, answer in requests if context
        )
        return super()._loglikelihood_tokens(requests, *args, **{**options, "disable_tqdm": True})

    def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> Any:
        return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)

    def generate_until(self, requests: Any, disable_tqdm: bool = True) -> Any:
        return super().generate_until(requests, disable_tqdm=disable_tqdm)

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **options: Any) -> Tensor:
        """Rows of prompt and answer; what follows an answer's end is padding."""
        found: Tensor = super()._model_generate(context, max_length, stop, **options)
        for row in found[:, context.shape[1] :]:
            tokens = row.tolist()
            end = next((i for i, token in enumerate(tokens) if token in self.ends), None)
            if end is not None:
                row[end:] = self.tokenizer.pad_token_id
                tokens = tokens[:end]
            text = self.tok_decode(tokens)
            self.unfinished += end is None and not any(term and term in text for term in stop)
        return found


def run_task(model: Harness, task: Any, *, limit: int | None, unsafe: bool) -> dict[str, Any]:
    """The harness's results of one task, with its samples."""
    with _variable("DISABLE_MULTIPROC", "1"):
        found = lm_eval.evaluate(
            lm=model, task_dict={"tasks": {task.task_name: task}}, limit=limit, bootstrap_iters=BOOTSTRAP,
            apply_chat_template=model.add_bos_token is False, fewshot_as_multiturn=True,
            confirm_run_unsafe_code=unsafe, log_samples=True,
        )  # fmt: skip
    return dict(found)


def load_tasks(path: Path) -> list[Any]:
    """The tasks of a YAML file or of a folder of them, with the Python functions they name. Call it ``offline``."""
    if path.is_dir():
        manager = TaskManager(include_path=str(path), include_defaults=False)
        names = list(manager.all_subtasks)
    else:
        is_group = _GROUP.search(path.read_text(encoding="utf-8"))  # whose tasks are in the files beside it
        manager = TaskManager(include_path=str(path.parent) if is_group else None, include_defaults=False)
        names = [str(path)]
    return list(manager.load(names)["tasks"].values()) if names else []


@contextmanager
def offline() -> Iterator[None]:
    """Nothing is downloaded inside the block, and what ``datasets`` keeps of files is forgotten after it."""
    places: list[tuple[Any, str, Any]] = [
        (huggingface_hub.constants, "HF_HUB_OFFLINE", True), (datasets.config, "HF_HUB_OFFLINE", True),
    ]  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="sftmix-tasks-") as folder:
        places.append((datasets.config, "HF_DATASETS_CACHE", Path(folder)))
        before = [getattr(module, name) for module, name, _ in places]
        for module, name, value in places:
            setattr(module, name, value)
        try:
            yield
        finally:
            for (module, name, _), value in zip(places, before, strict=True):
                setattr(module, name, value)


class Warnings(logging.Handler):
    """What the harness's loggers warn of, each text once with its count, in the place of their own lines."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.counts: dict[str, int] = {}

    def emit(self, record: logging.LogRecord) -> None:
        text = " ".join(record.getMessage().split())[:200]
        self.counts[text] = self.counts.get(text, 0) + 1

    @contextmanager
    def listening(self) -> Iterator[Warnings]:
        logger = logging.getLogger("lm_eval")
        handlers, propagate = list(logger.handlers), logger.propagate
        logger.handlers, logger.propagate = [self], False
        try:
            yield self
        finally:
            logger.handlers, logger.propagate = handlers, propagate


@contextmanager
def own_random() -> Iterator[None]:
    """The harness's seeds inside the block; a run's own random numbers go on after it as if it had not been."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(0)
    np.random.seed(SEED)
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
            torch.set_rng_state(states[2])


@contextmanager
def _variable(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before

"""Benchmarks on one model: the figures of its tasks, with standard errors and what they are about.

Figures of another file, number of shots, template or model are made anew, with a word; the others stand. What was asked
and answered is kept beside them. This needs lm-eval, the extra ``eval``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sftmix.data.tokens import TokenOptions
from sftmix.evaluation.decoding import greedy
from sftmix.evaluation.task_sources import Source
from sftmix.evaluation.uncertainty import wilson
from sftmix.files import replacing
from sftmix.model.export import stops
from sftmix.progress import activity, say

if TYPE_CHECKING:
    from sftmix.evaluation.harness import Harness

# Warnings of what is prevented, counted or said here.
_EXPECTED = (
    "`pretrained` model kwarg",
    "already-initialized model",
    "Truncating",
    "using preconfigured rule",
)
_SHOWN = 5  # warnings that are told
_WORDS = {
    "model": "model", "dtype": "model.dtype", "task": "task file", "rows": "rows or examples", "lm_eval": "lm-eval",
    "shots": "number of examples", "limit": "evaluate.task_limit", "chat_template": "evaluate.task_template",
    "template": "chat template", "ends": "end tokens",
}  # fmt: skip


@dataclass(frozen=True)
class Asking:
    """How tasks are asked: shots, rows, template, and what the figures are about besides the task."""

    num_fewshot: int | None = None
    limit: int | None = None
    template: str = "auto"
    batch_size: int = 8
    unsafe: bool = False
    ends: Sequence[int] = ()
    options: TokenOptions | None = None
    max_length: int | None = None
    about: Mapping[str, Any] = field(default_factory=dict)


def run_tasks(
    model: Callable[[], Any], tokenizer: Any, sources: Sequence[Source], asking: Asking,
    before: Mapping[str, Any], *, label: str, folder: Path,
) -> dict[str, Any]:  # fmt: skip
    """The figures of every task by its name; those of ``before`` that are about the same stand.

    ``model`` gives a causal LM of transformers, and is called when one is first needed. What was asked and answered
    goes into ``folder``, a file a task. Raises ``ValueError`` naming the task for whatever stops it.
    """
    with activity("loading lm-evaluation-harness"):
        from sftmix.evaluation import harness
    warnings = harness.Warnings()
    found: dict[str, Any] = {}
    chat = _chat(tokenizer, asking.template)
    with harness.offline(), harness.own_random(), warnings.listening():
        for source in sources:
            for task in _loaded(source):
                name = task.task_name
                if name in found:
                    raise ValueError(f"evaluate.tasks: expected each task once, got {name} again")
                with naming(name):
                    about = _about(task, source, asking, chat)
                    if before.get(name, {}).get("about") == about:
                        say(f"evaluate {label}: {name} done before")
                        found[name] = before[name]
                        continue
                    if name in before:
                        _tell_anew(label, name, before[name].get("about") or {}, about)
                    asked = model()
                    ends = stops(asked, asking.ends)
                    with greedy(asked, ends), activity(f"asking the {label} model {name}"):
                        one = harness.Harness(
                            asked, tokenizer, ends=ends, batch_size=asking.batch_size, chat=chat,
                            options=asking.options, max_length=asking.max_length,
                        )  # fmt: skip
                        result = harness.run_task(one, task, limit=asking.limit, unsafe=asking.unsafe)
                    found[name] = {**_figures(result, name, one), "about": about}
                    _keep_samples(folder / f"{name}.jsonl", result["samples"][name])
                    _tell(label, name, found[name])
    told = [(t, n) for t, n in warnings.counts.items() if not any(part in t for part in _EXPECTED)]
    for text, count in told[:_SHOWN]:
        say(f"evaluate {label}: lm-evaluation-harness warns, {count} times: {text}")
    if len(told) > _SHOWN:
        say(f"evaluate {label}: lm-evaluation-harness warns of {len(told) - _SHOWN} more things")
    return found


def check_tasks(paths: Sequence[Path], tokenizer: Any, asking: Asking) -> None:
    """Raise ``ValueError`` for tasks of a user's that cannot be loaded, or not asked as ``asking`` says."""
    from sftmix.evaluation import harness

    _chat(tokenizer, asking.template)
    with harness.offline(), harness.own_random(), harness.Warnings().listening():
        for path in paths:
            for task in _loaded(Source(path, str(path), "")):
                with naming(task.task_name):
                    _set_shots(task, asking.num_fewshot)


@contextmanager
def naming(task: str) -> Iterator[None]:
    """Errors of the harness, of a task's files and of its functions in one line that names the task."""
    try:
        yield
    except RuntimeError:  # the machine's, such as no memory
        raise
    except Exception as error:
        text = " ".join(str(error).split())
        if isinstance(error, ValueError) and text.startswith("evaluate."):
            raise
        raise ValueError(
            f"evaluate.tasks: {task}: expected a task that runs on local files, got {type(error).__name__}: {text:.300}"
        ) from error


def _loaded(source: Source) -> list[Any]:
    from sftmix.evaluation import harness

    with naming(source.name), activity(f"reading {source.name}"):
        tasks = harness.load_tasks(source.path)
        if not tasks:
            raise ValueError("no task in its files")
    return tasks


def _about(task: Any, source: Source, asking: Asking, chat: bool) -> dict[str, Any]:
    """What the figures of a task are about; its shots are set."""
    from sftmix.evaluation import harness

    shots = _set_shots(task, asking.num_fewshot)
    task.set_fewshot_seed(seed=harness.SEED)
    return {
        **asking.about, "task": source.digest, "rows": _docs_digest(task, shots), "shots": shots,
        "limit": asking.limit, "chat_template": chat, "lm_eval": harness.VERSION,
    }  # fmt: skip


def _chat(tokenizer: Any, template: str) -> bool:
    has = bool(getattr(tokenizer, "chat_template", None))
    if template == "on" and not has:
        raise ValueError("evaluate.task_template: expected a tokenizer with a chat template, got one without")
    return has if template == "auto" else template == "on"


def _set_shots(task: Any, asked: int | None) -> int:
    """The number of examples before each question. Raises ``ValueError`` where the question could be among them."""
    own = task.get_config("num_fewshot")
    if asked and own == 0:
        say(f"evaluate.num_fewshot: {task.task_name} has no examples, as its file says")
        asked = 0
    shots = int((own or 0) if asked is None else asked)
    task.set_config("num_fewshot", shots)
    config, examples = task.config, getattr(task, "fewshot_cfg", None)
    if not shots or examples is None or (examples.split is None and examples.samples is not None):
        return shots
    rows = config.test_split or config.validation_split
    pool = examples.split or config.training_split or config.validation_split or config.test_split
    # The harness leaves out the row that is asked only where the examples' split is named, and is the test split.
    if pool == rows and examples.split != config.test_split:
        raise ValueError(
            f"evaluate.num_fewshot: expected 0 for {task.task_name}, whose examples come from the rows that it "
            f"asks, answers included, got {shots}; name a fewshot_split and a test_split in its file"
        )
    return shots


def _docs_digest(task: Any, shots: int) -> str:
    """A hash of the rows that are asked, and of those that examples come from."""
    digest = hashlib.sha256()
    for rows in (task.eval_docs, task.fewshot_docs() if shots else ()):
        for row in rows or ():
            text = json.dumps(row, sort_keys=True, default=lambda value: type(value).__name__)
            digest.update(text.encode() + b"\n")
    return digest.hexdigest()[:16]


def _figures(result: Mapping[str, Any], name: str, asked: Harness) -> dict[str, Any]:
    """The metrics of one task, with a 95 % interval where a row is right or wrong."""
    values, samples = result["results"][name], result["samples"][name]
    metrics = []
    for key, value in values.items():
        metric, comma, chosen = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        stderr = values.get(f"{metric}_stderr,{chosen}")
        row: dict[str, Any] = {
            "metric": metric,
            "filter": chosen,
            "value": _number(value),
            "stderr": _number(stderr),
        }
        scores = [sample.get(metric) for sample in samples if sample["filter"] == chosen]
        if scores and all(isinstance(score, (int, float)) and score in (0, 1) for score in scores):
            row["interval95"] = list(wilson(int(sum(scores)), len(scores)))
        metrics.append(row)
    counts, config = result["n-samples"][name], result["configs"][name]
    return {
        "metrics": metrics, "num_examples": counts["effective"], "num_rows": counts["original"],
        "num_fewshot": result["n-shot"][name], "version": result["versions"][name],
        "generation": config.get("generation_kwargs"), "batch_size": asked.batch_size,
        "prompts_cut": asked.cut, "answers_unfinished": asked.unfinished,
    }  # fmt: skip


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and value == value else None


def _keep_samples(path: Path, samples: Sequence[Mapping[str, Any]]) -> None:
    """A line a row and filter: what was asked and answered, the target, and the metrics."""
    kept = ("doc_id", "filter", "target", "resps", "filtered_resps")
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for sample in samples:
            line = {name: sample[name] for name in kept}
            line |= {
                "prompt": sample["arguments"][0][0],
                **{name: sample[name] for name in sample["metrics"]},
            }
            file.write(json.dumps(line, ensure_ascii=False, default=str) + "\n")


def _tell_anew(label: str, name: str, before: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    said = [words for key, words in _WORDS.items() if before.get(key) != about.get(key)]
    say(f"evaluate {label}: {name} anew, the figures that stand there are about another {', '.join(said)}")


def _tell(label: str, name: str, figures: Mapping[str, Any]) -> None:
    asked, rows = figures["num_examples"], figures["num_rows"]
    if asked < rows:
        say(f"evaluate {label}: {name}: the first {asked} of {rows} rows (evaluate.task_limit)")
    if figures["prompts_cut"]:
        say(
            f"warning: evaluate {label}: {name}: {figures['prompts_cut']} prompts are longer than the model's "
            "positions and lost their beginning"
        )
    if figures["answers_unfinished"]:
        say(
            f"evaluate {label}: {name}: {figures['answers_unfinished']} of {asked} answers have no end within "
            f"{figures['generation'].get('max_gen_toks', 256)} tokens"
        )

"""Where the harness reads its tasks: built-in ones written beside their checked rows, and a user's own files.

A built-in task is written as lm-evaluation-harness reads it, so ``lm_eval --include_path FOLDER --tasks NAME`` asks the
same. Of a user's task, all text that decides what it asks is hashed, and Python that it runs is named.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml  # type: ignore[import-untyped]

from sftmix.evaluation.requests import TaskRequest
from sftmix.evaluation.task_rows import TaskRows, read_task_rows
from sftmix.files import replacing
from sftmix.progress import say

BUILT_IN = Path(__file__).parent / "tasks"
_FUNCTION = re.compile(r"!function\s+['\"]?([\w.]+)\.\w+")
_INCLUDE = re.compile(r"^include\s*:\s*(.+)$", re.MULTILINE)


@dataclass(frozen=True)
class Source:
    """A YAML file or folder that the harness reads, where it came from, and a hash of its files."""

    path: Path
    name: str
    digest: str


def check_installed(knob: str = "evaluate.tasks") -> None:
    """Raise ``ValueError`` naming the extra where lm-eval is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError(f"{knob}: expected lm-eval, got none; pip install 'sftmix[eval]'")


def check_rows(
    requests: Sequence[TaskRequest], fewshot: Mapping[str, Path], shots: int | None = None
) -> None:
    """Raise ``ValueError`` for files that are not of a built-in task's form, examples without their task, and too few.

    ``shots``: examples before each row; without a file of their own they are the other rows.
    """
    unused = set(fewshot) - {request.form for request in requests}
    if unused:
        raise ValueError(
            f"evaluate.fewshot: expected names of built-in tasks that are asked, got {min(unused)}"
        )
    for request in requests:
        if request.form is None:
            _given(request.path)
        else:
            most = len(read_task_rows(request.form, str(request.path), "evaluate.tasks").rows) - 1
            if request.form in fewshot:
                most = len(read_task_rows(request.form, str(fewshot[request.form]), "evaluate.fewshot").rows)
            if shots is not None and shots > most:
                raise ValueError(
                    f"evaluate.num_fewshot: expected at most {most}, the examples there are for {request.form}, got "
                    f"{shots}"
                )


def write_tasks(
    requests: Sequence[TaskRequest], fewshot: Mapping[str, Path], folder: Path, *, max_tokens: int,
    quiet: bool = False,
) -> list[Source]:  # fmt: skip
    """The sources of all requests; those of built-in tasks are written into ``folder``.

    ``fewshot``: files of examples by built-in task; without one they are a task's other rows. ``max_tokens``: longest
    answer of a built-in task. Unless ``quiet``, what is ignored in a file is said. Raises ``ValueError`` as
    ``check_rows``.
    """
    found = []
    for request in requests:
        if request.form is None:
            source, modules = _given(request.path)
            if modules and not quiet:
                say(f"evaluate.tasks: {request.path} runs Python of {', '.join(map(str, modules))}")
            found.append(source)
        else:
            files = {"test": (request.path, "evaluate.tasks")}
            if request.form in fewshot:
                files["train"] = (fewshot[request.form], "evaluate.fewshot")
            found.append(_written(request.form, files, folder, max_tokens, quiet=quiet))
    return found


def _written(
    form: str, files: Mapping[str, tuple[Path, str]], folder: Path, max_tokens: int, *, quiet: bool
) -> Source:
    """A built-in task as a YAML file beside its rows, by split from a file that a knob named."""
    settings = yaml.safe_load((BUILT_IN / f"{form}.yaml").read_text(encoding="utf-8"))
    digest = hashlib.sha256()
    placed = {}
    for split, (file, knob) in files.items():
        rows = read_task_rows(form, str(file), knob)
        if not quiet:
            _tell(rows, f"{knob}: {file}")
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows.rows)
        digest.update(text.encode())
        place = folder / f"{form}-{split}-{hashlib.sha256(text.encode()).hexdigest()[:12]}.jsonl"
        with replacing(place) as temporary:
            temporary.write_text(text, encoding="utf-8")
        placed[split] = place
    for old in folder.glob(f"{form}-*.jsonl"):
        if old not in placed.values():
            old.unlink()
    settings["dataset_kwargs"] = {"data_files": {split: str(p.resolve()) for split, p in placed.items()}}
    settings["fewshot_split"] = "train" if "train" in placed else "test"
    if settings["output_type"] == "generate_until":
        settings["generation_kwargs"]["max_gen_toks"] = max_tokens
    target = folder / f"{form}.yaml"
    with replacing(target) as temporary:
        temporary.write_text(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True), encoding="utf-8")
    digest.update(json.dumps({**settings, "dataset_kwargs": None}, sort_keys=True).encode())
    return Source(target, form, digest.hexdigest()[:16])


def _tell(rows: TaskRows, where: str) -> None:
    if rows.ignored:
        told = ", ".join(f"{name} ({count} rows)" for name, count in rows.ignored.items())
        say(f"{where}: fields that are not used: {told}")
    if rows.repeated:
        say(f"{where}: {rows.repeated} of {len(rows.rows)} rows are equal to an earlier one")


def _given(path: Path) -> tuple[Source, list[Path]]:
    """A user's task, and the Python files that it runs; all is read as text, with the files that it includes."""
    if path.is_dir():
        if other := next(path.rglob("*.yml"), None):
            raise ValueError(
                f"evaluate.tasks: expected files named .yaml in a folder, got {other}, which is not read"
            )
        files = sorted(path.rglob("*.yaml"))
    else:
        files = [path]
    if not files:
        raise ValueError(f"evaluate.tasks: expected a folder with .yaml files, got {path} without one")
    digest, seen, todo = hashlib.sha256(), dict[Path, None](), [file.resolve() for file in files]
    while todo:
        file = todo.pop()
        if file in seen:
            continue
        seen[file] = None
        try:
            text = file.read_text(encoding="utf-8")
            if file.suffix != ".py":
                yaml.load(text, Loader=_Loader)
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ValueError(
                f"evaluate.tasks: {file}: expected YAML, got {' '.join(str(error).split())}"
            ) from None
        digest.update(text.encode())
        if file.suffix == ".py":
            continue
        modules = [file.parent / f"{name.replace('.', '/')}.py" for name in _FUNCTION.findall(text)]
        todo += [module.resolve() for module in modules if module.is_file()]
        todo += [(file.parent / name.strip(" '\"")).resolve() for name in _INCLUDE.findall(text)]
    return Source(path, str(path), digest.hexdigest()[:16]), sorted(f for f in seen if f.suffix == ".py")


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """YAML in which ``!function`` is a text."""


_Loader.add_multi_constructor("!", lambda loader, suffix, node: str(node.value))

"""What ``evaluate.tasks``, ``evaluate.fewshot`` and ``evaluate.answers`` ask for: names with files, and paths."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sftmix.evaluation.task_rows import FORMS

_NAMED = re.compile(r"([A-Za-z][\w-]*)=(.+)")
_YAML = (".yaml", ".yml")


@dataclass(frozen=True)
class TaskRequest:
    """A benchmark: a built-in ``form`` with the file of its rows, or None with a task's YAML file or folder of them."""

    form: str | None
    path: Path


def parse_files(knob: str, text: str | None, names: Sequence[str]) -> dict[str, Path]:
    """``name=file`` pairs, with commas, by name. Raises ``ValueError`` for other names, and files that are missing."""
    found: dict[str, Path] = {}
    for part in _parts(knob, text):
        named = _NAMED.fullmatch(part)
        if named is None or named[1] not in names:
            raise ValueError(f"{knob}: expected name=file with a name of {', '.join(names)}, got {part!r}")
        if named[1] in found:
            raise ValueError(f"{knob}: expected each name once, got {named[1]} twice")
        found[named[1]] = _there(knob, named[2], folder=False)
    return found


def parse_tasks(text: str | None) -> list[TaskRequest]:
    """The benchmarks of ``evaluate.tasks``. Raises ``ValueError`` for names that are not known, and missing files."""
    knob, found = "evaluate.tasks", list[TaskRequest]()
    for part in _parts(knob, text):
        named = _NAMED.fullmatch(part)
        if named is not None and not Path(part).exists():
            path = next(iter(parse_files(knob, part, FORMS).values()))
            request = TaskRequest(named[1], path)
        elif part in FORMS:
            raise ValueError(f"{knob}: expected {part}=FILE with a file of its rows, got {part}")
        else:
            request = TaskRequest(None, _there(knob, part, folder=True))
        if request in found or (request.form and request.form in [other.form for other in found]):
            raise ValueError(f"{knob}: expected each task once, got {part} again")
        found.append(request)
    return found


def _parts(knob: str, text: str | None) -> list[str]:
    parts = [part.strip() for part in text.split(",")] if text is not None else []
    if "" in parts:
        raise ValueError(f"{knob}: expected entries separated by commas, got {text!r}")
    return parts


def _there(knob: str, name: str, *, folder: bool) -> Path:
    """The file (with ``folder``: YAML file, or folder) of that name. Raises ``ValueError`` where there is none."""
    path = Path(name).expanduser()
    if path.is_file() and (not folder or path.suffix in _YAML):
        return path
    if folder and path.is_dir():
        return path
    what = f"name=FILE ({', '.join(FORMS)}), a task's YAML file or a folder of them" if folder else "a file"
    raise ValueError(f"{knob}: expected {what}, got {name}{'' if path.exists() else ', which is not there'}")

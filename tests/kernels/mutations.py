"""Faults that the tests named in README.md must notice, put into a copy of the package one at a time.

    python -m tests.kernels.mutations [WORD ...]       those whose complaint or text has a WORD; minutes for all

Each named test passes on the unchanged copy and must fail on the changed one; a fault that is not noticed is printed
as SURVIVED and makes the exit status 1. test_mutations.py holds that faults.py and own_faults.py fit the code and the
README.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from tests.kernels.faults import REPORTED, Mutation
from tests.kernels.own_faults import OWN

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("sftmix_kernels", "tests", "pyproject.toml")
MUTATIONS = (*REPORTED, *OWN)


def prepare() -> None:
    """Import what every test needs and no fault touches, so that each run starts from a process that has it."""
    sys.dont_write_bytecode = True  # a file changed within its second would pass for the old one
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")
    for name in ("triton", "torch._dynamo"):
        if find_spec(name.partition(".")[0]):
            import_module(name)


def run(folder: Path, test: str) -> int:
    """pytest's exit status for ``test`` in the copy: 0 passed, 1 failed."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    for name in [name for name in sys.modules if name.partition(".")[0] in (*COPIED, "__main__")]:
        del sys.modules[name]
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    os._exit(pytest.main(["-q", "-x", "-p", "no:cacheprovider", test]))


def outcome(folder: Path, mutation: Mutation) -> str:
    """``killed``, ``SURVIVED``, or why neither can be said; the copy is as it was afterwards."""
    texts = {edit.file: (folder / edit.file).read_text(encoding="utf-8") for edit in mutation.edits}
    changed = dict(texts)
    for edit in mutation.edits:
        changed[edit.file] = changed[edit.file].replace(edit.old, edit.new)
    try:
        for name, text in changed.items():
            (folder / name).write_text(text, encoding="utf-8")
        status = run(folder, mutation.test)
    finally:
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
    return {0: "SURVIVED", 1: "killed"}.get(status, f"DID NOT RUN (pytest's status {status})")


def main(words: list[str]) -> int:
    chosen = [m for m in MUTATIONS if not words or any(word in f"{m.complaint} {m.what}" for word in words)]
    outcomes = []
    prepare()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "copy"
        for part in COPIED:
            source, target = ROOT / part, folder / part
            target.parent.mkdir(exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, target)
        passes: dict[str, bool] = {}
        for mutation in chosen:
            if mutation.test not in passes:
                passes[mutation.test] = run(folder, mutation.test) == 0
            outcomes.append(outcome(folder, mutation) if passes[mutation.test] else "FAILS UNCHANGED")
            print(f"{outcomes[-1]:8} {mutation.complaint}: {mutation.what}  ({mutation.test})", flush=True)
    print(f"{outcomes.count('killed')} of {len(outcomes)} killed")
    return int(any(found != "killed" for found in outcomes))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

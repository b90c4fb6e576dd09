"""The data set every Python carries: what is in it, how answers are made, and that nothing runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from sftmix.data.examples import load_examples
from sftmix.demo.docstrings import MAX_WORDS, MIN_WORDS, build_docstring_pairs

Pairs = list[dict]  # type: ignore[type-arg]


@pytest.fixture(scope="module")
def pairs() -> Pairs:
    return build_docstring_pairs()


def answers(found: Pairs) -> dict[str, str]:
    return {pair["source"]: pair["messages"][1]["content"] for pair in found}


def questions(found: Pairs) -> dict[str, str]:
    return {pair["source"]: pair["messages"][0]["content"] for pair in found}


def test_there_are_enough_and_they_differ(pairs: Pairs) -> None:
    assert len(pairs) >= 2000
    assert len(set(answers(pairs).values())) == len(set(questions(pairs).values())) == len(pairs)


def test_every_answer_is_one_short_plain_line(pairs: Pairs) -> None:
    for pair in pairs:
        user, assistant = pair["messages"]
        assert (user["role"], assistant["role"]) == ("user", "assistant")
        text = assistant["content"]
        assert MIN_WORDS <= len(text.split()) <= MAX_WORDS, pair["source"]
        assert text == " ".join(text.split()), pair["source"]
        assert text[-1] in ".!?)", pair["source"]
        assert not any(mark in text for mark in ("``", ":func:", ":class:", ">>>", "->")), pair["source"]
        assert pair["source"] in user["content"], pair["source"]


def test_what_is_known_of_every_python(pairs: Pairs) -> None:
    found = answers(pairs)
    assert "whitespace" in found["textwrap.dedent"]
    assert "shell-escaped" in found["shlex.quote"]
    assert {"json", "asyncio", "email", "logging"} <= {name.split(".")[0] for name in found}


def test_nothing_private_and_no_tests_or_tkinter(pairs: Pairs) -> None:
    for pair in pairs:
        parts = pair["source"].split(".")
        assert not any(part.startswith("_") for part in parts), pair["source"]
        assert parts[0] not in {"test", "tests", "idlelib", "lib2to3", "tkinter", "turtle"}, pair["source"]


def test_questions_take_varied_forms(pairs: Pairs) -> None:
    forms = {q.replace(name, "X").split("(")[0].rstrip(".)`") for name, q in questions(pairs).items()}
    assert len(forms) >= 10


def test_a_second_build_and_one_without_docstrings_are_equal(pairs: Pairs) -> None:
    """``-OO`` strips docstrings from what is imported; the sources still have them."""
    script = "import json; from sftmix.demo.docstrings import *; print(json.dumps(build_docstring_pairs()))"
    root = Path(__file__).resolve().parents[3]
    command = [sys.executable, "-OO", "-B", "-c", script]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == pairs


def test_the_pairs_are_examples(pairs: Pairs, tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    examples = load_examples(str(tmp_path / "pairs.jsonl"))
    assert len({e.id for e in examples}) == len(pairs)
    assert not any("-" in e.id for e in examples)


SOURCE = '''
"""A small module for the test. See the rest.

More text that is not part of the answer.
"""
raise SystemExit("a source file must never run")

def plain(a, b=1, *, c):
    """Return the sum of :func:`~m.x` and ``b``
    on two lines

    and a second paragraph."""

def signature(a):
    """signature(a) -> int

    Not reached."""

def prefixed(a):
    """prefixed(a) -> int -- count the letters of the argument"""

def short():
    """Does it."""

def colon():
    """The following values may be given here:

    - one"""

def session():
    """Add one like this >>> session() and look at it"""

def _private():
    """Nobody should ever read this text."""

def nothing(): ...

def copy(a):
    """Return THE sum of `m.x` and `b` on two lines."""

def twice():
    """The first definition of two of them."""

def twice():
    """The second definition of two of them."""

if True:
    def inside(x):
        """Found inside of an if block."""
else:
    async def other(x):
        """Found inside of an else block."""

class Thing:
    """A thing that has several methods."""
    def method(self, x, y=2):
        """Do what the method does here."""
    @staticmethod
    def static(x):
        """Do it without any object here."""
    def __len__(self):
        """Never asked about by anyone here."""
'''


@pytest.fixture
def library(tmp_path: Path) -> Path:
    (tmp_path / "mod.py").write_text(SOURCE)
    for folder in ("pkg", "pkg/tests", "test", "loose", "_private"):
        (tmp_path / folder).mkdir()
        if folder != "loose":
            (tmp_path / folder / "__init__.py").write_text(f'"""The package {folder} of the test library."""')
        (tmp_path / folder / "a.py").write_text(f'"""The module a in the folder {folder}."""')
    (tmp_path / "broken.py").write_text("def (:")
    (tmp_path / "latin.py").write_bytes(b'# -*- coding: latin-1 -*-\n"""A module with an \xe9 in it."""\n')
    return tmp_path


def test_answers_by_hand(library: Path) -> None:
    found = answers(build_docstring_pairs(library))
    assert found == {
        "mod": "A small module for the test. See the rest.",
        "mod.plain": "Return the sum of `m.x` and `b` on two lines.",
        "mod.prefixed": "Count the letters of the argument.",
        "mod.twice": "The first definition of two of them.",
        "mod.inside": "Found inside of an if block.",
        "mod.other": "Found inside of an else block.",
        "mod.Thing": "A thing that has several methods.",
        "mod.Thing.method": "Do what the method does here.",
        "mod.Thing.static": "Do it without any object here.",
        "pkg": "The package pkg of the test library.",
        "pkg.a": "The module a in the folder pkg.",
    }


def test_calls_show_required_arguments(library: Path) -> None:
    text = " ".join(pair["messages"][0]["content"] for pair in build_docstring_pairs(library))
    for call in ("mod.plain(", "mod.Thing.method(", "mod.inside("):
        if call in text:
            assert {"mod.plain(": "(a, ...)", "mod.Thing.method(": "(x, ...)", "mod.inside(": "(x)"}[
                call
            ] in text


@pytest.mark.parametrize("content", [None, "zip"])
def test_a_library_without_sources_is_refused(tmp_path: Path, content: str | None) -> None:
    if content:
        (tmp_path / "python.zip").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"stdlib: expected a folder with the library's \.py sources, got"):
        build_docstring_pairs(tmp_path)

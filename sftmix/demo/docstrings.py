"""Questions and answers from the docstrings of Python's standard library: a data set every Python carries.

How it is built:

1. The ``.py`` sources under ``sysconfig.get_paths()["stdlib"]`` are parsed with ``ast``, in the order of
   their names. Nothing is imported, so nothing runs, and ``python -OO`` changes nothing.
2. Tests, private modules, and packages that systems ship separately or that come and go with the version
   (``tkinter``, ``idlelib``, ``lib2to3``, ``distutils`` and the like) are left out.
3. Every public module, class, function and method with a docstring gives one pair. The answer is the first
   paragraph on one line, with reStructuredText marks removed; a leading signature is removed too.
4. Answers shorter than four words or longer than 60, those that end in a colon (a list would follow), that
   hold an interactive session, or that say nothing by themselves ("See above.") are dropped, and so are
   answers that were given before.
5. The question is one of several forms, chosen by a checksum of the name.

The result is the same on every machine with the same Python version.
"""

from __future__ import annotations

import ast
import inspect
import re
import sysconfig
import tokenize
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MIN_WORDS, MAX_WORDS = 4, 60

_SKIPPED = {
    *("test", "tests", "idlelib", "idle_test", "lib2to3", "distutils", "tkinter", "turtledemo", "ensurepip"),
    *(
        "site-packages",
        "dist-packages",
        "lib-dynload",
        "pydoc_data",
        "encodings",
        "__pycache__",
        "__phello__",
    ),
    *("turtle.py", "antigravity.py", "this.py", "sitecustomize.py", "usercustomize.py"),
}
_FORMS = {
    "module": (
        "What is Python's `{name}` module for?",
        "Describe the Python standard library module `{name}`.",
        "What does the module `{name}` in Python provide?",
    ),
    "class": (
        "What is the class `{name}` in Python?",
        "Describe Python's `{name}` class.",
        "What is `{name}` in Python's standard library?",
        "When would I use the Python class `{name}`?",
    ),
    "function": (
        "What does the Python function `{name}` do?",
        "Explain `{call}` in Python.",
        "In Python's standard library, what is `{name}` for?",
        "What happens when I call `{call}` in Python?",
        "Describe the function `{name}` in Python.",
    ),
    "method": (
        "What does the method `{name}` do in Python?",
        "Explain the Python method `{call}`.",
        "What happens when I call `{call}` in Python?",
        "Describe `{name}` in Python's standard library.",
    ),
}
_DEFINITIONS = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_ROLE = re.compile(r":(?:[a-z]+:)?[a-z]+:`[~!]?([^`]+)`")
_SIGNATURE = re.compile(r"^[\w.]+\([^()]*\)\s*(?:->\s*[\w. ,|\[\]()]+?)?\s*(?:--|—|:|\.(?=\s)|$)\s*")
_EMPTY = re.compile(r"^(see|same as above|internal|todo|xxx|deprecated|do not use|helper|ditto|like)\b", re.I)


@dataclass(frozen=True)
class _Entry:
    name: str  # dotted, from the module on
    kind: str  # a key of _FORMS
    call: str  # the name with its arguments
    docstring: str


def build_docstring_pairs(stdlib: str | Path | None = None) -> list[dict[str, Any]]:
    """Pairs as ``{"messages": [user, assistant], "source": "textwrap.dedent"}``, in order of the source.

    ``stdlib`` is the folder of the library's sources, this Python's by default. Raises ``ValueError`` when
    it holds no sources (a Python whose library is packed in an archive).
    """
    folder = Path(sysconfig.get_paths()["stdlib"] if stdlib is None else stdlib)
    files = _sources(folder)
    if not files:
        raise ValueError(
            f"stdlib: expected a folder with the library's .py sources, got {folder} without any"
        )
    pairs: list[dict[str, Any]] = []
    names: set[str] = set()
    answers: set[str] = set()
    for file in files:
        for entry in _entries(file, folder):
            answer = _answer(entry.docstring)
            if answer is None or entry.name in names or answer.casefold() in answers:
                continue
            names.add(entry.name)
            answers.add(answer.casefold())
            messages = [
                {"role": "user", "content": _question(entry)},
                {"role": "assistant", "content": answer},
            ]
            pairs.append({"messages": messages, "source": entry.name})
    return pairs


def _sources(folder: Path) -> list[Path]:
    """The public modules, ordered by their path in any file system."""
    found = []
    for file in folder.rglob("*.py"):
        parts = file.relative_to(folder).parts
        private = any(part.startswith("_") and part != "__init__.py" for part in parts)
        # A folder without __init__.py is no package of the library, e.g. config-3.11-x86_64.
        package = all((folder.joinpath(*parts[:i]) / "__init__.py").is_file() for i in range(1, len(parts)))
        if not private and package and not _SKIPPED.intersection(parts):
            found.append(file)
    return sorted(found, key=lambda file: file.relative_to(folder).parts)


def _entries(file: Path, folder: Path) -> Iterator[_Entry]:
    """Everything public in one file that has a docstring."""
    parts = file.relative_to(folder).with_suffix("").parts
    module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    with tokenize.open(file) as text, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old escapes in the library's own strings
        try:
            tree = ast.parse(text.read())
        except SyntaxError:  # a template, not a module
            return
    docstring = ast.get_docstring(tree, clean=False)
    if docstring:
        yield _Entry(module, "module", module, docstring)
    yield from _members(tree.body, module, in_class=False)


def _members(body: list[ast.stmt], parent: str, *, in_class: bool) -> Iterator[_Entry]:
    """Public definitions of a module or class, also those inside ``if`` and ``try``."""
    for node in body:
        for block in ("body", "orelse", "finalbody"):
            if isinstance(node, (ast.If, ast.Try)):
                yield from _members(getattr(node, block, []), parent, in_class=in_class)
        if not isinstance(node, _DEFINITIONS) or node.name.startswith("_"):
            continue
        name = f"{parent}.{node.name}"
        docstring = ast.get_docstring(node, clean=False)
        if isinstance(node, ast.ClassDef):
            if docstring:
                yield _Entry(name, "class", name, docstring)
            yield from _members(node.body, name, in_class=True)
        elif docstring:
            arguments = _arguments(node, in_class)
            yield _Entry(name, "method" if in_class else "function", f"{name}({arguments})", docstring)


def _arguments(node: ast.FunctionDef | ast.AsyncFunctionDef, in_class: bool) -> str:
    """The names of the required arguments, ``...`` for the others; the object itself is left out."""
    every = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args)]
    required = every[: len(every) - len(node.args.defaults)]
    static = any(isinstance(mark, ast.Name) and mark.id == "staticmethod" for mark in node.decorator_list)
    shown = required[1:] if in_class and not static and required else required
    optional = node.args.defaults or node.args.vararg or node.args.kwonlyargs or node.args.kwarg
    return ", ".join([*shown, "..."] if optional else shown)


def _question(entry: _Entry) -> str:
    forms = _FORMS[entry.kind]
    form = forms[zlib.crc32(entry.name.encode()) % len(forms)]
    return form.format(name=entry.name, call=entry.call)


def _answer(docstring: str) -> str | None:
    """The first paragraph as one line of plain text; ``None`` when it is of no use as an answer."""
    paragraph = re.split(r"\n\s*\n", inspect.cleandoc(docstring).strip(), maxsplit=1)[0]
    if re.search(r">>>|[-=]>", _SIGNATURE.sub("", paragraph, count=1)) or not paragraph.isascii():
        return None
    text = " ".join(paragraph.split())
    text = _ROLE.sub(r"`\1`", text).replace("``", "`")
    text = _SIGNATURE.sub("", text, count=1)
    if not MIN_WORDS <= len(text.split()) <= MAX_WORDS or _EMPTY.match(text):
        return None
    if not text[0].isalpha() or text.endswith((":", ",", "-")) or "  " in text:
        return None
    text = text[0].upper() + text[1:] if text.split()[0].isalpha() else text
    return text if text[-1] in ".!?)" else text + "."

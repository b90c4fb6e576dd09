"""The lists of files in the packages' pages: ``python -m tests.file_lists`` rewrites them, ``--check`` compares.

A Python file is described by the first sentence of its own docstring, so its line cannot rot and is never cut. Any
other file is described by hand in the page, in a whole sentence; the command adds a line for one that has none, and
tests/test_structure.py refuses it until somebody has written it. Lines keep their order, new ones come last.
"""

from __future__ import annotations

import argparse
import ast
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Page → the folder whose files it lists; the last one lists what no other does.
PAGES = {
    "sftmix_kernels/README.md": "sftmix_kernels/",
    "sftmix/README.md": "sftmix/",
    "bench/README.md": "bench/",
    "tests/README.md": "tests/",
    "CONTRIBUTING.md": "",
}
BEGIN = "<!-- files: written by `python -m tests.file_lists`; only lines of files that are not Python are edited -->"
END = "<!-- end of files -->"
MISSING = "MISSING: say in one sentence what this file is."
SHORTEST, LONGEST = 12, 125  # characters of a description
_ROW = re.compile(r"^\| (?:\[(?P<linked>[^\]]+)\]\([^)]+\)|`(?P<pattern>[^`]+)`) \| (?P<text>.*) \|$")


def files_of_the_project() -> set[str]:
    """What git would have in a commit; in a copy without git, every file that .gitignore does not name."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode == 0:
        return {name for name in listed.stdout.splitlines() if (ROOT / name).exists()}
    ignored = (ROOT / ".gitignore").read_text(encoding="utf-8").split()
    names = {str(path.relative_to(ROOT)) for path in ROOT.rglob("*") if path.is_file()}
    patterns = [pattern.rstrip("/") for pattern in ignored] + [".git"]
    return {
        name for name in names if not any(fnmatch(part, p) for part in Path(name).parts for p in patterns)
    }


def files_of(page: str) -> set[str]:
    """What ``page`` lists, relative to its folder; the empty ``__init__.py`` of test folders are left out."""
    mine = {
        name
        for name in files_of_the_project()
        if PAGES[page] == next(folder for folder in PAGES.values() if name.startswith(folder))
    }
    return {name.removeprefix(PAGES[page]) for name in mine if not fnmatch(name, "tests*/__init__.py")}


def first_sentence(path: Path) -> str:
    """The first line of a Python file's docstring, as Markdown; ``""`` without one."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return text.partition("\n")[0].replace("``", "`").replace("|", "\\|").strip()


def listed(page: str) -> dict[str, str]:
    """File or pattern → its description, in the order of the page. Raises ``ValueError`` for another line there."""
    text = (ROOT / page).read_text(encoding="utf-8")
    _, begin, rest = text.partition(BEGIN)
    table, end, _ = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{page}: expected the lines {BEGIN!r} and {END!r}, got neither or one")
    found: dict[str, str] = {}
    for line in table.strip().splitlines()[2:]:
        row = _ROW.match(line)
        if row is None:
            raise ValueError(f"{page}: expected a row of the list of files, got {line!r}")
        found[row["linked"] or row["pattern"]] = row["text"].strip()
    return found


def complaint(text: str) -> str:
    """What is wrong with a description, ``""`` where nothing is: missing, cut off, too short or too long."""
    if not text or re.search(r"\b(MISSING|TODO|TBD|FIXME|XXX)\b", text):
        return "missing"
    if not SHORTEST <= len(text) <= LONGEST or " " not in text:
        return f"expected {SHORTEST} to {LONGEST} characters in several words, got {len(text)}"
    if not text.endswith((".", ".`")) or text.endswith(".."):
        return "cut off: expected a whole sentence that ends with a full stop"
    if text.count("`") % 2 or text.count("(") != text.count(")"):
        return "cut off: a bracket or a backtick is left open"
    return ""


def table(page: str, known: dict[str, str]) -> str:
    """The list as it should be, from the files there are and the descriptions that were there."""
    folder, names = ROOT / PAGES[page], files_of(page)
    patterns = [name for name in known if "*" in name]
    alone = {name for name in names if not any(fnmatch(name, pattern) for pattern in patterns)}
    rows: dict[str, str] = {name: text for name, text in known.items() if name in alone or "*" in name}
    rows.update({name: known.get(name, MISSING) for name in sorted(alone)})
    for name in rows:
        if name.endswith(".py"):
            rows[name] = first_sentence(folder / name) or MISSING
    titles = (f"`{name}`" if "*" in name else f"[{name}]({name})" for name in rows)
    lines = [f"| {title} | {text} |" for title, text in zip(titles, rows.values(), strict=True)]
    return "\n".join(["| file | what it is |", "|---|---|", *lines])


def rewritten(page: str) -> str:
    """The whole page with its list as it should be."""
    text = (ROOT / page).read_text(encoding="utf-8")
    known = listed(page)
    before, after = text.partition(BEGIN)[0], text.partition(END)[2]
    return f"{before}{BEGIN}\n\n{table(page, known)}\n\n{END}{after}"


def check(pages: Iterable[str] = PAGES) -> list[str]:
    """What is wrong with the lists, one line a fault."""
    faults = []
    for page in pages:
        if rewritten(page) != (ROOT / page).read_text(encoding="utf-8"):
            faults.append(f"{page} differs from the files: run `python -m tests.file_lists`")
        faults += [
            f"{page}: {name}: {why}" for name, text in listed(page).items() if (why := complaint(text))
        ]
    return faults


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.file_lists", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a list differs")
    args = parser.parse_args(argv)
    if not args.check:
        for page in PAGES:
            (ROOT / page).write_text(rewritten(page), encoding="utf-8")
    faults = check()
    print(*faults, sep="\n", file=sys.stderr)
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())

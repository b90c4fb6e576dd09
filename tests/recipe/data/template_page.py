"""The page of chat templates: ``python -m tests.recipe.data.template_page`` writes TEMPLATES.md, ``--check`` compares.

Needs TRL's templates: trl installed, or SFTMIX_TRL_TEMPLATES naming their folder, where the version is read beside it.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.recipe.data.template_conversations import conversation
from tests.recipe.data.template_tokenizers import family_of, stand_in
from tests.recipe.data.test_template_matrix import is_fault, outcomes, templates

PAGE = Path(__file__).resolve().parents[3] / "sftmix" / "data" / "TEMPLATES.md"
KINDS = ("single", "multi", "system", "tools", "reasoning", "reasoning, multi")
HEAD = """# Chat templates

What the chat templates that TRL {version} ships make of conversations, each with a stand-in for its model family's
tokenizer. Written by `python -m tests.recipe.data.template_page` where trl is installed; `--check` compares.
✓: every text is in the rendered text, every answer is supervised with an end at which generation stops, and the tokens
are those of `apply_chat_template`. Otherwise such rows are refused, for the reason in the cell. `name` stands for the
model's template, `name_training` for TRL's variant of it.

| template | {kinds} |
|---|{lines}|
"""


def trl_version() -> str:
    """The version of the templates' trl: the installed one, or that of the unpacked wheel around the folder."""
    try:
        return importlib.metadata.version("trl")
    except importlib.metadata.PackageNotFoundError:
        found = sorted(templates()[0].parents[2].glob("trl-*.dist-info")) if templates() else []
        return found[-1].name.split("-")[1].removesuffix(".dist") if found else "of an unknown version"


def cell(outcome: Any) -> str:
    """✓, or why the conversation is refused, short enough for a table."""
    if not is_fault(outcome):
        return "✓"
    kind, reason = str(outcome.kind), " ".join(str(outcome.reason).split())
    lost = re.search(r" without the (.+?)(?: of message|, and|:)", reason)
    raised = re.search(r"\w+Error: (.+)", reason)
    said = f"drops the {lost[1]}" if lost else f"raises: {raised[1][:60]}" if raised else kind
    return said.replace("|", "\\|").rstrip(" ).")


def page() -> str:
    """The whole page: a row for each template, a column for each kind of conversation."""
    head = HEAD.format(version=trl_version(), kinds=" | ".join(KINDS), lines="|".join("---" for _ in KINDS))
    rows = []
    for path in templates():
        family = family_of(path.stem)
        tokenizer = stand_in(path.read_text(encoding="utf-8"), path.stem)
        made = outcomes([conversation(kind) for kind in KINDS], tokenizer, family)
        rows.append(f"| {path.stem} | {' | '.join(cell(outcome) for outcome in made)} |\n")
    return head + "".join(rows)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.recipe.data.template_page", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the page differs")
    args = parser.parse_args(argv)
    if not templates():
        print("trl: expected it installed, or SFTMIX_TRL_TEMPLATES set, got neither", file=sys.stderr)
        return 2
    if args.check:
        differs = not PAGE.exists() or PAGE.read_text(encoding="utf-8") != page()
        if differs:
            print("TEMPLATES.md differs: run `python -m tests.recipe.data.template_page`", file=sys.stderr)
        return int(differs)
    PAGE.write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

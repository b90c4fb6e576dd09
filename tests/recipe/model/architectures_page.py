"""The page of architectures: ``python -m tests.recipe.model.architectures_page FOLDER`` writes ARCHITECTURES.md.

FOLDER holds what ``make architectures`` wrote there with SFTMIX_ARCHITECTURES=FOLDER: a JSON line for each case.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.recipe.model.architectures import CASES, ROWS, class_of

TUNINGS = ("full", "lora", "bfloat16")
RESULTS = "SFTMIX_ARCHITECTURES"
PAGE = Path(__file__).resolve().parents[3] / "sftmix" / "model" / "ARCHITECTURES.md"
HEAD = """# Architectures

The causal language models of transformers {version} that a run was tried with: {rows} tiny random models of {classes}
classes, each trained from its files by the stages of `sftmix run`, in float32 and some in bfloat16 too. An
architecture is a `model_type` of transformers or a variant of one, as
[architectures.py](../../tests/recipe/model/architectures.py) describes it.

- ✓: the held-out loss is one number, whether of the model in memory after training, of the exported files as plain
  `AutoModelForCausalLM` loads them (token by token, from its own logits), or in evaluation.json; no tensor is missing
  from the files or new in them.
- In bfloat16 every tensor of the files also has the data type that transformers gives it (routers in float32).
- Under LoRA (`all-linear`), the share of the parameters of the decoder's blocks that stand in tensors it changed.
- A model that is refused is refused before it is trained, with the reason in the cell.
- ✗: the test failed. —: not tried.

Written by `python -m tests.recipe.model.architectures_page folder` from what
`SFTMIX_ARCHITECTURES=folder make architectures` left in an empty folder.

| architecture | class | full | LoRA | bfloat16 |
|---|---|---|---|---|
"""


def results(folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """The line of every case by (architecture, tuning).

    Raises ``ValueError`` where a case has no line or two, or the lines are of several versions of transformers.
    """
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            key = (row["name"], row["tuning"])
            if key in found:
                raise ValueError(
                    f"{folder}: expected one line for {' '.join(key)}, got two; use an empty folder"
                )
            found[key] = row
    missing = [" ".join(case) for case in CASES if case not in found]
    if missing:
        raise ValueError(f"{folder}: expected a line for every case, got none for {', '.join(missing)}")
    versions = sorted({row["transformers"] for row in found.values()})
    if len(versions) > 1:
        raise ValueError(f"{folder}: expected one version of transformers, got {', '.join(versions)}")
    return found


def cell(found: dict[str, Any] | None) -> str:
    """✓, with the share of the parameters under LoRA; or why the model is refused; or ✗ for a test that failed."""
    if found is None:
        return "—"
    if "refused" in found:
        return " ".join(str(found["refused"]).split()).replace("|", "\\|")
    if "share" not in found:
        return "✗"
    return f"✓ {100 * found['share']:.0f} %" if found["tuning"] == "lora" else "✓"


def page(found: dict[tuple[str, str], dict[str, Any]]) -> str:
    """The whole page, a row for each architecture in the order of its name."""
    classes = {name: class_of(name) for name in sorted(ROWS)}
    rows = [
        f"| {name} | {kind} | {' | '.join(cell(found.get((name, tuning))) for tuning in TUNINGS)} |\n"
        for name, kind in classes.items()
    ]
    version = next(iter(found.values()))["transformers"]
    return HEAD.format(version=version, classes=len(set(classes.values())), rows=len(ROWS)) + "".join(rows)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.recipe.model.architectures_page", description=__doc__
    )
    parser.add_argument("folder", type=Path, help="what the tests wrote with SFTMIX_ARCHITECTURES naming it")
    try:
        text = page(results(parser.parse_args(argv).folder))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

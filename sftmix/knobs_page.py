"""The page of knobs: ``python -m sftmix.knobs_page`` rewrites KNOBS.md from the configuration, ``--check`` compares.

Needs PyYAML alone: neither torch nor transformers is imported.
"""

from __future__ import annotations

import argparse
import inspect
import sys
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sftmix.config import REQUIRED, Config, describe
from sftmix.files import replacing
from sftmix.knobs import Knob, collect_knobs

PAGE = Path(__file__).with_name("KNOBS.md")
HEAD = """# Knobs

Written from [config.py](config.py) by `python -m sftmix.knobs_page`; `--check` compares. Each knob is a flag
(`--train.epochs 2`), a line of the YAML file given by `--config`, or its default here. Where the paper states a value,
it is the default. `sftmix knobs` prints the same list; `null` is written so in YAML and in flags.
"""


def _values(knob: Knob) -> str:
    """The type of a knob and what it may be: ``int ≥ 1``, ``float, 0 ≤ … < 1``, ``sftmix or ntp``."""
    limits = knob.field.metadata
    if limits["choices"]:
        kind = ", ".join(f"`{choice}`" for choice in limits["choices"])
    else:
        kind = "even int" if limits["even"] else knob.base.__name__
        for key, sign in (("at_least", "≥"), ("above", ">"), ("below", "<")):
            if limits[key] is not None:
                kind += f", {sign} {limits[key]:g}"
    return kind + (" or null" if knob.optional else "")


def _default(value: Any) -> str:
    if value == REQUIRED:
        return "required"
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return f"`{text}`"


def page() -> str:
    """The whole page: a table for each section of the configuration, in its order."""
    knobs, classes = collect_knobs(Config), typing.get_type_hints(Config)
    parts, current = [HEAD], None
    for name, default, meaning in describe():
        section = name.rpartition(".")[0]
        if section != current:
            current = section
            about = (inspect.getdoc(classes[section]) or "").replace("``", "`") if section else ""
            title = f"`{section}`: {about}" if section else "The run"
            parts.append(
                f"\n## {title.rstrip('.')}\n\n| knob | default | values | meaning |\n|---|---|---|---|\n"
            )
        parts.append(f"| `{name}` | {_default(default)} | {_values(knobs[name])} | {meaning} |\n")
    return "".join(parts)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m sftmix.knobs_page", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the page differs")
    args = parser.parse_args(argv)
    if args.check:
        differs = not PAGE.exists() or PAGE.read_text(encoding="utf-8") != page()
        if differs:
            print("KNOBS.md differs from config.py: run `python -m sftmix.knobs_page`", file=sys.stderr)
        return int(differs)
    with replacing(PAGE) as temporary:
        temporary.write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

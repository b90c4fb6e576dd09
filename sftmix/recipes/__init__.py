"""Settings to begin with, as YAML files: ``sftmix recipes`` lists them, ``--config NAME`` takes one.

A line of a file's first comment says what it is for. ``sftmix run --config NAME --dry-run`` shows what it would do.
"""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent


def recipes() -> dict[str, str]:
    """What each recipe is for, by name: the first line of its file."""
    found = {}
    for path in sorted(FOLDER.glob("*.yaml")):
        first = path.read_text(encoding="utf-8").partition("\n")[0]
        found[path.stem] = first.removeprefix("#").strip()
    return found


def config_file(given: str | None) -> Path | None:
    """The YAML file that ``--config`` means: a path, or a recipe's name. ``ValueError`` naming them for neither."""
    if given is None:
        return None
    path = Path(given)
    if path.exists() or path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        return path
    own = FOLDER / f"{given}.yaml"
    if not own.exists():
        raise ValueError(f"config: expected a YAML file or a recipe ({', '.join(recipes())}), got {given!r}")
    return own

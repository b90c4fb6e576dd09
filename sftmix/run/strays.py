"""What nobody reads is named: files that are not a run folder's, what killed writes left, SFTMIX_ variables.

A folder that holds other files and nothing of a run is refused: it is more likely a slip than a run folder.
"""

from __future__ import annotations

import fnmatch
import os
import shutil
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from sftmix.config import CONFIG_FILE
from sftmix.progress import say
from sftmix.rank import is_main
from sftmix.run.folder import EXTRA, FILES

# Beside the files of the stages: the settings, the converted GGUF file, the demo's pairs, the tokens and their account.
KNOWN = {CONFIG_FILE, "stages.json", "base", "data", "tokens", "data.json", "scoring"}
KNOWN |= {*FILES.values(), *EXTRA.values()}
_TRAINING = ("checkpoints", "metrics.jsonl", "tensorboard", "wandb", "model", "adapter")
_INNER = {
    "reference": ("checkpoints", "metrics.jsonl", "tensorboard", "wandb", "online.parquet", "point-[0-9]*"),
    "train-ntp": _TRAINING, "train-sftmix": _TRAINING, "plots": ("*.png",),
}  # fmt: skip
_WRITTEN = (
    "",
    "data",
    "scoring",
    "plots",
    "reference",
    "train-ntp",
    "train-sftmix",
    "evaluation",
)  # where temporary names appear
_SETTLED = 600.0  # seconds after which no write is still going on
_SHOWN = 5
VARIABLES: frozenset[str] = frozenset()  # SFTMIX_ names that the program reads: none


def look(run_dir: str | Path, used: Iterable[str | Path] = ()) -> None:
    """Say which files of a run folder nobody reads, and clear away what killed writes left.

    ``used`` are files that the configuration names, which may lie in the folder. Raises ``ValueError`` for a path
    that is not a folder and for a folder with other files and none of a run.
    """
    folder = Path(run_dir)
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"run_dir: expected a folder, got the file {folder}")
    found = strays(folder, used)
    names = ", ".join(found[:_SHOWN]) + (f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else "")
    if found and not any((folder / name).exists() for name in KNOWN):
        raise ValueError(
            f"run_dir: expected a new, an empty or a run folder, got {folder}, which holds {names}; take another "
            "run folder"
        )
    if found:
        say(f"warning: {folder} holds files that no stage reads: {names}")
    if not is_main():  # the others must not look while the main process clears away
        return
    for path, settled in leftovers(folder):
        name = path.relative_to(folder)
        if not settled:
            say(f"warning: {folder}: {name} is being written, or was left by a killed write")
        else:
            say(f"removed {name}, left by a killed write")
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def strays(folder: Path, used: Iterable[str | Path] = ()) -> list[str]:
    """Names in a run folder that are not a run's, sorted; those that begin with a dot are nobody's business."""
    kept = {os.path.realpath(Path(path).expanduser()) for path in used}
    found = []
    for inner in ("", *_INNER):
        known = _INNER.get(inner, tuple(KNOWN))
        if not (folder / inner).is_dir():
            continue
        for path in (folder / inner).iterdir():
            named = os.path.realpath(path)
            if any(path_kept == named or path_kept.startswith(named + os.sep) for path_kept in kept):
                continue
            if not path.name.startswith(".") and not any(fnmatch.fnmatch(path.name, name) for name in known):
                found.append(str(path.relative_to(folder)))
    return sorted(found)


def leftovers(folder: Path) -> list[tuple[Path, bool]]:
    """Temporary files and folders of writes, and whether they were last touched long ago."""
    found = []
    places = [folder / name for name in _WRITTEN]
    places += [place / "checkpoints" for place in places]
    for place in places:
        for path in sorted(place.glob(".*.tmp")):
            inside = [path, *path.rglob("*")] if path.is_dir() else [path]
            newest = max((item.stat().st_mtime for item in inside if item.exists()), default=0.0)
            found.append((path, time.time() - newest > _SETTLED))
    return found


def tell_unread_variables(environment: Mapping[str, str]) -> None:
    """Name the environment variables that look like ours and that nothing reads."""
    unread = sorted(
        name for name in environment if name.upper().startswith("SFTMIX_") and name not in VARIABLES
    )
    if unread:
        say(
            f"warning: environment variables that nothing reads: {', '.join(unread)} (knobs are flags: `sftmix knobs`)"
        )

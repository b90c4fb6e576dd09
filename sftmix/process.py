"""The process around a command: its streams and variables, and a line for what the machine refuses."""

from __future__ import annotations

import errno
import io
import os
import sys

from sftmix.progress import on_terminal
from sftmix.rank import is_main


def advice(error: Exception) -> str | None:
    """One line for what the machine refuses: a full disk, a file that may not be written, a package; else None."""
    text = " ".join(str(error).split())
    if isinstance(error, ImportError):
        return f"expected the packages of `pip install '.[recipe]'`, got {text}: install it"
    # Writers of weights have error classes of their own, whose text holds the system's.
    writer = type(error).__name__ == "SafetensorError" or "PytorchStreamWriter" in text
    if not isinstance(error, OSError) and not writer:
        return None
    number = getattr(error, "errno", None) or (errno.ENOSPC if "No space left" in text or writer else 0)
    what = {
        errno.ENOSPC: "free some space; the same command then goes on",
        errno.EDQUOT: "free some space; the same command then goes on",
        errno.EACCES: "change its permissions, or take another folder",
        errno.EPERM: "change its permissions, or take another folder",
        errno.EROFS: "take a folder that can be written",
        errno.ENOENT: "bring it back, or begin its stage anew with --restart",
    }.get(number, "the same command goes on once that is mended")
    named = getattr(error, "filename", None) or "a file"
    return f"{named}: expected to read or write it, got {getattr(error, 'strerror', None) or text}: {what}"


def prepare() -> None:
    """A narrow encoding loses characters, never the run; other libraries' bars are for terminals at most."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # torch's threads wait for each other by spinning, for milliseconds: on cores that other programs use too, a step
    # takes five times as long. Read when torch is loaded.
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    os.environ.setdefault("TQDM_DISABLE", "1")  # read by tqdm when it is imported
    if not (is_main() and on_terminal()):
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

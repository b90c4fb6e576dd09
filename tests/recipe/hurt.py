"""Damage to a file: a bit flipped, the second half gone, or the whole."""

from __future__ import annotations

from pathlib import Path


def hurt(path: Path, how: str) -> None:
    """``flip`` one bit in the middle, ``cut`` to the first half, or ``remove``."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    if how == "remove":
        path.unlink()
    else:
        path.write_bytes(content if how == "flip" else content[: len(content) // 2])

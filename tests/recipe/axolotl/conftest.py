"""Runs of the real axolotl need its package, which pins other versions than ours: `make test-axolotl` makes a place."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

NEEDED = "needs the package axolotl, whose pins are not ours: make test-axolotl"


@pytest.fixture(scope="session")
def axolotl() -> None:
    """Skips without the package."""
    if find_spec("axolotl") is None:
        pytest.skip(NEEDED)

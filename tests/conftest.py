"""What every test shares: the interpreter where there is no GPU, the shared data, a fixed seed, the progress line."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

# Before torch: a worker of pytest-xdist takes one core, or the threads of two fight over them.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

from tests.bfloat16 import mend_bfloat16
from tests.bounds import check_every_address
from tests.interpreter import replace_the_language_once_a_launch
from tests.progress import pytest_addoption, pytest_configure

if os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton"):
    replace_the_language_once_a_launch()
    mend_bfloat16()
    check_every_address()

__all__ = ["pytest_addoption", "pytest_configure"]  # hooks that pytest finds here by name
ROOT = Path(__file__).resolve().parent.parent
SHARED_DATA = ROOT.parent / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data beside the checkout; a clone without it skips."""
    if not SHARED_DATA.is_dir():
        pytest.skip("needs ../shared/data, which is not part of the project")
    return SHARED_DATA


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)

"""What every test shares: the interpreter where there is no GPU, the shared data, a fixed seed, the progress line."""

from __future__ import annotations

import os
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

from tests.interpreter import prepare_the_interpreter
from tests.progress import pytest_addoption, pytest_configure

prepare_the_interpreter()

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

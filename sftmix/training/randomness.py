"""Randomness inside a training step: dropout, router noise, layers left out at random.

Every chunk of a step seeds torch, numpy and Python from (seed, stage, step, chunk), so what is drawn depends neither on
what was drawn before nor on how many processes share the step: a stopped run draws on as it would have, and process
``rank`` draws what one process alone would at chunk ``rank``.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def seed_chunk(seed: int, stage: str, step: int, chunk: int) -> None:
    """Seed torch (the CPU and every GPU), numpy and Python for one chunk of an optimizer step."""
    digest = hashlib.sha256(f"{seed} {stage} {step} {chunk}".encode()).digest()
    value = int.from_bytes(digest[:8], "little") >> 1
    if torch.accelerator.is_available():
        torch.manual_seed(value)
    else:  # the same without torch's bookkeeping for devices that are not there
        torch.default_generator.manual_seed(value)
    random.seed(value)
    np.random.seed(value % 2**32)


@contextmanager
def own_randomness(device: torch.device) -> Iterator[None]:
    """Give the caller's random states back after the block."""
    numpy_state, python_state = np.random.get_state(), random.getstate()
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            np.random.set_state(numpy_state)
            random.setstate(python_state)

"""Which of several processes this one is, told without importing torch."""

from __future__ import annotations

import os
import sys


def is_main() -> bool:
    """Whether this process speaks and writes the files: alone, or rank 0.

    In a process group it is the group's rank that counts; before torchrun's processes have joined one, ``RANK``.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        return bool(distributed.get_rank() == 0)
    return os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK", "0") == "0"

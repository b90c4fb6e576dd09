"""The data type that ``model.dtype=auto`` takes: bfloat16 where the device multiplies 16-bit numbers, else float32.

Decided once, by what torch says of the device or one timed product (``product_support``), then written to the run
folder: a run that goes on keeps it, on whatever machine.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.distributed as dist

from sftmix.config import Config
from sftmix.progress import say
from sftmix_kernels import product_factor, product_support

AUTO = "auto"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def choose_dtype(device: torch.device | str) -> tuple[str, str]:
    """The name of the data type for ``device``, and why."""
    support = product_support(torch.bfloat16, device)
    return ("bfloat16" if support.in_hardware else "float32"), support.reason


def torch_dtype(name: str, device: torch.device | str) -> torch.dtype:
    """The torch dtype of a value of ``model.dtype``."""
    return DTYPES[choose_dtype(device)[0] if name == AUTO else name]


def settle_dtype(config: Config, device: torch.device, recorded: Config | None = None) -> Config:
    """The configuration with a data type in place of ``auto``, said in one line; what ``recorded`` has is kept.

    Under torchrun the first process decides for all.
    """
    if config.model.dtype != AUTO:
        return config
    if recorded is not None and recorded.model.dtype != AUTO:
        name, reason = recorded.model.dtype, "recorded in the run folder"
    else:
        name, reason = choose_dtype(device)
    decided = [name]
    if dist.is_initialized():
        dist.broadcast_object_list(decided, src=0)
    say(f"model.dtype: {decided[0]} ({reason})")
    return dataclasses.replace(config, model=dataclasses.replace(config.model, dtype=decided[0]))


def warn_if_slow(config: Config, device: torch.device) -> None:
    """One line where a 16-bit type was named, now or in an earlier run, that this device does not multiply."""
    name = config.model.dtype
    if name in DTYPES and not product_support(DTYPES[name], device).in_hardware:
        factor = product_factor(DTYPES[name], device)
        say(
            f"warning: model.dtype={name} is slow here: this device has no such products, one takes {factor:.3g} times "
            "as long as in float32 (a new run folder with --model.dtype float32 is faster)"
        )

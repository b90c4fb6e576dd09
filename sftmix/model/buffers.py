"""Buffers that are in no file: whether transformers has left them the values that the model's class gives them.

transformers 5 builds a model without memory and fills it from the files. A buffer that is not saved (a table of
frequencies, say) then holds whatever was in memory, unless the class makes it once more; its own classes do, code that
a model brings along often does not.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

REMOTE = "transformers_modules"  # the package in which transformers puts a model's own code


def check_buffers(causal_lm: Any, name: str) -> None:
    """Raise ``ValueError`` for a model of ``name`` whose own code lost a buffer's values; the CPU's are compared."""
    if not type(causal_lm).__module__.startswith(REMOTE):
        return
    found = _unsaved(causal_lm)
    expected = _unsaved(_built_anew(causal_lm)) if found else {}
    for full, value in expected.items():
        other = found.get(full)
        if other is not None and not _same(other, value):
            raise ValueError(
                f"model.name: expected {full}, which is not in the files of {name}, as {type(causal_lm).__name__} "
                f"makes it, got other values: transformers {version('transformers')} leaves it empty: let "
                f"_init_weights of the code in {name} make it anew, or save it with the weights (persistent=True)"
            )


def _unsaved(module: nn.Module) -> dict[str, Tensor]:
    """The buffers that a state dict leaves out, by name."""
    saved = module.state_dict().keys()
    return {name: value for name, value in module.named_buffers() if name not in saved}


def _built_anew(causal_lm: Any) -> nn.Module:
    """A model of the same class and configuration with real buffers; its weights take no memory."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(causal_lm.dtype)
    try:
        with torch.random.fork_rng(devices=[]), _weights_without_memory():
            built: nn.Module = type(causal_lm)(causal_lm.config)
    except (RuntimeError, NotImplementedError):
        return nn.Module()  # it computes with its weights, so that only the export's proof can tell
    finally:
        torch.set_default_dtype(before)
    return built


@contextmanager
def _weights_without_memory() -> Iterator[None]:
    original = nn.Module.register_parameter

    def register(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None:
            param = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)
        original(self, name, param)

    nn.Module.register_parameter = register  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]


def _same(found: Tensor, expected: Tensor) -> bool:
    if found.shape != expected.shape:
        return False
    if expected.is_meta or not expected.is_floating_point():
        return expected.is_meta or torch.equal(found.cpu(), expected)
    return torch.allclose(found.cpu().float(), expected.float(), rtol=1e-2, atol=1e-6, equal_nan=True)

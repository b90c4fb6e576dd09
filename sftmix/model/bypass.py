"""Which layers a model goes past: it reads their weight itself, so that an adapter around the layer would do nothing.

Mamba's ``dt_proj`` is such a layer: its weight is multiplied in the mixer's own code. Its adapter would train nothing
there, and merged it would change the exported model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from sftmix.model.causal_lm import SFTMixModel

PROBE_TOKENS = 4
# On a GPU the fused kernels of a state-space mixer take the weights of these layers themselves.
_FUSED = ("out_proj", "x_proj", "dt_proj")


class _Watch:
    """Who was called, who is being called, and whose parameters were read from outside."""

    def __init__(self) -> None:
        self.called: set[int] = set()
        self.inside: list[int] = []
        self.read: set[int] = set()

    def enter(self, module: nn.Module, *_: Any) -> None:
        self.called.add(id(module))
        self.inside.append(id(module))

    def leave(self, module: nn.Module, *_: Any) -> None:
        self.inside.remove(id(module))

    def watched(self, kind: type[nn.Module]) -> type[nn.Module]:
        """A subclass of ``kind`` whose parameters do not leave it unseen."""
        watch = self

        def __getattr__(self: nn.Module, name: str) -> Any:
            if name in self._parameters and id(self) not in watch.inside:
                watch.read.add(id(self))
            return kind.__getattr__(self, name)

        return type(kind.__name__, (kind,), {"__getattr__": __getattr__})


@torch.no_grad()
def bypassed(model: SFTMixModel, names: list[str]) -> list[str]:
    """Those of the named modules whose parameters the model reads without ever calling the module, here or on a GPU.

    The decoder is run on a few tokens in training mode, which may take another path than evaluation. What is neither
    called nor read, such as an expert that no token was sent to, is not among them.
    """
    watch, handles = _Watch(), []
    modules = {name: model.base.get_submodule(name) for name in names}
    kinds = {name: type(module) for name, module in modules.items()}
    mode, devices = model.training, [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        ids = torch.randint(model.vocab_size, (1, PROBE_TOKENS)).to(model.device)
        try:
            for module in modules.values():
                handles.append(module.register_forward_pre_hook(watch.enter))
                handles.append(module.register_forward_hook(watch.leave))
                module.__class__ = watch.watched(type(module))
            model.train()
            model.logits(ids)
        finally:
            model.train(mode)
            for name, module in modules.items():
                module.__class__ = kinds[name]
            for handle in handles:
                handle.remove()
    past = {name for name, module in modules.items() if id(module) in watch.read - watch.called}
    return [name for name in names if name in past or _is_fused(model, name)]


def _is_fused(model: SFTMixModel, name: str) -> bool:
    """Whether a layer is one of a state-space mixer (it has ``A_log``) that its fused kernels go past."""
    parent, _, leaf = name.rpartition(".")
    return leaf in _FUSED and hasattr(model.base.get_submodule(parent), "A_log")

"""What the decoder holds between forward and backward, read off two of its blocks run on shapes without numbers.

The blocks are the model's own code on fake tensors with autograd, so nothing here knows an architecture. Bytes are
those of the portable attention kernels; a GPU's keep the same tensors. A batch is taken to hold padding, so that a mask
[B, 1, T, T] is made. Checkpointing is the model's own (``full``), or keeps products and attention (``selective``).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from sftmix.model.causal_lm import SFTMixModel
from sftmix.model.targets import decoder_blocks
from sftmix.planning.live import LiveBytes
from sftmix.training.blocks import recompute

CHECKPOINTING = ("none", "selective", "full")


@dataclass(frozen=True)
class Activations:
    """Bytes of one micro-batch [B, T] on one GPU.

    ``before``: embeddings, masks and positions, until the end. ``block``: what one block keeps for its backward.
    ``after``: final norm and hidden states. ``forward``: the most that one block's forward holds beyond what is kept
    of the blocks before it; ``backward``: the same of its backward, what it keeps itself included. The latter is
    given where its weights' gradients leave at once, stay in the model's dtype, or stay in float32.
    """

    before: int
    block: int
    after: int
    forward: int
    backward: int
    backward_kept: int
    backward_float32: int


@dataclass
class _Region:
    """The most that is alive in a stretch of the run: alone, and with the gradients made in it."""

    start: int
    itemsize: int
    peaks: list[int] = field(default_factory=lambda: [0, 0, 0])
    made: int = 0  # numbers of gradients

    def see(self, now: int) -> None:
        for index, size in enumerate((0, self.itemsize, 4)):
            self.peaks[index] = max(self.peaks[index], now + self.made * size)


class _Watch:
    """Live bytes at the borders of the second block, forward and backward."""

    def __init__(self, itemsize: int) -> None:
        self.live = LiveBytes(self.see)
        self.itemsize = itemsize
        self.at: dict[str, int] = {}
        self.regions: dict[str, _Region] = {}
        self.region: _Region | None = None

    def see(self, now: int) -> None:
        if self.region is not None:
            self.region.see(now)

    def mark(self, name: str) -> None:
        self.at[name] = self.live.now
        self.region = self.regions[name] = _Region(self.live.now, self.itemsize)
        self.region.see(self.live.now)

    def gradient(self, parameter: Tensor) -> None:
        """A weight's gradient is ready: it is counted, not kept."""
        if self.region is not None:
            self.region.made += parameter.numel()
            self.region.see(self.live.now - parameter.numel() * parameter.element_size())
        parameter.grad = None


def trace(model: SFTMixModel, *, sequences: int, length: int, checkpointing: str) -> Activations:
    """Run the model's two blocks, forward and backward, on a batch [``sequences``, ``length``] of no numbers.

    ``model`` is on the meta device, as ``keep_two`` leaves it, and is used up.
    Raises ``ValueError`` for a model whose forward needs numbers.
    """
    if checkpointing not in CHECKPOINTING:
        raise ValueError(f"checkpointing: expected one of {', '.join(CHECKPOINTING)}, got {checkpointing!r}")
    watch = _Watch(model.dtype.itemsize)
    with FakeTensorMode(), _without_numbers(model):
        model.train()
        recompute(model, checkpointing)
        blocks = decoder_blocks(model)[1]
        watch.live.add([*model.parameters(), *model.buffers()])
        watch.mark("model")
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(watch.gradient)
        blocks[0].register_forward_pre_hook(lambda *_: watch.mark("first"))
        blocks[1].register_forward_pre_hook(partial(_entered, watch), with_kwargs=True)
        blocks[1].register_forward_hook(partial(_left, watch))
        ids = torch.zeros(sequences, length, dtype=torch.int64)
        mask = torch.ones_like(ids)
        try:
            with watch.live:
                hidden = _decoder(model)(input_ids=ids, attention_mask=mask, use_cache=False)[0]
                watch.mark("end")
                if not hidden.requires_grad:
                    raise ValueError("train.tuning: expected something to train in the blocks, found nothing")
                loss = hidden.sum()
                del hidden
                loss.backward()
        except (RuntimeError, NotImplementedError, TypeError) as error:
            reason = " ".join(str(error).split())[:160]
            raise ValueError(
                f"model: expected {type(model.base).__name__} to run on shapes alone, got {reason}"
            ) from error
    return _result(watch)


def _result(watch: _Watch) -> Activations:
    at, regions = watch.at, watch.regions
    block = at["end of second"] - at["second"]
    held = at["second"] - block  # the model's own among it
    peaks = [peak - held - block for peak in regions["backward of second"].peaks]
    return Activations(
        before=held - at["model"], block=block, after=at["end"] - at["end of second"],
        forward=regions["second"].peaks[0] - at["second"], backward=peaks[0], backward_kept=peaks[1],
        backward_float32=peaks[2],
    )  # fmt: skip


def _entered(watch: _Watch, block: nn.Module, args: Any, kwargs: Any) -> None:
    if "backward of second" in watch.at:  # a checkpoint's second run
        return
    hidden = args[0] if args else kwargs["hidden_states"]
    if hidden.requires_grad:
        hidden.register_hook(lambda gradient: watch.mark("backward of first"))
    watch.mark("second")


def _left(watch: _Watch, block: nn.Module, args: Any, output: Any) -> None:
    if "backward of second" in watch.at:
        return
    hidden = output if isinstance(output, Tensor) else output[0]
    if hidden.requires_grad:
        hidden.register_hook(lambda gradient: watch.mark("backward of second"))
    watch.mark("end of second")


def _decoder(model: SFTMixModel) -> Any:
    """The causal LM without its head."""
    return model.base.base_model if model.base.base_model is not model.base else model.decoder


@contextmanager
def _without_numbers(model: SFTMixModel) -> Iterator[None]:
    """Fake tensors on the CPU in the place of the model's, a tie staying a tie."""
    made: dict[int, Any] = {}
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                if id(parameter) not in made:
                    empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                    made[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
                module._parameters[name] = made[id(parameter)]
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
    yield

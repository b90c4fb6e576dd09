"""Whether a model can read several documents in one row, measured; and what its forward is then given.

A packed row [1, T] holds documents one after the other, without padding, each with positions from 0. That one document
then sees nothing of another is a matter of the model's masks, positions, convolutions and recurrent states, and a model
that lets them cross says nothing. So it is not believed: three short documents are read packed and each alone, and
then again with one of them changed.

A packed step is the padded one but for rounding. Dropout is drawn otherwise. A router's auxiliary loss is the mean over
the chunk's tokens, as it is where a model leaves padding out of it. What packing costs (sdpa and eager, a document at a
time; flash attention, by lengths; flex attention, by blocks): the tokens that there are, and each document's square.
A mask over the row costs the square of the whole, more than padding does, so only ``on`` takes it. What a document at
a time saves depends on the lengths: bench/RESULTS.md has a packed step beside a padded one (``python -m bench.loop``).
Flash and flex attention are passed what transformers asks for and were not run: they need a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from sftmix.model.documents import BY_DOCUMENT, attend_as_before, attend_by_document, plain_attention
from sftmix.model.probe import rounding
from sftmix.progress import say

if TYPE_CHECKING:
    from sftmix.model.causal_lm import SFTMixModel

LENGTHS = (9, 14, 6)  # of the probe's documents
LONG, ROW = 150, 300  # and of long ones in a row: some models compress blocks of 128 tokens
WINDOW = 5  # what windows, chunks and choices of keys are cut to meanwhile, for these documents to leave them
WINDOWS = (
    "sliding_window", "attention_chunk_size", "window_size", "index_topk", "index_block_size", "block_size",
    "index_topk_blocks", "topk_blocks",
)  # fmt: skip
NOISE = 0.25  # a relative change by padding above which nothing can be told
BY_DOCUMENTS, BLOCK_MASK, VARLEN = "a document at a time", "a mask over the row", "variable lengths"
CHEAP = (BY_DOCUMENTS, VARLEN)  # ways whose cost is that of the documents, not of the row's square


@dataclass(frozen=True)
class Packing:
    """How a model reads packed rows; ``way`` None: it cannot, and ``reason`` says why."""

    way: str | None
    reason: str = ""


# By class, configuration, attention, data type and kind of device.
_measurements: dict[tuple[Any, ...], Packing] = {}


def packed_inputs(causal_lm: Any, position_ids: Tensor, starts: Sequence[int]) -> dict[str, Any]:
    """What the model's forward is given for a packed row beside its tokens: no mask, positions, flash's lengths."""
    inputs: dict[str, Any] = {"position_ids": position_ids}
    if is_flash(causal_lm):
        # Told, not left to be found: every layer would read them from the positions, and wait for the GPU.
        cut = torch.tensor(starts, dtype=torch.int32).to(position_ids.device, non_blocking=True)
        longest = max(b - a for a, b in pairwise(starts))
        inputs.update(cu_seq_lens_q=cut, cu_seq_lens_k=cut, max_length_q=longest, max_length_k=longest)
    return inputs


def is_flash(causal_lm: Any) -> bool:
    return "flash" in str(plain_attention(_text(causal_lm.config)))


def _text(config: Any) -> Any:
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def packs(model: SFTMixModel, wanted: str, *, compiled: bool = False) -> bool:
    """Whether the model's batches are packed, ``wanted`` being the knob ``train.packing``.

    To be asked before the model is sharded: it is measured, and keeps the attention that reads its rows cheapest. auto
    packs where the cost is that of the documents, and says once why it does not. ``compiled`` blocks would be compiled
    anew for every row's documents where these are cut, so they are then not packed. Raises ``ValueError`` for on and a
    model that cannot.
    """
    if wanted == "off":
        return False
    name, said = type(model.base).__name__, _kind(model) in _measurements
    found = _measurement(model)
    if wanted == "on" and found.way is None:
        raise ValueError(
            f"train.packing: expected off or auto with {name}, which cannot read packed rows ({found.reason}), got on"
        )
    if compiled and found.way == BY_DOCUMENTS:
        why = "compiled blocks would be compiled anew for every row's documents"
        if wanted == "on":
            raise ValueError(f"train.packing: expected off or auto with train.compile ({why}), got on")
        say(f"packing: off for {name}: {why}")
        return False
    if wanted == "on" or found.way in CHEAP:
        return True
    if not said:
        say(f"packing: off for {name}: {found.reason}")
    return False


def _measurement(model: SFTMixModel) -> Packing:
    """What is measured of the model, or was of another of its class and configuration."""
    if model.packing is None:
        known = _measurements.get(kind := _kind(model))
        if known is None:
            known = _measurements[kind] = measure_packing(model)
        elif known.way == BY_DOCUMENTS:
            attend_by_document(model.base)
        model.packing = known
    return model.packing


def _kind(model: SFTMixModel) -> tuple[Any, ...]:
    base = model.base
    attention = plain_attention(_text(base.config))
    return type(base), str(base.config.to_dict()), attention, model.dtype, model.device.type


@torch.no_grad()
def measure_packing(model: SFTMixModel) -> Packing:
    """How ``model`` reads packed rows, by what it does with documents of random tokens."""
    cuts = plain_attention(_text(model.base.config)) in BY_DOCUMENT
    found = _measured(model, BY_DOCUMENTS if cuts else VARLEN)
    if found.way is not None or not cuts:
        return found
    end = _end_of_masks(model.base)
    if end is not None:
        return Packing(None, f"its own masks end at {end} tokens")
    masked = _measured(model, BLOCK_MASK)
    if masked.way is None:
        return masked
    return Packing(BLOCK_MASK, f"its documents are kept apart by {BLOCK_MASK} alone, which costs its square")


def _end_of_masks(causal_lm: Any) -> int | None:
    """The side of the smallest square mask among a model's buffers, which no row may pass."""
    shapes = [b.shape for b in causal_lm.buffers() if b.dtype in (torch.bool, torch.uint8) and b.ndim >= 2]
    return min((int(shape[-1]) for shape in shapes if shape[-1] == shape[-2] > 1), default=None)


def _measured(model: SFTMixModel, way: str) -> Packing:
    """What is found of one way; the model keeps the attention that it takes if it can."""
    generator = torch.Generator().manual_seed(0)
    limit = getattr(_text(model.base.config), "max_position_embeddings", None)
    longest = min(LONG, limit // 2) if isinstance(limit, int) else LONG  # some count positions from 2

    def draw(*lengths: int) -> list[Tensor]:
        sizes = [(min(length, longest),) for length in lengths]
        return [torch.randint(model.vocab_size, size, generator=generator).to(model.device) for size in sizes]

    before = model.training
    model.eval()
    found = Packing(None)
    try:
        with _short_windows(model.base):
            found = _compared(model, way, draw(*LENGTHS), draw(*[longest] * -(-ROW // longest)))
    except (RuntimeError, ValueError, TypeError, AttributeError, ImportError, IndexError, KeyError) as error:
        reason = str(error).strip().splitlines()
        found = Packing(None, f"it fails on one: {type(error).__name__}: {reason[0] if reason else ''}")
    finally:
        model.train(before)
        if found.way is None:
            attend_as_before(model.base)
    return found


def _compared(model: SFTMixModel, way: str, ids: list[Tensor], long: list[Tensor]) -> Packing:
    """What the hidden states of packed documents say, against the rounding that padding alone brings."""
    alone, whole = (
        [_hidden(model, x.unsqueeze(0), torch.ones_like(x).unsqueeze(0))[0] for x in each]
        for each in (ids, long)
    )
    padded, mask = (pad_sequence(x, batch_first=True) for x in (ids, [torch.ones_like(x) for x in ids]))
    usual = [row[: len(x)] for row, x in zip(_hidden(model, padded, mask), ids, strict=True)]
    if way == BY_DOCUMENTS:  # only now: a model may do something else under the name of its own attention
        attend_by_document(model.base)
    row = _hidden_packed(model, ids)
    noise, eps = max(map(_change, usual, alone)), rounding(row[0], model.head.weight)
    moved, crossed = max(map(_change, row, alone)), 0.0
    for changed in range(len(ids)):
        other = [(x + 1) % model.vocab_size if i == changed else x for i, x in enumerate(ids)]
        pairs = zip(_hidden_packed(model, other), row, strict=True)
        crossed = max(crossed, *(_change(*pair) for i, pair in enumerate(pairs) if i != changed))
    if noise > NOISE:
        return Packing(None, f"padding alone changes its hidden states by {noise:.2g}")
    if not crossed <= eps + noise:
        return Packing(None, f"a document's hidden states change by {crossed:.2g} when another one does")
    moved = max(moved, *map(_change, _hidden_packed(model, long), whole))
    if not moved <= max(1e-4, 4 * eps) + 4 * noise:
        return Packing(None, f"a document's hidden states are {moved:.2g} off what they are alone")
    return Packing(way)


def _hidden_packed(model: SFTMixModel, ids: list[Tensor]) -> list[Tensor]:
    """Last hidden states [n, D] of each document of a row."""
    starts = [0]
    for x in ids:
        starts.append(starts[-1] + len(x))
    position_ids = torch.cat([torch.arange(len(x), device=x.device) for x in ids]).unsqueeze(0)
    row = torch.cat(ids).unsqueeze(0)
    found = _hidden(model, row, None, position_ids=position_ids, starts=starts)[0]
    return [found[a:b] for a, b in pairwise(starts)]


def _hidden(model: SFTMixModel, input_ids: Tensor, mask: Tensor | None, **options: Any) -> Tensor:
    """What goes into the head [B, T, D], in float32."""
    seen: list[Tensor] = []
    handle = model.head.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    try:
        model(input_ids, mask, None, None, **options)
    finally:
        handle.remove()
    return seen[0].float()


def _change(found: Tensor, expected: Tensor) -> float:
    """The largest relative change of a token's hidden state."""
    change = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    return float(change.nan_to_num(torch.inf).max())


@contextmanager
def _short_windows(causal_lm: Any) -> Iterator[None]:
    """Windows, chunks and choices of keys cut to ``WINDOW`` inside the block."""
    holders: dict[int, Any] = {}
    for module in causal_lm.modules():
        holders[id(module)] = module
        config = getattr(module, "config", None)
        for part in (config, getattr(config, "text_config", None)):
            if part is not None:
                holders[id(part)] = part
    before = [
        (holder, name, value)
        for holder in holders.values()
        for name in WINDOWS
        if isinstance(value := getattr(holder, name, None), int) and value > WINDOW
    ]
    try:
        for holder, name, _ in before:
            setattr(holder, name, WINDOW)
        yield
    finally:
        for holder, name, value in before:
            setattr(holder, name, value)

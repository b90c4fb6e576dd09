"""Attention over one packed row, a document at a time, for the sdpa and eager attention of transformers.

A mask [T, T] over a packed row costs the square of its whole length, most of it for pairs of documents that may not
see each other. Here a row's queries, keys and values are cut at its documents, each of which attends by itself through
transformers' own function: nothing can cross, no [T, T] is made, and a document's result is what it is alone. Where no
row is packed both names do what sdpa and eager do.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

BY_DOCUMENT = {"sdpa": "sdpa_by_document", "eager": "eager_by_document"}
ORIGINAL = {new: name for name, new in BY_DOCUMENT.items()}
_lengths: ContextVar[tuple[int, ...] | None] = ContextVar("lengths of a row's documents", default=None)


@dataclass(frozen=True)
class DocumentMasks:
    """What a model hands to its attention layers in the place of a mask: one for each document of the row."""

    lengths: tuple[int, ...]
    masks: tuple[Tensor | None, ...]  # [1, 1, n, n] each; None: causal


@contextmanager
def documents(starts: Sequence[int] | None) -> Iterator[None]:
    """Masks made inside the block are those of documents from ``starts[i]`` to ``starts[i + 1]``; None: of no row."""
    lengths = None if starts is None else tuple(b - a for a, b in pairwise(starts))
    token = _lengths.set(lengths)
    try:
        yield
    finally:
        _lengths.reset(token)


def attend_by_document(causal_lm: Any) -> None:
    """Let a model's sdpa or eager attention cut packed rows. It stays: the backward pass may run attention again."""
    _rename(causal_lm, BY_DOCUMENT)


def attend_as_before(causal_lm: Any) -> None:
    """Take back ``attend_by_document``."""
    _rename(causal_lm, ORIGINAL)


def _rename(causal_lm: Any, names: dict[str, str]) -> None:
    configs = {id(m.config): m.config for m in causal_lm.modules() if hasattr(m, "config")}
    found = {key: getattr(config, "_attn_implementation", None) for key, config in configs.items()}
    for key, name in found.items():
        if name in names:  # its own name alone: an outer configuration's setter would rename its parts
            configs[key]._attn_implementation_internal = names[name]


def plain_attention(config: Any) -> str | None:
    """The attention of a configuration by transformers' own name."""
    name: str | None = getattr(config, "_attn_implementation", None)
    return ORIGINAL.get(name or "", name)


def _mask(
    make: Callable[..., Tensor | None], is_lazy: bool, *, batch_size: int, q_length: int, kv_length: int,
    attention_mask: Tensor | None = None, local_size: int | None = None, use_vmap: bool = False, **options: Any,
) -> Tensor | DocumentMasks | None:  # fmt: skip
    """The masks of a packed row's documents; of anything else what ``make`` makes. ``is_lazy``: None is causal."""
    options.update(attention_mask=attention_mask, local_size=local_size, use_vmap=use_vmap)
    lengths = _lengths.get()
    if lengths is None or attention_mask is not None or not sum(lengths) == q_length == kv_length:
        return make(batch_size=batch_size, q_length=q_length, kv_length=kv_length, **options)
    options.update(allow_is_causal_skip=False)
    masks: list[Tensor | None] = []
    start = 0
    for length in lengths:
        if is_lazy and not use_vmap and (local_size is None or length <= local_size):
            masks.append(None)  # a window that no document leaves is none
        else:
            options.update(q_offset=start, kv_offset=start)
            masks.append(make(batch_size=batch_size, q_length=length, kv_length=length, **options))
        start += length
    return DocumentMasks(lengths, tuple(masks))


def _attend(
    attend: Callable[..., tuple[Tensor, Tensor | None]], module: nn.Module,
    query: Tensor,  # [B, H, T, D]
    key: Tensor,  # [B, H_kv, T, D]
    value: Tensor,  # [B, H_kv, T, D]
    attention_mask: Tensor | DocumentMasks | None, **options: Any,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Attention [B, T, H, D]; where the mask is a row's documents', of each by itself."""
    if not isinstance(attention_mask, DocumentMasks):
        return attend(module, query, key, value, attention_mask, **options)
    lengths = list(attention_mask.lengths)
    # split, not slices: its backward is one concatenation, that of slices a sum of rows mostly zero
    parts = zip(*(x.split(lengths, dim=2) for x in (query, key, value)), attention_mask.masks, strict=True)
    found = [attend(module, q, k, v, mask, **options)[0] for q, k, v, mask in parts]
    return torch.cat(found, dim=1), None


def _own_eager(module: nn.Module, *args: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
    """The eager attention of the file that the module's class is written in."""
    found = inspect.unwrap(type(module).forward).__globals__.get("eager_attention_forward")
    if found is None:
        raise ValueError(f"model: expected {type(module).__name__} to have an eager attention, got none")
    return found(module, *args, **options)  # type: ignore[no-any-return]


AttentionInterface.register(BY_DOCUMENT["sdpa"], partial(_attend, sdpa_attention_forward))
AttentionInterface.register(BY_DOCUMENT["eager"], partial(_attend, _own_eager))
AttentionMaskInterface.register(BY_DOCUMENT["sdpa"], partial(_mask, sdpa_mask, True))
AttentionMaskInterface.register(BY_DOCUMENT["eager"], partial(_mask, eager_mask, False))

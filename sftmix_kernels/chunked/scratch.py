"""How the portable loss cuts its logits: chunks of rows for the products, blocks of a chunk, tiles of a forward pass.

A chunk's logits, in the dtype of products, want to be many, so that the products run at full speed. What turns them
into gradients passes over a block of them several times, so a block should stay in the processor's cache; it needs a
buffer in the dtype of sums: for the mixture and, where products are 16-bit, for the wider copies of both members.
A forward pass needs no whole row: it folds a tile of rows and columns, also of the cache's size, into running sums.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

DEFAULT_SCRATCH_BYTES = 64 * 2**20  # of ``chunked`` on a CPU
# Elsewhere: 64 MiB of a head of 128k are chunks of 130 rows, each a pass over float32 dweight, and blocks of ten pairs.
DEVICE_SCRATCH_BYTES = 512 * 2**20
DEFAULT_ROWS = 4096  # of a chunk of ``stored``: the products' full speed, in one reused buffer of logits
# Stays in a CPU's caches. On other devices a block is a quarter of the scratch, a tile all of it: larger launches.
CACHE_BYTES = 8 * 2**20
# Logits of all rows that take no more than this are one chunk: cutting them would cost more than it saves.
WHOLE_BYTES = 256 * 2**10
# Columns of one 16-bit product of dweight: wide enough for its speed.
PRODUCT_COLUMNS = 4096
TILE_COLUMNS = 512  # of a tile, at least: fewer and the product slows down


def default_scratch(device: str) -> int:
    """Bytes that ``chunked`` takes for logits where none are named."""
    return DEFAULT_SCRATCH_BYTES if device == "cpu" else DEVICE_SCRATCH_BYTES


def chunk_size(num_groups: int, group_bytes: int, scratch_bytes: int, whole_bytes: int = 0) -> int:
    """Groups (rows, or pairs) per chunk: as many as fit, at most half of all (no chunk is everything), chunks alike.

    All of them where they take at most ``whole_bytes`` and fit.
    """
    if num_groups * group_bytes <= min(whole_bytes, scratch_bytes):
        return num_groups
    most = max(1, min(scratch_bytes // max(group_bytes, 1), (num_groups + 1) // 2))
    num_chunks = max(1, -(-num_groups // most))
    return -(-num_groups // num_chunks)


class Sizes(NamedTuple):
    """Sizes of one call, in rows of V logits."""

    pairs: int  # pairs of a chunk; 0 without pairs
    singles: int  # unpaired rows of a chunk; 0 without them
    block: int  # pairs of a block
    block_singles: int  # unpaired rows of a block
    wide: int  # rows of the buffer in the dtype of sums

    @property
    def stored(self) -> int:
        """Rows of the buffer of logits."""
        return max(2 * self.pairs, self.singles)


def choose_sizes(
    num_rows: int, num_pairs: int, vocab_size: int, *, dtype: torch.dtype, wide_dtype: torch.dtype, device: str,
    scratch_bytes: int,
) -> Sizes:  # fmt: skip
    """Both buffers together take at most ``scratch_bytes``, but hold at least one pair (or row) and its mixture."""
    num_singles, direct = num_rows - 2 * num_pairs, dtype == wide_dtype
    row_bytes, wide_bytes = vocab_size * dtype.itemsize, vocab_size * wide_dtype.itemsize
    quarter = scratch_bytes // 4
    block_bytes = min(quarter, CACHE_BYTES) if device == "cpu" else quarter
    most = max(1, block_bytes // (3 * wide_bytes))  # pairs and their mixtures, or three times as many rows
    kept = wide_bytes * most * (1 if direct else 3)
    pairs = chunk_size(num_pairs, 2 * row_bytes, scratch_bytes - kept, WHOLE_BYTES)
    # Both buffers live as long as the call: unpaired rows beside pairs leave room for the mixture too.
    beside = 0 if direct and not num_pairs else kept
    singles = chunk_size(num_singles, row_bytes, scratch_bytes - beside, WHOLE_BYTES)
    block, block_singles = min(most, max(pairs, 1)), min(3 * most, max(singles, 1))
    wide = (block if direct else 3 * block) if num_pairs else 0
    if not direct and num_singles:
        wide = max(wide, block_singles)
    return Sizes(pairs, singles, block, block_singles, wide)


def choose_tile(
    count: int, vocab_size: int, *, cell_bytes: int, most_columns: int, device: str, scratch_bytes: int
) -> tuple[int, int]:
    """Rows (or pairs) and columns of a forward pass's tile, of ``cell_bytes`` for each column of each of them."""
    budget = min(scratch_bytes, CACHE_BYTES) if device == "cpu" else scratch_bytes
    rows = max(1, min(count, budget // (cell_bytes * min(vocab_size, most_columns, TILE_COLUMNS))))
    columns = max(1, min(vocab_size, most_columns, budget // (cell_bytes * rows)))
    if columns < vocab_size and columns > 64:
        columns -= columns % 64
    return rows, columns


def blocks(start: int, stop: int, size: int) -> Iterator[slice]:
    """[start, stop) in runs of ``size``, the last one shorter."""
    for first in range(start, stop, size):
        yield slice(first, min(first + size, stop))
